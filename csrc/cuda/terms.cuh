// The sums of all terms of AMTMLLoss, by one block: in a kernel of its own, or in the angle loss's last one, where
// other blocks have work besides.
#pragma once

#include "row_sums.cuh"

namespace amtml::gpu {

struct Terms {
  SummedRows rows;
  int64_t classes;
  bool mean_rows, mean_classes;
  const float* divisor;    // or null
  const float *theta, *v;  // whose squares are summed; or none of them
  int64_t theta_count, v_count;
  float ce_weight, kl_weight, angle_weight, regularizer_weight;
  float *loss, *terms;  // terms [6]: kd, ce, kl, angle, 0 for the hint, regularizer. Null: nothing is wanted
};

__device__ inline double squares(const float* x, int64_t count) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

// A term without weight is left out of the loss: 0 * infinity is NaN. `angle` counts in the first thread.
__device__ inline void write_terms(const Terms& of, double angle, double* scratch) {
  __syncthreads();
  const RowSums sums = all_sums(of.rows, scratch);
  const double regularizer = block_sum(squares(of.theta, of.theta_count) + squares(of.v, of.v_count), scratch);
  if (threadIdx.x != 0) return;
  const double rows = of.mean_rows ? fmax(sums.count, 1.0) : 1, by = of.divisor ? 1.0 / *of.divisor : 1;
  const double ce = by * sums.ce / rows, kl = by * sums.kl / (of.mean_classes ? rows * of.classes : rows);
  const double kd = (of.ce_weight == 0 ? 0 : of.ce_weight * ce) + (of.kl_weight == 0 ? 0 : of.kl_weight * kl);
  double total = kd;
  if (of.angle_weight != 0) total += of.angle_weight * angle;
  if (of.regularizer_weight != 0) total += of.regularizer_weight * regularizer;
  const double values[6] = {kd, ce, kl, angle, 0, regularizer};
  for (int k = 0; k < 6; ++k) of.terms[k] = static_cast<float>(values[k]);
  *of.loss = static_cast<float>(total);
}

}  // namespace amtml::gpu
