// Distillation of rows of few classes from a few teachers: several rows a warp. A row has 1 to 8 lanes, and each lane
// keeps what it has of the student's logits and of the teachers' exponentials in registers, so that nothing is read
// twice and no block waits for another row.
//
// Traffic: T + 1 rows in once, and one out. Exponentials of a class: T + 1, and two more where there are labels.
#pragma once

#include "multi_teacher_kd.cuh"

namespace amtml::gpu {

constexpr int kFewTeachers = 4;
constexpr int kOwn = 8;       // classes of a lane, at most
constexpr int kFewLanes = 8;  // of a row, at most
#ifdef AMTML_EMULATED_CUDA    // so that few rows fill a block, too
constexpr int kFewThreads = 64, kFewBlocks = 1;
#else
constexpr int kFewThreads = 128, kFewBlocks = 264;
#endif

// The lanes of a row: neighbors in a warp, a power of two. Its class k * count + lane is the k-th of a lane.
struct RowLanes {
  int shift, count, lane, steps, own;  // steps: classes of the first lane; own: of this one

  __device__ RowLanes(int shift, int classes)  // 1 << shift lanes
      : shift(shift),
        count(1 << shift),
        lane(static_cast<int>(threadIdx.x) & (count - 1)),
        steps((classes + count - 1) >> shift),
        own((classes - lane + count - 1) >> shift) {}
  // Calls use(k) for all steps; a lane may have no class in the last.
  template <class Use>
  __device__ __forceinline__ void each_step(const Use& use) const {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      if (k < steps) use(k);
    }
  }
  // The first of this lane in row i.
  template <class S>
  __device__ __forceinline__ S* first(S* rows, int64_t i, int64_t stride) const {
    return rows + i * stride + lane;
  }
  __device__ __forceinline__ float sum(float x) const {
    for (int by = count / 2; by > 0; by /= 2) x += __shfl_xor_sync(~0u, x, by);
    return x;
  }
  __device__ __forceinline__ float max(float x) const {  // NaN is left out
    for (int by = count / 2; by > 0; by /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, by));
    return x;
  }
};

// The softmax of a row.
struct FewSoftmax {
  float max = -INFINITY, inverse;  // of the sum of exp((x - max) / tau)

  // e may be x itself.
  __device__ __forceinline__ void make(const RowLanes& lanes, const float (&x)[kOwn], float unit, float (&e)[kOwn]) {
    lanes.each_step([&](int k) { max = fmaxf(max, x[k]); });
    max = lanes.max(max);
    const float shift = max == -INFINITY ? 0.0f : max;
    float sum = 0;
    lanes.each_step([&](int k) { sum += e[k] = exp2f((x[k] - shift) * unit); });
    sum = lanes.sum(sum);
    inverse = max == -INFINITY ? NAN : 1 / sum;  // no class has a probability
  }
};

template <class S, int T>
__global__ void __launch_bounds__(kFewThreads, T < 4 ? 5 : 4)
    few_kernel(const __grid_constant__ Problem pr, const Wanted want, const Incoming in, Pass pass, int lanes_shift) {
  double* const scratch = &shared<double>();  // [32]
  const int classes = static_cast<int>(pr.classes);
  const RowLanes lanes(lanes_shift, classes);
  const int64_t at = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) >> lanes_shift, i = least(at, pr.rows - 1);
  const bool forward = pass == Pass::kForward, first = lanes.lane == 0;
  let_next_start();
  if (!forward) wait_for_previous();
  if (pass == Pass::kRescale && !in.each_row && in.of_loss(0) == 1) return;  // all of the grid
  bool on = at < pr.rows && !pr.ignored(i);
  const float g = forward ? 1.0f : in.of_loss(i);
  if (pass == Pass::kRescale && on) on = !rescaled<S, 1>(pr, want, i, 0, classes, g, lanes.lane, lanes.count);

  float z[kOwn], e[T][kOwn];
  auto load_own = [&](const Rows& rows, float (&to)[kOwn]) {
    const S* from = lanes.first(static_cast<const S*>(rows.data), i, rows.stride);
    const int count = on ? lanes.own : 0;
#pragma unroll
    for (int k = 0; k < kOwn; ++k, from += lanes.count) to[k] = k < count ? static_cast<float>(*from) : -INFINITY;
  };
  load_own(pr.student, z);
#pragma unroll
  for (int t = 0; t < T; ++t) load_own(pr.teacher[t], e[t]);
  if (forward) wait_for_previous();
  float ce_grad, kl_grad;
  gradient_scales(pr, scratch, &ce_grad, &kl_grad);
  ce_grad *= g, kl_grad *= g;

  const float per_tau = 1 / pr.temperature;
  FewSoftmax q, of[T];
  float e_q[kOwn], sum1 = 0, factor[T], total = 0;
  q.make(lanes, z, pr.unit, e_q);
  if (pr.labels) lanes.each_step([&](int k) { sum1 += exp2f((z[k] - q.max) * kLog2e); });
  sum1 = pr.labels ? lanes.sum(sum1) : 1.0f;
  const float inverse1 = 1 / sum1;
  float* const stats = forward && on && first ? want.stats + i * (3 + 2 * T) : nullptr;
  if (stats) stats[0] = q.max, stats[1] = q.inverse, stats[2] = inverse1;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    FewSoftmax& p = of[t];
    p.make(lanes, e[t], pr.unit, e[t]);
    if (stats) stats[3 + 2 * t] = p.max, stats[4 + 2 * t] = p.inverse;
    const float w = on ? pr.weight(i, t) : 0.0f;
    if (w == 0 && !(fabsf(p.inverse) < INFINITY)) {  // it may hold NaN: left out
      p.inverse = 0;
      lanes.each_step([&](int k) { e[t][k] = 0; });
    }
    total += w, factor[t] = w * p.inverse;
  }
  // Rounding the log-sum to float32 would bias every KL near 0: what that cuts off is added at the end.
  const double exact_log_sum = -log(static_cast<double>(q.inverse));
  const float log_sum = static_cast<float>(exact_log_sum), smoothing = pr.label_smoothing;
  const int label = pr.labels && on ? static_cast<int>(pr.labels[i]) : -1;
  const int label_step = (label & (lanes.count - 1)) == lanes.lane ? label >> lanes.shift : -1;
  const float even = smoothing == 0 ? 0.0f : ce_grad * smoothing / static_cast<float>(classes);
  const float hit = ce_grad * (1 - smoothing);
  const float of_kl = kl_grad * per_tau, of_q1 = pr.labels ? ce_grad * inverse1 : 0.0f;
  S* const grads = want.grad_student ? lanes.first(static_cast<S*>(want.grad_student), i, pr.classes) : nullptr;
  float kl = 0, below = 0, slope[T] = {};
  lanes.each_step([&](int k) {
    float p = 0;
#pragma unroll
    for (int t = 0; t < T; ++t) p += factor[t] * e[t][k];
    const float ratio = if_mass(p, logf(p == 0 ? 1.0f : p) - ((z[k] - q.max) * pr.unit * kLog2 - log_sum));
    kl += if_mass(p, p * ratio);
#pragma unroll
    for (int t = 0; t < T; ++t) slope[t] += of[t].inverse * mixture_gradient(e[t][k], p, ratio);
    if (k >= lanes.own) return;
    below += q.max - z[k];
    if (!grads || !on) return;
    // a teacher without weight in the loss may hold NaN
    float grad = kl_grad == 0 ? 0.0f : kl_gradient(of_kl, total, e_q[k] * q.inverse, p);
    if (pr.labels) grad += of_q1 * exp2f((z[k] - q.max) * kLog2e) - even - (k == label_step ? hit : 0.0f);
    grads[k * lanes.count] = static_cast<S>(z[k] == -INFINITY ? 0.0f : grad);
  });
  kl = lanes.sum(kl), below = lanes.sum(below);
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const float sum = lanes.sum(slope[t]), inverse = of[t].inverse;
    if (!want.grad_weights || !on || !first) continue;
    want.grad_weights[i * T + t] = kl_grad == 0 ? 0.0f : kl_grad * (inverse == 0 ? 0.0f : 1 + sum);
  }
  if (at >= pr.rows || pass == Pass::kRescale) return;
  if (!on) return write_ignored<S>(pr, want, i, 0, classes, !forward, lanes.lane, lanes.count);
  if (!first || !(want.kl_rows || want.kl)) return;
  const float log_sum1 = static_cast<float>(log(static_cast<double>(sum1)));
  const double with_rest = total == 0 ? kl : kl + total * (exact_log_sum - log_sum);
  write_values<S>(pr, want, i, with_rest, below, q.max, log_sum1);
}

}  // namespace amtml::gpu
