// Runs CUDA kernels on the CPU, for tests: csrc/cuda/*.cu compiled as C++ against this header instead of CUDA's own.
//
// Every CUDA thread is a fiber with a stack of its own; barriers and warp shuffles switch between fibers. Blocks run
// one after another (those of a cluster together), with threads in rising order in one and in falling order in the
// next, so that a missing barrier shows as a wrong number in one of them. Shared memory starts as NaN. exp2f and expf
// err like the GPU's own. What it cannot show: speed, the rounding of its logf, races inside a warp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
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
struct alignas(16) double2 {
  double x, y;
};
#undef AMTML_VECTOR_TYPES

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }

namespace emulation {

constexpr size_t kStack = 128 << 10;
constexpr unsigned kWarp = 32;

struct Barrier {
  unsigned live = 0, arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
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
  bool started = false, done = false;
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
  unsigned progress = 0, launches = 0;
  std::string failure;
};

inline Machine& machine() {
  static thread_local Machine the;
  return the;
}

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

inline void wait(Barrier& b) {
  const unsigned generation = b.generation;
  ++b.arrived;
  release(b);
  while (b.generation == generation) yield();
}

inline Warp& warp() {
  Thread& t = *machine().thread;
  return t.block->warps[t.linear / kWarp];
}

template <class T>
T exchange(T value, unsigned source) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
  Warp& w = warp();
  std::memcpy(w.slot[machine().thread->linear % kWarp], &value, sizeof(T));
  wait(w.barrier);
  std::memcpy(&value, w.slot[source % kWarp], sizeof(T));
  wait(w.barrier);
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
  leave(t.block->warps[t.linear / kWarp].barrier);
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

// Runs the blocks of one cluster, whose indices start at `first`.
inline void run_cluster(unsigned first, unsigned size, size_t shared_bytes, std::vector<Thread>& threads,
                        bool falling) {
  Machine& m = machine();
  const unsigned per_block = m.block.x * m.block.y * m.block.z;
  m.cluster.blocks = std::vector<Block>(size);
  m.cluster.barrier = {size * per_block, 0, 0};
  for (unsigned b = 0; b < size; ++b) {
    Block& block = m.cluster.blocks[b];
    const unsigned at = first + b;
    block.index = dim3(at % m.grid.x, at / m.grid.x % m.grid.y, at / m.grid.x / m.grid.y);
    block.barrier = {per_block, 0, 0};
    block.warps.resize((per_block + kWarp - 1) / kWarp);
    block.shared.reset(new unsigned char[shared_bytes]);
    std::memset(block.shared.get(), 0xff, shared_bytes);
    for (unsigned i = 0; i < per_block; ++i) {
      Thread& t = threads[b * per_block + i];
      t.index = dim3(i % m.block.x, i / m.block.x % m.block.y, i / m.block.x / m.block.y);
      t.linear = i, t.block = &block, t.started = t.done = false;
      if (!t.stack) t.stack.reset(new unsigned char[kStack]);
      ++block.warps[i / kWarp].barrier.live;
    }
  }
  for (bool running = true; running;) {
    running = false;
    const unsigned before = m.progress;
    const unsigned total = size * per_block;
    for (unsigned i = 0; i < total; ++i) {
      Thread& t = threads[falling ? total - 1 - i : i];
      if (t.done) continue;
      running = true;
      resume(t);
    }
    if (running && m.progress == before) throw std::runtime_error("CUDA emulation: threads wait at different barriers");
  }
}

inline void run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  m.grid = grid, m.block = block, m.kernel = &kernel, m.failure.clear();
  const unsigned blocks = grid.x * grid.y * grid.z;
  static thread_local std::vector<Thread> threads;
  if (threads.size() < cluster * block.x * block.y * block.z) threads.resize(cluster * block.x * block.y * block.z);
  ++m.launches;
  for (unsigned first = 0; first < blocks; first += cluster) {
    run_cluster(first, cluster, shared_bytes, threads, (first / cluster + m.launches) % 2);
  }
  if (!m.failure.empty()) throw std::runtime_error(m.failure);
}

}  // namespace emulation

#define threadIdx (emulation::machine().thread->index)
#define blockIdx (emulation::machine().thread->block->index)
#define blockDim (emulation::machine().block)
#define gridDim (emulation::machine().grid)

inline void __syncthreads() { emulation::wait(emulation::machine().thread->block->barrier); }
inline void __syncwarp(unsigned = ~0u) { emulation::wait(emulation::warp().barrier); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return emulation::exchange(value, emulation::machine().thread->linear ^ by);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, lane);
}

using std::max;
using std::min;
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;  // not contracted with an addition
  return product;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline double __dmul_rn(double a, double b) {
  volatile double product = a * b;
  return product;
}
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }

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
