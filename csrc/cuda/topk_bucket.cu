// The student's rows of a distillation that compares the classes which teachers name, and one class for all others, a
// row a block; csrc/cpu/topk_bucket.cpp has the formulas.
//
// Forward: which classes are named stands in shared memory, a bit each, so that one sweep leaves them out of the
// online maximum and sums; the statistics need another one. Backward: a sweep as if nobody named a class, then those
// that are named, behind a barrier.
//
// Traffic: a row in, once each way, one out in backward, 16 bytes an entry.
#include "../arithmetic.h"
#include "kd_rows.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "topk_kd_loss";
constexpr int kMaxThreads = 256;
constexpr int64_t kSpan = int64_t{1} << 17;  // classes whose bits are in shared memory at a time
constexpr int64_t kNobody = -(int64_t{1} << 62);
constexpr int kFound = 7;  // numbers a row; amtml_fast/ops/topk_bucket.py has their order

struct Problem : KDProblem {
  const int64_t* indices;  // [N, entries]
  int64_t entries;
  bool second, total, statistics;

  __device__ int64_t index(int64_t i, int64_t j) const { return indices[i * entries + j]; }
  __device__ bool known(int64_t c) const { return c >= 0 && c < classes; }
};

struct Scratch {
  Online part[kMaxThreads / kWarp];
  double sums[kWarp];
  float max;
  double log_sum;
  uint32_t bits[1];  // [words], to the end
};

template <class S, class Packs>
__device__ __forceinline__ const Packs* row_of(const Problem& pr, int64_t i) {
  return reinterpret_cast<const Packs*>(static_cast<const S*>(pr.student.data) + i * pr.student.stride);
}

// Calls use(x, bits) for the packs of row i: their logits as they are, and a bit for each that is named.
template <class S, class Packs, class Use>
__device__ __forceinline__ void sweep(const Problem& pr, int64_t i, Scratch& s, const Use& use) {
  constexpr int64_t kCount = Packs::kCount;
  for (int64_t start = 0; start < pr.classes; start += kSpan) {
    const int64_t count = least(kSpan, pr.classes - start);
    __syncthreads();
    for (int64_t m = threadIdx.x; m < (count + 31) / 32; m += blockDim.x) s.bits[m] = 0;
    __syncthreads();
    for (int64_t j = threadIdx.x; j < pr.entries; j += blockDim.x) {
      const int64_t c = pr.index(i, j) - start;
      if (c >= 0 && c < count) atomicOr(&s.bits[c / 32], 1u << (c % 32));
    }
    __syncthreads();
    each_pack<false, 4>(row_of<S, Packs>(pr, i) + start / kCount, count / kCount, [&](const Packs& pack, int64_t at) {
      const int64_t c = at * kCount;
      const uint32_t bits = s.bits[c / 32] >> (c % 32);
      float x[kCount];
#pragma unroll
      for (int k = 0; k < kCount; ++k) x[k] = pack.at(k);
      use(x, bits);
    });
  }
}

template <class S, class Packs>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const __grid_constant__ Problem pr, double* all_found, double* all_named) {
  constexpr int kCount = Packs::kCount;
  Scratch& s = shared<Scratch>();
  const int64_t i = blockIdx.x;
  double* const found = all_found + i * kFound;
  double* const named = all_named + i * pr.entries;
  const bool ignored = pr.ignored(i);
  for (int64_t j = threadIdx.x; j < pr.entries; j += blockDim.x) {
    const int64_t c = ignored ? kNobody : pr.index(i, j);
    AMTML_DEVICE_CHECK(c == kNobody || pr.known(c), "topk_kd_loss: teacher_indices must be in [0, C)");
    named[j] = ignored        ? 0.0
               : c == kNobody ? -INFINITY
               : pr.known(c)  ? static_cast<double>(row_of<S, S>(pr, i)[c])
                              : NAN;
  }
  if (ignored) {
    if (threadIdx.x < kFound) found[threadIdx.x] = 0;
    return;
  }

  Online o{-INFINITY, 0, 0};
  double total = 0;
  sweep<S, Packs>(pr, i, s, [&](float (&x)[kCount], uint32_t bits) {
    if (pr.total) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) total += x[k];
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (bits >> k & 1) x[k] = -INFINITY;
    }
    pr.second ? take<true>(o, x, pr.unit) : take<false>(o, x, pr.unit);
  });
  total = block_sum(total, s.sums);
  o = warp_combined(o, pr.unit);
  if (threadIdx.x % kWarp == 0) s.part[threadIdx.x / kWarp] = o;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / kWarp; ++w) o = combined(o, s.part[w], pr.unit);
    AMTML_DEVICE_CHECK(!pr.labels || pr.has_label(i), "topk_kd_loss: labels must be in [0, C) or ignore_index");
    s.max = found[0] = o.max == -INFINITY ? 0.0f : o.max;
    s.log_sum = found[1] = log(static_cast<double>(o.sum));
    found[2] = pr.second ? log(static_cast<double>(o.sum1)) : 0;
    found[3] = !pr.labels ? 0 : pr.has_label(i) ? static_cast<double>(row_of<S, S>(pr, i)[pr.labels[i]]) : NAN;
    found[4] = pr.total ? total : 0;
    found[5] = found[6] = 0;
  }
  if (!pr.statistics) return;
  __syncthreads();
  const float max = s.max, log_sum = static_cast<float>(s.log_sum), per_tau = 1 / pr.temperature;
  double entropy = 0, below = 0;
  sweep<S, Packs>(pr, i, s, [&](float (&x)[kCount], uint32_t bits) {
    float terms = 0;
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      if (bits >> k & 1) continue;
      below += x[k];
      const float log_r = (x[k] - max) * per_tau - log_sum;
      terms += x[k] == -INFINITY ? 0.0f : expf(log_r) * log_r;
    }
    entropy += terms;
  });
  entropy = block_sum(entropy, s.sums);
  __syncthreads();
  below = block_sum(below, s.sums);
  if (threadIdx.x == 0) found[5] = entropy, found[6] = below;
}

// of_sums [N, 4]: what comes back to the log-sums at tau and at 1, the label's logit and the mean; of_named: to the
// logits.
template <class S, class Packs>
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(const __grid_constant__ Problem pr, const double* of_sums, const double* of_named,
                    const double* found, S* grads) {
  const int64_t i = blockIdx.x;
  S* const grad = grads + i * pr.classes;
  if (pr.ignored(i)) {
    for (int64_t c = threadIdx.x; c < pr.classes; c += blockDim.x) grad[c] = S(0.0f);
    return;
  }
  of_sums += i * 4, found += i * kFound, of_named += i * pr.entries;
  // Without a class there is nothing to multiply, whatever comes back.
  auto factor = [](double g, double log_sum) {
    return g == 0 || log_sum == -INFINITY ? 0.0f : static_cast<float>(g * exp(-log_sum));
  };
  const float m = static_cast<float>(found[0]), d = static_cast<float>(of_sums[3] / static_cast<double>(pr.classes));
  const float a = factor(of_sums[0] / pr.temperature, found[1]), b = pr.second ? factor(of_sums[1], found[2]) : 0.0f;
  auto at = [&](float z, auto second) {
    float g = fmaf(a, exp2f((z - m) * pr.unit), d);
    if (decltype(second)::value) g = fmaf(b, exp2f((z - m) * kLog2e), g);
    return z == -INFINITY ? 0.0f : g;
  };
  auto fill = [&](auto second) {
    Packs* const out = reinterpret_cast<Packs*>(grad);
    each_pack<true, 2>(row_of<S, Packs>(pr, i), pr.classes / Packs::kCount, [&](const Packs& pack, int64_t place) {
      Packs made;
#pragma unroll
      for (int k = 0; k < Packs::kCount; ++k) made.set(k, at(pack.at(k), second));
      write_through(out + place, made);
    });
  };
  pr.second ? fill(std::true_type{}) : fill(std::false_type{});
  __syncthreads();
  const S* const row = row_of<S, S>(pr, i);
  const int64_t label = pr.has_label(i) ? pr.labels[i] : -1;
  const double at_label = pr.labels ? of_sums[2] : 0;
  if (threadIdx.x == 0 && label >= 0 && at_label != 0) {
    const float z = static_cast<float>(row[label]);
    const float g = static_cast<float>(at_label) + (pr.second ? at(z, std::true_type{}) : at(z, std::false_type{}));
    grad[label] = static_cast<S>(z == -INFINITY ? 0.0f : g);
  }
  __syncthreads();
  for (int64_t j = threadIdx.x; j < pr.entries; j += blockDim.x) {
    const int64_t c = pr.index(i, j);
    if (!pr.known(c)) continue;
    const float g = static_cast<float>(of_named[j] + (c == label ? at_label : 0)) + d;
    grad[c] = static_cast<S>(static_cast<float>(row[c]) == -INFINITY ? 0.0f : g);
  }
}

// Of row blockIdx.x and bound blockIdx.y the last of the first `equal` classes that have it: every thread counts in a
// part of the row of its own.
template <class S>
__global__ void last_kernel(Rows student, int64_t classes, const S* bounds, const int64_t* equal, int64_t* last) {
  int64_t* const counts = &shared<int64_t>();
  const S* const row = static_cast<const S*>(student.data) + blockIdx.x * student.stride;
  const int64_t place = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y, wanted = equal[place];
  const float bound = static_cast<float>(bounds[place]);
  const int64_t size = (classes + blockDim.x - 1) / blockDim.x, begin = least(threadIdx.x * size, classes);
  const int64_t end = least(begin + size, classes);
  int64_t mine = 0;
  for (int64_t c = begin; c < end; ++c) mine += static_cast<float>(row[c]) == bound;
  counts[threadIdx.x] = mine;
  __syncthreads();
  int64_t before = 0, all = 0;
  for (unsigned k = 0; k < blockDim.x; ++k) {
    if (k < threadIdx.x) before += counts[k];
    all += counts[k];
  }
  if (threadIdx.x == 0 && all < wanted) last[place] = classes - 1;
  if (before >= wanted || before + mine < wanted) return;
  int64_t c = begin;
  for (; before < wanted; ++c) before += static_cast<float>(row[c]) == bound;
  last[place] = c - 1;
}

// --- the host's side

struct Inputs {
  Tensor student, indices;
  KDTensors own;
  Problem pr{};
  bool packs;
  unsigned threads = kWarp;

  Inputs(const Tensor& student_, const Tensor& indices_, const std::optional<Tensor>& labels, double temperature,
         int64_t ignore_index, bool second, bool total, bool statistics, const OnDevice& on)
      : student(dense_rows(student_)), indices(dense(indices_)) {
    own.fill(pr, kOp, student, 1, std::nullopt, labels, {temperature, 1, 1, 1, "", "sum", ignore_index, 0}, on);
    STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == pr.rows, kOp, ": indices must be [N, K]");
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, kOp, ": indices must be int64");
    pr.indices = static_cast<const int64_t*>(indices.const_data_ptr());
    pr.entries = indices.size(1);
    pr.second = second, pr.total = total, pr.statistics = statistics;
    const int wide = static_cast<int>(16 / student.element_size());
    packs = fits_packs(student, wide);
    while (threads * (packs ? wide : 1) < pr.classes && threads < kMaxThreads) threads *= 2;
  }
};

double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor> topk_bucket_fwd(const Tensor& student, const Tensor& indices, std::optional<Tensor>,
                                           std::optional<Tensor> labels, double temperature, int64_t ignore_index,
                                           bool need_second, bool need_total, bool, bool need_statistics) {
  const OnDevice on(student);
  const Inputs in(student, indices, labels, temperature, ignore_index, need_second, need_total, need_statistics, on);
  const Problem& pr = in.pr;
  const Tensor found = empty(student, {pr.rows, kFound}, ScalarType::Double);
  const Tensor named = empty(student, {pr.rows, pr.entries}, ScalarType::Double);
  const size_t bytes = sizeof(Scratch) + (least(kSpan, pr.classes) + 31) / 32 * sizeof(uint32_t);
  dispatch_gpu(in.student.scalar_type(), kOp, [&](auto element) {
    using S = decltype(element);
    launch(in.packs ? forward_kernel<S, Packed<S>> : forward_kernel<S, Single<S>>,
           {static_cast<unsigned>(pr.rows), in.threads, 1, bytes}, on, pr, doubles(found), doubles(named));
  });
  return {found, named};
}

Tensor topk_bucket_bwd(const Tensor& grad_sums, const Tensor& grad_z, const Tensor& student, const Tensor& indices,
                       std::optional<Tensor> labels, const Tensor& found, double temperature, int64_t ignore_index,
                       bool need_second, bool need_total, bool) {
  const OnDevice on(student);
  const Inputs in(student, indices, labels, temperature, ignore_index, need_second, need_total, false, on);
  const Problem& pr = in.pr;
  check_shape(kOp, "grad_sums", grad_sums, {pr.rows, 4});
  check_shape(kOp, "grad_z", grad_z, {pr.rows, pr.entries});
  check_shape(kOp, "found", found, {pr.rows, kFound});
  const Tensor sums = dense(grad_sums, ScalarType::Double), named = dense(grad_z, ScalarType::Double);
  const Tensor made = dense(found), grad = empty(student, {pr.rows, pr.classes}, student.scalar_type());
  dispatch_gpu(in.student.scalar_type(), kOp, [&](auto element) {
    using S = decltype(element);
    launch(in.packs ? backward_kernel<S, Packed<S>> : backward_kernel<S, Single<S>>,
           {static_cast<unsigned>(pr.rows), in.threads}, on, pr, doubles(sums), doubles(named), doubles(made),
           static_cast<S*>(grad.mutable_data_ptr()));
  });
  return grad;
}

Tensor topk_bucket_last(const Tensor& student_, const Tensor& bounds, const Tensor& equal) {
  const OnDevice on(student_);
  const Tensor student = dense_rows(student_), of_bounds = dense(bounds), counts = dense(equal);
  const int64_t n = student.size(0), teachers = bounds.size(1);
  check_shape(kOp, "bounds", bounds, {n, teachers});
  check_shape(kOp, "equal", equal, {n, teachers});
  const Tensor last = empty(student, {n, teachers}, ScalarType::Long);
  dispatch_gpu(student.scalar_type(), kOp, [&](auto element) {
    using S = decltype(element);
    launch(last_kernel<S>,
           {dim3(static_cast<unsigned>(n), static_cast<unsigned>(teachers)), kMaxThreads, 1,
            kMaxThreads * sizeof(int64_t)},
           on, Rows(student), student.size(1), static_cast<const S*>(of_bounds.const_data_ptr()),
           static_cast<const int64_t*>(counts.const_data_ptr()), static_cast<int64_t*>(last.mutable_data_ptr()));
  });
  return last;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("topk_bucket_fwd", TORCH_BOX(&topk_bucket_fwd));
  m.impl("topk_bucket_bwd", TORCH_BOX(&topk_bucket_bwd));
  m.impl("topk_bucket_last", TORCH_BOX(&topk_bucket_last));
}

}  // namespace amtml::gpu
