// AMTMLLoss without hints in one call each way, as csrc/cpu/whole_loss.cpp, in few launches: forward the weights (1),
// the rows of the distillation (1), the angle loss (3 at N = 128) and the sums of all terms (1), backward the rows (1)
// and the weights (2). What forward sends back is scaled where backward reads it, and nothing waits for the host.
#include "ops.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "AMTMLLoss";
constexpr int kThreads = 256;

struct Parameters {  // whose squares are summed
  const float *theta, *v;
  int64_t theta_count, v_count;
};

struct Reduction {
  const double *ce_rows, *kl_rows;  // [N]
  int64_t rows, classes;
  const int64_t* labels;
  int64_t ignore_index;
  bool mean_rows, mean_classes;
  const float *divisor, *angle;  // or null
  float ce_weight, kl_weight, angle_weight, regularizer_weight;
};

__device__ double squares(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

// kd, ce, kl, angle, 0 for the hint, regularizer; a term without weight is left out of the loss: 0 * infinity is NaN.
__global__ void terms_kernel(Reduction of, Parameters parameters, float* loss, float* terms) {
  double* scratch = &shared<double>();
  double sums[4] = {};
  for (int64_t i = threadIdx.x; i < of.rows; i += kThreads) {
    sums[0] += of.ce_rows[i];
    sums[1] += of.kl_rows[i];
    sums[2] += !(of.labels && of.labels[i] == of.ignore_index);
  }
  sums[3] = squares(parameters.theta, parameters.theta_count) + squares(parameters.v, parameters.v_count);
  for (double& sum : sums) {
    sum = block_sum(sum, scratch);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  const double rows = of.mean_rows ? fmax(sums[2], 1.0) : 1, by = of.divisor ? 1.0 / *of.divisor : 1;
  const double ce = by * sums[0] / rows, kl = by * sums[1] / (of.mean_classes ? rows * of.classes : rows);
  const double kd = (of.ce_weight == 0 ? 0 : of.ce_weight * ce) + (of.kl_weight == 0 ? 0 : of.kl_weight * kl);
  const double angle = of.angle ? *of.angle : 0, regularizer = sums[3];
  double total = kd;
  if (of.angle_weight != 0) total += of.angle_weight * angle;
  if (of.regularizer_weight != 0) total += of.regularizer_weight * regularizer;
  const double values[6] = {kd, ce, kl, angle, 0, regularizer};
  for (int k = 0; k < 6; ++k) terms[k] = static_cast<float>(values[k]);
  *loss = static_cast<float>(total);
}

Tensor8 whole_loss_fwd(std::optional<Tensor> features, std::optional<Tensor> theta, std::optional<Tensor> v,
                       std::optional<Tensor> given_weights, const Tensor& student, std::vector<Tensor> teachers,
                       std::optional<Tensor> labels, std::optional<Tensor> divisor, double temperature,
                       double ce_weight, double kl_weight, double kl_scale, std::string mode, std::string reduction,
                       int64_t ignore_index, double label_smoothing, bool max_pool, double angle_weight, double delta,
                       double eps, double regularizer_weight, bool need_student_grad, bool need_targets_grad) {
  STD_TORCH_CHECK(features.has_value() != given_weights.has_value(), kOp, ": either features or weights must be given");
  const OnDevice on(student);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  auto none = [&] { return empty(student, {0}, ScalarType::Float); };  // outputs may not be shared
  Tensor weights, pooled, index, grad_probs, grad_targets;
  Parameters parameters{};
  std::optional<Tensor> factors, scale;  // theta and v in float32
  if (features) {
    factors = as_float(theta), scale = as_float(v);
    std::tie(weights, pooled, index) = teacher_weights_fwd(*features, *factors, *scale, max_pool);
    if (regularizer_weight != 0) parameters = {values(factors), values(scale), factors->numel(), scale->numel()};
  } else {
    weights = *given_weights;
    pooled = none(), index = none();
  }
  KDRows rows = multi_teacher_kd_forward(student, teachers, converted(weights, ScalarType::Float), labels, set, false,
                                         false, angle_weight != 0, false, on);
  std::optional<Tensor> angle;
  if (angle_weight != 0) {
    Tensor value;
    std::tie(value, grad_probs, grad_targets) =
        angle_rows({rows.student_probs, rows.soft_targets, std::nullopt, labels, ignore_index}, delta, eps, "mean",
                   need_student_grad, need_targets_grad);
    angle = value;
  } else {
    grad_probs = none(), grad_targets = none();
  }
  const int64_t n = student.size(0);
  const auto by = as_float(divisor), y = labels ? std::optional(dense(*labels)) : std::nullopt;
  const double* of_rows = static_cast<const double*>(rows.values.const_data_ptr());
  const bool mean = reduction == "mean";
  const Reduction of{of_rows,
                     of_rows + n,
                     n,
                     student.size(1),
                     y ? static_cast<const int64_t*>(y->const_data_ptr()) : nullptr,
                     ignore_index,
                     mean || reduction == "batchmean",
                     mean,
                     values(by),
                     values(angle),
                     static_cast<float>(ce_weight),
                     static_cast<float>(kl_weight),
                     static_cast<float>(angle_weight),
                     static_cast<float>(regularizer_weight)};
  Tensor terms = empty(student, {6}, ScalarType::Float);
  launch(terms_kernel, {1, kThreads, 1, kWarp * sizeof(double)}, on, of, parameters,
         static_cast<float*>(rows.loss.mutable_data_ptr()), static_cast<float*>(terms.mutable_data_ptr()));
  return {rows.loss, terms, features ? weights : none(), pooled, index, rows.stats, grad_probs, grad_targets};
}

Tensor5 whole_loss_bwd(const Tensor& grad, std::optional<Tensor> features, std::optional<Tensor> theta,
                       std::optional<Tensor> v, const Tensor& weights, const Tensor& pooled, const Tensor& index,
                       const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> labels,
                       const Tensor& stats, const Tensor& grad_probs, const Tensor& grad_targets,
                       std::optional<Tensor> divisor, double temperature, double ce_weight, double kl_weight,
                       double kl_scale, std::string mode, std::string reduction, int64_t ignore_index,
                       double label_smoothing, bool max_pool, double angle_weight, double regularizer_weight,
                       bool need_student, bool need_weights, bool need_features, bool need_parameters) {
  const OnDevice on(student);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  const Tensor upstream = dense(grad, ScalarType::Float);
  auto given = [](const Tensor& t) { return t.numel() ? std::optional(t) : std::nullopt; };
  const KDIncoming incoming{upstream, given(grad_probs), given(grad_targets), divisor, angle_weight};
  auto [grad_student, grad_weights] =
      multi_teacher_kd_backward(incoming, student, teachers, converted(weights, ScalarType::Float), labels, stats, set,
                                need_student, need_weights, on);
  auto none = [&] { return empty(student, {0}, ScalarType::Float); };
  if (!features) return {grad_student, converted(grad_weights, weights.scalar_type()), none(), none(), none()};
  if (!need_weights) return {grad_student, none(), none(), none(), none()};
  auto [grad_features, grad_theta, grad_v] = teacher_weights_bwd(
      grad_weights, *features, dense(*theta, ScalarType::Float), dense(*v, ScalarType::Float), pooled, index, max_pool,
      need_features, need_parameters, values(upstream), 2 * regularizer_weight);
  if (need_parameters) {
    grad_theta = converted(grad_theta, theta->scalar_type());
    grad_v = converted(grad_v, v->scalar_type());
  }
  return {grad_student, none(), grad_features, grad_theta, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("whole_loss_fwd", TORCH_BOX(&whole_loss_fwd));
  m.impl("whole_loss_bwd", TORCH_BOX(&whole_loss_bwd));
}

}  // namespace
}  // namespace amtml::gpu
