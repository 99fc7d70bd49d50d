// The kernels that others build on; amtml_fast/ops/ says what they take and give.
#pragma once

#include "../common.h"
#include "../kd_settings.h"

namespace amtml {

std::tuple<Tensor, Tensor, Tensor> teacher_weights_fwd(const Tensor& features, const Tensor& theta, const Tensor& v,
                                                       bool use_max);
std::tuple<Tensor, Tensor, Tensor> teacher_weights_bwd(const Tensor& grad, const Tensor& features, const Tensor& theta,
                                                       const Tensor& v, const Tensor& pooled, const Tensor& index,
                                                       bool use_max, bool need_features, bool need_parameters);

Tensor8 multi_teacher_kd_forward(const Tensor& student, const std::vector<Tensor>& teachers,
                                 const std::optional<Tensor>& weights, const std::optional<Tensor>& labels,
                                 const KDSettings& set, bool need_student_grad, bool need_weights_grad,
                                 bool need_probs);

// What comes back to the distillation.
struct KDIncoming {
  Tensor grad_loss;                                // scalar, or [N] for the reduction "none"
  std::optional<Tensor> grad_probs, grad_targets;  // [N, C], through student_probs and soft_targets
};

// Gradients to student [N, C] and weights [N, T].
std::tuple<Tensor, Tensor> multi_teacher_kd_backward(const KDIncoming& incoming, const Tensor& student,
                                                     const std::vector<Tensor>& teachers,
                                                     const std::optional<Tensor>& weights,
                                                     const std::optional<Tensor>& labels, const Tensor& stats,
                                                     const KDSettings& set, bool need_student_grad,
                                                     bool need_weights_grad);

std::tuple<Tensor, Tensor, Tensor> angle_fwd(const Tensor& student, const Tensor& teacher,
                                             std::optional<Tensor> row_mask, double delta, double eps, Name reduction,
                                             bool need_student_grad, bool need_teacher_grad);

}  // namespace amtml
