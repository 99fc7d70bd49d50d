// Weighted multi-teacher distillation: cross-entropy, weighted KL and their gradients, one row at a time.
//
//   q = softmax(z / tau), p_t = softmax(z_t / tau), p = sum_t w_t p_t
//   KL = sum_c p (log p - log q)   (mixture)    or    sum_t w_t sum_c p_t (log p_t - log q)   (sum)
//   dKL/dz = ((sum_t w_t) q - p) / tau
//   dKL/dw_t = sum_c p_t (log p - log q + 1)    or    sum_c p_t (log p_t - log q)
//
// A row of every input is read once; its exponentials stay in cache until the row is done. Teachers are read in place.
#include <algorithm>

#include "multi_teacher_kd_few.h"
#include "ops.h"

namespace amtml {

using namespace multi_teacher;

namespace {

template <class A>
struct Row : StudentRow<A> {  // scratch of one thread: everything a row needs stays in cache until the row is done
  const Problem<A>& problem;
  bool in_place, keep;  // whether teachers are read in place; whether all of a teacher's logits are needed at once
  Buffer<A> converted_teachers;
  std::vector<Softmax<A>> of;  // of the teachers
  std::vector<A> stats, weight;
  std::vector<double> kl_t, dot;
  Buffer<A> p, ratio, out;  // of one chunk
  A total = 0;              // of the weights

  explicit Row(const Problem<A>& pr)
      : StudentRow<A>(pr.student, pr.classes, pr.labels != nullptr),
        problem(pr),
        in_place(pr.in_place()),
        keep(!pr.mixture || pr.teachers == 1),
        converted_teachers(in_place ? 0
                           : keep   ? pr.teachers * pr.classes
                                    : kChunk),
        stats(stats_size(pr.teachers)),
        weight(pr.teachers),
        kl_t(pr.teachers),
        dot(pr.teachers),
        p(std::min(pr.classes, kChunk)),
        ratio(std::min(pr.classes, kChunk)),
        out(std::min(pr.classes, kChunk)) {
    for (int64_t t = 0; t < pr.teachers; ++t) of.emplace_back(pr.classes);
  }
};

// Fills the scratch from row i. With `again` the statistics are read, else made.
template <class A>
AMTML_INLINE void load(Row<A>& row, int64_t i, A* stats, bool again) {
  const Problem<A>& pr = row.problem;
  const int64_t n = pr.classes;
  const A per_tau = static_cast<A>(1 / pr.set.temperature);
  row.load(pr.student, i, n, per_tau, stats, again, pr.teacher[0].ahead(i, pr.rows));
  row.total = 0;
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const A w = row.weight[t] = pr.weight(i, t);
    Softmax<A>& p = row.of[t];
    A* stat = stats + 3 + 2 * t;
    if (again) {
      p.begin(per_tau, stat[0], stat[1]);
    } else {
      p.begin(per_tau);
    }
    const bool last = t + 1 == pr.teachers;
    const Ahead next = last ? pr.student.ahead(i + 1, pr.rows) : pr.teacher[t + 1].ahead(i, pr.rows);
    p.make(pr.teacher[t], i, n, row.converted_teachers.data() + (row.keep && !row.in_place ? t * n : 0), row.keep,
           next);
    if (!again) stat[0] = p.m, stat[1] = p.inverse;
    row.total += w;
    if (w == 0 && !p.finite()) p.clear(n);  // 0 * NaN is 0
  }
}

// What to make of a loaded row; null or false where it is not asked for.
template <class A>
struct Wanted {
  bool kl;  // its value
  A *student_probs, *soft_targets;
  Target grad_student;
  int64_t first;  // the row's place in grad_student
  A* grad_weights;
  A ce_grad, kl_grad;        // d loss / d CE, d loss / d KL of this row
  const A *grad_q, *grad_p;  // that come back through student_probs and soft_targets
};

// sum p_t (log p_t - log q) of a chunk, where p_t = 0 counts 0.
template <class A>
AMTML_INLINE double teacher_kl(const Softmax<A>& p, const Softmax<A>& q, int64_t k, int64_t n) {
  const int64_t start = k * kChunk;
  const A *z = q.x + start, *x = p.x + start, *e = p.e.data() + start;
  const A by = p.by(k), per_tau = q.per_tau, m = q.m, log_sum = q.log_sum, m_t = p.m, log_sum_t = p.log_sum;
  return block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) {
    const A mass = e[c] * by;
    return if_mass(mass, mass * (((x[c] - m_t) * per_tau - log_sum_t) - ((z[c] - m) * per_tau - log_sum)));
  });
}

// Everything that follows from the exponentials, chunk by chunk. Returns the KL.
template <class A>
AMTML_INLINE double finish(Row<A>& row, int64_t label, const Wanted<A>& want) {
  const Problem<A>& pr = row.problem;
  const Softmax<A>& q = row.q;
  const int64_t classes = pr.classes, teachers = pr.teachers;
  const bool mixture = pr.mixture;
  const A per_tau = q.per_tau, m = q.m, log_sum = q.log_sum, total = row.total;
  const A kl_grad = want.kl_grad * per_tau, ce_grad = want.ce_grad;
  const A smoothing = static_cast<A>(pr.set.label_smoothing), even = smoothing / classes;
  constexpr A masked = -std::numeric_limits<A>::infinity();
  const bool need_log = mixture && (want.kl || want.grad_weights);
  const bool need_each = !mixture && (want.kl || want.grad_weights);
  A *p = row.p.data(), *ratio = row.ratio.data(), *out = row.out.data();
  double kl = 0, inner = 0, rest = q.rest;
  const bool alone = teachers == 1;  // log (w p_t) needs no logarithm then
  A log_sum_t = 0;
  if (need_log && alone) {
    double cut = 0;
    log_sum_t = rounded<A>(row.of[0].exact_log_sum() - std::log(static_cast<double>(total)), &cut);
    rest -= cut;
  }
  std::fill(row.dot.begin(), row.dot.end(), 0.0);
  std::fill(row.kl_t.begin(), row.kl_t.end(), 0.0);
  for (int64_t k = 0, start = 0; want.grad_q && start < classes; ++k, start += kChunk) {
    const A *e = q.e.data() + start, *back = want.grad_q + start, by = q.by(k);
    inner += block_sum<A>(std::min(kChunk, classes - start),
                          [&](int64_t c) __attribute__((always_inline)) { return back[c] * (e[c] * by); });
  }
  for (int64_t k = 0, start = 0; start < classes; ++k, start += kChunk) {
    const int64_t count = std::min(kChunk, classes - start);
    const A *z = q.x + start, *e = q.e.data() + start, by = q.by(k);
    if (need_log && alone) {  // log p - log q, and 0 where p is 0
      const A *x = row.of[0].x + start, *e_t = row.of[0].e.data() + start, m_t = row.of[0].m;
      const A factor = row.weight[0] * row.of[0].by(k);
      kl += block_sum<A>(count, [&](int64_t c) __attribute__((always_inline)) {
        const A mass = factor * e_t[c];
        const A log_ratio = ((x[c] - m_t) * per_tau - log_sum_t) - ((z[c] - m) * per_tau - log_sum);
        p[c] = mass;
        ratio[c] = if_mass(mass, log_ratio);
        return if_mass(mass, mass * log_ratio);
      });
    } else {
      for (int64_t t = 0; t < teachers; ++t) {
        const A *e_t = row.of[t].e.data() + start, factor = row.weight[t] * row.of[t].by(k);
        if (t == 0) {
#pragma omp simd
          for (int64_t c = 0; c < count; ++c) p[c] = factor * e_t[c];
        } else {
#pragma omp simd
          for (int64_t c = 0; c < count; ++c) p[c] += factor * e_t[c];
        }
      }
    }
    if (need_log && !alone) {
      kl += block_sum<A>(count, [&](int64_t c) __attribute__((always_inline)) {
        const A mass = p[c], log_ratio = log_positive(mass == 0 ? A(1) : mass) - ((z[c] - m) * per_tau - log_sum);
        ratio[c] = if_mass(mass, log_ratio);
        return if_mass(mass, mass * log_ratio);
      });
    }
    for (int64_t t = 0; need_each && t < teachers; ++t) row.kl_t[t] += teacher_kl(row.of[t], q, k, count);
    for (int64_t t = 0; want.grad_weights && t < teachers; ++t) {
      const A* e_t = row.of[t].e.data() + start;
      double sum = 0;
      if (mixture && want.kl_grad != 0) {
        sum = want.kl_grad * block_sum<A>(count, [&](int64_t c) __attribute__((always_inline)) {
                return mixture_gradient(e_t[c], p[c], ratio[c]);
              });
      }
      if (want.grad_p) {
        const A* back = want.grad_p + start;
        sum += block_sum<A>(count, [&](int64_t c) __attribute__((always_inline)) { return back[c] * e_t[c]; });
      }
      // Where the KL has no weight, a teacher's NaN has none.
      if (want.kl_grad != 0 || want.grad_p) row.dot[t] += sum * row.of[t].by(k);
    }
    if (want.soft_targets) std::copy_n(p, count, want.soft_targets + start);
    if (want.student_probs) {
      A* probs = want.student_probs + start;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) probs[c] = e[c] * by;
    }
    if (!want.grad_student) continue;
    A* grad = want.grad_student.place(want.first + start, out);
    if (kl_grad == 0) std::fill_n(p, count, A(0));  // a teacher without weight in the loss may hold NaN
    const auto unless_masked = [&](int64_t c, A g)
                                   __attribute__((always_inline)) { grad[c] = z[c] == masked ? A(0) : g; };
    if (pr.labels) {
      const A *e1 = row.q1.e.data() + start, ce_q = ce_grad * row.q1.by(k), flat = ce_grad * even;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) {
        unless_masked(c, kl_gradient(kl_grad, total, e[c] * by, p[c]) + (ce_q * e1[c] - flat));
      }
      const bool here = label >= start && label < start + count;
      if (here) unless_masked(label - start, grad[label - start] - ce_grad * (1 - smoothing));
    } else {
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) unless_masked(c, kl_gradient(kl_grad, total, e[c] * by, p[c]));
    }
    if (want.grad_q) {
      const A *back = want.grad_q + start, mean = static_cast<A>(inner), scaled = by * per_tau;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) unless_masked(c, grad[c] + softmax_gradient(scaled * e[c], back[c], mean));
    }
    want.grad_student.write(want.first + start, count, grad);
  }
  for (int64_t t = 0; t < teachers; ++t) {
    A kl_t = mixture ? A(0) : static_cast<A>(row.kl_t[t] + q.rest - row.of[t].rest);
    if (row.weight[t] == 0 && !(std::abs(kl_t) < std::numeric_limits<A>::infinity())) kl_t = 0;
    if (want.grad_weights) {
      const double slope = mixture ? row.of[t].inverse != 0 : kl_t;
      const double through_kl = want.kl_grad == 0 ? 0 : want.kl_grad * slope;
      want.grad_weights[t] = static_cast<A>(row.dot[t] + through_kl);
    }
    if (!mixture) kl += row.weight[t] == 0 ? 0 : row.weight[t] * kl_t;
  }
  return mixture && total != 0 ? kl + total * rest : kl;
}

struct Inputs {  // owns what Problem points to
  std::optional<Tensor> labels;
  ScalarType wide;

  Inputs(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& weights,
         const std::optional<Tensor>& given_labels, const KDSettings& set)
      : wide(wide_dtype(student.scalar_type())) {
    STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, kOp, ": student must be [N, C] with C >= 1");
    STD_TORCH_CHECK(!teachers.empty(), kOp, ": teachers must hold at least one teacher");
    const int64_t n = student.size(0), c = student.size(1);
    for (const Tensor& t : teachers) {
      check_shape(kOp, "teacher", t, {n, c});
      if (t.scalar_type() == ScalarType::Double) wide = ScalarType::Double;
    }
    if (weights) {
      check_shape(kOp, "weights", *weights, {n, static_cast<int64_t>(teachers.size())});
      if (weights->scalar_type() == ScalarType::Double) wide = ScalarType::Double;
      STD_TORCH_CHECK(weights->scalar_type() == wide, kOp, ": weights must be float32, or float64 if an input is");
    }
    labels = checked_labels(kOp, given_labels, n, c, set.ignore_index);
  }

  template <class A>
  Problem<A> problem(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& weights,
                     const KDSettings& set) const {
    Problem<A> pr{student.size(0),
                  student.size(1),
                  static_cast<int64_t>(teachers.size()),
                  Matrix(student),
                  Matrix(weights),
                  {},
                  labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr,
                  set,
                  set.mode == "mixture"};
    for (const Tensor& t : teachers) pr.teacher.emplace_back(t);
    return pr;
  }
};

// Gradients of row i that forward has made, times g, where that is exact: powers of two. False if they have to be made
// again, so that rounding happens once.
template <class A>
AMTML_INLINE bool rescaled(Row<A>& row, int64_t i, const Pass<A>& pass, double g) {
  int exponent = 0;
  if (g == 1) return true;
  if (std::abs(std::frexp(g, &exponent)) != 0.5) return false;
  const int64_t classes = row.problem.classes, teachers = row.problem.teachers;
  for (int64_t start = 0; pass.grad_student && start < classes; start += kChunk) {
    const int64_t n = std::min(kChunk, classes - start), first = i * classes + start;
    A* out = row.out.data();
    widen(pass.grad_student.data + first * bytes_of(pass.grad_student.dtype), pass.grad_student.dtype, 1, n, out);
    for (int64_t c = 0; c < n; ++c) out[c] *= static_cast<A>(g);
    pass.grad_student.write(first, n, out);
  }
  for (int64_t t = 0; pass.grad_weights && t < teachers; ++t) pass.grad_weights[i * teachers + t] *= static_cast<A>(g);
  return true;
}

// kForward is pass.forward(): as a constant, it saves a twentieth of the time in float64.
template <bool kForward, class A>
AMTML_INLINE void run_row(Row<A>& row, int64_t i, const Pass<A>& pass, A* q_row, A* p_row) {
  const Problem<A>& pr = row.problem;
  const KDSettings& set = pr.set;
  const int64_t c = pr.classes, size = stats_size(pr.teachers), label = pr.labels ? pr.labels[i] : 0;
  A* s = row.stats.data();
  const double g = pass.incoming(i);
  Wanted<A> want{kForward,
                 pass.student_probs ? pass.student_probs + i * c : nullptr,
                 pass.soft_targets ? pass.soft_targets + i * c : nullptr,
                 pass.grad_student,
                 i * c,
                 pass.grad_weights ? pass.grad_weights + i * pr.teachers : nullptr,
                 static_cast<A>(g * set.ce_weight * pass.scale.ce),
                 static_cast<A>(g * set.kl_weight * set.kl_scale * pass.scale.kl),
                 nullptr,
                 nullptr};
  if (pr.ignored(i)) {
    if (kForward) std::fill_n(pass.stats + i * size, size, A(0));
    if (want.student_probs) std::fill_n(want.student_probs, c, A(0)), std::fill_n(want.soft_targets, c, A(0));
    if (want.grad_student) want.grad_student.clear(want.first, c);
    if (want.grad_weights) std::fill_n(want.grad_weights, pr.teachers, A(0));
    return;
  }
  if (!kForward && pass.rescale && rescaled(row, i, pass, g)) return;
  if (!kForward) std::copy_n(pass.saved + i * size, size, s);
  load(row, i, s, !kForward);
  if (pass.grad_q) want.grad_q = load_row(pass.grad_q, i, c, q_row);
  if (pass.grad_p) want.grad_p = load_row(pass.grad_p, i, c, p_row);
  const double kl = finish(row, label, want);
  if (!kForward) return;
  std::copy_n(s, size, pass.stats + i * size);
  pass.kl[i] = set.kl_scale * kl;
  if (pr.labels) pass.ce[i] = cross_entropy(row, c, label, set.label_smoothing);
}

template <bool kForward, class A>
void run_rows(const Problem<A>& pr, const Pass<A>& pass) {
  if constexpr (sizeof(A) == 4) {
    if (pr.classes <= kFew) {
      return in_shares(pr.rows, pr.classes * (pr.teachers + 2), [&](Shares& next) {
        FewRows rows(pr, pass);
        vectorized([&] AMTML_BODY() {
          for (Share share; next(share);) run_groups<kForward>(rows, share, pass);
        });
      });
    }
  }
  in_shares(pr.rows, pr.classes * (pr.teachers + 2), [&](Shares& next) {
    Row<A> row(pr);
    Buffer<A> q_row(pass.grad_q ? pr.classes : 0), p_row(pass.grad_p ? pr.classes : 0);
    vectorized([&] AMTML_BODY() {
      for (Share share; next(share);) {
        for (int64_t i = share.begin; i < share.end; ++i) run_row<kForward>(row, i, pass, q_row.data(), p_row.data());
      }
    });
  });
}

}  // namespace

Tensor8 multi_teacher_kd_forward(const Tensor& student, const std::vector<Tensor>& teachers,
                                 const std::optional<Tensor>& weights, const std::optional<Tensor>& labels,
                                 const KDSettings& set, bool need_student_grad, bool need_weights_grad,
                                 bool need_probs) {
  const Inputs inputs(student, teachers, weights, labels, set);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(teachers.size());
  const bool rounded =
      need_student_grad && inputs.wide == ScalarType::Float && student.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(!need_student_grad || rounded || student.scalar_type() == inputs.wide, kOp,
                  ": the gradient of a float16 student, or beside float64, is made in backward");
  auto make = [&](bool wanted, const Shape& shape) { return empty_or_none(student, wanted, shape, inputs.wide); };
  const Shape value = set.each_row() ? Shape{n} : Shape{};
  const Tensor loss = make(true, value), ce = make(true, value), kl = make(true, value);
  const Tensor probs = make(need_probs, {n, c}), targets = make(need_probs, {n, c});
  const Tensor stats = make(true, {n, stats_size(count)});
  const Tensor grad_student =
      empty_or_none(student, need_student_grad, {n, c}, rounded ? ScalarType::BFloat16 : inputs.wide);
  const Tensor grad_weights = make(need_weights_grad, {n, count});
  dispatch_wide(inputs.wide, [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> pr = inputs.problem<A>(student, teachers, weights, set);
    std::vector<double> ce_rows(n), kl_rows(n);
    Pass<A> pass{};
    pass.stats = data<A>(stats), pass.ce = ce_rows.data(), pass.kl = kl_rows.data();
    pass.scale = reduction_scale(pr.labels, n, c, set);
    pass.student_probs = data<A>(probs), pass.soft_targets = data<A>(targets);
    if (need_student_grad) pass.grad_student = Target(grad_student);
    pass.grad_weights = data<A>(grad_weights);
    run_rows<true>(pr, pass);
    reduce_rows(set, pass.scale, ce_rows, kl_rows, data<A>(loss), data<A>(ce), data<A>(kl));
  });
  return {loss, ce, kl, probs, targets, stats, grad_student, grad_weights};
}

namespace {

// Writes the gradients, where they are not empty. rescale: they are those of an incoming gradient of 1.
void write_gradients(const KDIncoming& incoming, const Tensor& student, const std::vector<Tensor>& teachers,
                     const std::optional<Tensor>& weights, const std::optional<Tensor>& labels, const Tensor& stats,
                     const KDSettings& set, const Tensor& grad_student, const Tensor& grad_weights, bool rescale) {
  const Inputs inputs(student, teachers, weights, labels, set);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(teachers.size());
  check_shape(kOp, "grad_loss", incoming.grad_loss, set.each_row() ? Shape{n} : Shape{});
  check_shape(kOp, "stats", stats, {n, stats_size(count)});
  if (incoming.grad_probs) check_shape(kOp, "grad_probs", *incoming.grad_probs, {n, c});
  if (incoming.grad_targets) check_shape(kOp, "grad_targets", *incoming.grad_targets, {n, c});
  dispatch_wide(inputs.wide, [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> pr = inputs.problem<A>(student, teachers, weights, set);
    const Tensor grad_loss = dense(incoming.grad_loss, inputs.wide), saved = dense(stats);
    Pass<A> pass{};
    pass.saved = static_cast<const A*>(saved.const_data_ptr());
    pass.grad_loss = static_cast<const A*>(grad_loss.const_data_ptr()), pass.each_row = set.each_row();
    pass.scale = reduction_scale(pr.labels, n, c, set);
    if (grad_student.numel()) pass.grad_student = Target(grad_student);
    pass.grad_weights = data<A>(grad_weights);
    pass.grad_q = Matrix(incoming.grad_probs), pass.grad_p = Matrix(incoming.grad_targets);
    pass.rescale = rescale;
    run_rows<false>(pr, pass);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> multi_teacher_kd_backward(const KDIncoming& incoming, const Tensor& student,
                                                     const std::vector<Tensor>& teachers,
                                                     const std::optional<Tensor>& weights,
                                                     const std::optional<Tensor>& labels, const Tensor& stats,
                                                     const KDSettings& set, bool need_student_grad,
                                                     bool need_weights_grad) {
  const int64_t n = student.size(0), count = static_cast<int64_t>(teachers.size());
  const Tensor grad_student = empty_or_none(student, need_student_grad, {n, student.size(1)}, student.scalar_type());
  const Tensor grad_weights = empty_or_none(student, need_weights_grad, {n, count}, stats.scalar_type());
  write_gradients(incoming, student, teachers, weights, labels, stats, set, grad_student, grad_weights, false);
  return {grad_student, grad_weights};
}

namespace {

// The operator, whose weights are the caller's: a wrong value there is an error. Those of an adapter (in AMTMLLoss, or
// with need_probs) may be NaN in a step that diverges, and then so is the loss.
Tensor8 multi_teacher_kd_fwd(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                             std::optional<Tensor> labels, double temperature, double ce_weight, double kl_weight,
                             double kl_scale, Name mode, Name reduction, int64_t ignore_index, double label_smoothing,
                             bool need_student_grad, bool need_weights_grad, bool need_probs) {
  if (weights && !need_probs) {
    const auto y = checked_labels(kOp, labels, student.size(0), student.size(1), ignore_index);
    check_weights(kOp, *weights, y, ignore_index);
  }
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  return multi_teacher_kd_forward(student, teachers, weights, labels, set, need_student_grad, need_weights_grad,
                                  need_probs);
}

std::tuple<Tensor, Tensor> multi_teacher_kd_bwd(const Tensor& grad_loss, std::optional<Tensor> grad_probs,
                                                std::optional<Tensor> grad_targets, const Tensor& student,
                                                std::vector<Tensor> teachers, std::optional<Tensor> weights,
                                                std::optional<Tensor> labels, const Tensor& stats, double temperature,
                                                double ce_weight, double kl_weight, double kl_scale, Name mode,
                                                Name reduction, int64_t ignore_index, double label_smoothing,
                                                bool need_student_grad, bool need_weights_grad) {
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  return multi_teacher_kd_backward({grad_loss, grad_probs, grad_targets}, student, teachers, weights, labels, stats,
                                   set, need_student_grad, need_weights_grad);
}

void multi_teacher_kd_rescale_(const Tensor& grad_student, const Tensor& grad_weights, const Tensor& grad_loss,
                               const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                               std::optional<Tensor> labels, const Tensor& stats, double temperature, double ce_weight,
                               double kl_weight, double kl_scale, Name mode, Name reduction, int64_t ignore_index,
                               double label_smoothing) {
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  write_gradients({grad_loss, std::nullopt, std::nullopt}, student, teachers, weights, labels, stats, set, grad_student,
                  grad_weights, true);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("multi_teacher_kd_fwd", TORCH_BOX(&multi_teacher_kd_fwd));
  m.impl("multi_teacher_kd_bwd", TORCH_BOX(&multi_teacher_kd_bwd));
  m.impl("multi_teacher_kd_rescale_", TORCH_BOX(&multi_teacher_kd_rescale_));
}

}  // namespace amtml
