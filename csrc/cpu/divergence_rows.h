// The rows of any divergence between the student and what the teachers say: value, gradients and statistics.
//
//   q = softmax(z / tau), p_t = softmax(z_t / tau_t)
//   p = sum_t w_t p_t  (mixture)    p = softmax(sum_t w_t z_t / tau_t)  (logits)    p_t itself, weighed by w_t  (sum)
//   D(p, q) = sum_c f(p_c, q_c), a = df/dp, b = df/dq
//   dD/dz_k = q_k (b_k - sum_c q_c b_c) / tau
//   dD/dw_t = sum_c p_t,c a_c  (mixture)    sum_k (p_k a_k - p_k sum_c p_c a_c) z_t,k / tau_t  (logits)    D(p_t, q)
//   (sum)
//
// A row of every input is read once; its exponentials stay in cache until the row is done.
#pragma once

#include "kd_rows.h"

namespace amtml::divergences {

constexpr char kOp[] = "multi_teacher_kd_loss";
constexpr double kTiny = 1e-30;  // of less than this in a mixture, reverse KL takes the logarithm from the teachers

using Mode = DivergenceMode;
using Settings = DivergenceSettings;

template <class A>
struct Problem {
  int64_t rows, classes, teachers;
  Matrix student, weights;
  std::vector<Matrix> teacher;
  const int64_t* labels;
  const A* temperatures;  // one a row, or null
  const Settings& set;
  bool labeled;                    // whether there is a cross-entropy
  const Normal* normal = nullptr;  // of a part of the classes, [N, S]: what each softmax has of all classes
  bool constants = true;           // whether sums over classes get what is added to them once

  // Those of a row: of the student, its second at temperature 1, the teachers and the mixed logits.
  int64_t softmaxes() const { return 1 + labeled + teachers + (set.mode == Mode::logits); }
  bool in_place() const {  // whether no teacher needs to be converted
    bool all = true;
    for (const Matrix& m : teacher) all &= m.template in_place<A>();
    return all;
  }
  bool ignored(int64_t i) const { return labels && labels[i] == set.kd.ignore_index; }
  double temperature(int64_t i) const { return temperatures ? temperatures[i] : set.kd.temperature; }
  A weight(int64_t i, int64_t t) const {
    if (!weights) return A(1) / A(teachers);
    return static_cast<const A*>(weights.data)[i * weights.row_stride + t * weights.column_stride];
  }
};

// Scratch of one thread.
template <class A>
struct Row : StudentRow<A> {
  const Problem<A>& problem;
  std::vector<Softmax<A>> of;  // of the teachers
  Softmax<A> mixed;            // of the mixed logits
  Buffer<A> converted_teachers, mixed_logits;
  Buffer<double> mixed_exactly;
  std::vector<A> weight;
  std::vector<double> dot;                  // d D / d weight
  std::vector<int64_t> lost;                // classes that the student has and its target has not: they make D infinite
  Buffer<A> qb, pa;                         // q b and p a, of all classes
  Buffer<A> p, prob, log_p, log_q, a, out;  // of a chunk: p, q, their logarithms, a
  A total = 0;                              // sum of the weights
  double lost_mass = 0;                     // sum of their q, weighed
  double distance = 0;                      // D
  double taken_off = 0;                     // mixed logits are less by this

  explicit Row(const Problem<A>& pr)
      : StudentRow<A>(pr.student, pr.classes, pr.labeled),
        problem(pr),
        mixed(pr.set.mode == Mode::logits ? pr.classes : 0),
        converted_teachers(pr.in_place() ? 0 : pr.teachers * pr.classes),
        mixed_logits(pr.set.mode == Mode::logits ? pr.classes : 0),
        mixed_exactly(pr.set.mode == Mode::logits ? pr.classes : 0),
        weight(pr.teachers),
        dot(pr.teachers),
        qb(pr.classes),
        pa(pr.set.mode == Mode::logits ? pr.classes : 0),
        p(kChunk),
        prob(kChunk),
        log_p(kChunk),
        log_q(kChunk),
        a(kChunk),
        out(kChunk) {
    for (int64_t t = 0; t < pr.teachers; ++t) of.emplace_back(pr.classes);
  }
};

// What the mode "logits" takes the softmax of: -inf where a teacher with weight has it. It is made in double, and kept
// less its largest number, of all classes where that is known: then what counts is rounded to its last digit, in every
// pass of a part alike.
template <class A>
AMTML_INLINE void mix_logits(Row<A>& row, const Normal* of_all) {
  const int64_t n = row.problem.classes;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double* s = row.mixed_exactly.data();
  std::fill_n(s, n, 0.0);
  for (int64_t t = 0; t < row.problem.teachers; ++t) {
    const A* x = row.of[t].x;
    const double w = row.weight[t], by = row.of[t].per_tau;
    if (w == 0) continue;  // 0 times infinity, or NaN, is 0
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) {  // NaN stays
      s[c] = x[c] == -infinity && s[c] == s[c] ? -infinity : s[c] + w * (x[c] * by);
    }
  }
  const double top = of_all ? of_all->maximum : maximum(s, n);
  row.taken_off = top - top == 0 ? top : 0;
  A* out = row.mixed_logits.data();
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) out[c] = static_cast<A>(s[c] - row.taken_off);
}

template <class A>
AMTML_INLINE void load(Row<A>& row, int64_t i) {
  const Problem<A>& pr = row.problem;
  const int64_t n = pr.classes;
  const double tau = pr.temperature(i);
  const Normal* of_all = pr.normal ? pr.normal + i * pr.softmaxes() : nullptr;
  const auto begin = [&](Softmax<A>& p, A per_tau, double taken_off = 0) {
    of_all ? p.begin(per_tau, *of_all++, taken_off) : p.begin(per_tau);
  };
  begin(row.q, static_cast<A>(1 / tau));
  if (pr.labeled) begin(row.q1, 1);
  row.load(pr.student, i, n, pr.teacher[0].ahead(i, pr.rows));
  row.total = 0;
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const double own = pr.set.teacher_temperatures.empty() ? tau : pr.set.teacher_temperatures[t];
    const bool in_place = pr.teacher[t].template in_place<A>(), last = t + 1 == pr.teachers;
    const Ahead next = last ? pr.student.ahead(i + 1, pr.rows) : pr.teacher[t + 1].ahead(i, pr.rows);
    Softmax<A>& p = row.of[t];
    begin(p, static_cast<A>(1 / own));
    p.make(pr.teacher[t], i, n, row.converted_teachers.data() + (in_place ? 0 : t * n), true, next);
    const A w = row.weight[t] = pr.weight(i, t);
    if (w == 0 && !p.finite()) p.clear(n);  // 0 * NaN is 0
    row.total += w;
  }
  if (pr.set.mode != Mode::logits) return;
  mix_logits(row, of_all);
  begin(row.mixed, 1, row.taken_off);
  row.mixed.make(row.mixed_logits.data(), n);
}

// Adds up the terms of a chunk and makes q b, times `weight` and added to what is there, and a.
template <Divergence kind, class A>
AMTML_INLINE double add_terms(Row<A>& row, int64_t n, MixtureShares<A> share, A weight, A* qb) {
  const A *p = row.p.data(), *q = row.prob.data(), *log_p = row.log_p.data(), *log_q = row.log_q.data();
  A* a = row.a.data();
  const auto log = [](A x) __attribute__((always_inline)) { return log_positive(x); };
  return block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) {
    const auto term = divergence_term<kind>(p[c], q[c], log_p[c], log_q[c], share, log);
    qb[c] += weight * term.qb;
    a[c] = term.a;
    return term.value;
  });
}

template <class A>
AMTML_INLINE double add_terms(Row<A>& row, int64_t n, A weight, A* qb) {
  const auto share = shares_of<A>(row.problem.set.kind, row.problem.set.beta);
  switch (row.problem.set.kind) {
    case Divergence::forward_kl:
      return add_terms<Divergence::forward_kl>(row, n, share, weight, qb);
    case Divergence::reverse_kl:
      return add_terms<Divergence::reverse_kl>(row, n, share, weight, qb);
    case Divergence::jsd:
      return add_terms<Divergence::jsd>(row, n, share, weight, qb);
    case Divergence::skew_kl:
      return add_terms<Divergence::skew_kl>(row, n, share, weight, qb);
    case Divergence::skew_reverse_kl:
      return add_terms<Divergence::skew_reverse_kl>(row, n, share, weight, qb);
    default:
      return add_terms<Divergence::tvd>(row, n, share, weight, qb);
  }
}

// log p of a mixture that is too small for A, and each p_t / p in `share`; 0 where that is too large for A, as of a
// teacher without weight. False where no teacher with weight has the class.
template <class A>
bool tiny_mixture(const Row<A>& row, int64_t c, double& log_p, std::vector<double>& share) {
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double most = -infinity, sum = 0;
  for (size_t t = 0; t < share.size(); ++t) {
    share[t] = row.of[t].inverse == 0 ? -infinity : row.of[t].log(c);
    if (row.weight[t] != 0) most = std::max(most, share[t]);
  }
  if (most == -infinity) return false;
  for (size_t t = 0; t < share.size(); ++t) {
    share[t] = std::exp(share[t] - most);
    if (share[t] > std::numeric_limits<A>::max()) share[t] = 0;
    if (row.weight[t] != 0) sum += row.weight[t] * share[t];
  }
  for (double& each : share) each /= sum;
  log_p = most + std::log(sum);
  return true;
}

// Reverse KL needs log p where p is too small for A, or 0: takes such classes of a chunk out of it, and adds them to D,
// q b and the weights' gradient. A class that the target has not makes D infinite.
template <class A>
double take_tiny_classes(Row<A>& row, int64_t start, int64_t n, const Softmax<A>* target, A weight) {
  std::vector<double> share(row.problem.teachers);
  double sum = 0;
  for (int64_t c = 0; c < n; ++c) {
    const A q = row.prob[c];
    if (!(row.p[c] < A(kTiny)) || q == 0) continue;
    double log_p = 0;
    const bool has = target ? target->log(start + c) != -std::numeric_limits<A>::infinity()
                            : tiny_mixture(row, start + c, log_p, share);
    if (!has) {
      if (weight != 0) row.lost.push_back(start + c), row.lost_mass += weight * q;
      sum = std::numeric_limits<double>::infinity();
      row.prob[c] = 0;
    } else if (!target) {
      const double value = q * (row.log_q[c] - log_p);
      sum += value;
      row.qb[start + c] += weight * static_cast<A>(value);
      for (int64_t t = 0; t < row.problem.teachers; ++t) row.dot[t] -= q * share[t];
      row.prob[c] = 0;
    }
  }
  return sum;
}

// p, q and their logarithms of a chunk; the target is a softmax, or the teachers' mixture where that is null.
template <class A>
AMTML_INLINE void make_chunk(Row<A>& row, const Softmax<A>* target, int64_t k, int64_t n, bool logs) {
  const int64_t start = k * kChunk;
  A *p = row.p.data(), *q = row.prob.data(), *log_p = row.log_p.data(), *log_q = row.log_q.data();
  if (target) {
    const A *e = target->e.data() + start, by = target->by(k);
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) p[c] = e[c] * by;
  } else {
    std::fill_n(p, n, A(0));
    for (int64_t t = 0; t < row.problem.teachers; ++t) {
      const A *e = row.of[t].e.data() + start, by = row.weight[t] * row.of[t].by(k);
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) p[c] += by * e[c];
    }
  }
  const A *e = row.q.e.data() + start, by = row.q.by(k);
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) q[c] = e[c] * by;
  if (!logs) return;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) log_q[c] = row.q.log(start + c);
  if (target) {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) log_p[c] = target->log(start + c);
  } else {
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) log_p[c] = log_positive(p[c] == 0 ? A(1) : p[c]);
  }
}

// D of the student to one target of this weight. Adds q b, and to the gradient of a mixture's weights, or makes p a for
// mixed logits.
template <class A>
AMTML_INLINE double compare(Row<A>& row, const Softmax<A>* target, A weight) {
  const Problem<A>& pr = row.problem;
  const Divergence kind = pr.set.kind;
  const A *p = row.p.data(), *q = row.prob.data(), *a = row.a.data();
  double sum = 0;
  for (int64_t k = 0, start = 0; start < pr.classes; ++k, start += kChunk) {
    const int64_t n = std::min(kChunk, pr.classes - start);
    make_chunk(row, target, k, n, kind == Divergence::forward_kl || kind == Divergence::reverse_kl);
    if (kind == Divergence::reverse_kl) sum += take_tiny_classes(row, start, n, target, weight);
    // 0 * NaN is 0: what a teacher without weight would add goes nowhere.
    sum += add_terms(row, n, weight, weight == 0 ? row.out.data() : row.qb.data() + start);
    if (!target) {
      for (int64_t t = 0; t < pr.teachers; ++t) {
        const A* e_t = row.of[t].e.data() + start;
        row.dot[t] +=
            row.of[t].by(k) * block_sum<A>(n, [&] AMTML_BODY(int64_t c) { return if_mass(e_t[c], e_t[c] * a[c]); });
      }
    } else if (pr.set.mode == Mode::logits) {
      A* pa = row.pa.data() + start;
      const bool reverse = kind == Divergence::reverse_kl;  // a = -q / p may be too large for A there
      const A equals = slope_of_equals(kind, shares_of<A>(kind, pr.set.beta));
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) pa[c] = reverse ? p[c] - q[c] : if_mass(p[c], p[c] * (a[c] - equals));
    }
  }
  if (!pr.constants) return sum;
  const double mass = target ? target->inverse != 0 : row.total, cut = target ? target->rest : 0;
  if (kind == Divergence::forward_kl) return mass == 0 ? sum : sum + mass * (row.q.rest - cut);
  if (kind == Divergence::reverse_kl) return sum + cut - row.q.rest;
  return sum + divergence_constant(kind, mass, shares_of<double>(kind, pr.set.beta));
}

template <class A>
AMTML_INLINE void begin_comparing(Row<A>& row) {
  std::fill_n(row.qb.data(), row.problem.classes, A(0));
  std::fill(row.dot.begin(), row.dot.end(), 0.0);
  row.lost.clear();
  row.lost_mass = row.distance = 0;
}

// D, q b, and the gradient of D to the weights.
template <class A>
AMTML_INLINE void compare_all(Row<A>& row) {
  const Problem<A>& pr = row.problem;
  const int64_t n = pr.classes;
  begin_comparing(row);
  const bool each = pr.set.mode == Mode::sum;
  // One call for all modes: three, inlined, took twice as long to compile.
  for (int64_t t = 0; t < (each ? pr.teachers : 1); ++t) {
    const A w = each ? row.weight[t] : A(1);
    const Softmax<A>* target = each ? &row.of[t] : pr.set.mode == Mode::logits ? &row.mixed : nullptr;
    const double own = compare(row, target, w);
    row.distance += w == 0 ? 0 : w * own;
    if (each) row.dot[t] = w == 0 && !std::isfinite(own) ? 0 : own;
  }
  if (pr.constants && pr.set.mode == Mode::mixture && pr.set.kind == Divergence::forward_kl) {
    for (int64_t t = 0; t < pr.teachers; ++t) row.dot[t] += row.of[t].inverse != 0;  // the 1 of df/dp
  }
  if (pr.set.mode != Mode::logits || pr.normal) return;  // a part has not the sum of all p a
  const A mean = static_cast<A>(block_sum<A>(n, [&] AMTML_BODY(int64_t c) { return row.pa[c]; }));
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const Softmax<A>& p = row.of[t];
    const A shift = p.shift();
    row.dot[t] = 0;
    for (int64_t k = 0, start = 0; start < n; ++k, start += kChunk) {
      const A *e = row.mixed.e.data() + start, *pa = row.pa.data() + start, *logits = p.x + start, by = row.mixed.by(k);
      row.dot[t] += block_sum<A>(std::min(kChunk, n - start), [&] AMTML_BODY(int64_t c) {
        const A x = logits[c], slope = pa[c] - e[c] * by * mean;
        // What is not finite, as it is or over tau, has no weight, or no probability.
        const A scaled = (x - shift) * p.per_tau,
                y = std::abs(scaled) < std::numeric_limits<A>::infinity() ? scaled : -shift * p.per_tau;
        return if_mass(y, slope * y);
      });
    }
  }
}

// The mass that q b of the row just compared adds up to. The 1 that reverse KL's b leaves out cancels but for the
// classes that are lost.
template <class A>
AMTML_INLINE double slope(const Row<A>& row) {
  const A* qb = row.qb.data();
  return block_sum<A>(row.problem.classes, [&] AMTML_BODY(int64_t c) { return qb[c]; }) - row.lost_mass;
}

// d loss / d student of a compared row, in chunks. mean: sum q b; flat: what label smoothing takes off each class.
template <class A>
AMTML_INLINE void write_grad(Row<A>& row, int64_t i, A kl_grad, A ce_grad, A mean, A flat, const Target& grad_student) {
  const Problem<A>& pr = row.problem;
  const int64_t classes = pr.classes, label = pr.labels ? pr.labels[i] : 0;
  const A smoothing = static_cast<A>(pr.set.kd.label_smoothing);
  constexpr A masked = -std::numeric_limits<A>::infinity();
  A* qb = row.qb.data();
  for (const int64_t c : row.lost) qb[c] = row.q.e[c] * row.q.by(c / kChunk) * mean;  // no gradient through them
  for (int64_t k = 0, start = 0; start < classes; ++k, start += kChunk) {
    const int64_t n = std::min(kChunk, classes - start);
    const A *z = row.q.x + start, *e = row.q.e.data() + start, *own = qb + start, by = row.q.by(k);
    A* grad = grad_student.place(i * classes + start, row.out.data());
    if (kl_grad == 0) {  // a divergence without weight may be infinite
      std::fill_n(grad, n, A(0));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) grad[c] = kl_grad * (own[c] - e[c] * by * mean);
    }
    if (pr.labeled) {
      const A *e1 = row.q1.e.data() + start, ce_q = ce_grad * row.q1.by(k);
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) grad[c] += ce_q * e1[c] - flat;
      if (label >= start && label < start + n) grad[label - start] -= ce_grad * (1 - smoothing);
    }
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) grad[c] = z[c] == masked ? A(0) : grad[c];
    grad_student.write(i * classes + start, n, grad);
  }
}

// The first class of the largest value.
template <class A>
struct Largest {
  A value = -1;
  int64_t at = 0;
  AMTML_INLINE void take(A x, int64_t c) {
    if (x > value) value = x, at = c;
  }
};

// What a loaded row has for KDStats: entropies of q and p, KL(p_t || q) of each teacher, and where q and p are largest.
template <class A>
struct Statistics {
  double of_q, of_p;
  std::vector<double> kl;
  Largest<A> q, p;
};

template <class A>
AMTML_INLINE Statistics<A> statistics(Row<A>& row) {
  const Problem<A>& pr = row.problem;
  const Softmax<A>* target = pr.set.mode == Mode::logits ? &row.mixed : nullptr;
  const A *p = row.p.data(), *q = row.prob.data(), *log_p = row.log_p.data(), *log_q = row.log_q.data();
  Statistics<A> out{0, 0, std::vector<double>(pr.teachers), {}, {}};
  Largest<A> of_p, of_q;  // in registers
  for (int64_t k = 0, start = 0; start < pr.classes; ++k, start += kChunk) {
    const int64_t n = std::min(kChunk, pr.classes - start);
    make_chunk(row, target, k, n, true);
    out.of_q -= block_sum<A>(n, [&] AMTML_BODY(int64_t c) { return if_mass(q[c], q[c] * log_q[c]); });
    out.of_p -= block_sum<A>(n, [&] AMTML_BODY(int64_t c) { return if_mass(p[c], p[c] * log_p[c]); });
    for (int64_t c = 0; c < n; ++c) of_p.take(p[c], start + c), of_q.take(q[c], start + c);
    for (int64_t t = 0; t < pr.teachers; ++t) {
      const Softmax<A>& own = row.of[t];
      const A *e = own.e.data() + start, by = own.by(k);
      out.kl[t] += block_sum<A>(n, [&] AMTML_BODY(int64_t c) {
        const A each = e[c] * by;
        return if_mass(each, each * (own.log(start + c) - log_q[c]));
      });
    }
  }
  out.p = of_p, out.q = of_q;
  if (!pr.constants) return out;
  out.of_q += row.q.rest;
  if (target) out.of_p += target->rest;
  for (int64_t t = 0; t < pr.teachers; ++t) out.kl[t] += row.q.rest - row.of[t].rest;
  return out;
}

// --- what operators are given

struct Inputs {
  const Tensor& student;
  const std::vector<Tensor>& teachers;
  const std::optional<Tensor>&weights, &labels, &temperatures;
};

// One number a row, contiguous, of the dtype of sums.
inline std::optional<Tensor> checked_numbers(const char* name, const std::optional<Tensor>& given, int64_t rows,
                                             ScalarType wide) {
  if (!given) return std::nullopt;
  check_shape(kOp, name, *given, {rows});
  STD_TORCH_CHECK(given->scalar_type() == wide, kOp, ": ", name, " must be float32, or float64 if an input is");
  return dense(*given);
}

// The dtype of sums.
inline ScalarType checked_inputs(const Inputs& in, const Settings& set) {
  const Tensor& student = in.student;
  STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, kOp, ": student must be [N, C] with C >= 1");
  STD_TORCH_CHECK(!in.teachers.empty(), kOp, ": teachers must hold at least one teacher");
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(in.teachers.size());
  STD_TORCH_CHECK(set.teacher_temperatures.empty() || static_cast<int64_t>(set.teacher_temperatures.size()) == count,
                  kOp, ": teacher_temperatures must be none, or one for each teacher");
  ScalarType wide = wide_dtype(student.scalar_type());
  for (const Tensor& t : in.teachers) {
    check_shape(kOp, "teacher", t, {n, c});
    if (t.scalar_type() == ScalarType::Double) wide = ScalarType::Double;
  }
  if (in.weights) {
    check_shape(kOp, "weights", *in.weights, {n, count});
    if (in.weights->scalar_type() == ScalarType::Double) wide = ScalarType::Double;
    STD_TORCH_CHECK(in.weights->scalar_type() == wide, kOp, ": weights must be float32, or float64 if an input is");
  }
  return wide;
}

// Labels and temperatures: one of each a row, contiguous.
template <class A>
Problem<A> problem_of(const Inputs& in, const std::optional<Tensor>& labels, const std::optional<Tensor>& temperatures,
                      const Settings& set) {
  Problem<A> pr{in.student.size(0),
                in.student.size(1),
                static_cast<int64_t>(in.teachers.size()),
                Matrix(in.student),
                Matrix(in.weights),
                {},
                labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr,
                temperatures ? static_cast<const A*>(temperatures->const_data_ptr()) : nullptr,
                set,
                labels.has_value()};
  for (const Tensor& t : in.teachers) pr.teacher.emplace_back(t);
  return pr;
}

}  // namespace amtml::divergences
