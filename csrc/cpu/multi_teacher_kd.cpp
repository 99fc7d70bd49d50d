// Weighted multi-teacher distillation: cross-entropy, weighted KL and their gradients, one row at a time.
//
//   q = softmax(z / tau), p_t = softmax(z_t / tau), p = sum_t w_t p_t
//   KL = sum_c p (log p - log q)   (mixture)    or    sum_t w_t sum_c p_t (log p_t - log q)   (sum)
//   dKL/dz = ((sum_t w_t) q - p) / tau
//   dKL/dw_t = sum_c p_t (log p - log q + 1)    or    sum_c p_t (log p_t - log q)
//
// A row of every input is read once; its exponentials stay in cache until the row is done. Teachers are read in place.
#include <algorithm>

#include "simd.h"

namespace amtml {
namespace {

constexpr char kOp[] = "multi_teacher_kd_loss";

struct Settings {
  double temperature, ce_weight, kl_weight, kl_scale;
  bool mixture;
  int64_t ignore_index;
  double label_smoothing;
};

template <class A>
struct Problem {
  int64_t rows, classes, teachers;
  Matrix student, weights;
  std::vector<Matrix> teacher;
  const int64_t* labels;
  Settings set;

  bool ignored(int64_t i) const { return labels && labels[i] == set.ignore_index; }
  A weight(int64_t i, int64_t t) const {
    if (!weights) return A(1) / A(teachers);
    return static_cast<const A*>(weights.data)[i * weights.row_stride + t * weights.column_stride];
  }
};

// Row statistics, kept for backward: the student's maximum, inverse sums at tau and at 1; maximum and inverse sum per
// teacher. Not log-sums: at 60,000 classes their last bit is already 5e-7 of a probability.
inline int64_t stats_size(int64_t teachers) { return 3 + 2 * teachers; }

template <class A>
struct Row {  // scratch of one thread
  const Problem<A>& problem;
  const bool keep_teachers;                                      // p_t of every teacher, not only their mixture
  std::vector<A> student, teacher, log_q, q, q1, p, ratio, p_t;  // q1: softmax(z); ratio: log p - log q + 1
  std::vector<A> kl_t, weight;
  const A* z = nullptr;
  double log_sum1 = 0;      // of the student at temperature 1
  double student_rest = 0;  // what rounding the student's log-sum to A cut off: it would bias every KL near 0

  Row(const Problem<A>& pr, bool keep)
      : problem(pr),
        keep_teachers(keep),
        student(pr.classes),
        teacher(pr.classes),
        log_q(pr.classes),
        q(pr.classes),
        q1(pr.labels ? pr.classes : 0),
        p(pr.classes),
        ratio(pr.classes),
        p_t(pr.classes * (keep ? pr.teachers : 1)),
        kl_t(pr.teachers),
        weight(pr.teachers) {}

  A* teacher_probs(int64_t t) { return p_t.data() + (keep_teachers ? t * problem.classes : 0); }
};

template <class A>
AMTML_INLINE A maximum(const A* z, int64_t n) {
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t c = 0; c < n; ++c) m = z[c] > m ? z[c] : m;
  return m;
}

// e = exp((z - m) / tau), returns its sum; then e is divided by the sum.
template <class A>
AMTML_INLINE double softmax(const A* z, int64_t n, A m, A tau, A* e) {
  const double sum = block_sum<A>(
      n, [&](int64_t c) __attribute__((always_inline)) { return e[c] = exp_nonpositive((z[c] - m) / tau); });
  const A inverse = static_cast<A>(1 / sum);
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) e[c] *= inverse;
  return sum;
}

// The same from saved statistics.
template <class A>
AMTML_INLINE void softmax_again(const A* z, int64_t n, A m, A inverse, A tau, A* e) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) e[c] = exp_nonpositive((z[c] - m) / tau) * inverse;
}

// sum_c p (log p - log q) where p = 0 counts 0, with log p = (z - m) / tau - log_sum.
template <class A>
AMTML_INLINE double teacher_kl(const A* p, const A* z, int64_t n, A m, A log_sum, A tau, const A* log_q) {
  return block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) {
    const A term = p[c] * ((z[c] - m) / tau - log_sum - log_q[c]);
    return p[c] == 0 ? A(0) : term;
  });
}

template <class A>
AMTML_INLINE A rounded(double value, double* rest) {
  const A near = static_cast<A>(value);
  *rest = value - near;
  return near;
}

// Fills the scratch from row i. With `again` the statistics are read, else made.
template <class A>
AMTML_INLINE void load(Row<A>& row, int64_t i, A* stats, bool again, bool need_kl_t) {
  const Problem<A>& pr = row.problem;
  const int64_t n = pr.classes;
  const A tau = static_cast<A>(pr.set.temperature);
  const A* z = row.z = load_row(pr.student, i, n, row.student.data());
  A *q = row.q.data(), *q1 = row.q1.data(), *log_q = row.log_q.data(), *p = row.p.data();
  double log_sum_exact = 0;
  if (again) {
    softmax_again(z, n, stats[0], stats[1], tau, q);
    log_sum_exact = -std::log(static_cast<double>(stats[1]));
    if (pr.labels) softmax_again(z, n, stats[0], stats[2], A(1), q1);
  } else {
    stats[0] = maximum(z, n);
    const double sum = softmax(z, n, stats[0], tau, q), sum1 = pr.labels ? softmax(z, n, stats[0], A(1), q1) : 1;
    log_sum_exact = std::log(sum);
    row.log_sum1 = std::log(sum1);
    stats[1] = static_cast<A>(1 / sum);
    stats[2] = static_cast<A>(1 / sum1);
  }
  const A m = stats[0], log_sum = rounded<A>(log_sum_exact, &row.student_rest);
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    log_q[c] = (z[c] - m) / tau - log_sum;
    p[c] = 0;
  }
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const A w = row.weight[t] = pr.weight(i, t);
    const A* zt = load_row(pr.teacher[t], i, n, row.teacher.data());
    A *pt = row.teacher_probs(t), *stat = stats + 3 + 2 * t;
    double teacher_log_sum = 0, teacher_rest = 0;
    if (again) {
      softmax_again(zt, n, stat[0], stat[1], tau, pt);
      teacher_log_sum = -std::log(static_cast<double>(stat[1]));
    } else {
      stat[0] = maximum(zt, n);
      const double sum = softmax(zt, n, stat[0], tau, pt);
      stat[1] = static_cast<A>(1 / sum);
      teacher_log_sum = std::log(sum);
    }
    if (w == 0 && !(std::abs(stat[1]) < std::numeric_limits<A>::infinity())) std::fill_n(pt, n, A(0));  // 0 * NaN is 0
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) p[c] += w * pt[c];
    if (need_kl_t) {
      const A log_sum_t = rounded<A>(teacher_log_sum, &teacher_rest);
      const double rest = row.student_rest - teacher_rest;
      const A kl = static_cast<A>(teacher_kl(pt, zt, n, stat[0], log_sum_t, tau, log_q) + rest);
      row.kl_t[t] = w == 0 && !(std::abs(kl) < std::numeric_limits<A>::infinity()) ? A(0) : kl;
    }
  }
}

// log p - log q + 1, and 0 where p is 0.
template <class A>
AMTML_INLINE void log_ratio(Row<A>& row) {
  const A *p = row.p.data(), *log_q = row.log_q.data();
  A* ratio = row.ratio.data();
#pragma omp simd
  for (int64_t c = 0; c < row.problem.classes; ++c) {
    const A value = log_positive(p[c] == 0 ? A(1) : p[c]) - log_q[c] + 1;
    ratio[c] = p[c] == 0 ? A(0) : value;
  }
}

template <class A>
AMTML_INLINE double row_kl(Row<A>& row) {
  const int64_t n = row.problem.classes;
  if (!row.problem.set.mixture) {
    double sum = 0;
    for (int64_t t = 0; t < row.problem.teachers; ++t) sum += row.weight[t] == 0 ? 0 : row.weight[t] * row.kl_t[t];
    return sum;
  }
  const A *p = row.p.data(), *log_q = row.log_q.data();
  double total = 0;
  for (int64_t t = 0; t < row.problem.teachers; ++t) total += row.weight[t];
  return (total == 0 ? 0 : total * row.student_rest) + block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) {
           const A value = p[c] * (log_positive(p[c] == 0 ? A(1) : p[c]) - log_q[c]);
           return p[c] == 0 ? A(0) : value;
         });
}

// -(1 - s) log q1_y - s / C sum_c log q1_c
template <class A>
AMTML_INLINE double row_ce(const Row<A>& row, int64_t label, const A* stats) {
  const double smoothing = row.problem.set.label_smoothing, log_sum = row.log_sum1;
  const A *z = row.z, m = stats[0];
  const double label_term = log_sum - (z[label] - m);
  if (smoothing == 0) return label_term;  // not 0 * infinity
  const int64_t n = row.problem.classes;
  const double below = block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) { return m - z[c]; });
  return (1 - smoothing) * label_term + smoothing * (log_sum + below / static_cast<double>(n));
}

// ce_scale * dCE/dz + kl_scale * dKL/dz + the gradient that comes back through q; 0 at masked classes.
template <class A>
AMTML_INLINE void grad_student_row(const Row<A>& row, int64_t label, A ce_scale, A kl_scale, const A* grad_q, A* out) {
  const Problem<A>& pr = row.problem;
  const int64_t n = pr.classes;
  const A tau = static_cast<A>(pr.set.temperature);
  const A *z = row.z, *q = row.q.data(), *p = row.p.data(), *q1 = row.q1.data();
  A total = 0;
  for (int64_t t = 0; t < pr.teachers; ++t) total += row.weight[t];
  const A kl_by_tau = kl_scale / tau;
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) {
    const A value = kl_by_tau * (total * q[c] - p[c]);
    out[c] = kl_by_tau == 0 ? A(0) : value;  // a teacher without weight in the loss may hold NaN
  }
  if (pr.labels) {
    const A smoothing = static_cast<A>(pr.set.label_smoothing), even = smoothing / n;
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) out[c] += ce_scale * (q1[c] - even);
    out[label] -= ce_scale * (1 - smoothing);
  }
  if (grad_q) {
    const A inner =
        static_cast<A>(block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) { return grad_q[c] * q[c]; }));
#pragma omp simd
    for (int64_t c = 0; c < n; ++c) out[c] += q[c] * (grad_q[c] - inner) / tau;
  }
  constexpr A masked = -std::numeric_limits<A>::infinity();
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) out[c] = z[c] == masked ? A(0) : out[c];
}

// kl_scale * dKL/dw + the gradient that comes back through p.
template <class A>
AMTML_INLINE void grad_weights_row(Row<A>& row, A kl_scale, const A* grad_p, A* out) {
  const Problem<A>& pr = row.problem;
  const A* ratio = row.ratio.data();
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const A* pt = row.teacher_probs(t);
    double sum = 0;
    if (kl_scale != 0) {
      sum = pr.set.mixture ? block_sum<A>(pr.classes,
                                          [&](int64_t c) __attribute__((always_inline)) {
                                            const A term = pt[c] * ratio[c];
                                            return pt[c] == 0 ? A(0) : term;
                                          })
                           : row.kl_t[t];
      sum *= kl_scale;
    }
    if (grad_p) {
      sum += block_sum<A>(pr.classes, [&](int64_t c) __attribute__((always_inline)) { return grad_p[c] * pt[c]; });
    }
    out[t] = static_cast<A>(sum);
  }
}

// Denominators of the two terms, from the reduction and the rows that count.
struct Scale {
  double ce, kl;
};

template <class A>
Scale reduction_scale(const Problem<A>& pr, const std::string& reduction) {
  if (reduction == "none" || reduction == "sum") return {1, 1};
  int64_t count = 0;
  for (int64_t i = 0; i < pr.rows; ++i) count += !pr.ignored(i);
  const double rows = static_cast<double>(std::max<int64_t>(count, 1));
  return {1 / rows, reduction == "mean" ? 1 / (rows * pr.classes) : 1 / rows};
}

struct Inputs {  // owns what Problem points to
  std::optional<Tensor> labels;
  ScalarType wide;

  Inputs(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& weights,
         const std::optional<Tensor>& given_labels, const Settings& set)
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
    if (!given_labels) return;
    check_shape(kOp, "labels", *given_labels, {n});
    STD_TORCH_CHECK(given_labels->scalar_type() == ScalarType::Long, kOp, ": labels must be int64");
    labels = torch::stable::contiguous(*given_labels);
    const int64_t* y = static_cast<const int64_t*>(labels->const_data_ptr());
    for (int64_t i = 0; i < n; ++i) {
      STD_TORCH_CHECK(y[i] == set.ignore_index || (y[i] >= 0 && y[i] < c), kOp, ": labels[", i, "] must be in [0, ", c,
                      ") or ignore_index ", set.ignore_index, ", got ", y[i]);
    }
  }

  template <class A>
  Problem<A> problem(const Tensor& student, const std::vector<Tensor>& teachers, const std::optional<Tensor>& weights,
                     const Settings& set) const {
    Problem<A> pr{student.size(0),
                  student.size(1),
                  static_cast<int64_t>(teachers.size()),
                  Matrix(student),
                  Matrix(weights),
                  {},
                  labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr,
                  set};
    for (const Tensor& t : teachers) pr.teacher.emplace_back(t);
    return pr;
  }
};

using Tensor8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Tensor8 multi_teacher_kd_fwd(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                             std::optional<Tensor> labels, double temperature, double ce_weight, double kl_weight,
                             double kl_scale, std::string mode, std::string reduction, int64_t ignore_index,
                             double label_smoothing, bool need_student_grad, bool need_weights_grad, bool need_probs) {
  const Settings set{temperature, ce_weight, kl_weight, kl_scale, mode == "mixture", ignore_index, label_smoothing};
  const Inputs inputs(student, teachers, weights, labels, set);
  const int64_t n = student.size(0), c = student.size(1), num_teachers = static_cast<int64_t>(teachers.size());
  STD_TORCH_CHECK(!need_student_grad || student.scalar_type() == inputs.wide, kOp,
                  ": the forward gradient of a 16-bit student is made in backward");
  const bool none = reduction == "none";
  const Shape value_shape = none ? Shape{n} : Shape{};
  auto empty = [&](const Shape& shape) { return torch::stable::new_empty(student, shape, inputs.wide); };
  Tensor loss = empty(value_shape), ce = empty(value_shape), kl = empty(value_shape);
  Tensor probs = empty(need_probs ? Shape{n, c} : Shape{0}), targets = empty(need_probs ? Shape{n, c} : Shape{0});
  Tensor stats = empty({n, stats_size(num_teachers)});
  Tensor grad_student = empty(need_student_grad ? Shape{n, c} : Shape{0});
  Tensor grad_weights = empty(need_weights_grad ? Shape{n, num_teachers} : Shape{0});
  dispatch_wide(inputs.wide, [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> pr = inputs.problem<A>(student, teachers, weights, set);
    const Scale scale = reduction_scale(pr, reduction);
    auto data = [](const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    A *stat = data(stats), *q_out = data(probs), *p_out = data(targets), *dz = data(grad_student),
      *dw = data(grad_weights);
    std::vector<double> ce_rows(n), kl_rows(n);
    torch::stable::parallel_for(0, n, grain(c * (num_teachers + 2)), [&](int64_t begin, int64_t end) {
      Row<A> row(pr, need_weights_grad && set.mixture);
      vectorized([&] AMTML_BODY() {
        for (int64_t i = begin; i < end; ++i) {
          A* s = stat + i * stats_size(num_teachers);
          if (pr.ignored(i)) {
            std::fill_n(s, stats_size(num_teachers), A(0));
            if (need_probs) std::fill_n(q_out + i * c, c, A(0)), std::fill_n(p_out + i * c, c, A(0));
            if (need_student_grad) std::fill_n(dz + i * c, c, A(0));
            if (need_weights_grad) std::fill_n(dw + i * num_teachers, num_teachers, A(0));
            continue;
          }
          const int64_t label = pr.labels ? pr.labels[i] : 0;
          load(row, i, s, false, !set.mixture);
          kl_rows[i] = kl_scale * row_kl(row);
          if (pr.labels) ce_rows[i] = row_ce(row, label, s);
          if (need_probs) std::copy_n(row.q.data(), c, q_out + i * c), std::copy_n(row.p.data(), c, p_out + i * c);
          const A ce_grad = static_cast<A>(ce_weight * scale.ce),
                  kl_grad = static_cast<A>(kl_weight * kl_scale * scale.kl);
          if (need_student_grad) grad_student_row<A>(row, label, ce_grad, kl_grad, nullptr, dz + i * c);
          if (need_weights_grad) {
            if (set.mixture) log_ratio(row);
            grad_weights_row<A>(row, kl_grad, nullptr, dw + i * num_teachers);
          }
        }
      });
    });
    auto total = [=](double ce_value, double kl_value) {  // not 0 * infinity
      return (ce_weight == 0 ? 0 : ce_weight * ce_value) + (kl_weight == 0 ? 0 : kl_weight * kl_value);
    };
    A *loss_out = data(loss), *ce_out = data(ce), *kl_out = data(kl);
    double ce_sum = 0, kl_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      ce_sum += ce_rows[i];
      kl_sum += kl_rows[i];
      if (none) {
        ce_out[i] = static_cast<A>(ce_rows[i]);
        kl_out[i] = static_cast<A>(kl_rows[i]);
        loss_out[i] = static_cast<A>(total(ce_rows[i], kl_rows[i]));
      }
    }
    if (!none) {
      ce_out[0] = static_cast<A>(ce_sum * scale.ce);
      kl_out[0] = static_cast<A>(kl_sum * scale.kl);
      loss_out[0] = static_cast<A>(total(ce_sum * scale.ce, kl_sum * scale.kl));
    }
  });
  return {loss, ce, kl, probs, targets, stats, grad_student, grad_weights};
}

std::tuple<Tensor, Tensor> multi_teacher_kd_bwd(const Tensor& grad_loss, std::optional<Tensor> grad_probs,
                                                std::optional<Tensor> grad_targets, const Tensor& student,
                                                std::vector<Tensor> teachers, std::optional<Tensor> weights,
                                                std::optional<Tensor> labels, const Tensor& stats, double temperature,
                                                double ce_weight, double kl_weight, double kl_scale, std::string mode,
                                                std::string reduction, int64_t ignore_index, double label_smoothing,
                                                bool need_student_grad, bool need_weights_grad) {
  const Settings set{temperature, ce_weight, kl_weight, kl_scale, mode == "mixture", ignore_index, label_smoothing};
  const Inputs inputs(student, teachers, weights, labels, set);
  const int64_t n = student.size(0), c = student.size(1), num_teachers = static_cast<int64_t>(teachers.size());
  const bool none = reduction == "none";
  check_shape(kOp, "grad_loss", grad_loss, none ? Shape{n} : Shape{});
  check_shape(kOp, "stats", stats, {n, stats_size(num_teachers)});
  if (grad_probs) check_shape(kOp, "grad_probs", *grad_probs, {n, c});
  if (grad_targets) check_shape(kOp, "grad_targets", *grad_targets, {n, c});
  Tensor grad_student = empty_or_none(student, need_student_grad, {n, c}, student.scalar_type());
  Tensor grad_weights = empty_or_none(student, need_weights_grad, {n, num_teachers}, inputs.wide);
  dispatch_wide(inputs.wide, [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> pr = inputs.problem<A>(student, teachers, weights, set);
    const Scale scale = reduction_scale(pr, reduction);
    const Tensor incoming = torch::stable::contiguous(torch::stable::to(grad_loss, inputs.wide));
    const A* up = static_cast<const A*>(incoming.const_data_ptr());
    const A* saved = static_cast<const A*>(stats.const_data_ptr());
    const Matrix grad_q(grad_probs), grad_p(grad_targets);
    A* dw = static_cast<A*>(grad_weights.mutable_data_ptr());
    dispatch(student.scalar_type(), kOp, [&](auto element) {
      using T = decltype(element);
      T* dz = static_cast<T*>(grad_student.mutable_data_ptr());
      torch::stable::parallel_for(0, n, grain(c * (num_teachers + 2)), [&](int64_t begin, int64_t end) {
        Row<A> row(pr, need_weights_grad);
        std::vector<A> wide_row(c), q_row(c), p_row(c), s(stats_size(num_teachers));
        vectorized([&] AMTML_BODY() {
          for (int64_t i = begin; i < end; ++i) {
            if (pr.ignored(i)) {
              if (need_student_grad) std::fill_n(dz + i * c, c, T(0));
              if (need_weights_grad) std::fill_n(dw + i * num_teachers, num_teachers, A(0));
              continue;
            }
            std::copy_n(saved + i * stats_size(num_teachers), stats_size(num_teachers), s.data());
            load(row, i, s.data(), true, need_weights_grad && !set.mixture);
            const double g = up[none ? i : 0];
            const A kl_grad = static_cast<A>(g * kl_weight * kl_scale * scale.kl);
            if (need_student_grad) {
              const A* back = grad_q ? load_row(grad_q, i, c, q_row.data()) : nullptr;
              A* out = wide_row.data();
              grad_student_row<A>(row, pr.labels ? pr.labels[i] : 0, static_cast<A>(g * ce_weight * scale.ce), kl_grad,
                                  back, out);
              for (int64_t k = 0; k < c; ++k) dz[i * c + k] = static_cast<T>(out[k]);
            }
            if (need_weights_grad) {
              if (set.mixture) log_ratio(row);
              const A* back = grad_p ? load_row(grad_p, i, c, p_row.data()) : nullptr;
              grad_weights_row<A>(row, kl_grad, back, dw + i * num_teachers);
            }
          }
        });
      });
    });
  });
  return {grad_student, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("multi_teacher_kd_fwd", TORCH_BOX(&multi_teacher_kd_fwd));
  m.impl("multi_teacher_kd_bwd", TORCH_BOX(&multi_teacher_kd_bwd));
}

}  // namespace
}  // namespace amtml
