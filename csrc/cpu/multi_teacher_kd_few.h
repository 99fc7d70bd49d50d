// Weighted multi-teacher distillation of few classes, 16 rows at once.
#pragma once

#include "few_rows.h"
#include "multi_teacher_kd.h"
#include "shares.h"

namespace amtml::multi_teacher {

// The scratch of one thread.
struct FewRows {
  const Problem<float>& problem;
  bool keep;  // whether all teachers' logits are needed at once
  Columns student;
  std::vector<Columns> logits;  // of the teachers; of one after the other if not `keep`
  FewSoftmax q, q1;
  std::vector<FewSoftmax> of;               // the teachers'
  std::vector<Each<float>> weight, factor;  // times the inverse sum
  std::vector<Each<double>> dot, kl_t;
  Columns p, ratio, made, back_q, back_p;
  Buffer<float> scratch;
  Each<bool> on;  // the rows that count
  Each<int64_t> label;
  Each<float> total, ce_grad, kl_grad;  // sum of the weights; d loss / d CE, d loss / d KL
  Each<double> ce, kl;

  FewRows(const Problem<float>& pr, const Pass<float>& pass)
      : problem(pr),
        keep(!pr.mixture || pr.teachers == 1),
        student(pr.classes),
        q(pr.classes),
        q1(pr.labels ? pr.classes : 0),
        weight(pr.teachers),
        factor(pr.teachers),
        dot(pr.teachers),
        kl_t(pr.teachers),
        p(pr.classes),
        ratio(pr.classes),
        made(pr.classes),
        back_q(pass.grad_q ? pr.classes : 0),
        back_p(pass.grad_p ? pr.classes : 0),
        scratch(pr.classes * kRows) {
    for (int64_t t = 0; t < (keep ? pr.teachers : 1); ++t) logits.emplace_back(pr.classes);
    for (int64_t t = 0; t < pr.teachers; ++t) of.emplace_back(pr.classes);
  }
};

// Softmaxes and weights of a group.
template <bool kForward>
AMTML_INLINE void load(FewRows& r, const Group& group) {
  const Problem<float>& pr = r.problem;
  const int64_t n = pr.classes;
  const float per_tau = static_cast<float>(1 / pr.set.temperature);
  load_columns(pr.student, group, n, r.scratch.data(), r.student);
  r.q.per_tau.fill(per_tau);
  r.q.make(r.student, n);
  r.q.take_logarithms();
  if (pr.labels) r.q1.make(r.student, n, r.q, 1 / static_cast<double>(per_tau));
  if (pr.labels && kForward) r.q1.take_logarithms();
  r.total.fill(0);
  for (int64_t t = 0; t < pr.teachers; ++t) {
    FewSoftmax& p = r.of[t];
    Columns& x = r.logits[r.keep ? t : 0];
    load_columns(pr.teacher[t], group, n, r.scratch.data(), x);
    p.per_tau.fill(per_tau);
    p.make(x, n);
    if (r.keep) p.take_logarithms();
    Each<bool> nothing;
    bool any = false;
    for (int l = 0; l < kRows; ++l) {
      const float w = r.weight[t][l] = pr.weight(group.row(l), t);
      r.total[l] += w;
      nothing[l] = w == 0 && !p.finite(l);
      any |= nothing[l];
    }
    if (any) p.clear(nothing, n);  // 0 * NaN is 0
    each_row([&](int l) __attribute__((always_inline)) { r.factor[t][l] = r.weight[t][l] * p.inverse[l]; });
  }
}

// The mixture p (with a loop of its own for the first teacher: of a choice between two sums Clang made other roundings
// in some lanes than in others), and, where they are needed, log p - log q and the KL in its mode.
AMTML_INLINE void compare(FewRows& r, bool need_logs) {
  const Problem<float>& pr = r.problem;
  const float per_tau = static_cast<float>(1 / pr.set.temperature);
  const FewSoftmax& q = r.q;
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const Each<float>& factor = r.factor[t];
    for (int64_t c = 0; c < pr.classes; ++c) {
      const float* e = r.of[t].e.at(c);
      float* p = r.p.at(c);
      if (t == 0) {
        each_row([&](int l) __attribute__((always_inline)) { p[l] = factor[l] * e[l]; });
      } else {
        each_row([&](int l) __attribute__((always_inline)) { p[l] += factor[l] * e[l]; });
      }
    }
  }
  if (!need_logs) return;
  const auto log_q = [&](int64_t c, int l) __attribute__((always_inline)) {
    return (r.student.at(c)[l] - q.m[l]) * per_tau - q.log_sum[l];
  };
  Each<double> sum, cut;
  if (pr.mixture && pr.teachers == 1) {  // log (w p_t) needs no logarithm then
    Each<float> log_sum_t;
    for (int l = 0; l < kRows; ++l) {
      const double log_sum = r.of[0].exact_log_sum(l) - std::log(static_cast<double>(r.total[l]));
      log_sum_t[l] = rounded<float>(log_sum, &cut.of[l]);
    }
    sum_classes(pr.classes, sum, [&](int64_t c, int l) __attribute__((always_inline)) {
      const float p = r.p.at(c)[l], log_p = (r.logits[0].at(c)[l] - r.of[0].m[l]) * per_tau - log_sum_t[l];
      const float ratio = r.ratio.at(c)[l] = if_mass(p, log_p - log_q(c, l));
      return if_mass(p, p * ratio);
    });
  } else if (pr.mixture) {
    cut.fill(0);
    sum_classes(pr.classes, sum, [&](int64_t c, int l) __attribute__((always_inline)) {
      const float p = r.p.at(c)[l], ratio = if_mass(p, log_positive(p == 0 ? 1.0f : p) - log_q(c, l));
      r.ratio.at(c)[l] = ratio;
      return if_mass(p, p * ratio);
    });
  }
  if (pr.mixture) {
    each_row([&](int l) __attribute__((always_inline)) {
      r.kl[l] = sum[l] + (r.total[l] != 0 ? r.total[l] * (q.rest[l] - cut[l]) : 0);
    });
    return;
  }
  r.kl.fill(0);
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const FewSoftmax& p = r.of[t];
    Each<double>& kl_t = r.kl_t[t];
    sum_classes(pr.classes, kl_t, [&](int64_t c, int l) __attribute__((always_inline)) {
      const float mass = p.e.at(c)[l] * p.inverse[l], log_p = (r.logits[t].at(c)[l] - p.m[l]) * per_tau - p.log_sum[l];
      return if_mass(mass, mass * (log_p - log_q(c, l)));
    });
    for (int l = 0; l < kRows; ++l) {
      kl_t[l] += q.rest[l] - p.rest[l];
      if (r.weight[t][l] != 0) {
        r.kl[l] += r.weight[t][l] * kl_t[l];
      } else if (!(std::abs(kl_t[l]) < std::numeric_limits<double>::infinity())) {
        kl_t[l] = 0;
      }
    }
  }
}

// The gradients of the weights, in r.dot.
AMTML_INLINE void differentiate_weights(FewRows& r, bool back_p) {
  const Problem<float>& pr = r.problem;
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const FewSoftmax& p = r.of[t];
    Each<double> of_kl, of_back;
    if (pr.mixture) {
      sum_classes(pr.classes, of_kl, [&](int64_t c, int l) __attribute__((always_inline)) {
        return mixture_gradient(p.e.at(c)[l], r.p.at(c)[l], r.ratio.at(c)[l]);
      });
    }
    if (back_p) {
      sum_classes(pr.classes, of_back,
                  [&](int64_t c, int l) __attribute__((always_inline)) { return r.back_p.at(c)[l] * p.e.at(c)[l]; });
    }
    each_row([&](int l) __attribute__((always_inline)) {
      const double g = r.kl_grad[l], slope = pr.mixture ? double(p.inverse[l] != 0) : r.kl_t[t][l];
      // Where the KL has no weight, a teacher's NaN has none.
      const double through_kl = g == 0 ? 0 : g * ((pr.mixture ? of_kl[l] * p.inverse[l] : 0) + slope);
      r.dot[t][l] = through_kl + (back_p ? of_back[l] * p.inverse[l] : 0);
    });
  }
}

// The gradient of the student's logits, in r.made.
AMTML_INLINE void differentiate_student(FewRows& r, bool back_q) {
  const Problem<float>& pr = r.problem;
  const float per_tau = static_cast<float>(1 / pr.set.temperature), smoothing = pr.set.label_smoothing;
  const float even = smoothing / pr.classes;
  const FewSoftmax& q = r.q;
  Each<float> kl_grad, ce_q, flat;
  Each<double> inner;
  each_row([&](int l) __attribute__((always_inline)) {
    kl_grad[l] = r.kl_grad[l] * per_tau, flat[l] = r.ce_grad[l] * even;
    ce_q[l] = pr.labels ? r.ce_grad[l] * r.q1.inverse[l] : 0.0f;
  });
  inner.fill(0);
  if (back_q) {
    sum_classes(pr.classes, inner, [&](int64_t c, int l) __attribute__((always_inline)) {
      return r.back_q.at(c)[l] * (q.e.at(c)[l] * q.inverse[l]);
    });
  }
  constexpr float masked = -std::numeric_limits<float>::infinity();
  for (int64_t c = 0; c < pr.classes; ++c) {
    const float *z = r.student.at(c), *e = q.e.at(c), *e1 = pr.labels ? r.q1.e.at(c) : e, *p = r.p.at(c);
    const float* back = back_q ? r.back_q.at(c) : e;
    float* out = r.made.at(c);
    const bool labeled = pr.labels != nullptr;
    each_row([&](int l) __attribute__((always_inline)) {
      const float mass = kl_grad[l] == 0 ? 0.0f : p[l];  // a teacher without weight in the loss may hold NaN
      float g = kl_gradient(kl_grad[l], r.total[l], e[l] * q.inverse[l], mass);
      g += labeled ? ce_q[l] * e1[l] - flat[l] : 0.0f;
      const float mean = static_cast<float>(inner[l]);
      g += back_q ? softmax_gradient(q.inverse[l] * per_tau * e[l], back[l], mean) : 0.0f;
      out[l] = z[l] == masked ? 0.0f : g;
    });
  }
  for (int l = 0; pr.labels && l < kRows; ++l) {
    float& out = r.made.at(r.label[l])[l];
    if (r.student.at(r.label[l])[l] != masked) out -= r.ce_grad[l] * (1 - smoothing);
  }
}

template <bool kForward>
AMTML_INLINE void run_group(FewRows& r, const Group& group, const Pass<float>& pass) {
  const Problem<float>& pr = r.problem;
  const KDSettings& set = pr.set;
  const int64_t n = pr.classes;
  bool any = false, as_made = true;
  for (int l = 0; l < kRows; ++l) {
    const int64_t i = group.row(l);
    r.on[l] = !pr.ignored(i);
    r.label[l] = pr.labels && r.on[l] ? pr.labels[i] : 0;
    const double g = pass.incoming(i);
    r.ce_grad[l] = static_cast<float>(g * set.ce_weight * pass.scale.ce);
    r.kl_grad[l] = static_cast<float>(g * set.kl_weight * set.kl_scale * pass.scale.kl);
    any |= r.on[l], as_made &= g == 1 || !r.on[l];
  }
  if (!kForward && pass.rescale && as_made) return;
  if (any) {  // else nothing is read
    load<kForward>(r, group);
    if (pass.grad_q) load_columns(pass.grad_q, group, n, r.scratch.data(), r.back_q);
    if (pass.grad_p) load_columns(pass.grad_p, group, n, r.scratch.data(), r.back_p);
    compare(r, kForward || pass.grad_weights);
    if (kForward && pr.labels) cross_entropy(r.student, r.q1, r.label, n, set.label_smoothing, r.ce);
    if (pass.grad_weights) differentiate_weights(r, bool(pass.grad_p));
    if (pass.grad_student) differentiate_student(r, bool(pass.grad_q));
  }
  for (int l = 0; l < group.count; ++l) {
    const int64_t i = group.first + l;
    if (kForward) pass.kl[i] = r.on[l] ? set.kl_scale * r.kl[l] : 0;
    if (kForward && pr.labels) pass.ce[i] = r.on[l] ? r.ce[l] : 0;
    for (int64_t t = 0; pass.grad_weights && t < pr.teachers; ++t) {
      pass.grad_weights[i * pr.teachers + t] = r.on[l] ? static_cast<float>(r.dot[t][l]) : 0.0f;
    }
  }
  float* scratch = r.scratch.data();
  if (pass.grad_student) store_columns(r.made, group, r.on, n, scratch, pass.grad_student);
  if (pass.soft_targets) store_columns(r.p, group, r.on, n, scratch, Target(pass.soft_targets));
  if (pass.student_probs) {
    for (int64_t c = 0; c < n; ++c) {
      const float* e = r.q.e.at(c);
      float* out = r.made.at(c);
      each_row([&](int l) __attribute__((always_inline)) { out[l] = e[l] * r.q.inverse[l]; });
    }
    store_columns(r.made, group, r.on, n, scratch, Target(pass.student_probs));
  }
}

template <bool kForward>
AMTML_INLINE void run_groups(FewRows& rows, const Share& share, const Pass<float>& pass) {
  const int64_t size = stats_size(rows.problem.teachers);
  if (kForward) std::fill_n(pass.stats + share.begin * size, (share.end - share.begin) * size, 0.0f);
  for (int64_t i = share.begin; i < share.end; i += kRows) {
    run_group<kForward>(rows, {i, static_cast<int>(std::min<int64_t>(kRows, share.end - i))}, pass);
  }
}

}  // namespace amtml::multi_teacher
