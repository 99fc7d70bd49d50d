// The rows of a distillation on GPUs: softmax and cross-entropy of the student, scales of the gradients, and sums over
// rows. Shared by the losses that set teachers against it.
#pragma once

#include <cfloat>

#include "ops.cuh"

namespace amtml::gpu {

// Exponentials are exp2f((x - maximum) * unit). Nothing is added to its argument, which is exact to 2^-24 of itself and
// would lose that beside a larger number; its results go down to the smallest float32.
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLog2 = 0.6931471805599453f;

struct Rows {  // [N, C], dense along C
  const void* data = nullptr;
  int64_t stride = 0;
  ScalarType dtype = ScalarType::Float;

  Rows() = default;
  explicit Rows(const Tensor& t) : data(t.const_data_ptr()), stride(t.stride(0)), dtype(t.scalar_type()) {}
};

struct AnyType {
};  // an element type that is known when the kernel runs, for teachers of another dtype than the student

template <int kPack, class T>
__device__ __forceinline__ void load_row(const Rows& rows, int64_t i, int64_t c, float (&to)[kPack]) {
  if constexpr (!std::is_same_v<T, AnyType>) {
    load(static_cast<const T*>(rows.data) + i * rows.stride + c, to);
  } else if (rows.dtype == ScalarType::Half) {
    load_row<kPack, Half>(rows, i, c, to);
  } else if (rows.dtype == ScalarType::BFloat16) {
    load_row<kPack, BFloat16>(rows, i, c, to);
  } else {
    load_row<kPack, float>(rows, i, c, to);
  }
}

struct KDProblem {
  int64_t rows, classes;
  int teachers;
  Rows student;
  const float* weights;  // null: uniform
  int64_t weights_row, weights_column;
  const int64_t* labels;  // null: none
  int64_t ignore_index;
  float temperature, ce_weight, kl_weight, kl_scale, label_smoothing;
  float unit;                    // log2(e) over the temperature
  bool mean_rows, mean_classes;  // what the reduction divides by
  const int64_t* counted;        // [kParts] rows that count, or null: found inline

  __device__ bool ignored(int64_t i) const { return labels && labels[i] == ignore_index; }
  __device__ bool has_label(int64_t i) const { return labels && labels[i] >= 0 && labels[i] < classes; }
  __device__ float weight(int64_t i, int t) const {
    return weights ? weights[i * weights_row + t * weights_column] : 1.0f / static_cast<float>(teachers);
  }
};

// --- the host's side: kd_rows.cu

// What a problem points to.
struct KDTensors {
  std::optional<Tensor> weights, labels, counted;

  // All of `pr` but what the losses add to it.
  void fill(KDProblem& pr, const char* op, const Tensor& student, int64_t teachers,
            const std::optional<Tensor>& given_weights, const std::optional<Tensor>& given_labels,
            const KDSettings& set, const OnDevice& on);
};

// Losses from each row's cross-entropy and KL, the first 2 N numbers of `rows` in float64; ce and kl may be null.
void reduce_rows(const KDProblem& pr, const Tensor& rows, float* loss, float* ce, float* kl, const OnDevice& on);

// A tensor whose rows are dense.
inline Tensor dense_rows(const Tensor& t) { return t.dim() != 2 || t.size(1) <= 1 || t.stride(1) == 1 ? t : dense(t); }

// Whether every row starts at such an address that it can be read `wide` classes at a time.
inline bool fits_packs(const Tensor& t, int wide) {
  return t.size(1) % wide == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (wide * t.element_size()) == 0 &&
         (t.size(0) <= 1 || t.stride(0) % wide == 0);
}

// --- on the device

// 16 bytes of a row.
template <class S>
struct alignas(16) Packed {
  static constexpr int kCount = 16 / sizeof(S);
  uint32_t words[4];

  __device__ __forceinline__ float at(int k) const {  // k known to the compiler: words stay in registers
    if constexpr (std::is_same_v<S, BFloat16>) {      // the upper half of a float32
      const uint32_t bits = k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16;
      float x;
      std::memcpy(&x, &bits, sizeof(x));
      return x;
    }
    return static_cast<float>(reinterpret_cast<const S*>(words)[k]);
  }
  __device__ __forceinline__ void set(int k, float x) { reinterpret_cast<S*>(words)[k] = static_cast<S>(x); }
};

// One number of a row that cannot be read 16 bytes at a time.
template <class S>
struct Single {
  static constexpr int kCount = 1;
  S number;

  __device__ __forceinline__ float at(int) const { return static_cast<float>(number); }
  __device__ __forceinline__ void set(int, float x) { number = static_cast<S>(x); }
};

template <bool kLast, class S>
__device__ __forceinline__ Single<S> read(const Single<S>* at) {
  return *at;
}
template <class S>
__device__ __forceinline__ void write_through(Single<S>* at, const Single<S>& one) {
  *at = one;
}

template <bool kLast, class S>
__device__ __forceinline__ Packed<S> read(const Packed<S>* at) {  // the last time: it need not stay in cache
#ifdef AMTML_EMULATED_CUDA
  return *at;
#else
  const uint4* from = reinterpret_cast<const uint4*>(at);
  const uint4 words = kLast ? __ldcs(from) : __ldg(from);
  return {words.x, words.y, words.z, words.w};
#endif
}

template <class S>
__device__ __forceinline__ void write_through(Packed<S>* at, const Packed<S>& pack) {
#ifdef AMTML_EMULATED_CUDA
  *at = pack;
#else
  __stcs(reinterpret_cast<uint4*>(at), uint4{pack.words[0], pack.words[1], pack.words[2], pack.words[3]});
#endif
}

// 2^x by the approximate instruction: what is below the normal numbers counts 0.
__device__ __forceinline__ float power_of_2(float x) {
#ifdef AMTML_EMULATED_CUDA
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

struct Online {  // maximum, and sums of exponentials below it
  float max, sum, sum1;
};

// Sums of several parts: each is scaled from its own maximum to the common one. Without a maximum the sum is 0, or NaN,
// which stays.
__device__ __forceinline__ float rescaled(float sum, float from, float to, float per_unit) {
  return from == -INFINITY ? sum : sum * exp2f((from - to) * per_unit);
}

// Calls use(pack, at) for the packs at threadIdx.x, threadIdx.x + blockDim.x, ... below `count`: kLoads loads are under
// way at a time.
template <bool kLast, int kLoads, class Packs, class Use>
__device__ __forceinline__ void each_pack(const Packs* row, int64_t count, const Use& use) {
  const int64_t step = blockDim.x;
  for (int64_t first = threadIdx.x; first < count; first += kLoads * step) {
    Packs packs[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) packs[u] = read<kLast>(row + least(first + u * step, count - 1));
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (first + u * step < count) use(packs[u], first + u * step);
    }
  }
}

// Takes the classes of a pack, or of an array of floats.
template <bool kSecond, int kPack>
__device__ __forceinline__ void take(Online& o, const float (&x)[kPack], float unit) {
  float most = x[0];
#pragma unroll
  for (int k = 1; k < kPack; ++k) most = fmaxf(most, x[k]);
  if (most > o.max) {
    o.sum = rescaled(o.sum, o.max, most, unit);
    if (kSecond) o.sum1 = rescaled(o.sum1, o.max, most, kLog2e);
    o.max = most;
  }
  const float shift = o.max == -INFINITY ? 0.0f : o.max;
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    o.sum += power_of_2((x[k] - shift) * unit);
    if (kSecond) o.sum1 += power_of_2((x[k] - shift) * kLog2e);
  }
}
template <bool kSecond, class Packs>
__device__ __forceinline__ void take(Online& o, const Packs& pack, float unit) {
  float x[Packs::kCount];
#pragma unroll
  for (int k = 0; k < Packs::kCount; ++k) x[k] = pack.at(k);
  take<kSecond>(o, x, unit);
}

__device__ __forceinline__ Online combined(Online a, Online b, float unit) {
  const float most = fmaxf(a.max, b.max);
  if (most == -INFINITY) return {most, a.sum + b.sum, a.sum1 + b.sum1};  // NaN stays
  return {most, rescaled(a.sum, a.max, most, unit) + rescaled(b.sum, b.max, most, unit),
          rescaled(a.sum1, a.max, most, kLog2e) + rescaled(b.sum1, b.max, most, kLog2e)};
}

// Of the warp.
__device__ __forceinline__ Online warp_combined(Online o, float unit) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) {
    const Online other{__shfl_xor_sync(~0u, o.max, by), __shfl_xor_sync(~0u, o.sum, by),
                       __shfl_xor_sync(~0u, o.sum1, by)};
    o = combined(o, other, unit);
  }
  return o;
}

// How much of d loss / d CE and d loss / d KL a row has, before the incoming gradient.
__device__ inline void gradient_scales(const KDProblem& pr, double* scratch, float* ce, float* kl) {
  double rows = 1;
  if (pr.mean_rows) {
    int64_t count = pr.rows;
    if (pr.counted) {
      count = warp_sum(pr.counted[threadIdx.x % kWarp]);
    } else if (pr.labels) {
      int mine = 0;
      for (int64_t i = threadIdx.x; i < pr.rows; i += blockDim.x) mine += !pr.ignored(i);
      count = block_sum(mine, reinterpret_cast<int*>(scratch));
      __syncthreads();
    }
    rows = count > 0 ? static_cast<double>(count) : 1;
  }
  *ce = static_cast<float>(pr.ce_weight / rows);
  *kl = static_cast<float>(static_cast<double>(pr.kl_weight) * pr.kl_scale /
                           (pr.mean_classes ? rows * static_cast<double>(pr.classes) : rows));
}

__device__ inline double weighted(const KDProblem& pr, double ce, double kl) {  // not 0 * infinity
  return (pr.ce_weight == 0 ? 0 : pr.ce_weight * ce) + (pr.kl_weight == 0 ? 0 : pr.kl_weight * kl);
}

// Of row i, from the student's maximum and log-sum at temperature 1; below = sum of maximum - z.
template <class S>
__device__ double cross_entropy(const KDProblem& pr, int64_t i, float max, float log_sum1, double below) {
  if (!pr.has_label(i)) return 0;
  const int64_t label = pr.labels[i];
  float z[1];
  load_row<1, S>(pr.student, i, label, z);
  const double ce = static_cast<double>(log_sum1) - (z[0] - max);
  if (pr.label_smoothing == 0) return ce;  // not 0 * infinity
  return (1 - pr.label_smoothing) * ce + pr.label_smoothing * (log_sum1 + below / static_cast<double>(pr.classes));
}

}  // namespace amtml::gpu
