// The kernels that others build on; amtml_fast/ops.py has what they take and give.
#pragma once

#include "../kd_settings.h"
#include "common.cuh"

namespace amtml::gpu {  // apart from the CPU's of the same name

struct KDRows {
  Tensor loss, ce, kl, student_probs, soft_targets, stats, grad_student, grad_weights;
  Tensor values;  // [2, N] float64: each row's cross-entropy and KL before the reduction, unless that is "none"
};

// The forward pass; loss, ce and kl are written only with `reduce`, or for the reduction "none".
KDRows multi_teacher_kd_forward(const Tensor& student, const std::vector<Tensor>& teachers,
                                const std::optional<Tensor>& weights, const std::optional<Tensor>& labels,
                                const KDSettings& set, bool need_student_grad, bool need_weights_grad, bool need_probs,
                                bool reduce, const OnDevice& on);

// What comes back to the distillation.
struct KDIncoming {
  Tensor grad_loss;                                // scalar, or [N] for the reduction "none"
  std::optional<Tensor> grad_probs, grad_targets;  // [N, C], through student_probs and soft_targets
  std::optional<Tensor> divisor;                   // scalar: of the loss
  std::optional<double> probs_factor;  // with it, grad_probs and grad_targets count factor * grad_loss times
};

// Gradients to student [N, C] and weights [N, T].
std::tuple<Tensor, Tensor> multi_teacher_kd_backward(const KDIncoming& incoming, const Tensor& student,
                                                     const std::vector<Tensor>& teachers,
                                                     const std::optional<Tensor>& weights,
                                                     const std::optional<Tensor>& labels, const Tensor& stats,
                                                     const KDSettings& set, bool need_student_grad,
                                                     bool need_weights_grad, const OnDevice& on);

// As csrc/cpu/ops.h has them. With `upstream`, one float on the device, backward adds factor * upstream * parameter to
// the gradients of theta and v.
std::tuple<Tensor, Tensor, Tensor> teacher_weights_fwd(const Tensor& features, const Tensor& theta, const Tensor& v,
                                                       bool use_max);
std::tuple<Tensor, Tensor, Tensor> teacher_weights_bwd(const Tensor& grad, const Tensor& features, const Tensor& theta,
                                                       const Tensor& v, const Tensor& pooled, const Tensor& index,
                                                       bool use_max, bool need_features, bool need_parameters,
                                                       const float* upstream = nullptr, double factor = 0);

// What the angle loss is made of. Rows where row_mask is false, or whose label is ignore_index, take no part, whatever
// they hold: one of the two or none is given.
struct AngleRows {
  const Tensor &student, &teacher;  // [N, C]
  std::optional<Tensor> row_mask;   // [N] bool
  std::optional<Tensor> labels;     // [N] int32 or int64 (others are converted)
  int64_t ignore_index;
};

// The loss, and its gradients to student and teacher [N, C] float32, or [0] where not needed. Three launches up to
// N = 128, four up to 800.
std::tuple<Tensor, Tensor, Tensor> angle_rows(const AngleRows& rows, double delta, double eps,
                                              const std::string& reduction, bool need_student_grad,
                                              bool need_teacher_grad);

}  // namespace amtml::gpu
