// Any divergence between the student and what the teachers say: value, gradients and statistics, in one kernel forward
// and one backward. divergence_rows.cuh sweeps over the rows.
#include "divergence_rows.cuh"

namespace amtml::gpu::divergences {
namespace {

// What is made; null where it is not asked for.
struct Results : Wanted {
  float *grad_alpha, *statistics;  // [N], [N, 4 + T]
  ScalarType grad_dtype;           // of grad_student
};

// The row's scalars and the gradient of its weights.
__device__ inline void write_row(const Problem& pr, const Results& want, int64_t i, Scratch& s) {
  const double tau = pr.temperature_of(i), squared = pr.t2_scale ? tau * tau : 1;
  const double ce_weight = pr.alphas ? 1 - static_cast<double>(pr.alphas[i]) : pr.of_ce;
  const double kl_weight = pr.alphas ? pr.alphas[i] : pr.of_kl;
  const double g = s.by.incoming, kl_grad = g * kl_weight * squared * s.by.kl;
  for (int t = threadIdx.x; want.grad_weights && t < pr.teachers; t += blockDim.x) {
    double slope = s.totals[kFixed + t];
    if (pr.mode == DivergenceMode::sum) {
      slope += constant_of_target(pr, s, t + 1);
      if (s.weight[t] == 0 && !(fabs(slope) < INFINITY)) slope = 0;
    } else if (pr.logits()) {
      const double mean = s.totals[kFixed + pr.teachers + t];
      slope -= if_mass(mean, s.totals[kOfPA] * mean);
    } else {
      slope += constant_of_slope(pr, s, t + 1);
    }
    want.grad_weights[i * pr.teachers + t] = kl_grad == 0 ? 0.0f : static_cast<float>(kl_grad * slope);
  }
  if (threadIdx.x != 0) return;
  const double kl = squared * (s.totals[kValue] + constant_of_row(pr, s));
  AMTML_DEVICE_CHECK(!pr.labels || pr.has_label(i), "multi_teacher_kd_loss: labels must be in [0, C) or ignore_index");
  const double ce = pr.labels ? cross_entropy<AnyType>(pr, i, s.of[0].max, s.log_sum1, s.totals[kBelow]) : 0;
  const double of_ce = ce_weight == 0 ? 0 : ce_weight * ce, of_kl = kl_weight == 0 ? 0 : kl_weight * kl;
  if (want.ce_rows) want.ce_rows[i] = of_ce, want.kl_rows[i] = of_kl;
  if (want.loss) want.loss[i] = static_cast<float>(of_ce + of_kl);
  if (!want.grad_alpha) return;
  // What is infinite has no gradient either where it has no weight.
  const auto counted = [](double weight, double x) { return weight == 0 && !(fabs(x) < INFINITY) ? 0 : x; };
  want.grad_alpha[i] = static_cast<float>(g * (counted(kl_weight, kl) * s.by.kl - counted(ce_weight, ce) * s.by.ce));
}

__device__ inline void write_ignored(const Problem& pr, const Results& want, const Slice& slice) {
  const int64_t i = slice.row;
  for (int c = slice.begin + threadIdx.x; want.grad_student && c < slice.end; c += blockDim.x) {
    const float zero[1] = {};
    put(want.grad_student, want.grad_dtype, i * pr.classes + c, zero);
  }
  if (cluster_rank() != 0) return;
  for (int t = threadIdx.x; t < 4 + pr.teachers; t += blockDim.x) {
    if (want.statistics) want.statistics[i * (4 + pr.teachers) + t] = 0;
    if (want.grad_weights && t < pr.teachers) want.grad_weights[i * pr.teachers + t] = 0;
  }
  if (threadIdx.x != 0) return;
  if (want.ce_rows) want.ce_rows[i] = want.kl_rows[i] = 0;
  if (want.loss) want.loss[i] = 0;
  if (want.grad_alpha) want.grad_alpha[i] = 0;
}

// As KDStats has them: entropies of q and p, mass, agreement, and KL(p_t || q) of each teacher.
__device__ inline void write_statistics(const Problem& pr, float* out, Scratch& s) {
  const double q_rest = s.of[0].rest;
  for (int t = threadIdx.x; t < pr.teachers; t += blockDim.x) {
    out[4 + t] = static_cast<float>(s.totals[2 + t] + q_rest - s.of[t + 1].rest);
  }
  if (threadIdx.x != 0) return;
  unsigned long long best[2];
  best_of_row(s, best);
  out[0] = static_cast<float>(s.totals[0] + q_rest);
  out[1] = static_cast<float>(s.totals[1] + (pr.logits() ? s.of[pr.teachers + 1].rest : 0));
  out[2] = s.total > 0;
  out[3] = static_cast<uint32_t>(best[0]) == static_cast<uint32_t>(best[1]);
}

// Forward, or with what comes back to the loss backward, which makes all of it again.
template <int kPack, bool kSum>
__global__ void __launch_bounds__(kMaxThreads, 3)
    divergence_kernel(const __grid_constant__ Problem pr, const __grid_constant__ Results want, const float* grad_loss,
                      bool each_row) {
  Scratch& s = shared<Scratch>();
  const Slice slice = slice_of<kPack>(pr);
  const int64_t i = slice.row;
  if (pr.ignored(i)) return write_ignored(pr, want, slice);
  float of_ce, of_kl;
  gradient_scales(pr, s.sums, &of_ce, &of_kl);
  make_softmaxes<kPack>(pr, slice, s);
  const bool below = pr.labeled && pr.label_smoothing != 0;
  const Sweep make{want.grad_weights != nullptr, false, below, want.grad_student, want.grad_dtype};
  const bool known = pr.kind == Divergence::forward_kl;  // what sum q b is
  if (threadIdx.x == 0) {
    const float g = grad_loss ? grad_loss[each_row ? i : 0] : 1.0f, tau = pr.temperature_of(i);
    const float ce_weight = pr.alphas ? 1 - pr.alphas[i] : pr.of_ce, kl_weight = pr.alphas ? pr.alphas[i] : pr.of_kl;
    s.by = {g,
            of_ce,
            of_kl,
            g * of_ce * ce_weight,
            g * of_kl * kl_weight * (pr.t2_scale ? tau : 1 / tau),
            pr.logits() ? -1.0f : -s.total};
  }
  __syncthreads();
  for (bool gather = true;; gather = false) {
    const bool write = want.grad_student && (known || !gather);
    sweep<kPack, kSum>(pr, make, slice, gather, write, s);
    if (!want.grad_student || write) break;
    if (threadIdx.x == 0) s.by.qb = static_cast<float>(s.totals[kSlope]);
    __syncthreads();
  }
  if (cluster_rank() == 0) write_row(pr, want, i, s);
  if (!want.statistics) return;
  __syncthreads();
  gather_statistics<kPack>(pr, slice, s);
  if (cluster_rank() == 0) write_statistics(pr, want.statistics + i * (4 + pr.teachers), s);
  cluster_sync();  // nobody leaves while others read
}

void run_rows(const Inputs& inputs, const Results& want, const float* grad_loss, bool each_row, const OnDevice& on) {
  const auto kernel = [](bool packs, bool sum) {
    return packs ? (sum ? divergence_kernel<4, true> : divergence_kernel<4, false>)
                 : (sum ? divergence_kernel<1, true> : divergence_kernel<1, false>);
  };
  launch_rows(inputs, kernel, on, want, grad_loss, each_row);
}

Tensor5 divergence_fwd(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                       std::optional<Tensor> labels, std::optional<Tensor> alphas, std::optional<Tensor> temperatures,
                       Name divergence, double beta, Name mode, std::vector<double> teacher_temperatures,
                       double temperature, bool t2_scale, double ce_weight, double kl_weight, Name reduction,
                       int64_t ignore_index, double label_smoothing, bool need_student_grad, bool need_weights_grad,
                       bool need_alpha_grad, bool need_statistics) {
  STD_TORCH_CHECK(!need_student_grad || student.scalar_type() == ScalarType::Float, kOp,
                  ": the gradient of a 16-bit student is made in backward");
  const OnDevice on(student);
  const DivergenceSettings set(divergence, beta, mode, teacher_temperatures, temperature, t2_scale, ce_weight,
                               kl_weight, reduction, ignore_index, label_smoothing);
  const Inputs inputs(student, teachers, weights, labels, alphas, temperatures, set, on);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(teachers.size());
  const bool none = set.kd.each_row();
  auto make = [&](bool wanted, const Shape& shape) { return empty_or_none(student, wanted, shape, ScalarType::Float); };
  const Tensor loss = make(true, none ? Shape{n} : Shape{}), grad_student = make(need_student_grad, {n, c});
  const Tensor grad_weights = make(need_weights_grad, {n, count}), grad_alpha = make(need_alpha_grad, {n});
  const Tensor statistics = make(need_statistics, {n, 4 + count});
  const Tensor rows = empty(student, {2, none ? 0 : n}, ScalarType::Double);
  Results want{};
  if (none) {
    want.loss = data(loss);
  } else {
    want.ce_rows = static_cast<double*>(rows.mutable_data_ptr()), want.kl_rows = want.ce_rows + n;
  }
  want.grad_student = data(grad_student), want.grad_dtype = ScalarType::Float;
  want.grad_weights = data(grad_weights), want.grad_alpha = data(grad_alpha), want.statistics = data(statistics);
  run_rows(inputs, want, nullptr, false, on);
  if (!none) reduce_rows(inputs.pr, rows, data(loss), nullptr, nullptr, on);
  return {loss, grad_student, grad_weights, grad_alpha, statistics};
}

std::tuple<Tensor, Tensor, Tensor> divergence_bwd(
    const Tensor& grad_loss, const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
    std::optional<Tensor> labels, std::optional<Tensor> alphas, std::optional<Tensor> temperatures, Name divergence,
    double beta, Name mode, std::vector<double> teacher_temperatures, double temperature, bool t2_scale,
    double ce_weight, double kl_weight, Name reduction, int64_t ignore_index, double label_smoothing,
    bool need_student_grad, bool need_weights_grad, bool need_alpha_grad) {
  const OnDevice on(student);
  const DivergenceSettings set(divergence, beta, mode, teacher_temperatures, temperature, t2_scale, ce_weight,
                               kl_weight, reduction, ignore_index, label_smoothing);
  const Inputs inputs(student, teachers, weights, labels, alphas, temperatures, set, on);
  const int64_t n = student.size(0), count = static_cast<int64_t>(teachers.size());
  const bool none = set.kd.each_row();
  check_shape(kOp, "grad_loss", grad_loss, none ? Shape{n} : Shape{});
  const Tensor incoming = dense(grad_loss, ScalarType::Float);
  const Tensor grad_student = empty_or_none(student, need_student_grad, {n, student.size(1)}, student.scalar_type());
  const Tensor grad_weights = empty_or_none(student, need_weights_grad, {n, count}, ScalarType::Float);
  const Tensor grad_alpha = empty_or_none(student, need_alpha_grad, {n}, ScalarType::Float);
  Results want{};
  if (grad_student.numel()) want.grad_student = grad_student.mutable_data_ptr();
  want.grad_dtype = student.scalar_type();
  want.grad_weights = data(grad_weights), want.grad_alpha = data(grad_alpha);
  run_rows(inputs, want, static_cast<const float*>(incoming.const_data_ptr()), none, on);
  return {grad_student, grad_weights, grad_alpha};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("divergence_fwd", TORCH_BOX(&divergence_fwd));
  m.impl("divergence_bwd", TORCH_BOX(&divergence_bwd));
}

}  // namespace amtml::gpu::divergences
