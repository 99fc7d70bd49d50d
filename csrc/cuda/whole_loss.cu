// AMTMLLoss without hints in one call each way, as csrc/cpu/whole_loss.cpp, in few launches: forward the weights (1),
// the rows of the distillation (1) and the angle loss with the sums of all terms (3 at N = 128), backward the rows (1)
// and the weights with their parameters (1). Each starts while the one before it ends. What forward sends back is
// scaled where backward reads it, all that passes between the kernels lies in one allocation, and nothing waits for the
// host.
#include "ops.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "AMTMLLoss";
constexpr int kThreads = 256;

// Without an angle loss, whose last kernel does it otherwise.
__global__ void terms_kernel(const __grid_constant__ Terms terms) {
  wait_for_previous();
  write_terms(terms, 0, &shared<double>());
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor8 whole_loss_fwd(std::optional<Tensor> features, std::optional<Tensor> theta, std::optional<Tensor> v,
                       std::optional<Tensor> given_weights, const Tensor& student, std::vector<Tensor> teachers,
                       std::optional<Tensor> labels, std::optional<Tensor> divisor, double temperature,
                       double ce_weight, double kl_weight, double kl_scale, Name mode, Name reduction,
                       int64_t ignore_index, double label_smoothing, bool max_pool, double angle_weight, double delta,
                       double eps, double regularizer_weight, bool need_student_grad, bool need_targets_grad) {
  STD_TORCH_CHECK(features.has_value() != given_weights.has_value(), kOp, ": either features or weights must be given");
  const OnDevice on(student);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  auto none = [&] { return empty(student, {0}, ScalarType::Float); };  // outputs may not be shared
  const bool with_angle = angle_weight != 0, mean = reduction == "mean";
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(teachers.size());
  const std::optional<Tensor> y = labels ? std::optional(dense(*labels)) : std::nullopt;
  const auto by = as_float(divisor), factors = as_float(theta), scale = as_float(v);

  const Tensor loss = empty(student, {}, ScalarType::Float), terms = empty(student, {6}, ScalarType::Float);
  const Tensor stats = empty(student, {n, 3 + 2 * count}, ScalarType::Float);
  const Tensor grad_probs = empty_or_none(student, with_angle && need_student_grad, {n, c}, ScalarType::Float);
  const Tensor grad_targets = empty_or_none(student, with_angle && need_targets_grad, {n, c}, ScalarType::Float);
  Tensor weights, pooled, index;
  if (features) {
    std::tie(weights, pooled, index) = teacher_weights_fwd(*features, *factors, *scale, max_pool);
  } else {
    weights = converted(*given_weights, ScalarType::Float), pooled = none(), index = none();
  }

  Wanted want{};
  want.stats = floats(stats);
  AngleCall angle_call{Points(nullptr, c), Points(nullptr, c)};
  if (y) angle_call.takes_part = {y->const_data_ptr(), n, 1, ignore_index, sizeof(int64_t)};
  angle_call.takes_part.n = n;
  angle_call.vertex_weight = nullptr, angle_call.delta = delta, angle_call.eps = eps;
  angle_call.reduction = AngleReduction::kMean, angle_call.gradients = need_student_grad + need_targets_grad;
  angle_call.grad_one = need_student_grad ? floats(grad_probs) : nullptr;
  angle_call.grad_other = need_targets_grad ? floats(grad_targets) : nullptr;
  angle_call.loss = floats(loss);
  const bool swap = need_targets_grad && !need_student_grad;
  if (swap) std::swap(angle_call.grad_one, angle_call.grad_other);
  void* angle_memory = nullptr;
  RowSums* parts = nullptr;
  auto lay_out = [&](Pieces pieces) {
    want.ce_rows = pieces.take<double>(n), want.kl_rows = pieces.take<double>(n);
    if (!with_angle) {
      parts = pieces.take<RowSums>(n > kSumAlone ? kParts : 0);
      return pieces;
    }
    want.student_probs = pieces.take<float>(n * c), want.targets = pieces.take<float>(n * c);
    angle_memory = pieces.take<unsigned char>(static_cast<int64_t>(angle_scratch(angle_call, on)));
    return pieces;
  };
  const Tensor memory = memory_for(student, lay_out(Pieces()));
  lay_out(Pieces(memory.mutable_data_ptr()));

  multi_teacher_kd_forward(student, teachers, weights, y, set, want, on, features.has_value());
  const int64_t* label = y ? static_cast<const int64_t*>(y->const_data_ptr()) : nullptr;
  Terms sums{{want.ce_rows, want.kl_rows, n, label, ignore_index, nullptr}, c};
  sums.mean_rows = mean || reduction == "batchmean", sums.mean_classes = mean;
  sums.divisor = values(by);
  if (features && regularizer_weight != 0) {
    sums.theta = values(factors), sums.v = values(scale);
    sums.theta_count = factors->numel(), sums.v_count = scale->numel();
  }
  sums.ce_weight = static_cast<float>(ce_weight), sums.kl_weight = static_cast<float>(kl_weight);
  sums.angle_weight = static_cast<float>(angle_weight);
  sums.regularizer_weight = static_cast<float>(regularizer_weight);
  sums.loss = floats(loss), sums.terms = floats(terms);
  if (with_angle) {
    angle_call.one = Points(want.student_probs, c), angle_call.other = Points(want.targets, c);
    if (swap) std::swap(angle_call.one, angle_call.other);
    angle_call.terms = sums;
    angle(angle_call, angle_memory, on, true);
  } else {
    if (n > kSumAlone) {
      sum_parts(sums.rows, parts, on);
      sums.rows.parts = parts;
    }
    launch(terms_kernel, {1, kThreads, 1, kWarp * sizeof(double), true}, on, sums);
  }
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
  auto none = [&] { return empty(student, {0}, ScalarType::Float); };
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(teachers.size());
  const bool to_features = features && need_weights && need_features;
  const bool to_parameters = features && need_weights && need_parameters;
  const Tensor grad_student = empty_or_none(student, need_student, {n, c}, student.scalar_type());
  Tensor grad_features = to_features ? torch::stable::empty_like(*features) : none();
  Tensor grad_theta = to_parameters ? empty(student, {count, theta->size(1)}, ScalarType::Float) : none();
  Tensor grad_v = to_parameters ? empty(student, {v->size(0)}, ScalarType::Float) : none();
  Tensor grad_weights = features ? none() : empty_or_none(student, need_weights, {n, count}, ScalarType::Float);
  {
    const OnDevice on(student);
    const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
    const Tensor upstream = dense(grad, ScalarType::Float), w = converted(weights, ScalarType::Float);
    auto given = [](const Tensor& t) { return t.numel() ? std::optional(t) : std::nullopt; };
    const KDIncoming incoming{upstream, given(grad_probs), given(grad_targets), divisor, angle_weight};
    // [2, N, T]: what comes back to the weights, and the slopes of their scores
    const Tensor scratch = empty_or_none(student, features && need_weights, {2, n, count}, ScalarType::Float);
    Wanted want{};
    if (need_student) want.grad_student = grad_student.mutable_data_ptr();
    if (need_weights) want.grad_weights = floats(features ? scratch : grad_weights);
    multi_teacher_kd_backward(incoming, student, teachers, w, labels, stats, set, want, on);
    if (features && need_weights) {
      const WeightsGrads grads{to_features ? grad_features.mutable_data_ptr() : nullptr,
                               to_parameters ? floats(grad_theta) : nullptr, to_parameters ? floats(grad_v) : nullptr};
      const Decay decay{floats(upstream), static_cast<float>(2 * regularizer_weight)};
      teacher_weights_backward({Values(want.grad_weights), count, 1}, *features, *as_float(theta), *as_float(v), pooled,
                               index, max_pool, to_features ? grad_features : *features, grads,
                               want.grad_weights + n * count, floats(w), decay, on, true);
    }
  }
  // to the parameters' own dtypes
  if (!features) return {grad_student, converted(grad_weights, weights.scalar_type()), none(), none(), none()};
  if (to_parameters) {
    grad_theta = converted(grad_theta, theta->scalar_type());
    grad_v = converted(grad_v, v->scalar_type());
  }
  return {grad_student, grad_weights, grad_features, grad_theta, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("whole_loss_fwd", TORCH_BOX(&whole_loss_fwd));
  m.impl("whole_loss_bwd", TORCH_BOX(&whole_loss_bwd));
}

}  // namespace
}  // namespace amtml::gpu
