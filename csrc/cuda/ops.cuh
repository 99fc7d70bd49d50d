// The kernels that others build on; amtml_fast/ops has what the operators take and give.
#pragma once

#include "../kd_settings.h"
#include "points.cuh"
#include "terms.cuh"

namespace amtml::gpu {  // apart from the CPU's of the same name

// What a pass over the rows of a distillation makes; null where it is not asked for.
struct Wanted {
  double *ce_rows, *kl_rows;       // [N] times kl_scale, before the reduction
  float *loss, *ce, *kl;           // [N], instead, for the reduction "none"
  float *student_probs, *targets;  // [N, C]
  float* stats;                    // [N, 3 + 2T]: maximum, inverse sums at tau and at 1; maximum, inverse sum a teacher
  void* grad_student;              // [N, C]
  float* grad_weights;             // [N, T]
};

// early: as in Spread; of all inputs the weights alone may come from the kernel in front.
void multi_teacher_kd_forward(const Tensor& student, const std::vector<Tensor>& teachers,
                              const std::optional<Tensor>& weights, const std::optional<Tensor>& labels,
                              const KDSettings& set, const Wanted& want, const OnDevice& on, bool early);

// What comes back to the distillation.
struct KDIncoming {
  Tensor grad_loss;                                // scalar, or [N] for the reduction "none"
  std::optional<Tensor> grad_probs, grad_targets;  // [N, C], through student_probs and soft_targets
  std::optional<Tensor> divisor;                   // scalar: of the loss
  std::optional<double> probs_factor;  // with it, grad_probs and grad_targets count factor * grad_loss times
};

// Gradients to student [N, C] and weights [N, T], where `want` has a place for them.
void multi_teacher_kd_backward(const KDIncoming& incoming, const Tensor& student, const std::vector<Tensor>& teachers,
                               const std::optional<Tensor>& weights, const std::optional<Tensor>& labels,
                               const Tensor& stats, const KDSettings& set, const Wanted& want, const OnDevice& on);

std::tuple<Tensor, Tensor, Tensor> teacher_weights_fwd(const Tensor& features, const Tensor& theta, const Tensor& v,
                                                       bool use_max);

// Adds factor * upstream * parameter to each gradient, unless upstream is null.
struct Decay {
  const float* upstream;  // one number on the device
  float factor;
};

// The gradient of the weights, [N, T] in any of the GPU's dtypes.
struct WeightsIncoming {
  Values values;
  int64_t sn, st;
};

// Where the gradients go; null where they are not wanted. Those of theta and v are wanted both or not at all.
struct WeightsGrads {
  void* features;  // in the dtype and the strides of `map_like`
  float *theta, *v;
};

// slopes: [N, T] of scratch, for the gradients of theta and v.
// weights: the result of forward, [N, T] dense; with it, and few examples, all is one launch. early: as in Spread.
void teacher_weights_backward(const WeightsIncoming& incoming, const Tensor& features, const Tensor& theta,
                              const Tensor& v, const Tensor& pooled, const Tensor& index, bool use_max,
                              const Tensor& map_like, const WeightsGrads& grads, float* slopes, const float* weights,
                              const Decay& decay, const OnDevice& on, bool early);

enum class AngleReduction { kMean, kDistinct, kSum, kNone };

// An angle loss: csrc/cuda/angle.cu.
struct AngleCall {
  Points one, other;  // the sides; a gradient to the second alone makes them change places
  TakingPart takes_part;
  const float* vertex_weight;  // [N] on the device, or null
  double delta, eps;
  AngleReduction reduction;
  int gradients;                 // of the first sides
  float *grad_one, *grad_other;  // [N, C]
  float* loss;                   // one, or [N] for the reduction "none"; null where it is not wanted
  Terms terms;                   // with what the loss is added up, or nothing
};

// Bytes of scratch that it takes. early: as in Spread.
size_t angle_scratch(const AngleCall& call, const OnDevice& on);
void angle(const AngleCall& call, void* scratch, const OnDevice& on, bool early);

}  // namespace amtml::gpu
