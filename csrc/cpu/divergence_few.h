// Any divergence of few classes, 16 rows at once; divergence_rows.h has the formulas. Rare rows are left to it: those
// with NaN or infinite results, and those whose reverse KL needs the logarithm of next to nothing.
#pragma once

#include "divergence.h"
#include "few_rows.h"

namespace amtml::divergences {

// The scratch of one thread.
struct FewRows {
  const Problem<float>& problem;
  const bool sums, mixes_logits, logs;  // its mode; whether the divergence asks for logarithms
  Columns student;
  std::vector<Columns> logits;  // of the teachers; of one after the other if they are not mixed
  std::vector<FewSoftmax>
      of;  // the teachers'; one after the other if they are compared so, without e if logits are mixed
  FewSoftmax q, q1, mixed;
  Columns mixed_logits;
  Buffer<double> mixed_exactly;
  std::vector<Each<float>> weight;
  std::vector<Each<double>> dot;         // d D / d weight
  Columns p, prob, log_p, log_q, qb, a;  // p, q, their logarithms, q b; a, or p a of mixed logits
  Columns made;
  Buffer<float> scratch;
  Each<bool> on, rare;  // the rows that count, and which of them are left out
  Each<int64_t> label;
  Each<float> total;             // sum of the weights
  Each<double> distance, ce;     // D, CE
  Each<float> kl_grad, ce_grad;  // d loss / d (D / tau), d loss / d CE

  explicit FewRows(const Problem<float>& pr)
      : problem(pr),
        sums(pr.set.mode == Mode::sum),
        mixes_logits(pr.set.mode == Mode::logits),
        logs(pr.set.kind == Divergence::forward_kl || pr.set.kind == Divergence::reverse_kl),
        student(pr.classes),
        q(pr.classes),
        q1(pr.labeled ? pr.classes : 0),
        mixed(mixes_logits ? pr.classes : 0),
        mixed_logits(mixes_logits ? pr.classes : 0),
        mixed_exactly(mixes_logits ? pr.classes * kRows : 0),
        weight(pr.teachers),
        dot(pr.teachers),
        p(pr.classes),
        prob(pr.classes),
        log_p(logs ? pr.classes : 0),
        log_q(logs ? pr.classes : 0),
        qb(pr.classes),
        a(pr.classes),
        made(pr.classes),
        scratch(pr.classes * kRows) {
    for (int64_t t = 0; t < (mixes_logits ? pr.teachers : 1); ++t) logits.emplace_back(pr.classes);
    for (int64_t t = 0; t < (sums ? 1 : pr.teachers); ++t) of.emplace_back(mixes_logits ? 0 : pr.classes);
  }
};

AMTML_INLINE void leave_out_if_not_finite(FewRows& r, const FewSoftmax& p) {
  for (int l = 0; l < kRows; ++l) r.rare[l] |= !p.finite(l);
}

// Probabilities of a softmax, and its logarithms.
AMTML_INLINE void write_probabilities(const FewSoftmax& from, int64_t classes, Columns& to) {
  for (int64_t c = 0; c < classes; ++c) {
    const float* e = from.e.at(c);
    float* p = to.at(c);
    each_row([&](int l) __attribute__((always_inline)) { p[l] = e[l] * from.inverse[l]; });
  }
}
AMTML_INLINE void write_logarithms(const FewSoftmax& from, const Columns& logits, int64_t classes, Columns& to) {
  for (int64_t c = 0; c < classes; ++c) {
    const float* x = logits.at(c);
    float* log_p = to.at(c);
    each_row([&](int l) __attribute__((always_inline)) {
      const float log = (x[l] - from.m[l]) * from.per_tau[l] - from.log_sum[l];
      log_p[l] = from.inverse[l] == 0 ? 0.0f : log;  // of a teacher that counts nothing it may be NaN
    });
  }
}

AMTML_INLINE void load_student(FewRows& r, const Group& group, bool need_ce) {
  const Problem<float>& pr = r.problem;
  load_columns(pr.student, group, pr.classes, r.scratch.data(), r.student);
  for (int l = 0; l < kRows; ++l) r.q.per_tau[l] = static_cast<float>(1 / pr.temperature(group.row(l)));
  r.q.make(r.student, pr.classes);
  leave_out_if_not_finite(r, r.q);
  write_probabilities(r.q, pr.classes, r.prob);
  if (r.logs) {
    r.q.take_logarithms();
    write_logarithms(r.q, r.student, pr.classes, r.log_q);
  }
  if (!pr.labeled) return;
  r.q1.make(r.student, pr.classes, r.q, pr.temperatures ? 0 : 1 / static_cast<double>(r.q.per_tau[0]));
  if (need_ce) r.q1.take_logarithms();
}

// Logits, temperature and weight of teacher t, and its softmax where that is asked for.
AMTML_INLINE void load_teacher(FewRows& r, const Group& group, int64_t t, Columns& x, FewSoftmax& p) {
  const Problem<float>& pr = r.problem;
  load_columns(pr.teacher[t], group, pr.classes, r.scratch.data(), x);
  if (pr.set.teacher_temperatures.empty()) {
    p.per_tau = r.q.per_tau;
  } else {
    p.per_tau.fill(static_cast<float>(1 / pr.set.teacher_temperatures[t]));
  }
  for (int l = 0; l < kRows; ++l) r.total[l] += r.weight[t][l] = pr.weight(group.row(l), t);
  if (r.mixes_logits) return;
  p.make(x, pr.classes);
  if (r.sums && r.logs) p.take_logarithms();
  Each<bool> nothing;
  bool any = false;
  for (int l = 0; l < kRows; ++l) {
    nothing[l] = r.weight[t][l] == 0 && !p.finite(l);
    any |= nothing[l];
  }
  if (any) p.clear(nothing, pr.classes);  // 0 * NaN is 0
  leave_out_if_not_finite(r, p);
}

AMTML_INLINE void mix_logits(FewRows& r) {
  const int64_t n = r.problem.classes;
  using Most = Lanes<double, kRows, 4>;
  Most found = Most::all(-std::numeric_limits<double>::infinity());
  for (int64_t c = 0; c < n; ++c) {
    double* s = r.mixed_exactly.data() + c * kRows;
    std::fill_n(s, kRows, 0.0);
    for (int64_t t = 0; t < r.problem.teachers; ++t) {
      const float* x = r.logits[t].at(c);
      const Each<float>&w = r.weight[t], &by = r.of[t].per_tau;
      each_row([&](int l) __attribute__((always_inline)) {
        const double logit = w[l] == 0 ? 0.0f : x[l];  // 0 times infinity, or NaN, is 0
        s[l] += static_cast<double>(w[l]) * (logit * static_cast<double>(by[l]));
      });
    }
    found = most(Most::load(s), found);
  }
  Each<double> top;
  for (int p = 0; p < 4; ++p) Most::V::store(top.of + p * kRows / 4, found.part[p]);
  for (int l = 0; l < kRows; ++l) top[l] = top[l] - top[l] == 0 ? top[l] : 0;
  for (int64_t c = 0; c < n; ++c) {
    const double* s = r.mixed_exactly.data() + c * kRows;
    float* x = r.mixed_logits.at(c);
    each_row([&](int l) __attribute__((always_inline)) { x[l] = static_cast<float>(s[l] - top[l]); });
  }
  r.mixed.per_tau.fill(1);
  r.mixed.make(r.mixed_logits, n);
  if (r.logs) r.mixed.take_logarithms();
  leave_out_if_not_finite(r, r.mixed);
}

// The teachers' mixture, in r.p, and its logarithm. (A loop of its own for the first teacher: of a choice between two
// sums Clang makes other roundings in some lanes than in others.)
AMTML_INLINE void mix(FewRows& r) {
  const int64_t n = r.problem.classes;
  for (int64_t t = 0; t < r.problem.teachers; ++t) {
    Each<float> by;
    each_row([&](int l) __attribute__((always_inline)) { by[l] = r.weight[t][l] * r.of[t].inverse[l]; });
    for (int64_t c = 0; c < n; ++c) {
      const float* e = r.of[t].e.at(c);
      float* p = r.p.at(c);
      if (t == 0) {
        each_row([&](int l) __attribute__((always_inline)) { p[l] = by[l] * e[l]; });
      } else {
        each_row([&](int l) __attribute__((always_inline)) { p[l] += by[l] * e[l]; });
      }
    }
  }
  if (!r.logs) return;
  for (int64_t c = 0; c < n; ++c) {
    const float* p = r.p.at(c);
    float* log_p = r.log_p.at(c);
    each_row([&](int l) __attribute__((always_inline)) { log_p[l] = log_positive(p[l] == 0 ? 1.0f : p[l]); });
  }
  if (r.problem.set.kind != Divergence::reverse_kl) return;
  Each<float> least;
  least.fill(1);
  for (int64_t c = 0; c < n; ++c) {
    const float *p = r.p.at(c), *q = r.prob.at(c);
    each_row([&](int l) __attribute__((always_inline)) { least[l] = q[l] != 0 && p[l] < least[l] ? p[l] : least[l]; });
  }
  for (int l = 0; l < kRows; ++l) r.rare[l] |= least[l] < kTiny;
}

// Adds up the terms and makes q b, times `weight` and added to what is there, and a.
template <Divergence kind>
AMTML_INLINE void add_terms(FewRows& r, MixtureShares<float> share, const Each<float>& weight, Each<double>& sum) {
  constexpr bool logs = kind == Divergence::forward_kl || kind == Divergence::reverse_kl;
  const auto log = [](float x) __attribute__((always_inline)) { return log_positive(x); };
  sum_classes(r.problem.classes, sum, [&](int64_t c, int l) __attribute__((always_inline)) {
    const float log_p = logs ? r.log_p.at(c)[l] : 0.0f, log_q = logs ? r.log_q.at(c)[l] : 0.0f;
    const auto term = divergence_term<kind>(r.p.at(c)[l], r.prob.at(c)[l], log_p, log_q, share, log);
    r.qb.at(c)[l] += weight[l] * term.qb;
    r.a.at(c)[l] = term.a;
    return term.value;
  });
}

AMTML_INLINE void add_terms(FewRows& r, const Each<float>& weight, Each<double>& sum) {
  const auto share = shares_of<float>(r.problem.set.kind, r.problem.set.beta);
  switch (r.problem.set.kind) {
    case Divergence::forward_kl:
      return add_terms<Divergence::forward_kl>(r, share, weight, sum);
    case Divergence::reverse_kl:
      return add_terms<Divergence::reverse_kl>(r, share, weight, sum);
    case Divergence::jsd:
      return add_terms<Divergence::jsd>(r, share, weight, sum);
    case Divergence::skew_kl:
      return add_terms<Divergence::skew_kl>(r, share, weight, sum);
    case Divergence::skew_reverse_kl:
      return add_terms<Divergence::skew_reverse_kl>(r, share, weight, sum);
    default:
      return add_terms<Divergence::tvd>(r, share, weight, sum);
  }
}

// D of the student to what is in r.p; the target is a softmax, or the teachers' mixture where that is null.
AMTML_INLINE void compare(FewRows& r, const FewSoftmax* target, const Each<float>& weight, Each<double>& own) {
  const Divergence kind = r.problem.set.kind;
  const double beta = r.problem.set.beta;
  add_terms(r, weight, own);
  Each<double> mass, rest;  // of p, and what roundings cut off log q less log p
  each_row([&](int l) __attribute__((always_inline)) {
    mass[l] = target ? double(target->inverse[l] != 0) : r.total[l];
    rest[l] = target ? r.q.rest[l] - target->rest[l] : r.q.rest[l];
  });
  if (kind == Divergence::forward_kl) {
    each_row([&](int l) __attribute__((always_inline)) { own[l] += mass[l] * rest[l]; });
  } else if (kind == Divergence::reverse_kl) {
    each_row([&](int l) __attribute__((always_inline)) {
      const double sum = own[l] - rest[l];
      own[l] = mass[l] == 0 ? 0 : sum;
    });
  } else {
    for (int l = 0; l < kRows; ++l) own[l] += divergence_constant(kind, mass[l], shares_of<double>(kind, beta));
  }
  for (int l = 0; l < kRows; ++l) r.rare[l] |= !(std::abs(own[l]) < std::numeric_limits<double>::infinity());
}

// d D / d weight of a mixture's teachers.
AMTML_INLINE void differentiate_mixture(FewRows& r) {
  const Problem<float>& pr = r.problem;
  const bool one = pr.set.kind == Divergence::forward_kl;  // of df/dp
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const FewSoftmax& p = r.of[t];
    Each<double>& dot = r.dot[t];
    sum_classes(pr.classes, dot, [&](int64_t c, int l) __attribute__((always_inline)) {
      const float e = p.e.at(c)[l];
      return if_mass(e, e * r.a.at(c)[l]);
    });
    each_row([&](int l)
                 __attribute__((always_inline)) { dot[l] = dot[l] * p.inverse[l] + double(one && p.inverse[l] != 0); });
  }
}

// The same of those whose logits are mixed.
AMTML_INLINE void differentiate_mixed_logits(FewRows& r) {
  const Problem<float>& pr = r.problem;
  const float equals = slope_of_equals(pr.set.kind, shares_of<float>(pr.set.kind, pr.set.beta));
  const bool reverse = pr.set.kind == Divergence::reverse_kl;  // a = -q / p may be too large for a float there
  Each<double> sum;
  sum_classes(pr.classes, sum, [&](int64_t c, int l) __attribute__((always_inline)) {
    const float p = r.p.at(c)[l], a = r.a.at(c)[l];
    return r.a.at(c)[l] = reverse ? p - r.prob.at(c)[l] : if_mass(p, p * (a - equals));
  });
  for (int64_t c = 0; c < pr.classes; ++c) {
    const float* p = r.p.at(c);
    float* slope = r.a.at(c);
    each_row([&](int l) __attribute__((always_inline)) { slope[l] -= p[l] * static_cast<float>(sum[l]); });
  }
  for (int64_t t = 0; t < pr.teachers; ++t) {
    FewSoftmax& of = r.of[t];
    of.find_maximum(r.logits[t], pr.classes);
    Each<float> none;  // the place of what is not finite, as it is or over tau: it has no weight, or no probability
    each_row([&](int l) __attribute__((always_inline)) {
      of.m[l] = of.m[l] - of.m[l] == 0 ? of.m[l] : 0.0f;
      none[l] = -of.m[l] * of.per_tau[l];
    });
    sum_classes(pr.classes, r.dot[t], [&](int64_t c, int l) __attribute__((always_inline)) {
      const float scaled = (r.logits[t].at(c)[l] - of.m[l]) * of.per_tau[l];
      const float y = std::abs(scaled) < std::numeric_limits<float>::infinity() ? scaled : none[l];
      return if_mass(y, r.a.at(c)[l] * y);
    });
  }
}

// D, q b, and, where they are needed, the gradients of D to the weights. (One call of everything for all modes: inlined
// for each, it would take that much longer to compile.)
AMTML_INLINE void compare_all(FewRows& r, const Group& group, bool need_weights_grad) {
  const Problem<float>& pr = r.problem;
  const int64_t n = pr.classes;
  std::fill_n(r.qb.data(), n * kRows, 0.0f);
  r.total.fill(0);
  r.distance.fill(0);
  for (int64_t t = 0; t < pr.teachers; ++t) {
    FewSoftmax& p = r.of[r.sums ? 0 : t];
    Columns& x = r.logits[r.mixes_logits ? t : 0];
    load_teacher(r, group, t, x, p);
    if (!r.sums && t + 1 < pr.teachers) continue;
    if (r.mixes_logits) mix_logits(r);
    const FewSoftmax* target = r.sums ? &p : r.mixes_logits ? &r.mixed : nullptr;
    if (target) {
      write_probabilities(*target, n, r.p);
      if (r.logs) write_logarithms(*target, r.sums ? x : r.mixed_logits, n, r.log_p);
    } else {
      mix(r);
    }
    Each<float> weight;
    Each<double> own;
    for (int l = 0; l < kRows; ++l) weight[l] = r.sums ? r.weight[t][l] : 1.0f;
    compare(r, target, weight, own);
    each_row([&](int l) __attribute__((always_inline)) { r.distance[l] += weight[l] * own[l]; });
    if (r.sums) r.dot[t] = own;
  }
  if (!need_weights_grad || r.sums) return;
  r.mixes_logits ? differentiate_mixed_logits(r) : differentiate_mixture(r);
}

// The gradient of the student's logits, in r.made.
AMTML_INLINE void differentiate_student(FewRows& r) {
  const Problem<float>& pr = r.problem;
  const float smoothing = static_cast<float>(pr.set.kd.label_smoothing);
  Each<double> slope;
  sum_classes(pr.classes, slope, [&](int64_t c, int l) __attribute__((always_inline)) { return r.qb.at(c)[l]; });
  Each<float> mean, ce_q, flat;
  each_row([&](int l) __attribute__((always_inline)) { mean[l] = static_cast<float>(slope[l]); });
  if (pr.labeled) {
    each_row([&](int l) __attribute__((always_inline)) {
      ce_q[l] = r.ce_grad[l] * r.q1.inverse[l], flat[l] = r.ce_grad[l] * smoothing / pr.classes;
    });
  }
  constexpr float masked = -std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < pr.classes; ++c) {
    const float *z = r.student.at(c), *q = r.prob.at(c), *qb = r.qb.at(c);
    float* out = r.made.at(c);
    each_row([&](int l) __attribute__((always_inline)) { out[l] = r.kl_grad[l] * (qb[l] - q[l] * mean[l]); });
    if (pr.labeled) {
      const float* e1 = r.q1.e.at(c);
      each_row([&](int l) __attribute__((always_inline)) { out[l] += ce_q[l] * e1[l] - flat[l]; });
    }
    each_row([&](int l) __attribute__((always_inline)) { out[l] = z[l] == masked ? 0.0f : out[l]; });
  }
  for (int l = 0; pr.labeled && l < kRows; ++l) {
    float& out = r.made.at(r.label[l])[l];
    if (r.student.at(r.label[l])[l] != masked) out -= r.ce_grad[l] * (1 - smoothing);
  }
}

// The rows of a group, but for those that it says are rare.
AMTML_INLINE void run_group(FewRows& r, const Group& group, const Pass<float>& pass) {
  const Problem<float>& pr = r.problem;
  const Settings& set = pr.set;
  const bool need_ce = pr.labeled && (pass.forward() || pass.grad_alpha);
  bool any = false;
  for (int l = 0; l < kRows; ++l) {
    const int64_t i = group.row(l);
    r.on[l] = !pr.ignored(i), r.rare[l] = false, any |= r.on[l];
    r.label[l] = pr.labels && r.on[l] ? pr.labels[i] : 0;
  }
  if (any) {  // else nothing is read
    load_student(r, group, need_ce);
    compare_all(r, group, pass.grad_weights);
    if (need_ce) cross_entropy(r.student, r.q1, r.label, pr.classes, set.kd.label_smoothing, r.ce);
  }
  for (int l = 0; l < kRows; ++l) {
    const int64_t i = group.row(l);
    r.rare[l] &= r.on[l];
    r.kl_grad[l] = r.ce_grad[l] = 0;
    if (l >= group.count) continue;
    if (r.on[l]) {
      const auto dot = [&](int64_t t) __attribute__((always_inline)) { return r.dot[t][l]; };
      const RowGradients of = write_row(pr, pass, i, r.distance[l], need_ce ? r.ce[l] : 0, dot);
      r.kl_grad[l] = static_cast<float>(of.kl), r.ce_grad[l] = static_cast<float>(of.ce);
    } else {
      write_ignored_row(pr, pass, i);
    }
  }
  if (!pass.grad_student) return;
  if (any) differentiate_student(r);
  store_columns(r.made, group, r.on, pr.classes, r.scratch.data(), pass.grad_student);
}

}  // namespace amtml::divergences
