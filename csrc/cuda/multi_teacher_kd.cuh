// Distillation of one row from T teachers in two sweeps, for what most calls are: a mixture of at most eight teachers
// in the student's dtype, with rows that can be read 16 bytes at a time. multi_teacher_kd.cu has the general kernel.
//
// A row is spread over a cluster of blocks. The first sweep makes the maxima and sums of all T + 1 softmaxes online;
// the second makes the loss and its gradients. All T + 1 loads of a place are issued together, T being a template
// argument.
//
// Traffic: T + 1 rows in twice, and one out. Exponentials of a class: T + 2 in each sweep.
#pragma once

#include "../arithmetic.h"
#include "kd_rows.cuh"

namespace amtml::gpu {

struct Problem : KDProblem {
  Rows teacher[kMaxTeachers];
  bool mixture;
  int keep;  // of a row's slice, as many packs of each thread stay in shared memory between the sweeps
};

// What comes back, for backward.
struct Incoming {
  const float* grad_loss;  // [N] or one
  bool each_row;
  const float* divisor;                    // of the loss, or null
  const float *grad_probs, *grad_targets;  // [N, C] dense, or null
  float probs_factor;                      // if not NaN, they count that times grad_loss

  __device__ float of_loss(int64_t i) const {
    const float g = grad_loss[each_row ? i : 0];
    return divisor ? g / *divisor : g;
  }
  __device__ float of_probs() const { return probs_factor == probs_factor ? probs_factor * *grad_loss : 1.0f; }
};

constexpr double kLog2eExact = 1.4426950408889634;
// Of the student's exponents: less its log-sum, which is at most 31 for 2^31 classes, they stay above -112.
constexpr float kLowest = -80;
constexpr float kMostMass = 1 << 14;  // of a mixture: the ratio that log_2_ratio makes of its bits stays below 2^127
#ifdef AMTML_EMULATED_CUDA            // so that small rows are spread, too
constexpr int kSweepThreads = 64, kSweepSteps = 1, kSweepBlocks = 8;
#else
constexpr int kSweepThreads = 256, kSweepSteps = 64, kSweepBlocks = 264;
#endif
constexpr int kSweepTeachers = 8, kSweepWarps = kSweepThreads / kWarp;

// log2(p) - y, for p and 2^y in [2^-112, 2]. The approximate logarithm cuts off what does not fit its result, which
// makes every KL a little too small: so it gets p over the power of 2 next to 2^y, of which the logarithm is small.
__device__ __forceinline__ float log_2_ratio(float p, float y) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: added, it rounds to an integer, which the last bits are then
  const float rounded = y + kRound, near = rounded - kRound;
  uint32_t bits, exponent;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&exponent, &rounded, sizeof(exponent));
  bits -= exponent << 23;
  float of_near, log;
  std::memcpy(&of_near, &bits, sizeof(bits));
#ifdef AMTML_EMULATED_CUDA
  log = log2f(of_near);
#else
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log) : "f"(of_near));
#endif
  return log - (y - near);
}

enum class Pass { kForward, kBackward, kRescale };

// Copies to shared memory that need neither registers nor the first-level cache while they are under way. A thread
// reads only what it copied itself, after waiting for it.
template <class S>
__device__ __forceinline__ void copy_to_shared(Packed<S>* to, const Packed<S>* from) {
#if defined(AMTML_EMULATED_CUDA) || !defined(__CUDA_ARCH__)
  *to = *from;
#else
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
#endif
}
__device__ __forceinline__ void wait_for_copies() {
#if !defined(AMTML_EMULATED_CUDA) && defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// What a block shares.
template <int T>
struct alignas(16) SweepScratch {
  double sums[kWarp];
  Online part[T + 1][kSweepWarps], of_block[T + 1], whole[T + 1];
  float max[T + 1], inverse[T + 1], weight[T];
  float inverse1, log2_sum, log_sum1, ce_grad, kl_grad, total;
  double rest;                                    // what log2_sum lost in rounding, times log 2
  float parts[T + 2][kMaxCluster * kSweepWarps];  // of all warps of the cluster, in its first block
  const void* rows[T + 1];                        // of all tensors
  void* grads;                                    // of the student, in this row; or null
  int label_pack;
  double totals[T + 2];  // KL, slopes of the weights, sum of maximum - z

  // Behind it: [keep][T + 1][threads] packs.
  template <class S>
  __device__ __forceinline__ Packed<S>* kept(int place, int t) {
    return reinterpret_cast<Packed<S>*>(this + 1) + (place * (T + 1) + t) * blockDim.x + threadIdx.x;
  }
};

// Exponents are fmaf(x, unit, base) with base = -maximum * unit, and those at temperature 1 are that times the
// temperature. The rounding of base is a factor of all exponentials of a row, and so of none of its probabilities; it
// is less than 2 up to kFar. Beyond, where masks are that have a number for infinity, far_sums and one class at a time
// take its place. Maxima start at the least that is not far: so nothing subtracts infinities, and what is masked has
// the sum 0.
constexpr float kFar = 1 << 23;

// (__fmul_rn: a product that became part of a multiply-add would be rounded another way from place to place.)
__device__ __forceinline__ float base_of(float max, float unit) { return -__fmul_rn(max, unit); }

// The sums from another maximum.
template <bool kSecond>
__device__ __forceinline__ Online moved(Online o, float max, const KDProblem& pr) {
  const float by = base_of(max, pr.unit) - base_of(o.max, pr.unit);
  o.sum *= power_of_2(by);
  if (kSecond) o.sum1 *= power_of_2(by * pr.temperature);
  o.max = max;
  return o;
}

// Of groups of `count` lanes, a power of two.
template <bool kSecond>
__device__ __forceinline__ Online merged(Online o, unsigned count, const KDProblem& pr) {
  float most = o.max;
  for (unsigned by = count / 2; by > 0; by /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, by));
  o = moved<kSecond>(o, most, pr);
  for (unsigned by = count / 2; by > 0; by /= 2) {
    o.sum += __shfl_xor_sync(~0u, o.sum, by);
    if (kSecond) o.sum1 += __shfl_xor_sync(~0u, o.sum1, by);
  }
  return o;
}

template <class S, bool kSecond>
__device__ __forceinline__ void first_sweep(const Packed<S>& pack, const KDProblem& pr, Online& o) {
  constexpr int kPack = Packed<S>::kCount;
  float x[kPack];
#pragma unroll
  for (int k = 0; k < kPack; ++k) x[k] = pack.at(k);
  float most = x[0];
#pragma unroll
  for (int k = 1; k < kPack; ++k) most = fmaxf(most, x[k]);
  if (most > o.max) o = moved<kSecond>(o, most, pr);
  const float base = base_of(o.max, pr.unit);
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    const float y = fmaf(x[k], pr.unit, base);
    o.sum += power_of_2(y);
    if (kSecond) o.sum1 += power_of_2(y * pr.temperature);
  }
}

// What the second sweep needs of a row.
template <int T>
struct Factors {
  float log2_sum, base[T + 1], weight[T];  // the weight times the inverse sum
  float of_q, of_p, of_q1, even;           // of which the gradient is a sum
  bool labels;
};

// The classes of a pack: their gradients to the student, and what they add to the KL over log 2 and to the slopes of
// the weights. False, and nothing added, if that takes more care: without mass, or with a student that is masked.
template <class S, int T>
__device__ __forceinline__ bool second_sweep(const KDProblem& pr, const Factors<T>& f, const Packed<S> (&in)[T + 1],
                                             Packed<S>& grads, float (&sums)[T + 1]) {
  float part[T + 1] = {}, least = 1, lowest = 0;
#pragma unroll
  for (int k = 0; k < Packed<S>::kCount; ++k) {
    float e[T];
#pragma unroll
    for (int t = 0; t < T; ++t) e[t] = power_of_2(fmaf(in[t + 1].at(k), pr.unit, f.base[t + 1]));
    float p = f.weight[0] * e[0];
#pragma unroll
    for (int t = 1; t < T; ++t) p = fmaf(f.weight[t], e[t], p);
    const float y = fmaf(in[0].at(k), pr.unit, f.base[0]), ratio = log_2_ratio(p, y - f.log2_sum);
    part[0] = fmaf(p, ratio, part[0]);
#pragma unroll
    for (int t = 0; t < T; ++t) part[t + 1] = fmaf(e[t], ratio, part[t + 1]);
    least = fminf(least, p), lowest = fminf(lowest, y);
    float grad = fmaf(-f.of_p, p, fmaf(f.of_q, power_of_2(y), f.even));
    if (f.labels) grad = fmaf(f.of_q1, power_of_2(y * pr.temperature), grad);
    grads.set(k, grad);
  }
  if (!(least > 0x1p-100f && lowest > kLowest)) return false;
#pragma unroll
  for (int t = 0; t <= T; ++t) sums[t] += part[t];
  return true;
}

// Gradients that forward has made for an incoming gradient of 1, times g, where that is exact: in float32, and for
// powers of two in 16 bits. False if they have to be made again, so that rounding happens once. By `threads` threads.
template <class S, int kPack>
__device__ bool rescaled(const Problem& pr, const Wanted& want, int64_t i, int64_t begin, int64_t end, float g,
                         unsigned thread, unsigned threads) {
  if (g == 1) return true;
  int exponent;
  if (sizeof(S) != sizeof(float) && fabsf(frexpf(g, &exponent)) != 0.5f) return false;
  S* const row = static_cast<S*>(want.grad_student) + i * pr.classes;
  for (int64_t c = begin + thread * kPack; want.grad_student && c < end; c += threads * kPack) {
    float x[kPack];
    load(row + c, x);
#pragma unroll
    for (int k = 0; k < kPack; ++k) x[k] *= g;
    store(row + c, x);
  }
  for (int t = thread; want.grad_weights && cluster_rank() == 0 && t < pr.teachers; t += threads) {
    want.grad_weights[i * pr.teachers + t] *= g;
  }
  return true;
}

template <class S>
__device__ void write_ignored(const Problem& pr, const Wanted& want, int64_t i, int64_t begin, int64_t end, bool again,
                              unsigned thread, unsigned threads) {
  for (int64_t c = i * pr.classes + begin + thread; c < i * pr.classes + end; c += threads) {
    if (want.student_probs) want.student_probs[c] = 0;
    if (want.targets) want.targets[c] = 0;
    if (want.grad_student) static_cast<S*>(want.grad_student)[c] = S(0.0f);
  }
  if (cluster_rank() != 0) return;
  for (int t = thread; t < 3 + 2 * pr.teachers; t += threads) {
    if (!again) want.stats[i * (3 + 2 * pr.teachers) + t] = 0;
    if (want.grad_weights && t < pr.teachers) want.grad_weights[i * pr.teachers + t] = 0;
  }
  if (thread != 0) return;
  if (want.kl_rows) want.kl_rows[i] = want.ce_rows[i] = 0;
  if (want.kl) want.kl[i] = want.ce[i] = want.loss[i] = 0;
}

// The row's losses, from the sums over its classes.
template <class S>
__device__ void write_values(const Problem& pr, const Wanted& want, int64_t i, double kl, double below, float max,
                             float log_sum1) {
  kl *= pr.kl_scale;
  AMTML_DEVICE_CHECK(!pr.labels || pr.has_label(i), "multi_teacher_kd_loss: labels must be in [0, C) or ignore_index");
  const double ce = pr.labels ? cross_entropy<S>(pr, i, max, log_sum1, below) : 0;
  if (want.kl_rows) want.kl_rows[i] = kl, want.ce_rows[i] = ce;
  if (!want.kl) return;
  want.kl[i] = static_cast<float>(kl);
  want.ce[i] = static_cast<float>(ce);
  want.loss[i] = static_cast<float>(weighted(pr, ce, kl));
}

// Maxima and sums again, of exponents that are made of differences.
template <class S, int T>
__device__ __noinline__ void far_sums(const Problem& pr, SweepScratch<T>& s, int64_t begin, int64_t end) {
  cluster_sync();  // others have read what they had to
  for (int t = 0; t <= T; ++t) {
    const S* const x = static_cast<const S*>(s.rows[t]);
    float most = -INFINITY;
    for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) most = fmaxf(most, static_cast<float>(x[c]));
    most = warp_max(most);
    if (threadIdx.x % kWarp == 0) s.part[t][threadIdx.x / kWarp].max = most;
  }
  __syncthreads();
  if (threadIdx.x <= T) {
    float most = -INFINITY;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) most = fmaxf(most, s.part[threadIdx.x][warp].max);
    s.of_block[threadIdx.x].max = most;
  }
  cluster_sync();
  if (threadIdx.x <= T) {
    float most = -INFINITY;
    for (unsigned k = 0; k < cluster_size(); ++k) most = fmaxf(most, in_block(&s.of_block[threadIdx.x], k)->max);
    s.whole[threadIdx.x].max = most;
  }
  __syncthreads();
  for (int t = 0; t <= T; ++t) {
    const S* const x = static_cast<const S*>(s.rows[t]);
    const float most = s.whole[t].max;
    double sum = 0, sum1 = 0;  // NaN where no class has a probability
    for (int64_t c = begin + threadIdx.x; c < end; c += blockDim.x) {
      const float below = static_cast<float>(x[c]) - most;
      sum += exp2f(below * pr.unit);
      if (t == 0 && pr.labels) sum1 += exp2f(below * kLog2e);
    }
    sum = block_sum(sum, s.sums);
    __syncthreads();
    sum1 = block_sum(sum1, s.sums);
    __syncthreads();
    if (threadIdx.x == 0) s.of_block[t].sum = static_cast<float>(sum), s.of_block[t].sum1 = static_cast<float>(sum1);
  }
  cluster_sync();
  if (threadIdx.x <= T) {
    float sum = 0, sum1 = 0;
    for (unsigned k = 0; k < cluster_size(); ++k) {
      const Online& part = *in_block(&s.of_block[threadIdx.x], k);
      sum += part.sum, sum1 += part.sum1;
    }
    s.whole[threadIdx.x].sum = sum, s.whole[threadIdx.x].sum1 = sum1;
  }
}

// What follows from the maximum and the sums of one tensor, for one thread each.
template <int T>
__device__ void settle(const Problem& pr, const Wanted& want, int64_t i, Pass pass, const float* stats, bool far,
                       SweepScratch<T>& s) {
  const int t = threadIdx.x;
  const int64_t at = i * (3 + 2 * T) + (t == 0 ? 0 : 1 + 2 * t);
  float max = s.whole[t].max, inverse, inverse1 = 1, sum1 = 1;
  // What the rounding of base makes of each exponent. The statistics are without it: another kernel may have made them.
  const float cut = far ? 0.0f : fmaf(max, pr.unit, base_of(max, pr.unit));
  if (pass == Pass::kForward) {
    if (t == 0 && pr.labels) sum1 = s.whole[t].sum1;
    inverse = 1 / s.whole[t].sum, inverse1 = 1 / sum1;
    if (cluster_rank() == 0) {
      want.stats[at] = max, want.stats[at + 1] = inverse * exp2f(cut);
      if (t == 0) want.stats[2 + at] = inverse1 * exp2f(cut * pr.temperature);
    }
  } else {
    inverse = stats[at + 1] * exp2f(-cut);
    if (t == 0) inverse1 = stats[2 + at] * exp2f(-cut * pr.temperature);
  }
  if (t == 0) {
    // Rounding the log-sum to float32 would bias every KL near 0: what that cuts off is added at the end.
    const double log_sum = -log(static_cast<double>(inverse)) * kLog2eExact;
    s.log2_sum = static_cast<float>(log_sum), s.rest = (log_sum - s.log2_sum) / kLog2eExact;
    s.log_sum1 = static_cast<float>(log(static_cast<double>(sum1)) - double{cut} * pr.temperature / kLog2eExact);
    s.inverse1 = inverse1;
  } else {
    const float w = pr.weight(i, t - 1);
    if (w == 0 && !(fabsf(inverse) < INFINITY)) max = inverse = 0;  // it may hold NaN: left out
    s.weight[t - 1] = w;
  }
  s.max[t] = max, s.inverse[t] = inverse;
}

// On a multiprocessor: as many as leave the compiler the registers that it needs.
constexpr int blocks_at_once(int teachers) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  return teachers <= 2 ? 4 : teachers <= 4 ? 3 : 2;
#else
  return teachers <= 3 ? 4 : teachers == 4 ? 3 : 2;
#endif
}

// A row for each cluster of blocks.
template <class S, int T>
__global__ void __launch_bounds__(kSweepThreads, blocks_at_once(T))
    sweeps_kernel(const __grid_constant__ Problem pr, const Wanted want, const Incoming in, const float* stats,
                  Pass pass) {
  constexpr int kPack = Packed<S>::kCount;
  SweepScratch<T>& s = shared<SweepScratch<T>>();
  const unsigned rank = cluster_rank(), blocks = cluster_size();
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t i = blockIdx.x / blocks;
  const int packs = static_cast<int>(pr.classes / kPack), slice = (packs + blocks - 1) / blocks;
  const int begin = min(static_cast<int>(rank) * slice, packs), end = min(begin + slice, packs);
  let_next_start();
  if (pass != Pass::kForward || pr.ignored(i)) wait_for_previous();
  if (pr.ignored(i)) {
    if (pass == Pass::kRescale) return;  // 0 it is
    return write_ignored<S>(pr, want, i, int64_t{begin} * kPack, int64_t{end} * kPack, pass != Pass::kForward,
                            threadIdx.x, blockDim.x);
  }
  const float g = pass == Pass::kForward ? 1.0f : in.of_loss(i);
  if (pass == Pass::kRescale &&
      rescaled<S, kPack>(pr, want, i, int64_t{begin} * kPack, int64_t{end} * kPack, g, threadIdx.x, blockDim.x))
    return;
  if (threadIdx.x == 0) {
    s.label_pack = pr.labels ? static_cast<int>(pr.labels[i] / kPack) : -1;
    s.grads = want.grad_student ? static_cast<S*>(want.grad_student) + i * pr.classes : nullptr;
  }

  Factors<T> f;
  if (threadIdx.x <= T) {
    const Rows& rows = threadIdx.x == 0 ? pr.student : pr.teacher[threadIdx.x - 1];
    s.rows[threadIdx.x] = reinterpret_cast<const Packed<S>*>(static_cast<const S*>(rows.data) + i * rows.stride);
  }
  __syncthreads();

  if (pass == Pass::kForward) {
    Online o[T + 1];
#pragma unroll
    for (int t = 0; t <= T; ++t) o[t] = {-kFar / pr.unit, 0, 0};
    auto row = [&](int t) { return static_cast<const Packed<S>*>(s.rows[t]); };
    for (int place = 0, at = begin + threadIdx.x; place < pr.keep && at < end; ++place, at += blockDim.x) {
#pragma unroll
      for (int t = 0; t <= T; ++t) copy_to_shared(s.template kept<S>(place, t), row(t) + at);
    }
    wait_for_copies();
    for (int place = 0, at = begin + threadIdx.x; at < end; ++place, at += blockDim.x) {
      Packed<S> pack[T + 1];
      if (place < pr.keep) {
#pragma unroll
        for (int t = 0; t <= T; ++t) pack[t] = *s.template kept<S>(place, t);
      } else {
#pragma unroll
        for (int t = 0; t <= T; ++t) pack[t] = read<false>(row(t) + at);
      }
#pragma unroll
      for (int t = 0; t <= T; ++t) {
        if (t == 0 && pr.labels) {
          first_sweep<S, true>(pack[t], pr, o[t]);
        } else {
          first_sweep<S, false>(pack[t], pr, o[t]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t <= T; ++t) {
      o[t] = t == 0 ? merged<true>(o[t], kWarp, pr) : merged<false>(o[t], kWarp, pr);
      if (lane == 0) s.part[t][warp] = o[t];
    }
    __syncthreads();
    for (int t = warp; t <= T; t += warps) {
      const Online block = merged<true>(s.part[t][lane % warps], warps, pr);
      if (lane == 0) s.of_block[t] = block;
    }
    wait_for_previous();
  }
  cluster_sync();
  if (pass == Pass::kForward) {
    for (int t = warp; t <= T; t += warps) {
      const Online all = merged<true>(*in_block(&s.of_block[t], lane % blocks), blocks, pr);
      if (lane == 0) s.whole[t] = all;
    }
  } else if (threadIdx.x <= T) {
    const float* const stat = stats + i * (3 + 2 * T) + (threadIdx.x == 0 ? 0 : 1 + 2 * threadIdx.x);
    s.whole[threadIdx.x] = {stat[0], 1 / stat[1], 1};
  }
  __syncthreads();
  float ce_grad, kl_grad;
  gradient_scales(pr, s.sums, &ce_grad, &kl_grad);
  ce_grad *= g, kl_grad *= g;
  if (threadIdx.x == 0) s.ce_grad = ce_grad, s.kl_grad = kl_grad;
  bool far = false;
#pragma unroll
  for (int t = 0; t <= T; ++t) far |= !(fabsf(base_of(s.whole[t].max, pr.unit)) < kFar / 2);
  if (far && pass == Pass::kForward) far_sums<S, T>(pr, s, begin * kPack, end * kPack);
  if (threadIdx.x <= T) settle<T>(pr, want, i, pass, stats, far, s);
  __syncthreads();

  const bool value = want.kl_rows || want.kl;
  const float per_tau = 1 / pr.temperature, even = pr.label_smoothing / static_cast<float>(pr.classes);
  float total = 0;
  unsigned left_out = 0;
#pragma unroll
  for (int t = 0; t < T; ++t) {
    total += s.weight[t];
    f.weight[t] = s.weight[t] * s.inverse[t + 1];
    if (s.inverse[t + 1] == 0) left_out |= 1u << t;
  }
#pragma unroll
  for (int t = 0; t <= T; ++t) f.base[t] = base_of(s.max[t], pr.unit);
  f.log2_sum = s.log2_sum;
  f.labels = pr.labels != nullptr;
  f.of_p = kl_grad * per_tau, f.of_q = f.of_p * total * s.inverse[0];
  f.of_q1 = f.labels ? ce_grad * s.inverse1 : 0.0f, f.even = f.labels && even != 0 ? -ce_grad * even : 0.0f;
  const bool smooth = pr.label_smoothing != 0 && value,
             plain = !far && left_out == 0 && kl_grad != 0 && total < kMostMass;
  if (threadIdx.x == 0) s.total = total;
  float sums[T + 1] = {}, below = 0;
  const int mine = end - begin - static_cast<int>(threadIdx.x), step = static_cast<int>(blockDim.x);
  const int keep = pass == Pass::kForward ? pr.keep : 0;
  // Backwards: what was read last may be in cache still.
  for (int place = (mine - 1) / step, at = begin + threadIdx.x + place * step; mine > 0 && at >= begin;
       --place, at -= step) {
    Packed<S> pack[T + 1];
    if (place < keep) {
#pragma unroll
      for (int t = 0; t <= T; ++t) pack[t] = *s.template kept<S>(place, t);
    } else {
#pragma unroll
      for (int t = 0; t <= T; ++t) pack[t] = read<true>(static_cast<const Packed<S>*>(s.rows[t]) + at);
    }
    if (smooth) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) below += s.max[0] - pack[0].at(k);
    }
    Packed<S> grads;
    if (plain && at != s.label_pack && second_sweep<S, T>(pr, f, pack, grads, sums)) {
      if (s.grads) write_through<S>(static_cast<Packed<S>*>(s.grads) + at, grads);
      continue;
    }
    // One class at a time: those of the label's pack, and with care.
    for (int64_t c = int64_t{at} * kPack; c < int64_t{at + 1} * kPack; ++c) {
      auto logit = [&](int t) { return static_cast<float>(static_cast<const S*>(s.rows[t])[c]); };
      auto exponent = [&](int t, float x) {
        return far ? (x - s.max[t]) * pr.unit : fmaf(x, pr.unit, base_of(s.max[t], pr.unit));
      };
      float p = 0;
#pragma unroll 1
      for (int t = 0; t < T; ++t) {
        if (s.inverse[t + 1] == 0) continue;
        p += s.weight[t] * s.inverse[t + 1] * exp2f(exponent(t + 1, logit(t + 1)));
      }
      const float z = logit(0), y = exponent(0, z);
      const float log_q = (y == -INFINITY ? (z - s.max[0]) * pr.unit : y) - f.log2_sum;  // of a number as of -infinity
      const float ratio = log2f(p == 0 ? 1.0f : p) - log_q;
      if (p != 0) sums[0] += p * ratio;  // no mass adds nothing, whatever its logarithm is
#pragma unroll
      for (int t = 0; t < T; ++t) {
        if (!want.grad_weights || s.inverse[t + 1] == 0) continue;
        sums[t + 1] += mixture_gradient(exp2f(exponent(t + 1, logit(t + 1))), p, ratio, kLog2e);
      }
      if (!s.grads) continue;
      float grad = fmaf(f.of_q, exp2f(y), f.even) - (s.kl_grad == 0 ? 0.0f : f.of_p * p);  // p may be NaN
      if (f.labels) grad = fmaf(f.of_q1, exp2f(y * pr.temperature), grad);
      if (f.labels && c == pr.labels[i]) grad -= s.ce_grad * (1 - pr.label_smoothing);
      static_cast<S*>(s.grads)[c] = static_cast<S>(z == -INFINITY ? 0.0f : grad);
    }
  }

  if (!value && !want.grad_weights) return;
#pragma unroll
  for (int q = 0; q < T + 2; ++q) {
    const float sum = warp_sum(q <= T ? sums[q] : below);
    if (lane == 0) *in_block(&s.parts[q][rank * warps + warp], 0) = sum;
  }
  cluster_sync();
  if (rank != 0) return;
  for (int q = warp; q < T + 2; q += warps) {
    double sum = 0;
    for (unsigned k = lane; k < blocks * warps; k += kWarp) sum += s.parts[q][k];
    sum = warp_sum(sum);
    if (lane == 0) s.totals[q] = q <= T ? sum / kLog2eExact : sum;
  }
  __syncthreads();
  if (want.grad_weights && threadIdx.x < T) {
    const int t = threadIdx.x;
    const float inverse = s.inverse[t + 1];
    const float slope = inverse == 0 ? 0.0f : 1 + inverse * static_cast<float>(s.totals[t + 1]);
    want.grad_weights[i * T + t] = s.kl_grad == 0 ? 0.0f : s.kl_grad * slope;
  }
  if (threadIdx.x == 0 && value) {
    write_values<S>(pr, want, i, s.totals[0] + s.total * s.rest, s.totals[T + 1], s.max[0], s.log_sum1);
  }
}

}  // namespace amtml::gpu
