// The loss of teachers that give their largest classes only, with one class for all that a teacher does not name, from
// what topk_bucket.cu finds in the student's rows; and its gradients to that. csrc/cpu/topk_bucket_loss.cpp has the
// formulas.
//
// A row a block, of which each thread takes some of the K entries. Sorted by class, the first of a class speaks for
// it. All numbers are double: what an entry costs is small beside the row, and sums may be far below one another.
//
// Traffic: 28 bytes an entry in, a few times, and 16 out.
#include "../arithmetic.h"
#include "kd_rows.cuh"
#include "topk_named.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "topk_kd_loss";
constexpr double kFar = 1e-280;  // of the largest exponential: below it a sum has a maximum of its own

struct Problem : KDProblem {
  Named of;
  double tau;
  MixtureShares<double> share;
  Divergence kind;

  __device__ bool has_ce() const { return labels && ce_weight != 0; }
};

struct Made {
  double *ce_rows, *kl_rows;  // [N], or null
  float* loss;                // [N], instead
  double *of_sums, *of_named;
  int64_t* heads;
  float* of_weights;
};

// Value and q df/dq of an outcome.
__device__ __noinline__ DivergenceTerm<double> outcome(Divergence kind, double p, double q, double log_q,
                                                       MixtureShares<double> share) {
  const auto log_of = [](double x) { return log(x); };
  const double log_p = p == 0 ? -INFINITY : log(p);
  switch (kind) {
    case Divergence::forward_kl:
      return divergence_term<Divergence::forward_kl>(p, q, log_p, log_q, share, log_of);
    case Divergence::reverse_kl:
      return divergence_term<Divergence::reverse_kl>(p, q, log_p, log_q, share, log_of);
    case Divergence::jsd:
      return divergence_term<Divergence::jsd>(p, q, log_p, log_q, share, log_of);
    case Divergence::skew_kl:
      return divergence_term<Divergence::skew_kl>(p, q, log_p, log_q, share, log_of);
    case Divergence::skew_reverse_kl:
      return divergence_term<Divergence::skew_reverse_kl>(p, q, log_p, log_q, share, log_of);
    default:
      return divergence_term<Divergence::tvd>(p, q, log_p, log_q, share, log_of);
  }
}

// Sums over the outcomes of a teacher.
struct Outcomes {
  double value = 0, qb = 0, mass = 0, lost_mass = 0;

  __device__ double add(const Problem& pr, double p, double q, double log_q) {
    mass += p;
    if (pr.kind == Divergence::reverse_kl && p == 0 && q != 0) {  // infinite, and without a gradient
      value += INFINITY, lost_mass += q;                          // NaN stays NaN
      return 0;
    }
    const DivergenceTerm<double> term = outcome(pr.kind, p, q, log_q, pr.share);
    value += term.value, qb += term.qb;
    return term.qb;
  }
};

// D of all teachers, and what is gathered of its gradients; those to the classes that are named stand in `of_named`.
struct Compared {
  double distance = 0, of_outside = 0, total_b = 0;
  bool outside_lost = false;
  unsigned lost = 0;  // a bit for each of this thread's places
};

__device__ inline void compare(const Problem& pr, const Row& row, int t, const LogSum& outside, const LogSum& all,
                               double kl_grad, const Made& out, Compared& to) {
  const double weight = pr.weight(row.i, t);
  double* const of_named = out.of_named + row.first();
  double left_out = 0;
#pragma unroll 1
  for (int m = pr.of.start.of[t] + threadIdx.x; m < pr.of.start.of[t + 1]; m += blockDim.x) {
    if (pr.of.indices[row.first() + m] == kNobody) left_out += row.given(m);
  }
  left_out = row.sum(left_out);
  const double log_mass = row.log_mass(t);
  const bool dead = weight == 0 && !(exp(log_mass) < INFINITY);  // 0 * NaN is 0

  // The student's share of what the teacher does not name.
  double others = 0, own = 0;
  row.each_head([&](int m) {
    if (row.names(t, m)) {
      ++own;
    } else {
      others += exp(row.logit(m) / pr.tau - all.top);
    }
  });
  double top = all.top, of_outside = exp(outside.above(top));
  others = row.sum(others) + of_outside, own = row.sum(own);
  const bool far = others < kFar;
  if (far) {
    top = outside.top;
    row.each_head([&](int m) {
      if (!row.names(t, m)) top = fmax(top, row.logit(m) / pr.tau);
    });
    top = row.max(top);
    const bool some = top != -INFINITY;
    of_outside = some ? exp(outside.above(top)) : 0;
    others = 0;
    row.each_head([&](int m) {
      if (some && !row.names(t, m)) others += exp(row.logit(m) / pr.tau - top);
    });
    others = row.sum(others) + of_outside;
  }
  const bool none = others == 0 && all.top != -INFINITY;  // the student has none of these classes: a constant

  Outcomes sums;
  row.each_head([&](int m) {
    double p;
    if (!row.names(t, m, &p)) return;
    if (dead) p = 0;
    const double log_q = all.of(row.logit(m) / pr.tau), b = sums.add(pr, p, exp(log_q), log_q);
    if (weight == 0) return;
    of_named[entry_of(row.s.keys[m])] += weight * b;
    if (pr.kind == Divergence::reverse_kl && p == 0) to.lost |= 1u << (m / blockDim.x);
  });
  sums.value = row.sum(sums.value), sums.qb = row.sum(sums.qb);
  sums.mass = row.sum(sums.mass), sums.lost_mass = row.sum(sums.lost_mass);
  double rest = 0;
  if (own != static_cast<double>(pr.classes)) rest = dead ? 1 : unnamed_mass(log_mass) + left_out;
  const double log_rest = none ? -INFINITY : all.of(top) + log(others), of_those = sums.qb;
  const double b = sums.add(pr, rest, exp(log_rest), log_rest);
  if (none) sums.qb = of_those;
  sums.value += divergence_constant(pr.kind, sums.mass, pr.share);
  if (pr.kind == Divergence::skew_kl && sums.mass == 0) sums.value = sums.qb = 0;  // whatever q is
  const bool broken = weight == 0 && !(fabs(sums.value) < INFINITY);
  if (out.of_weights && threadIdx.x == 0) {
    out.of_weights[row.i * pr.teachers + t] = broken || kl_grad == 0 ? 0 : static_cast<float>(kl_grad * sums.value);
  }
  if (weight == 0) return;

  to.distance += weight * sums.value;
  to.total_b += weight * (sums.qb - sums.lost_mass);
  const bool gone = pr.kind == Divergence::reverse_kl && rest == 0;
  to.outside_lost |= gone;
  const double by = none ? 0 : weight * b / others;
  to.of_outside += none ? 0 : by * of_outside;
  row.each_head([&](int m) {
    if (row.names(t, m)) return;
    if (gone) to.lost |= 1u << (m / blockDim.x);
    if (!none) of_named[entry_of(row.s.keys[m])] += by * exp(row.logit(m) / pr.tau - top);
  });
}

__device__ inline void write_ignored(const Problem& pr, const Row& row, const Made& out) {
  for (int m = threadIdx.x; m < pr.of.entries(); m += blockDim.x) {
    out.of_named[row.first() + m] = 0, out.heads[row.first() + m] = kNobody;
  }
  for (int t = threadIdx.x; out.of_weights && t < pr.teachers; t += blockDim.x) {
    out.of_weights[row.i * pr.teachers + t] = 0;
  }
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 4; ++k) out.of_sums[row.i * 4 + k] = 0;
  if (out.kl_rows) out.kl_rows[row.i] = out.ce_rows[row.i] = 0;
  if (out.loss) out.loss[row.i] = 0;
}

__global__ void __launch_bounds__(kNamedThreads) rows_kernel(const __grid_constant__ Problem pr, const Made out) {
  NamedScratch& s = shared<NamedScratch>();
  const Row row{pr.of, s, blockIdx.x};
  const int64_t i = row.i;
  if (pr.ignored(i)) return write_ignored(pr, row, out);
  float ce_grad, kl_grad;
  gradient_scales(pr, s.sums, &ce_grad, &kl_grad);
  row.load_keys();
#pragma unroll 1
  for (int m = threadIdx.x; m < pr.of.entries(); m += blockDim.x) {  // of the places of this thread
    const int64_t c = class_of(s.keys[m]);
    if (s.keys[m] == kNoEntry) break;
    out.of_named[row.first() + entry_of(s.keys[m])] = 0;
    out.heads[row.first() + entry_of(s.keys[m])] = begins(s.keys, m) ? c : kNobody;
  }
#pragma unroll 1
  for (int m = threadIdx.x; m < pr.of.entries(); m += blockDim.x) {
    if (pr.of.indices[row.first() + m] != kNobody) continue;
    out.of_named[row.first() + m] = 0, out.heads[row.first() + m] = kNobody;
  }

  const LogSum outside = row.outside(row.found()[1], pr.tau), all = row.all(outside, pr.tau);
  Compared made;
#pragma unroll 1
  for (int t = 0; t < pr.teachers; ++t) compare(pr, row, t, outside, all, kl_grad, out, made);
  double of_outside = made.outside_lost ? 0 : made.of_outside - made.total_b * exp(outside.log_share_in(all));

  double ce = 0, of_outside1 = 0;
  LogSum all1{};
  if (pr.has_ce()) {
    const LogSum outside1 = row.outside(row.found()[pr.tau == 1 ? 1 : 2], 1);
    all1 = row.all(outside1, 1);
    of_outside1 = ce_grad * exp(outside1.log_share_in(all1));
    ce = all1.above(row.found()[3]);
    const double smoothing = pr.label_smoothing;
    if (smoothing != 0) {  // not 0 * infinity
      ce = (1 - smoothing) * ce + smoothing * all1.above(row.found()[4] / static_cast<double>(pr.classes));
    }
  }
  row.each_head([&](int m) {
    double& g = out.of_named[row.first() + entry_of(s.keys[m])];
    const double z = row.logit(m);
    const bool lost = made.lost >> (m / blockDim.x) & 1;
    g = lost || kl_grad == 0 ? 0 : kl_grad / pr.tau * (g - made.total_b * exp(all.of(z / pr.tau)));
    if (pr.has_ce()) g += ce_grad * exp(all1.of(z));
  });
  if (threadIdx.x != 0) return;
  of_outside = kl_grad == 0 ? 0 : kl_grad * of_outside;  // teachers without weight in the loss may hold NaN
  double* const of_sums = out.of_sums + i * 4;
  of_sums[0] = of_outside + (pr.tau == 1 ? of_outside1 : 0);
  of_sums[1] = pr.tau == 1 ? 0 : of_outside1;
  of_sums[2] = pr.has_ce() ? -ce_grad * (1.0 - pr.label_smoothing) : 0.0;
  of_sums[3] = pr.has_ce() ? -ce_grad * static_cast<double>(pr.label_smoothing) : 0.0;
  const double kl = pr.kl_scale * made.distance;
  if (out.kl_rows) out.kl_rows[i] = kl, out.ce_rows[i] = ce;
  if (out.loss) out.loss[i] = static_cast<float>(weighted(pr, ce, kl));
}

// --- the host's side

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> topk_bucket_rows(
    const Tensor& found, const Tensor& named, const Tensor& student, const Tensor& indices, const Tensor& log_probs,
    std::vector<int64_t> sizes, std::optional<Tensor> weights, std::optional<Tensor> labels, double temperature,
    double ce_weight, double kl_weight, double kl_scale, Name tail, Name reduction, int64_t ignore_index,
    double label_smoothing, Name divergence, double beta) {
  const OnDevice on(student);
  const DivergenceSettings settings(divergence, beta, tail, {}, temperature, false, ce_weight, kl_weight, reduction,
                                    ignore_index, label_smoothing);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing};
  const int64_t n = student.size(0), teachers = static_cast<int64_t>(sizes.size());
  const NamedTensors entries_of(kOp, found, named, indices, log_probs, sizes, student.size(1));
  KDTensors own;
  Problem pr{};
  pr.of = entries_of.of;
  own.fill(pr, kOp, student, teachers, weights, labels, set, on);
  pr.tau = temperature, pr.share = shares_of<double>(settings.kind, beta), pr.kind = settings.kind;
  const int64_t entries = pr.of.start.of[teachers];

  const bool none = set.each_row();
  const Tensor loss = empty(student, none ? Shape{n} : Shape{}, ScalarType::Float);
  const Tensor of_sums = empty(student, {n, 4}, ScalarType::Double);
  const Tensor of_named = empty(student, {n, entries}, ScalarType::Double);
  const Tensor heads = empty(student, {n, entries}, ScalarType::Long);
  const Tensor of_weights = empty(student, {n, teachers}, ScalarType::Float);
  const Tensor rows = empty(student, {2, none ? 0 : n}, ScalarType::Double);
  Made out{};
  if (none) {
    out.loss = data(loss);
  } else {
    out.ce_rows = doubles(rows), out.kl_rows = out.ce_rows + n;
  }
  out.of_sums = doubles(of_sums), out.of_named = doubles(of_named), out.of_weights = data(of_weights);
  out.heads = static_cast<int64_t*>(heads.mutable_data_ptr());
  launch(rows_kernel, entries_of.spread(), on, pr, out);
  if (!none) reduce_rows(pr, rows, data(loss), nullptr, nullptr, on);
  return {loss, of_sums, of_named, heads, of_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) { m.impl("topk_bucket_rows", TORCH_BOX(&topk_bucket_rows)); }

}  // namespace amtml::gpu
