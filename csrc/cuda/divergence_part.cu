// The rows of divergence.cu where this process has but a part of their classes: csrc/cpu/divergence_part.cpp says what
// the three operators make. Each is one kernel, with one sweep over the row (and another for statistics).
#include "../divergence_part.h"
#include "divergence_rows.cuh"

namespace amtml::gpu::divergences {
namespace {

enum class Step { sums, shares, gradient };

// What is given and made besides.
struct Part {
  Step step;
  double* out;           // [N, S, 2] sums, or [N, K] shares
  const double* normal;  // [N, S, 2] of all classes, but for the sums
  PartLayout at;
  bool constants;
  const float *of_kl, *of_ce, *totals;  // [N], of the gradient
};

// Places of a row's softmaxes in sums and normals: the student's second, at temperature 1, is behind its first.
__device__ __forceinline__ int place_of(const Problem& pr, int t) { return t == 0 || !pr.labeled ? t : t + 1; }
__device__ __forceinline__ int places(const Problem& pr) { return pr.softmaxes() + pr.labeled; }

template <int kPack>
__device__ __forceinline__ void write_sums(const Problem& pr, const Part& part, const Slice& slice, Scratch& s) {
  double* const out = part.out + slice.row * places(pr) * 2;
  begin_row(pr, slice.row, s);
  sum_softmaxes<kPack>(pr, slice, s, [&](int t, const Online& o) {
    if (cluster_rank() != 0) return;
    double* const at = out + 2 * place_of(pr, t);
    at[0] = o.max, at[1] = o.sum;
    if (t == 0 && pr.labeled) at[2] = o.max, at[3] = o.sum1;
  });
}

__device__ inline void load_softmaxes(const Problem& pr, const double* normal, Scratch& s) {
  for (int t = threadIdx.x; t < pr.softmaxes(); t += blockDim.x) {
    const double *at = normal + 2 * place_of(pr, t), log_sum = at[1];
    set_softmax(pr, s, t, static_cast<float>(at[0]), static_cast<float>(exp(-log_sum)), log_sum);
    if (t == 0 && pr.labeled) s.inverse1 = static_cast<float>(exp(-at[3]));
  }
}

// From the totals of a sweep.
__device__ inline void write_shares(const Problem& pr, const Part& part, int64_t i, double* out, const Scratch& s) {
  const bool sum = pr.mode == DivergenceMode::sum, logits = pr.logits();
  const PartLayout& at = part.at;
  double *const totals = out + at.each, *const weights = totals + at.totals, *const ce = weights + at.weights;
  for (int t = threadIdx.x; t < pr.teachers; t += blockDim.x) {
    const double first = s.totals[kFixed + t];
    const double second = sum || logits ? s.totals[kFixed + pr.teachers + t] : 0;
    if (sum) {
      out[t] = first + (part.constants ? constant_of_target(pr, s, t + 1) : 0);
      if (at.totals) totals[t] = second;
    } else if (at.weights && logits) {
      weights[t] = first, weights[pr.teachers + t] = second;
    } else if (at.weights) {
      weights[t] = first + (part.constants ? constant_of_slope(pr, s, t + 1) : 0);
    }
  }
  if (threadIdx.x != 0) return;
  if (!sum) {
    out[0] = s.totals[kValue] + (part.constants ? constant_of_row(pr, s) : 0);
    if (at.totals) totals[0] = s.totals[kSlope];
    if (at.weights && logits) weights[2 * pr.teachers] = s.totals[kOfPA];
  }
  if (!at.ce) return;
  const double log_sum1 = part.normal[i * places(pr) * 2 + 3];
  ce[0] = 0;
  if (pr.has_label(i)) {
    float z[1];
    load_row<1, AnyType>(pr.student, i, pr.labels[i], z);
    ce[0] = (static_cast<double>(z[0]) - s.of[0].max) - log_sum1;
  }
  ce[1] = -s.totals[kBelow] - static_cast<double>(pr.classes) * log_sum1;
}

// From the totals of gather_statistics.
__device__ inline void write_statistics(const Problem& pr, const Part& part, double* out, Scratch& s) {
  const bool once = part.constants;
  const double q_rest = s.of[0].rest;
  for (int t = threadIdx.x; t < pr.teachers; t += blockDim.x) {
    out[2 + t] = s.totals[2 + t] + (once ? q_rest - s.of[t + 1].rest : 0);
  }
  if (threadIdx.x != 0) return;
  out[0] = s.totals[0] + (once ? q_rest : 0);
  out[1] = s.totals[1] + (once && pr.logits() ? s.of[pr.teachers + 1].rest : 0);
  unsigned long long best[2];
  best_of_row(s, best);
  for (int k = 0; k < 2; ++k) {
    const uint32_t bits = static_cast<uint32_t>(best[k] >> 32);
    float p;
    std::memcpy(&p, &bits, sizeof(p));
    double* const to = out + 2 + pr.teachers + 2 * k;
    to[0] = p, to[1] = static_cast<double>(~static_cast<uint32_t>(best[k]));
  }
}

__device__ inline void write_ignored(const Problem& pr, const Sweep& want, const Part& part, const Slice& slice) {
  const int64_t i = slice.row;
  for (int c = slice.begin + threadIdx.x; want.grad_student && c < slice.end; c += blockDim.x) {
    const float zero[1] = {};
    put(want.grad_student, want.grad_dtype, i * pr.classes + c, zero);
  }
  if (cluster_rank() != 0 || !part.out) return;
  const bool sums = part.step == Step::sums;
  const int count = sums ? places(pr) * 2 : static_cast<int>(part.at.size());
  for (int k = threadIdx.x; k < count; k += blockDim.x) part.out[i * count + k] = sums ? k % 2 : 0;
}

template <int kPack, bool kSum>
__global__ void __launch_bounds__(kMaxThreads, 3)
    divergence_part_kernel(const __grid_constant__ Problem pr, const __grid_constant__ Sweep want,
                           const __grid_constant__ Part part) {
  Scratch& s = shared<Scratch>();
  const Slice slice = slice_of<kPack>(pr);
  const int64_t i = slice.row;
  if (pr.ignored(i)) return write_ignored(pr, want, part, slice);
  if (part.step == Step::sums) {
    write_sums<kPack>(pr, part, slice, s);
    cluster_sync();  // nobody leaves while others read
    return;
  }
  const bool shares = part.step == Step::shares;
  begin_row(pr, i, s);
  load_softmaxes(pr, part.normal + i * places(pr) * 2, s);
  if (threadIdx.x == 0 && !shares) {
    s.by.student_ce = part.of_ce ? part.of_ce[i] : 0;
    s.by.student_kl = part.of_kl[i] * (1 / pr.temperature_of(i));
    s.by.qb = part.totals[i];
  }
  __syncthreads();
  sweep<kPack, kSum>(pr, want, slice, shares, !shares, s);
  if (!shares) return;
  double* const out = part.out + i * part.at.size();
  if (cluster_rank() == 0) write_shares(pr, part, i, out, s);
  if (!part.at.statistics) return;
  __syncthreads();
  gather_statistics<kPack>(pr, slice, s);
  if (cluster_rank() == 0) write_statistics(pr, part, out + part.at.size() - part.at.statistics, s);
  cluster_sync();  // nobody leaves while others read
}

void run_rows(const Inputs& inputs, const Sweep& want, const Part& part, const OnDevice& on) {
  const auto kernel = [](bool packs, bool sum) {
    return packs ? (sum ? divergence_part_kernel<4, true> : divergence_part_kernel<4, false>)
                 : (sum ? divergence_part_kernel<1, true> : divergence_part_kernel<1, false>);
  };
  launch_rows(inputs, kernel, on, want, part);
}

const double* normals(const Tensor& normal, const Problem& pr, bool logits) {
  check_shape(kOp, "normal", normal, {pr.rows, 1 + pr.labeled + pr.teachers + logits, 2});
  STD_TORCH_CHECK(normal.scalar_type() == ScalarType::Double && normal.is_contiguous(), kOp,
                  ": normal must be float64 and contiguous");
  return static_cast<const double*>(normal.const_data_ptr());
}

Tensor divergence_part_sums(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                            std::optional<Tensor> labels, std::optional<Tensor> temperatures, Name mode,
                            std::vector<double> teacher_temperatures, double temperature, bool labeled) {
  const OnDevice on(student);
  const DivergenceSettings set = part_settings("forward_kl", 0, mode, teacher_temperatures, temperature, 0);
  Inputs inputs(student, teachers, weights, labels, std::nullopt, temperatures, set, on);
  inputs.pr.labeled = labeled;
  const int64_t places = 1 + labeled + inputs.pr.teachers + (set.mode == DivergenceMode::logits);
  const Tensor out = empty(student, {student.size(0), places, 2}, ScalarType::Double);
  Part part{};
  part.step = Step::sums, part.out = static_cast<double*>(out.mutable_data_ptr());
  run_rows(inputs, Sweep{}, part, on);
  return out;
}

Tensor divergence_part_fwd(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                           std::optional<Tensor> labels, std::optional<Tensor> temperatures, const Tensor& normal,
                           Name divergence, double beta, Name mode, std::vector<double> teacher_temperatures,
                           double temperature, bool labeled, bool constants, bool need_totals, bool need_weights,
                           bool need_statistics) {
  const OnDevice on(student);
  const DivergenceSettings set = part_settings(divergence, beta, mode, teacher_temperatures, temperature, 0);
  Inputs inputs(student, teachers, weights, labels, std::nullopt, temperatures, set, on);
  inputs.pr.labeled = labeled;
  const int count = inputs.pr.teachers;
  const bool sum = set.mode == DivergenceMode::sum, logits = set.mode == DivergenceMode::logits;
  Part part{};
  part.step = Step::shares, part.constants = constants, part.normal = normals(normal, inputs.pr, logits);
  part.at = PartLayout(set, count, labeled, need_totals, need_weights, need_statistics);
  const Tensor out = empty(student, {student.size(0), part.at.size()}, ScalarType::Double);
  part.out = static_cast<double*>(out.mutable_data_ptr());
  Sweep want{};
  want.slopes = sum || need_weights, want.apart = sum, want.below = labeled;
  run_rows(inputs, want, part, on);
  return out;
}

Tensor divergence_part_bwd(const Tensor& of_kl, std::optional<Tensor> of_ce, const Tensor& totals,
                           const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                           std::optional<Tensor> labels, std::optional<Tensor> temperatures, const Tensor& normal,
                           Name divergence, double beta, Name mode, std::vector<double> teacher_temperatures,
                           double temperature, double label_smoothing, double even) {
  const OnDevice on(student);
  const DivergenceSettings set =
      part_settings(divergence, beta, mode, teacher_temperatures, temperature, label_smoothing);
  Inputs inputs(student, teachers, weights, labels, std::nullopt, temperatures, set, on);
  Problem& pr = inputs.pr;
  pr.labeled = of_ce.has_value(), pr.even = static_cast<float>(even);
  std::vector<Tensor> kept;
  const auto numbers = [&](const char* name, const Tensor& t) {
    check_shape(kOp, name, t, {pr.rows});
    kept.push_back(dense(t, ScalarType::Float));
    return static_cast<const float*>(kept.back().const_data_ptr());
  };
  Part part{};
  part.step = Step::gradient, part.normal = normals(normal, pr, set.mode == DivergenceMode::logits);
  part.of_kl = numbers("of_kl", of_kl), part.totals = numbers("totals", totals);
  if (of_ce) part.of_ce = numbers("of_ce", *of_ce);
  const Tensor grad = empty(student, {student.size(0), student.size(1)}, student.scalar_type());
  Sweep want{};
  want.grad_student = grad.mutable_data_ptr(), want.grad_dtype = student.scalar_type();
  run_rows(inputs, want, part, on);
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("divergence_part_sums", TORCH_BOX(&divergence_part_sums));
  m.impl("divergence_part_fwd", TORCH_BOX(&divergence_part_fwd));
  m.impl("divergence_part_bwd", TORCH_BOX(&divergence_part_bwd));
}

}  // namespace amtml::gpu::divergences
