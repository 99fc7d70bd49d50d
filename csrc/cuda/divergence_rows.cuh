// The rows of any divergence between the student and what the teachers say: value, gradients and statistics, a row for
// each cluster of blocks. csrc/cpu/divergence_rows.h has the formulas.
//
// student [N, C] and T teachers [N, C], read in place. The first sweep over a row makes the maxima and sums of all
// softmaxes online. The second makes D, sum q b and the weights' gradient. The student's gradient needs sum q b: a
// third sweep makes the terms again and writes it. Forward KL has sum q b = -sum p without looking, and does it in the
// second.
//
// Dtypes, divergences and modes are branches that a whole launch takes alike: a kernel for each of them would be many.
#pragma once

#include "../arithmetic.h"
#include "kd_rows.cuh"

namespace amtml::gpu::divergences {

constexpr char kOp[] = "multi_teacher_kd_loss";
constexpr int kQueue = 2;              // teachers whose loads are under way at a time
constexpr float kTinyMixture = 1e-30;  // below it log p is made of logarithms
#ifdef AMTML_EMULATED_CUDA             // so that small rows are spread, too
constexpr int kMaxThreads = 64, kMostBlocks = 48, kSteps = 2;
#else
constexpr int kMaxThreads = 256, kMostBlocks = 264, kSteps = 4;
#endif
constexpr int kMaxWarps = kMaxThreads / kWarp;

struct Problem : KDProblem {  // weights of the two terms, and kl_scale, are 1 there: rows have their own
  Rows teacher[kMaxTeachers];
  float teacher_temperature[kMaxTeachers];
  bool own_temperatures;  // of the teachers; else the row's
  const float *alphas, *temperatures;
  float of_ce, of_kl;  // without alphas
  Divergence kind;
  DivergenceMode mode;
  MixtureShares<float> share;
  MixtureShares<double> exact;  // share
  bool t2_scale;
  bool labeled;  // whether there is a cross-entropy
  float even;    // what label smoothing gives each class

  __device__ bool logits() const { return mode == DivergenceMode::logits; }
  __device__ int softmaxes() const { return 1 + teachers + logits(); }  // of the student, teachers and mixed logits
  __device__ float temperature_of(int64_t i) const { return temperatures ? temperatures[i] : temperature; }
};

// What a sweep makes of the rows.
struct Sweep {
  bool slopes;            // of the weights
  bool apart;             // in mode "sum" each teacher's D and sum q b, whatever its weight: first and second
  bool below;             // sum of the maximum less the logits
  void* grad_student;     // or null
  ScalarType grad_dtype;  // its dtype
};

// The softmax of a row.
struct Softmax {
  float per_tau, unit, max, inverse, log_sum;  // the inverse sum is 0 where the row is left out
  double rest;                                 // what rounding log_sum to float32 cuts off

  __device__ __forceinline__ float probability(float x) const {
    return inverse == 0 ? 0.0f : exp2f((x - max) * unit) * inverse;
  }
  __device__ __forceinline__ float log(float x) const { return (x - max) * unit * kLog2 - log_sum; }
};

enum Sum { kValue, kSlope, kBelow, kOfPA, kFixed };  // D, sum q b, sum of maximum - z, sum p a; then each teacher's

// What a row is weighed by, and all but the first sweep need. In shared memory: kept in registers, they spilled.
struct Scales {
  float incoming, ce, kl;            // what comes back; d loss / d of either term of the row, before its weight
  float student_ce, student_kl, qb;  // of the student's gradient; sum q b
};

struct Scratch {
  Scales by;
  Softmax of[kMaxTeachers + 2];  // student, teachers, mixed logits
  float weight[kMaxTeachers], total, inverse1, log_sum1;
  Online part[kMaxTeachers + 2][kMaxWarps], whole[kMaxTeachers + 2];                      // of this block
  double sums[kWarp], own[kFixed + 2 * kMaxTeachers], totals[kFixed + 2 * kMaxTeachers];  // own: of this block
  unsigned long long best_of_warp[kMaxWarps], best[2];
  float partial[1];  // [2][T][threads], to the end

  // Two numbers of this thread for each teacher.
  __device__ __forceinline__ float& first(int t) { return partial[t * blockDim.x + threadIdx.x]; }
  __device__ __forceinline__ float& second(const Problem& pr, int t) { return first(pr.teachers + t); }
};

// Classes of one block, in one row.
struct Slice {
  int64_t row;
  int begin, end;
};

// --- rows of any dtype

// Neighbors in a row as they lie in memory: converted only when they are used, so that several loads are under way.
template <int kPack>
struct Raw {
  uint32_t words[kPack];

  __device__ __forceinline__ void get(ScalarType dtype, float (&to)[kPack]) const {
    if (dtype == ScalarType::Float) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) std::memcpy(&to[k], &words[k], sizeof(float));
    } else if (dtype == ScalarType::BFloat16) {  // the upper half of a float32
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const uint32_t bits = k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16;
        std::memcpy(&to[k], &bits, sizeof(float));
      }
    } else {
#pragma unroll
      for (int k = 0; k < kPack; ++k) to[k] = static_cast<float>(reinterpret_cast<const Half*>(words)[k]);
    }
  }
};

template <int kPack>
__device__ __forceinline__ Raw<kPack> fetch(const Rows& rows, int64_t i, int c) {
  Raw<kPack> raw = {};
  auto copy = [&](auto element, auto count) {
    using Each = decltype(element);
    using Words = Pack<Each, decltype(count)::value>;
    const char* const from = static_cast<const char*>(rows.data) + (i * rows.stride + c) * (sizeof(Words) / kPack);
    check_alignment<Each, decltype(count)::value>(reinterpret_cast<const Each*>(from));
    const Words words = *reinterpret_cast<const Words*>(from);
#pragma unroll
    for (int k = 0; k < decltype(count)::value; ++k) raw.words[k] = words.at[k];
  };
  if (rows.dtype == ScalarType::Float) {
    copy(uint32_t{}, std::integral_constant<int, kPack>{});
  } else if constexpr (kPack == 1) {
    copy(uint16_t{}, std::integral_constant<int, 1>{});
  } else {
    copy(uint32_t{}, std::integral_constant<int, kPack / 2>{});
  }
  return raw;
}

template <int kPack>
__device__ __forceinline__ void put(void* to, ScalarType dtype, int64_t at, const float (&from)[kPack]) {
  if (dtype == ScalarType::Float) {
    store(static_cast<float*>(to) + at, from);
  } else if (dtype == ScalarType::BFloat16) {
    store(static_cast<BFloat16*>(to) + at, from);
  } else {
    store(static_cast<Half*>(to) + at, from);
  }
}

// Calls use(t, x) for all teachers, in order, with their logits from class c on. `use` is there once: what is loaded
// moves through a queue of registers.
template <int kPack, class Use>
__device__ __forceinline__ void each_teacher(const Problem& pr, int64_t i, int c, const Use& use) {
#pragma unroll 1
  for (int first = 0; first < pr.teachers; first += kQueue) {
    Raw<kPack> queue[kQueue];
    const int count = min(kQueue, pr.teachers - first);
#pragma unroll
    for (int u = 0; u < kQueue; ++u) {
      if (u < count) queue[u] = fetch<kPack>(pr.teacher[first + u], i, c);
    }
#pragma unroll 1
    for (int u = 0; u < count; ++u) {
      float x[kPack];
      queue[0].get(pr.teacher[first + u].dtype, x);
      use(first + u, x);
#pragma unroll
      for (int k = 1; k < kQueue; ++k) queue[k - 1] = queue[k];
    }
  }
}

// Adds a teacher to what mode "logits" takes the softmax of: -inf where a teacher with weight has it.
template <int kPack>
__device__ __forceinline__ void mix(const Scratch& s, int t, const float (&x)[kPack], float (&mixed)[kPack]) {
  const float w = s.weight[t], by = s.of[t + 1].per_tau;
  if (w == 0) return;  // 0 times infinity, or NaN, is 0
#pragma unroll
  for (int k = 0; k < kPack; ++k) {  // NaN stays
    mixed[k] = x[k] == -INFINITY && mixed[k] == mixed[k] ? x[k] : mixed[k] + w * (x[k] * by);
  }
}

// --- the first sweep

// Begins a row: temperatures and weights.
__device__ inline void begin_row(const Problem& pr, int64_t i, Scratch& s) {
  for (int t = threadIdx.x; t < pr.softmaxes(); t += blockDim.x) {
    const bool teacher = t > 0 && t <= pr.teachers, given = teacher && pr.own_temperatures;
    const float tau = given ? pr.teacher_temperature[t - 1] : t > pr.teachers ? 1.0f : pr.temperature_of(i);
    s.of[t].per_tau = 1 / tau, s.of[t].unit = s.of[t].per_tau * kLog2e;
    if (teacher) s.weight[t - 1] = pr.weight(i, t - 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    s.total = 0;
    for (int t = 0; t < pr.teachers; ++t) s.total += s.weight[t];
  }
}

// The maxima and sums of all softmaxes of a row that has begun, in every block: each(t, online) by one thread.
template <int kPack, class Each>
__device__ __forceinline__ void sum_softmaxes(const Problem& pr, const Slice& slice, Scratch& s, const Each& each) {
  const int64_t i = slice.row;
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int teachers = pr.teachers, count = pr.softmaxes();
  for (int t = 0; t < teachers; ++t) s.first(t) = -INFINITY, s.second(pr, t) = 0;
  Online q{-INFINITY, 0, 0}, mixed{-INFINITY, 0, 0};
  for (int c = slice.begin + threadIdx.x * kPack; c < slice.end; c += blockDim.x * kPack) {
    const Raw<kPack> raw = fetch<kPack>(pr.student, i, c);
    float z[kPack], logits[kPack] = {};
    each_teacher<kPack>(pr, i, c, [&](int t, const float (&x)[kPack]) {
      Online o{s.first(t), s.second(pr, t), 0};
      take<false>(o, x, s.of[t + 1].unit);
      s.first(t) = o.max, s.second(pr, t) = o.sum;
      if (pr.logits()) mix(s, t, x, logits);
    });
    if (pr.logits()) take<false>(mixed, logits, kLog2e);
    raw.get(pr.student.dtype, z);
    pr.labeled ? take<true>(q, z, s.of[0].unit) : take<false>(q, z, s.of[0].unit);
  }
  for (int t = 0; t < count; ++t) {
    Online o = t == 0 ? q : t > teachers ? mixed : Online{s.first(t - 1), s.second(pr, t - 1), 0};
    o = warp_combined(o, s.of[t].unit);
    if (lane == 0) s.part[t][warp] = o;
  }
  __syncthreads();
  for (int t = threadIdx.x; t < count; t += blockDim.x) {
    Online o = s.part[t][0];
    for (unsigned w = 1; w < warps; ++w) o = combined(o, s.part[t][w], s.of[t].unit);
    s.whole[t] = o;
  }
  cluster_sync();
  for (int t = threadIdx.x; t < count; t += blockDim.x) {
    Online o = *in_block(&s.whole[t], 0);
    for (unsigned rank = 1; rank < cluster_size(); ++rank) {
      o = combined(o, *in_block(&s.whole[t], rank), s.of[t].unit);
    }
    each(t, o);
  }
  __syncthreads();
}

// A softmax with this maximum and logarithm of the sum beside it; `inverse`: of that sum.
__device__ __forceinline__ void set_softmax(const Problem& pr, Scratch& s, int t, float max, float inverse,
                                            double log_sum) {
  Softmax& made = s.of[t];
  made.max = max, made.inverse = inverse;
  made.log_sum = static_cast<float>(log_sum), made.rest = log_sum - made.log_sum;
  const bool without = t > 0 && t <= pr.teachers && s.weight[t - 1] == 0;
  if (without && !(fabsf(made.inverse) < INFINITY)) made.inverse = 0, made.rest = 0;  // 0 * NaN is 0
}

template <int kPack>
__device__ void make_softmaxes(const Problem& pr, const Slice& slice, Scratch& s) {
  begin_row(pr, slice.row, s);
  sum_softmaxes<kPack>(pr, slice, s, [&](int t, Online o) {
    if (o.max == -INFINITY) o.sum = o.sum1 = NAN;  // no class has a probability
    const float inverse = 1 / o.sum;
    set_softmax(pr, s, t, o.max, inverse, -log(static_cast<double>(inverse)));
    if (t == 0) s.inverse1 = 1 / o.sum1, s.log_sum1 = static_cast<float>(log(static_cast<double>(o.sum1)));
  });
}

// --- sums

template <class T>
__device__ __forceinline__ void block_total(Scratch& s, int k, T x) {
  const double sum = block_sum(static_cast<double>(x), s.sums);
  if (threadIdx.x == 0) s.own[k] = sum;
  __syncthreads();
}

// The sums of all blocks of the cluster, in each of them.
__device__ inline void cluster_totals(Scratch& s, int count) {
  cluster_sync();
  for (int k = threadIdx.x; k < count; k += blockDim.x) {
    double sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += in_block(s.own, rank)[k];
    s.totals[k] = sum;
  }
  cluster_sync();  // nobody leaves, or goes on to the next sums, while others read
}

// --- the second and the third sweep

struct Log {
  AMTML_SHARED float operator()(float x) const { return logf(x); }
};

// Of the classes of a pack: returns the sum of their terms, adds q b times the weight, and makes `a`: p a of mixed
// logits, less the slope of equals, else df/dp. The 1 that forward KL's leaves out changes nothing for logits, and
// write_row adds it to a mixture's. The two KLs alone make logarithms of p and q.
template <Divergence kind, int kPack, class LogP, class LogQ>
__device__ __forceinline__ float terms(const Problem& pr, float weight, const float (&p)[kPack],
                                       const float (&q)[kPack], const LogP& log_p, const LogQ& log_q,
                                       float (&qb)[kPack], float (&a)[kPack]) {
  constexpr bool kForward = kind == Divergence::forward_kl, kReverse = kind == Divergence::reverse_kl;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kPack; ++k) {
    float of_p = 0, of_q = 0;
    if constexpr (kForward || kReverse) of_p = log_p(k), of_q = log_q(k);
    const auto term = divergence_term<kind>(p[k], q[k], of_p, of_q, pr.share, Log());
    sum += term.value;
    if (weight != 0) qb[k] += weight * term.qb;  // 0 * NaN is 0
    if constexpr (kReverse) {                    // a = -q / p may be too large for float32
      a[k] = pr.logits() ? p[k] - q[k] : term.a;
    } else {
      a[k] = pr.logits() ? if_mass(p[k], p[k] * (term.a - slope_of_equals(kind, pr.share))) : term.a;
    }
  }
  return sum;
}

template <int kPack, class LogP, class LogQ>
__device__ __forceinline__ float terms(const Problem& pr, float weight, const float (&p)[kPack],
                                       const float (&q)[kPack], const LogP& log_p, const LogQ& log_q,
                                       float (&qb)[kPack], float (&a)[kPack]) {
  switch (pr.kind) {
    case Divergence::forward_kl:
      return terms<Divergence::forward_kl>(pr, weight, p, q, log_p, log_q, qb, a);
    case Divergence::reverse_kl:
      return terms<Divergence::reverse_kl>(pr, weight, p, q, log_p, log_q, qb, a);
    case Divergence::jsd:
      return terms<Divergence::jsd>(pr, weight, p, q, log_p, log_q, qb, a);
    case Divergence::skew_kl:
      return terms<Divergence::skew_kl>(pr, weight, p, q, log_p, log_q, qb, a);
    case Divergence::skew_reverse_kl:
      return terms<Divergence::skew_reverse_kl>(pr, weight, p, q, log_p, log_q, qb, a);
    default:
      return terms<Divergence::tvd>(pr, weight, p, q, log_p, log_q, qb, a);
  }
}

// log p of a mixture that is too small for float32, -inf where no teacher with weight has the class; and what reverse
// KL adds to the slopes of the weights, if they are asked for: q p_t / p, or 0 where that is too large, as of a teacher
// without weight.
__device__ inline float log_of_tiny_mixture(const Problem& pr, int64_t i, int64_t c, float q, bool slopes, Scratch& s) {
  auto log_of = [&](int t) {
    float x[1];
    load_row<1, AnyType>(pr.teacher[t], i, c, x);
    return s.of[t + 1].inverse == 0 ? -INFINITY : s.of[t + 1].log(x[0]);
  };
  float most = -INFINITY, sum = 0;
#pragma unroll 1
  for (int t = 0; t < pr.teachers; ++t) {
    if (s.weight[t] != 0) most = fmaxf(most, log_of(t));
  }
  if (most == -INFINITY) return most;
#pragma unroll 1
  for (int t = 0; t < pr.teachers; ++t) {
    if (s.weight[t] != 0) sum += s.weight[t] * expf(log_of(t) - most);
  }
#pragma unroll 1
  for (int t = 0; slopes && t < pr.teachers; ++t) {
    const float e = expf(log_of(t) - most);
    if (e < INFINITY) s.first(t) -= q * (e / sum);
  }
  return most + logf(sum);
}

// gather: D, sum q b and the weights' slopes. write: the gradient.
template <int kPack, bool kSum>
__device__ __forceinline__ void sweep(const Problem& pr, const Sweep& want, const Slice& slice, bool gather, bool write,
                                      Scratch& s) {
  const int64_t i = slice.row;
  const int label = pr.labels ? static_cast<int>(pr.labels[i]) : -1;
  const Softmax& student = s.of[0];
  const bool reverse = pr.kind == Divergence::reverse_kl, slopes = gather && want.slopes;
  const bool smooth = gather && want.below, apart = gather && want.apart;
  double value = 0, all_qb = 0, below = 0, all_pa = 0;
  if (gather) {
    for (int t = 0; t < pr.teachers; ++t) s.first(t) = s.second(pr, t) = 0;
  }
  for (int c = slice.begin + threadIdx.x * kPack; c < slice.end; c += blockDim.x * kPack) {
    float z[kPack], q[kPack], qb[kPack] = {}, part = 0, lost_mass = 0;
    // Bits of the classes that the student has and its target has not: they make reverse KL infinite, and get no
    // gradient.
    unsigned lost = 0;
    fetch<kPack>(pr.student, i, c).get(pr.student.dtype, z);
#pragma unroll
    for (int k = 0; k < kPack; ++k) q[k] = student.probability(z[k]);
    // What one target adds, without the classes of `out`.
    auto compare = [&](float weight, const float (&p)[kPack], const auto& log_p, unsigned out, float (&a)[kPack]) {
      float rest[kPack];
#pragma unroll
      for (int k = 0; k < kPack; ++k) rest[k] = out >> k & 1 ? 0.0f : q[k];
      return terms(pr, weight, p, rest, log_p, [&](int k) { return student.log(z[k]); }, qb, a);
    };
    // Classes that a target of logits x has not.
    auto without = [&](const Softmax& target, const float (&x)[kPack], float weight) {
      unsigned out = 0;
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        if (!reverse || target.log(x[k]) != -INFINITY || q[k] == 0) continue;
        out |= 1u << k;
        lost_mass += weight * q[k];
      }
      if (weight != 0) lost |= out;
      return out;
    };
    if constexpr (kSum) {
      each_teacher<kPack>(pr, i, c, [&](int t, const float (&x)[kPack]) {
        const Softmax& own = s.of[t + 1];
        const float w = apart ? 1.0f : s.weight[t];
        float p[kPack], a[kPack];
#pragma unroll
        for (int k = 0; k < kPack; ++k) p[k] = own.probability(x[k]);
        const unsigned out = without(own, x, w);
        const float of_rest = compare(w, p, [&](int k) { return own.log(x[k]); }, out, a);
        const float sum = out ? INFINITY : of_rest;
        if (w != 0) part += w * sum;
        if (slopes) s.first(t) += sum;
        if (!apart) return;
        float of_qb = -lost_mass;
#pragma unroll
        for (int k = 0; k < kPack; ++k) of_qb += qb[k], qb[k] = 0;
        s.second(pr, t) += of_qb, lost_mass = 0;
      });
    } else {
      const Softmax& mixed = s.of[pr.teachers + 1];
      float x[kPack] = {}, p[kPack] = {}, a[kPack];
      unsigned out = 0;
      if (pr.logits()) {
        each_teacher<kPack>(pr, i, c, [&](int t, const float (&each)[kPack]) { mix(s, t, each, x); });
#pragma unroll
        for (int k = 0; k < kPack; ++k) p[k] = mixed.probability(x[k]);
        out = without(mixed, x, 1);
        if (out) part = INFINITY;
      } else {
        each_teacher<kPack>(pr, i, c, [&](int t, const float (&x)[kPack]) {
          const Softmax& own = s.of[t + 1];
          const float w = s.weight[t];
#pragma unroll
          for (int k = 0; k < kPack; ++k) p[k] += w * own.probability(x[k]);
        });
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          if (reverse && p[k] < kTinyMixture && q[k] != 0) out |= 1u << k;
        }
#pragma unroll 1
        for (int k = 0; out && k < kPack; ++k) {
          if (!(out >> k & 1)) continue;
          float one[1];
          load_row<1, AnyType>(pr.student, i, c + k, one);
          const float own_q = student.probability(one[0]);
          const float log_of_p = log_of_tiny_mixture(pr, i, c + k, own_q, slopes, s);
          if (log_of_p == -INFINITY) {
            part = INFINITY;
            lost |= 1u << k;
            lost_mass += own_q;
            continue;
          }
          const float term = own_q * (student.log(one[0]) - log_of_p);
          part += term;
#pragma unroll
          for (int at = 0; at < kPack; ++at) qb[at] += at == k ? term : 0.0f;
        }
      }
      auto log_p = [&](int k) { return pr.logits() ? mixed.log(x[k]) : logf(p[k] == 0 ? 1.0f : p[k]); };
      part += compare(1, p, log_p, out, a);
      if (slopes) {
        float of_pa = 0;
#pragma unroll
        for (int k = 0; k < kPack; ++k) of_pa += a[k];
        all_pa += of_pa;
        each_teacher<kPack>(pr, i, c, [&](int t, const float (&x)[kPack]) {
          const Softmax& own = s.of[t + 1];
          const float shift = fabsf(own.max) < INFINITY ? own.max : 0.0f;  // by which nothing changes but the rounding
          float sum = 0, other = 0;
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            if (pr.logits()) {
              const float scaled = (x[k] - shift) * own.per_tau;
              // Else no weight or no probability is there: as a logit of 0. (scaled - scaled may be fused: its
              // rounding.)
              const bool finite = fabsf(scaled) < INFINITY;
              const float y = finite ? scaled : -shift * own.per_tau;
              sum += if_mass(y, a[k] * y), other += if_mass(y, p[k] * y);  // a may be infinite
            } else {
              const float each = own.probability(x[k]);
              sum += if_mass(each, each * a[k]);
            }
          }
          s.first(t) += sum;
          if (pr.logits()) s.second(pr, t) += other;
        });
      }
    }
    if (gather) {
      float of_qb = -lost_mass;  // the 1 that reverse KL's b leaves out cancels but for the classes that are lost
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        of_qb += qb[k];
        if (smooth) below += student.max - z[k];
      }
      value += part, all_qb += of_qb;
    }
    if (!write) continue;
    float grad[kPack];
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const bool none = s.by.student_kl == 0 || lost >> k & 1;  // a divergence without weight may be infinite
      float g = none ? 0.0f : s.by.student_kl * (qb[k] - q[k] * s.by.qb);
      if (pr.labeled) {
        const float q1 = exp2f((z[k] - student.max) * kLog2e) * s.inverse1;
        g += s.by.student_ce * (q1 - pr.even - (c + k == label ? 1 - pr.label_smoothing : 0.0f));
      }
      grad[k] = z[k] == -INFINITY ? 0.0f : g;
    }
    put(want.grad_student, want.grad_dtype, i * pr.classes + c, grad);
  }
  if (!gather) return;
  block_total(s, kValue, value);
  block_total(s, kSlope, all_qb);
  block_total(s, kBelow, below);
  block_total(s, kOfPA, all_pa);
  const int teacher_sums = slopes ? (pr.logits() || apart ? 2 : 1) * pr.teachers : 0;
  for (int t = 0; t < teacher_sums; ++t) block_total(s, kFixed + t, s.first(t));
  cluster_totals(s, kFixed + teacher_sums);
}

// --- statistics

__device__ inline unsigned long long larger(unsigned long long a, unsigned long long b) { return a > b ? a : b; }

// Of probabilities and their classes: the largest key is the first class of the largest probability.
__device__ __forceinline__ unsigned long long key_of(float p, int c) {
  uint32_t bits;
  std::memcpy(&bits, &p, sizeof(bits));
  return static_cast<unsigned long long>(bits) << 32 | ~static_cast<uint32_t>(c);
}

// The largest key of the block, in thread 0's `to`.
__device__ inline void block_best(Scratch& s, unsigned long long key, unsigned long long* to) {
  for (int by = kWarp / 2; by > 0; by /= 2) key = larger(key, __shfl_xor_sync(~0u, key, by));
  if (threadIdx.x % kWarp == 0) s.best_of_warp[threadIdx.x / kWarp] = key;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / kWarp; ++w) key = larger(key, s.best_of_warp[w]);
    *to = key;
  }
  __syncthreads();
}

// Sums of the classes: of the entropies of q and p, and of each teacher's KL(p_t || q); and where q and p are largest.
template <int kPack>
__device__ void gather_statistics(const Problem& pr, const Slice& slice, Scratch& s) {
  const int64_t i = slice.row;
  const Softmax& student = s.of[0];
  double of_q = 0, of_p = 0;
  unsigned long long best_q = 0, best_p = 0;
  for (int t = 0; t < pr.teachers; ++t) s.first(t) = 0;
  for (int c = slice.begin + threadIdx.x * kPack; c < slice.end; c += blockDim.x * kPack) {
    float z[kPack], p[kPack] = {}, logits[kPack] = {}, sum_q = 0, sum_p = 0;
    fetch<kPack>(pr.student, i, c).get(pr.student.dtype, z);
    each_teacher<kPack>(pr, i, c, [&](int t, const float (&x)[kPack]) {
      const Softmax& own = s.of[t + 1];
      const float w = s.weight[t];
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const float each = own.probability(x[k]);
        p[k] += w * each;
        sum += if_mass(each, each * (own.log(x[k]) - student.log(z[k])));
      }
      s.first(t) += sum;
      if (pr.logits()) mix(s, t, x, logits);
    });
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      const Softmax& mixed = s.of[pr.teachers + 1];
      if (pr.logits()) p[k] = mixed.probability(logits[k]);
      const float q = student.probability(z[k]), log_p = pr.logits() ? mixed.log(logits[k]) : logf(p[k]);
      sum_q -= if_mass(q, q * student.log(z[k]));
      sum_p -= if_mass(p[k], p[k] * log_p);
      best_q = larger(best_q, key_of(q, c + k));
      best_p = larger(best_p, key_of(p[k], c + k));
    }
    of_q += sum_q, of_p += sum_p;
  }
  block_total(s, 0, of_q);
  block_total(s, 1, of_p);
  for (int t = 0; t < pr.teachers; ++t) block_total(s, 2 + t, s.first(t));
  block_best(s, best_q, &s.best[0]);
  block_best(s, best_p, &s.best[1]);
  cluster_totals(s, 2 + pr.teachers);
}

// The largest keys of q and p in the row.
__device__ inline void best_of_row(Scratch& s, unsigned long long (&best)[2]) {
  best[0] = best[1] = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) {
    for (int k = 0; k < 2; ++k) best[k] = larger(best[k], in_block(s.best, rank)[k]);
  }
}

// The classes of this block, in the row of its cluster.
template <int kPack>
__device__ __forceinline__ Slice slice_of(const Problem& pr) {
  const int classes = static_cast<int>(pr.classes), blocks = static_cast<int>(cluster_size());
  const int length = (classes / kPack + blocks - 1) / blocks * kPack;
  const int begin = min(static_cast<int>(cluster_rank()) * length, classes);
  return {blockIdx.x / blocks, begin, min(begin + length, classes)};
}

// --- what sums over classes get once, in float64

// What the rounding of the log-sums took from D, for a target of which that cut off `rest`.
__device__ inline double cut_off(const Problem& pr, double student, double rest) {
  if (pr.kind == Divergence::forward_kl) return student - rest;
  return pr.kind == Divergence::reverse_kl ? rest - student : 0;
}

// D of a target of its own, the softmax at place t, whatever its weight.
__device__ inline double constant_of_target(const Problem& pr, const Scratch& s, int t) {
  if (s.of[t].inverse == 0) return divergence_constant(pr.kind, 0.0, pr.exact);
  return cut_off(pr, s.of[0].rest, s.of[t].rest);
}

// D of the row, from that of every class.
__device__ inline double constant_of_row(const Problem& pr, const Scratch& s) {
  const double q_rest = s.of[0].rest;
  if (pr.logits()) return cut_off(pr, q_rest, s.of[pr.teachers + 1].rest);
  double sum = 0;
  if (pr.mode == DivergenceMode::sum) {
    for (int t = 0; t < pr.teachers; ++t) {
      if (s.weight[t] != 0) sum += s.weight[t] * cut_off(pr, q_rest, s.of[t + 1].rest);
    }
    return sum;
  }
  const double mass = s.total;
  if (mass != 0) sum = (pr.kind == Divergence::forward_kl ? mass : 1) * cut_off(pr, q_rest, 0);
  return sum + divergence_constant(pr.kind, mass, pr.exact);
}

// The slope of a mixture's weight: the 1 of forward KL's df/dp.
__device__ inline double constant_of_slope(const Problem& pr, const Scratch& s, int t) {
  return pr.kind == Divergence::forward_kl && s.of[t].inverse != 0;
}

// --- the host's side

// Copies of what the kernel does not read in place, and the problem that points into them.
struct Inputs {
  Tensor student;
  std::vector<Tensor> teachers;
  std::optional<Tensor> alphas, temperatures;
  KDTensors own;
  Problem pr{};
  bool packs;

  Inputs(const Tensor& student_, const std::vector<Tensor>& teachers_, const std::optional<Tensor>& weights,
         const std::optional<Tensor>& labels, const std::optional<Tensor>& alphas_,
         const std::optional<Tensor>& temperatures_, const DivergenceSettings& set, const OnDevice& on)
      : student(dense_rows(student_)) {
    const int64_t count = static_cast<int64_t>(teachers_.size());
    STD_TORCH_CHECK(count >= 1, kOp, ": teachers must hold at least one teacher");
    STD_TORCH_CHECK(count <= kMaxTeachers, kOp, ": the CUDA kernels take at most ", kMaxTeachers, " teachers, got ",
                    count);
    STD_TORCH_CHECK(set.teacher_temperatures.empty() || static_cast<int64_t>(set.teacher_temperatures.size()) == count,
                    kOp, ": teacher_temperatures must be none, or one for each teacher");
    KDSettings kd = set.kd;
    kd.ce_weight = kd.kl_weight = 1;
    own.fill(pr, kOp, student, count, weights, labels, kd, on);
    STD_TORCH_CHECK(pr.classes <= 1 << 30, kOp, ": the CUDA kernel takes at most 2^30 classes, got ", pr.classes);
    packs = takes(student);
    pr.own_temperatures = !set.teacher_temperatures.empty();
    for (int64_t t = 0; t < count; ++t) {
      check_shape(kOp, "teacher", teachers_[t], {pr.rows, pr.classes});
      teachers.push_back(dense_rows(teachers_[t]));
      packs &= takes(teachers[t]);
      pr.teacher[t] = Rows(teachers[t]);
      if (pr.own_temperatures) pr.teacher_temperature[t] = static_cast<float>(set.teacher_temperatures[t]);
    }
    auto numbers = [&](const char* name, const std::optional<Tensor>& given, std::optional<Tensor>& kept) {
      if (!given) return static_cast<const float*>(nullptr);
      check_shape(kOp, name, *given, {pr.rows});
      STD_TORCH_CHECK(given->scalar_type() == ScalarType::Float, kOp, ": ", name, " must be float32");
      kept = dense(*given);
      return values(kept);
    };
    pr.alphas = numbers("alpha", alphas_, alphas);
    pr.temperatures = numbers("temperature", temperatures_, temperatures);
    pr.of_ce = static_cast<float>(set.kd.ce_weight), pr.of_kl = static_cast<float>(set.kd.kl_weight);
    pr.labeled = labels.has_value();
    pr.even = static_cast<float>(set.kd.label_smoothing) / static_cast<float>(pr.classes);
    pr.kind = set.kind, pr.mode = set.mode, pr.t2_scale = set.t2_scale;
    pr.share = shares_of<float>(set.kind, set.beta), pr.exact = shares_of<double>(set.kind, set.beta);
  }

 private:
  static bool takes(const Tensor& t) {  // four classes at a time
    dispatch_gpu(t.scalar_type(), kOp, [](auto) {});
    return fits_packs(t, 4);
  }
};

// Launches kernel<kPack, kSum> for these rows, chosen by `of`.
template <class Kernels, class... Args>
void launch_rows(const Inputs& inputs, const Kernels& of, const OnDevice& on, const Args&... args) {
  const Problem& pr = inputs.pr;
  const int64_t packs = pr.classes / (inputs.packs ? 4 : 1);
  unsigned threads = kWarp, cluster = 1;
  while (threads < packs && threads < kMaxThreads) threads *= 2;
  // Few long rows by several blocks each, so that all multiprocessors work.
  while (cluster < kMaxCluster && pr.rows * cluster < kMostBlocks && packs > int64_t{kSteps} * threads * cluster)
    cluster *= 2;
  if (cluster > 1) cluster = on.largest_cluster(cluster);
  const size_t bytes = sizeof(Scratch) + 2 * pr.teachers * threads * sizeof(float);
  const bool sum = pr.mode == DivergenceMode::sum;
  launch(of(inputs.packs, sum), {blocks(pr.rows * cluster), threads, cluster, bytes}, on, pr, args...);
}

}  // namespace amtml::gpu::divergences
