// The kernels that others build on; amtml_fast/ops.py has what they take and give.
#pragma once

#include "../common.h"

namespace amtml {

using Tensor8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor, Tensor> teacher_weights_fwd(const Tensor& features, const Tensor& theta, const Tensor& v,
                                                       bool use_max);
std::tuple<Tensor, Tensor, Tensor> teacher_weights_bwd(const Tensor& grad, const Tensor& features, const Tensor& theta,
                                                       const Tensor& v, const Tensor& pooled, const Tensor& index,
                                                       bool use_max, bool need_features, bool need_parameters);

Tensor8 multi_teacher_kd_fwd(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                             std::optional<Tensor> labels, double temperature, double ce_weight, double kl_weight,
                             double kl_scale, std::string mode, std::string reduction, int64_t ignore_index,
                             double label_smoothing, bool need_student_grad, bool need_weights_grad, bool need_probs);
std::tuple<Tensor, Tensor> multi_teacher_kd_bwd(const Tensor& grad_loss, std::optional<Tensor> grad_probs,
                                                std::optional<Tensor> grad_targets, const Tensor& student,
                                                std::vector<Tensor> teachers, std::optional<Tensor> weights,
                                                std::optional<Tensor> labels, const Tensor& stats, double temperature,
                                                double ce_weight, double kl_weight, double kl_scale, std::string mode,
                                                std::string reduction, int64_t ignore_index, double label_smoothing,
                                                bool need_student_grad, bool need_weights_grad);

std::tuple<Tensor, Tensor, Tensor> angle_fwd(const Tensor& student, const Tensor& teacher,
                                             std::optional<Tensor> row_mask, double delta, double eps,
                                             std::string reduction, bool need_student_grad, bool need_teacher_grad);

}  // namespace amtml
