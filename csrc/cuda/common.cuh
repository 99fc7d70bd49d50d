// What the CUDA kernels share: the stream, launches, shared memory, clusters, reductions, wide loads.
//
// tests/cuda_emulator has a cuda_runtime.h that runs these kernels on the CPU; what it replaces is in the #ifdefs here.
#pragma once

#include <cuda_runtime.h>

#include <limits>

#include "../common.h"

#ifdef AMTML_EMULATED_CUDA
#define AMTML_CUDA_KEY CPU
#else
#include <cooperative_groups.h>
#include <torch/csrc/stable/accelerator.h>
#define AMTML_CUDA_KEY CUDA
// Weak: a CPU build of torch lacks it, and this library loads there too. A CUDA build has it behind libtorch.so, which
// setup.py makes this library need.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace amtml {

constexpr int kWarp = 32;
constexpr int kMaxTeachers = 32;  // of a row of logits or entries; amtml_fast/backend.py has this number, too
constexpr int kMaxCluster = 8;    // blocks of a cluster, for which CUDA's whole GPUs with clusters all have room

// What is asked of a device once; each question costs the host about a microsecond. device.cu
struct DeviceFacts {
  int code;          // compute capability, times 10, that the kernels which run there were compiled for
  bool fast_double;  // float64 at half the speed of float32 or a quarter: the large chip of each generation
};
const DeviceFacts& facts_of(int device);
// Lets a kernel have more than 48 KB of shared memory.
void allow_shared(const void* kernel, int device, size_t bytes);

// The device of a tensor and its current stream, while this object lives.
#ifdef AMTML_EMULATED_CUDA
class OnDevice {
 public:
  explicit OnDevice(const Tensor&) : facts(facts_of(0)) { ++emulation::depth(); }
  ~OnDevice() noexcept(false) {  // the kernels have ended when the outermost of these objects goes
    if (--emulation::depth() == 0) emulation::settle(std::uncaught_exceptions() == 0);
  }
  OnDevice(const OnDevice&) = delete;

  const DeviceFacts& facts;
#else
class OnDevice {
  torch::stable::accelerator::DeviceGuard guard_;  // first: the facts are asked of the current device

 public:
  explicit OnDevice(const Tensor& t) : OnDevice(t.get_device_index()) {}

  const int device;
  const DeviceFacts& facts;
  cudaStream_t stream = nullptr;

 private:
  explicit OnDevice(int index) : guard_(index), device(index), facts(facts_of(index)) {
    void* handle = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "amtml_fast: this torch has no CUDA");
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &handle));
    stream = static_cast<cudaStream_t>(handle);
  }

 public:
#endif
  // Blocks of a cluster: 1 where the kernels were not compiled for compute capability 9.0 or later, be it that such a
  // device runs them from older PTX.
  unsigned largest_cluster(unsigned wanted) const { return facts.code >= 90 ? wanted : 1; }
};

// How a kernel is spread: blocks, threads of a block, blocks of a cluster (more than 1 on compute capability 9.0 and
// later only), bytes of shared memory. early: it may start before the kernel in front of it has ended, and must call
// wait_for_previous.
struct Spread {
  dim3 grid, block;
  unsigned cluster = 1;
  size_t shared_bytes = 0;
  bool early = false;
};

// kernel(args...) on the stream; a grid without blocks launches nothing.
template <class... Parameters, class... Args>
void launch(void (*kernel)(Parameters...), const Spread& spread, const OnDevice& on, Args&&... args) {
  if (spread.grid.x == 0 || spread.grid.y == 0 || spread.grid.z == 0) return;
#ifdef AMTML_EMULATED_CUDA
  std::tuple<std::decay_t<Parameters>...> own(std::forward<Args>(args)...);
  emulation::launch({spread.grid, spread.block, spread.cluster, spread.shared_bytes, spread.early,
                     [kernel, own]() mutable { std::apply(kernel, own); }});
#else
  cudaLaunchConfig_t config = {};
  config.gridDim = spread.grid;
  config.blockDim = spread.block;
  config.dynamicSmemBytes = spread.shared_bytes;
  config.stream = on.stream;
  cudaLaunchAttribute attributes[2] = {};
  config.attrs = attributes;
  if (spread.cluster > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = spread.cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  }
  if (spread.early && on.facts.code >= 90) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  if (spread.shared_bytes > (48 << 10)) {
    allow_shared(reinterpret_cast<const void*>(kernel), on.device, spread.shared_bytes);
  }
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
  STD_TORCH_CHECK(error == cudaSuccess, "amtml_fast: a CUDA kernel was not launched: ", cudaGetErrorString(error));
#endif
}

// --- kernels that overlap their neighbors in a stream (compute capability 9.0 and later; elsewhere nothing happens)

// An early kernel in every thread, before it writes to global memory, or reads what kernels in front of it write: what
// was freed on the host may be in use until then.
__device__ __forceinline__ void wait_for_previous() {
#ifdef AMTML_EMULATED_CUDA
  emulation::wait_for_previous();
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets an early kernel behind this one start as soon as all blocks of this one have.
__device__ __forceinline__ void let_next_start() {
#if !defined(AMTML_EMULATED_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// The block's shared memory, as what the kernel keeps there. Its size is sizeof(T) or more in the launch.
template <class T>
__device__ __forceinline__ T& shared() {
#ifdef AMTML_EMULATED_CUDA
  return *reinterpret_cast<T*>(emulation::machine().thread->block->shared.get());
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
#endif
}

// Where CUDA has `assert`: stops the kernel and says what was wrong. Such a value must not be used as an index even so.
#ifdef AMTML_EMULATED_CUDA
#define AMTML_DEVICE_CHECK(right, what) \
  if (!(right)) emulation::machine().failure = what
#else
#define AMTML_DEVICE_CHECK(right, what) assert((right) && what)
#endif

// --- clusters: blocks that see each other's shared memory

__device__ __forceinline__ unsigned cluster_size() {
#ifdef AMTML_EMULATED_CUDA
  return static_cast<unsigned>(emulation::machine().cluster.blocks.size());
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().num_blocks();
#else
  return 1;
#endif
}

__device__ __forceinline__ unsigned cluster_rank() {
#ifdef AMTML_EMULATED_CUDA
  return static_cast<unsigned>(emulation::machine().thread->block - emulation::machine().cluster.blocks.data());
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().block_rank();
#else
  return 0;
#endif
}

// A barrier of all threads of the cluster: of the block, where there are none.
__device__ __forceinline__ void cluster_sync() {
#ifdef AMTML_EMULATED_CUDA
  emulation::wait(emulation::machine().cluster.barrier, 0);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// The same place of shared memory in another block of the cluster.
template <class T>
__device__ __forceinline__ T* in_block(T* mine, unsigned rank) {
#ifdef AMTML_EMULATED_CUDA
  emulation::Machine& m = emulation::machine();
  unsigned char* const base = m.thread->block->shared.get();
  return reinterpret_cast<T*>(m.cluster.blocks[rank].shared.get() + (reinterpret_cast<unsigned char*>(mine) - base));
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}

// --- sums; every thread gets the result, and the order does not depend on timing

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x += __shfl_xor_sync(0xffffffffu, x, by);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {  // NaN is left out
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, by));
  return x;
}

// The sum over the block. `scratch` [32] is in shared memory and free again when the next barrier has passed.
template <class T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  const unsigned warps = (blockDim.x + kWarp - 1) / kWarp, lane = threadIdx.x % kWarp;
  x = warp_sum(x);
  if (warps == 1) return x;
  if (lane == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : T(0));
}

// --- loads and stores of kCount neighbors, as wide as the hardware has them

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T at[kCount];
};

// A GPU stops at an address that is not a multiple of what is moved; so does the emulator.
template <class T, int kCount>
__device__ __forceinline__ void check_alignment([[maybe_unused]] const T* address) {
#ifdef AMTML_EMULATED_CUDA
  AMTML_DEVICE_CHECK(reinterpret_cast<uintptr_t>(address) % alignof(Pack<T, kCount>) == 0, "misaligned address");
#endif
}

template <int kCount, class T>
__device__ __forceinline__ void load(const T* from, float (&to)[kCount]) {
  check_alignment<T, kCount>(from);
  const Pack<T, kCount> pack = *reinterpret_cast<const Pack<T, kCount>*>(from);
#pragma unroll
  for (int i = 0; i < kCount; ++i) to[i] = static_cast<float>(pack.at[i]);
}

template <int kCount, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[kCount]) {
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.at[i] = static_cast<T>(from[i]);
  check_alignment<T, kCount>(to);
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

// Elements of whatever dtype, one at a time: for what is read once, in several dtypes. The branch is the same for a
// whole launch.
struct Values {
  const void* data;
  ScalarType dtype;

  explicit Values(const Tensor& t) : data(t.const_data_ptr()), dtype(t.scalar_type()) {}
  explicit Values(const float* numbers) : data(numbers), dtype(ScalarType::Float) {}
  __device__ __forceinline__ float operator[](int64_t i) const {
    if (dtype == ScalarType::Half) return static_cast<float>(static_cast<const Half*>(data)[i]);
    if (dtype == ScalarType::BFloat16) return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
};

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The numbers of a float32 tensor; null where there are none.
inline float* data(const Tensor& t) { return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr; }
inline const float* values(const std::optional<Tensor>& t) {
  return t ? static_cast<const float*>(t->const_data_ptr()) : nullptr;
}
inline std::optional<Tensor> as_float(const std::optional<Tensor>& t) {
  return t ? std::optional(dense(*t, ScalarType::Float)) : std::nullopt;
}

// The pieces of one allocation, one after another. Without memory it counts: a layout is made twice, the first time to
// see what it takes.
class Pieces {
 public:
  explicit Pieces(void* memory = nullptr) : base_(static_cast<unsigned char*>(memory)) {}
  template <class T>
  T* take(int64_t count) {
    constexpr size_t kAlign = 256;  // as torch's allocator
    const size_t at = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }
  size_t bytes() const { return used_; }

 private:
  unsigned char* const base_;
  size_t used_ = 0;
};

// Memory for pieces, on the device of `like`.
inline Tensor memory_for(const Tensor& like, const Pieces& pieces) {
  return empty(like, {static_cast<int64_t>(pieces.bytes() / sizeof(double))}, ScalarType::Double);
}

// A number of blocks along x; more than a grid takes would wrap, and leave rows out.
inline unsigned blocks(int64_t count) {
  STD_TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(),
                  "amtml_fast: a CUDA kernel can have 2^31 - 1 blocks, got ", count);
  return static_cast<unsigned>(count);
}
inline unsigned blocks_for(int64_t items, int64_t per_block) { return blocks((items + per_block - 1) / per_block); }

// Calls run(T{}) with T the element type of dtype: those that the GPU serves.
template <class F>
void dispatch_gpu(ScalarType dtype, const char* op, F&& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(Half{});
    case ScalarType::BFloat16:
      return run(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": the CUDA kernels take float32, float16 and bfloat16");
  }
}

}  // namespace amtml
