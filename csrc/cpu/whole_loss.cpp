// AMTMLLoss without hints in one call each way: teacher weights, distillation, angle loss, regularizer.
//
// The soft targets of the distillation pass go straight into the angle loss, and its gradient straight back into the
// distillation's. One call instead of five and a dozen small tensors between them: at a batch of 128 that is what the
// loss costs besides its arithmetic.
#include "ops.h"
#include "simd.h"

namespace amtml {
namespace {

constexpr char kOp[] = "AMTMLLoss";

// Each call into torch costs more than the loops here, so tensors that are float already are read as they are.
double item(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Float) return *static_cast<const float*>(t.const_data_ptr());
  const Tensor wide = converted(t, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

void put(Tensor& t, int64_t i, double value) {
  if (t.scalar_type() == ScalarType::Double) {
    static_cast<double*>(t.mutable_data_ptr())[i] = value;
  } else {
    static_cast<float*>(t.mutable_data_ptr())[i] = static_cast<float>(value);
  }
}

ScalarType factors_dtype(const Tensor& features, const Tensor& theta, const Tensor& v) {
  for (const Tensor* t : {&features, &theta, &v}) {
    if (t->scalar_type() == ScalarType::Double) return ScalarType::Double;
  }
  return ScalarType::Float;
}

double sum_of_squares(const Tensor& t) {
  const ScalarType dtype = wide_dtype(t.scalar_type());
  const Tensor flat = dense(t, dtype);
  double sum = 0;
  dispatch_wide(dtype, [&](auto zero) {
    const auto* x = static_cast<const decltype(zero)*>(flat.const_data_ptr());
    for (int64_t i = 0; i < t.numel(); ++i) sum += static_cast<double>(x[i]) * x[i];
  });
  return sum;
}

// grad + factor * parameter, in the dtype of the parameter.
Tensor with_decay(const Tensor& grad, const Tensor& parameter, double factor) {
  const Tensor flat = dense(parameter, grad.scalar_type());
  dispatch_wide(grad.scalar_type(), [&](auto zero) {
    using A = decltype(zero);
    A* g = static_cast<A*>(grad.mutable_data_ptr());
    const A* p = static_cast<const A*>(flat.const_data_ptr());
    for (int64_t i = 0; i < grad.numel(); ++i) g[i] += static_cast<A>(factor * p[i]);
  });
  return converted(grad, parameter.scalar_type());
}

// The rows that take part in the angle loss, or nothing if all do.
std::optional<Tensor> row_mask(const std::optional<Tensor>& labels, int64_t ignore_index) {
  if (!labels) return std::nullopt;
  const Tensor flat = dense(*labels, ScalarType::Long);
  const int64_t *y = static_cast<const int64_t*>(flat.const_data_ptr()), n = flat.numel();
  if (std::find(y, y + n, ignore_index) == y + n) return std::nullopt;
  Tensor mask = empty(*labels, {n}, ScalarType::Bool);
  bool* keep = static_cast<bool*>(mask.mutable_data_ptr());
  for (int64_t i = 0; i < n; ++i) keep[i] = y[i] != ignore_index;
  return mask;
}

Tensor8 whole_loss_fwd(std::optional<Tensor> features, std::optional<Tensor> theta, std::optional<Tensor> v,
                       std::optional<Tensor> given_weights, const Tensor& student, std::vector<Tensor> teachers,
                       std::optional<Tensor> labels, std::optional<Tensor> divisor, double temperature,
                       double ce_weight, double kl_weight, double kl_scale, Name mode, Name reduction,
                       int64_t ignore_index, double label_smoothing, bool max_pool, double angle_weight, double delta,
                       double eps, double regularizer_weight, bool need_student_grad, bool need_targets_grad) {
  STD_TORCH_CHECK(features.has_value() != given_weights.has_value(), kOp, ": either features or weights must be given");
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  auto none = [&] { return empty(student, {0}, ScalarType::Float); };  // outputs may not be shared
  Tensor weights = none(), pooled = none(), index = none(), grad_probs = none(), grad_targets = none();
  double regularizer = 0;
  if (features) {
    const ScalarType dtype = factors_dtype(*features, *theta, *v);
    std::tie(weights, pooled, index) =
        teacher_weights_fwd(*features, converted(*theta, dtype), converted(*v, dtype), max_pool);
    if (regularizer_weight != 0) regularizer = sum_of_squares(*theta) + sum_of_squares(*v);
  } else {
    weights = *given_weights;
  }
  bool is_double = student.scalar_type() == ScalarType::Double || weights.scalar_type() == ScalarType::Double;
  for (const Tensor& t : teachers) is_double |= t.scalar_type() == ScalarType::Double;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  auto [loss, ce, kl, probs, targets, stats, unused_student, unused_weights] = multi_teacher_kd_forward(
      student, teachers, converted(weights, wide), labels, set, false, false, angle_weight != 0);
  const double by = divisor ? 1 / item(*divisor) : 1, kd = item(loss) * by;
  double angle = 0;
  if (angle_weight != 0) {
    Tensor value = none();
    std::tie(value, grad_probs, grad_targets) = angle_fwd(probs, targets, row_mask(labels, ignore_index), delta, eps,
                                                          "mean", need_student_grad, need_targets_grad);
    angle = item(value);
  }
  Tensor terms = empty(student, {6}, wide);
  const double values[6] = {kd, item(ce) * by, item(kl) * by, angle, 0, regularizer};
  for (int i = 0; i < 6; ++i) put(terms, i, values[i]);
  double total = kd;  // not 0 * infinity
  if (angle_weight != 0) total += angle_weight * angle;
  if (regularizer_weight != 0) total += regularizer_weight * regularizer;
  put(loss, 0, total);
  return {loss, terms, features ? weights : none(), pooled, index, stats, grad_probs, grad_targets};
}

Tensor5 whole_loss_bwd(const Tensor& grad, std::optional<Tensor> features, std::optional<Tensor> theta,
                       std::optional<Tensor> v, const Tensor& weights, const Tensor& pooled, const Tensor& index,
                       const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> labels,
                       const Tensor& stats, const Tensor& grad_probs, const Tensor& grad_targets,
                       std::optional<Tensor> divisor, double temperature, double ce_weight, double kl_weight,
                       double kl_scale, Name mode, Name reduction, int64_t ignore_index, double label_smoothing,
                       bool max_pool, double angle_weight, double regularizer_weight, bool need_student,
                       bool need_weights, bool need_features, bool need_parameters) {
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  const ScalarType wide = stats.scalar_type();
  const double g = item(grad);
  auto scaled = [&](const Tensor& t) -> std::optional<Tensor> {
    if (t.numel() == 0) return std::nullopt;
    Tensor out = empty(t, {t.size(0), t.size(1)}, t.scalar_type());
    dispatch_wide(t.scalar_type(), [&](auto zero) {
      using A = decltype(zero);
      const A *from = static_cast<const A*>(t.const_data_ptr()), by = static_cast<A>(g * angle_weight);
      A* to = static_cast<A*>(out.mutable_data_ptr());
      for (int64_t i = 0; i < t.numel(); ++i) to[i] = from[i] * by;
    });
    return out;
  };
  Tensor upstream = empty(student, {}, wide);
  put(upstream, 0, divisor ? g / item(*divisor) : g);
  auto [grad_student, grad_weights] =
      multi_teacher_kd_backward({upstream, scaled(grad_probs), scaled(grad_targets)}, student, teachers,
                                converted(weights, wide), labels, stats, set, need_student, need_weights);
  auto none = [&] { return empty(student, {0}, ScalarType::Float); };
  if (!features) return {grad_student, converted(grad_weights, weights.scalar_type()), none(), none(), none()};
  Tensor grad_features = none(), grad_theta = none(), grad_v = none();
  if (need_weights) {
    const ScalarType dtype = factors_dtype(*features, *theta, *v);
    std::tie(grad_features, grad_theta, grad_v) =
        teacher_weights_bwd(grad_weights, *features, converted(*theta, dtype), converted(*v, dtype), pooled, index,
                            max_pool, need_features, need_parameters);
    if (need_parameters) {
      grad_theta = with_decay(grad_theta, *theta, 2 * regularizer_weight * g);
      grad_v = with_decay(grad_v, *v, 2 * regularizer_weight * g);
    }
  }
  return {grad_student, none(), grad_features, grad_theta, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("whole_loss_fwd", TORCH_BOX(&whole_loss_fwd));
  m.impl("whole_loss_bwd", TORCH_BOX(&whole_loss_bwd));
}

}  // namespace
}  // namespace amtml
