// Runs CUDA kernels on the CPU, for tests: csrc/cuda/*.cu compiled as C++ against this header instead of CUDA's own.
//
// Every CUDA thread is a fiber with a stack of its own; barriers and warp shuffles switch between fibers. Blocks run
// one after another (those of a cluster together), with threads in rising order in one and in falling order in the
// next, so that a missing barrier shows as a wrong number in one of them. Shared memory starts as NaN. exp2f and expf
// err like the GPU's own. It stops where threads of a block or a warp wait on different lines of the source, at
// shuffles with lanes that have left, behind the end of shared memory, and at launches that no GPU takes
// (test_emulator.py). What it cannot show: speed, the rounding of its logf, races inside a warp; and products that
// become part of an addition, but with the compiler's flags that CONTRIBUTING.md has.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define AMTML_VECTOR_TYPES(T, name)                  \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; }; \
  struct alignas(16) name##4 { T x, y, z, w; };
AMTML_VECTOR_TYPES(float, float)
AMTML_VECTOR_TYPES(int, int)
AMTML_VECTOR_TYPES(unsigned, uint)
#undef AMTML_VECTOR_TYPES

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

namespace emulation {

constexpr size_t kStack = 128 << 10, kBehind = 256;  // kBehind: bytes after shared memory that nobody may touch
constexpr unsigned kWarp = 32;

struct Barrier {
  unsigned live = 0, arrived = 0, generation = 0;
  int line = 0;  // where its first thread waits
};

struct Warp {
  Barrier barrier;
  unsigned lanes = 0;  // a bit for each that has not left
  alignas(16) unsigned char slot[kWarp][16];
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
};

struct Thread {
  dim3 index;
  unsigned linear;
  Block* block;
  ucontext_t context;
  jmp_buf place;
  std::unique_ptr<unsigned char[]> stack;
  bool started = false, done = false, waited = false;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
};

struct Machine {
  dim3 grid, block;
  Cluster cluster;
  Thread* thread = nullptr;
  ucontext_t scheduler;
  jmp_buf scheduler_place;
  const std::function<void()>* kernel = nullptr;
  unsigned progress = 0;
  bool previous_done = true;
  std::string failure;
};

inline Machine*& current() {
  static thread_local Machine* the = nullptr;
  return the;
}
inline Machine& machine() { return *current(); }

inline void fail(const char* what) { machine().failure = std::string("CUDA emulation: ") + what; }

inline void yield() {
  Machine& m = machine();
  if (_setjmp(m.thread->place) == 0) _longjmp(m.scheduler_place, 1);
}

inline void release(Barrier& b) {
  if (b.arrived == 0 || b.arrived < b.live) return;
  b.arrived = 0;
  ++b.generation;
  ++machine().progress;
}

// At `line` of the source: there all threads of the barrier have to wait.
inline void wait(Barrier& b, int line) {
  const unsigned generation = b.generation;
  if (b.arrived == 0) b.line = line;
  if (b.line != line) fail("threads wait at different barriers");
  ++b.arrived;
  release(b);
  while (b.generation == generation) yield();
}

inline Warp& warp() {
  Thread& t = *machine().thread;
  return t.block->warps[t.linear / kWarp];
}

template <class T>
T exchange(T value, unsigned source, int line) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
  Warp& w = warp();
  std::memcpy(w.slot[machine().thread->linear % kWarp], &value, sizeof(T));
  wait(w.barrier, line);
  if (!(w.lanes >> source % kWarp & 1)) fail("a shuffle asks a lane that is not there");
  std::memcpy(&value, w.slot[source % kWarp], sizeof(T));
  wait(w.barrier, line);
  return value;
}

inline void leave(Barrier& b) {
  --b.live;
  release(b);
}

inline void run_thread() {
  Machine& m = machine();
  (*m.kernel)();
  Thread& t = *m.thread;
  t.done = true;
  ++m.progress;
  warp().lanes &= ~(1u << t.linear % kWarp);
  leave(warp().barrier);
  leave(t.block->barrier);
  leave(m.cluster.barrier);
  _longjmp(m.scheduler_place, 1);
}

inline void resume(Thread& t) {
  Machine& m = machine();
  m.thread = &t;
  if (_setjmp(m.scheduler_place) != 0) return;
  if (t.started) _longjmp(t.place, 1);
  t.started = true;
  getcontext(&t.context);
  t.context.uc_stack = {t.stack.get(), 0, kStack};
  t.context.uc_link = nullptr;
  makecontext(&t.context, &run_thread, 0);
  setcontext(&t.context);
}

struct Launch {
  dim3 grid, block;
  unsigned cluster;
  size_t shared_bytes;
  bool early;
  std::function<void()> kernel;
};

inline unsigned& launches() {
  static thread_local unsigned count = 0;
  return count;
}
inline unsigned& early_launches() {
  static thread_local unsigned count = 0;
  return count;
}

// A kernel on its way. One that may start early does: its first cluster runs as far as it gets before the kernel in
// front of it is run at all, nor, where that is an early one, the kernel in front of that. What it reads too soon is
// not there yet.
class Run {
 public:
  explicit Run(Launch launch) : launch_(std::move(launch)), number_(++launches()) {
    machine_.grid = launch_.grid, machine_.block = launch_.block, machine_.kernel = &launch_.kernel;
    machine_.previous_done = !launch_.early;
    threads_.resize(launch_.cluster * per_block());
    set_up(0);
  }

  void start() { step(0); }

  void finish() {
    machine_.previous_done = true;
    for (unsigned first = 0; first < launch_.grid.x * launch_.grid.y * launch_.grid.z; first += launch_.cluster) {
      if (first > 0) set_up(first);
      if (!step(first)) throw std::runtime_error("CUDA emulation: threads wait at different barriers");
    }
    if (!machine_.failure.empty()) throw std::runtime_error(machine_.failure);
  }

 private:
  unsigned per_block() const { return launch_.block.x * launch_.block.y * launch_.block.z; }

  // The blocks of one cluster, whose indices start at `first`.
  void set_up(unsigned first) {
    Machine& m = machine_;
    m.cluster.blocks = std::vector<Block>(launch_.cluster);
    m.cluster.barrier = {launch_.cluster * per_block(), 0, 0};
    for (unsigned b = 0; b < launch_.cluster; ++b) {
      Block& block = m.cluster.blocks[b];
      const unsigned at = first + b;
      block.index = dim3(at % m.grid.x, at / m.grid.x % m.grid.y, at / m.grid.x / m.grid.y);
      block.barrier = {per_block(), 0, 0};
      block.warps.resize((per_block() + kWarp - 1) / kWarp);
      block.shared.reset(new unsigned char[launch_.shared_bytes + kBehind]);
      std::memset(block.shared.get(), 0xff, launch_.shared_bytes + kBehind);
      for (unsigned i = 0; i < per_block(); ++i) {
        Thread& t = threads_[b * per_block() + i];
        t.index = dim3(i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y);
        t.linear = i, t.block = &block, t.started = t.done = t.waited = false;
        if (!t.stack) t.stack.reset(new unsigned char[kStack]);
        ++block.warps[i / kWarp].barrier.live;
        block.warps[i / kWarp].lanes |= 1u << i % kWarp;
      }
    }
  }

  // Runs the threads until all are done (true), or none gets on.
  bool step(unsigned first) {
    current() = &machine_;
    const bool falling = (first / launch_.cluster + number_) % 2;
    while (true) {
      bool running = false;
      const unsigned before = machine_.progress, total = static_cast<unsigned>(threads_.size());
      for (unsigned i = 0; i < total; ++i) {
        Thread& t = threads_[falling ? total - 1 - i : i];
        if (t.done) continue;
        running = true;
        resume(t);
      }
      if (!running) break;
      if (machine_.progress == before) return false;
    }
    for (const Block& block : machine_.cluster.blocks) {
      const unsigned char *behind = block.shared.get() + launch_.shared_bytes, untouched = 0xff;
      const bool whole = std::count(behind, behind + kBehind, untouched) == kBehind;
      if (!whole) throw std::runtime_error("CUDA emulation: written behind shared memory");
    }
    for (const Thread& t : threads_) {
      if (launch_.early && !t.waited) throw std::runtime_error("CUDA emulation: an early kernel must wait");
    }
    return true;
  }

  const Launch launch_;
  const unsigned number_;
  Machine machine_;
  std::vector<Thread> threads_;
};

// The last launch and early ones behind it: they are run when one comes that is not early, or the stream is waited for.
inline std::vector<std::unique_ptr<Run>>& under_way() {
  static thread_local std::vector<std::unique_ptr<Run>> all;
  return all;
}

// What kernels on their way read and write may have been freed by the host: it lives until they have ended.
inline std::vector<std::shared_ptr<void>>& kept() {
  static thread_local std::vector<std::shared_ptr<void>> all;
  return all;
}

inline int& depth() {
  static thread_local int count = 0;
  return count;
}

inline void settle(bool run_it = true) {
  for (const auto& run : std::exchange(under_way(), {})) {
    if (run_it) run->finish();
  }
  if (depth() == 0) kept().clear();
}

inline void launch(Launch launch) {
  const dim3 grid = launch.grid, block = launch.block;
  const bool fits = grid.x < 1u << 31 && grid.y < 1 << 16 && grid.z < 1 << 16 && grid.x % launch.cluster == 0 &&
                    launch.cluster <= 8 && uint64_t{block.x} * block.y * block.z <= 1024;
  if (!fits || launch.shared_bytes > 227 << 10) throw std::runtime_error("CUDA emulation: no GPU takes such a launch");
  early_launches() += launch.early;
  if (!launch.early) settle();
  auto next = std::make_unique<Run>(std::move(launch));
  if (!under_way().empty()) next->start();
  under_way().push_back(std::move(next));
}

inline void wait_for_previous() {
  Machine& m = machine();
  if (!m.thread->waited) ++m.progress;
  m.thread->waited = true;
  while (!m.previous_done) yield();
}

}  // namespace emulation

#define threadIdx (emulation::machine().thread->index)
#define blockIdx (emulation::machine().thread->block->index)
#define blockDim (emulation::machine().block)
#define gridDim (emulation::machine().grid)

inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::wait(emulation::machine().thread->block->barrier, line);
}
inline void __syncwarp(unsigned = ~0u, int line = __builtin_LINE()) {
  emulation::wait(emulation::warp().barrier, line);
}
inline unsigned atomicOr(unsigned* at, unsigned bits) {
  const unsigned before = *at;
  *at |= bits;
  return before;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int by, int line = __builtin_LINE()) {
  return emulation::exchange(value, emulation::machine().thread->linear ^ by, line);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, int line = __builtin_LINE()) {
  return emulation::exchange(value, lane, line);
}

using std::max;
using std::min;
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // not contracted with an addition
  return product;
}
inline float __fadd_rn(float a, float b) {
  volatile float first = a;  // nor is a product that is added here
  return first + b;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}

namespace emulation {

// `exact` in float32: one of the two beside it, by the bits of the argument x. Numbers below the normal ones are
// rounded.
inline float faithful(double exact, float x) {
  const float nearest = static_cast<float>(exact);
  if (nearest == exact || !std::isnormal(nearest)) return nearest;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const bool up = bits * 2654435761u >> 31;
  return up == (nearest > exact) ? nearest : std::nextafter(nearest, up ? INFINITY : -INFINITY);
}

}  // namespace emulation

// Float32 in and out, and as often the wrong neighbor as the right one: the GPU makes them of its approximate ex2, and
// CUDA promises 2 ulps and 1. In the kernels' namespace these names hide the C library's.
namespace amtml {

inline float exp2f(float x) { return emulation::faithful(std::exp2(static_cast<double>(x)), x); }
inline float expf(float x) { return emulation::faithful(std::exp(static_cast<double>(x)), x); }

}  // namespace amtml
