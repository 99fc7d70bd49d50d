// Weighted multi-teacher distillation: cross-entropy, weighted KL and their gradients, one row at a time.
//
//   q = softmax(z / tau), p_t = softmax(z_t / tau), p = sum_t w_t p_t
//   KL = sum_c p (log p - log q)   (mixture)    or    sum_t w_t sum_c p_t (log p_t - log q)   (sum)
//   dKL/dz = ((sum_t w_t) q - p) / tau
//   dKL/dw_t = sum_c p_t (log p - log q + 1)    or    sum_c p_t (log p_t - log q)
//
// A row of every input is read once; its exponentials stay in cache until the row is done. Teachers are read in place.
#include <algorithm>

#include "../arithmetic.h"
#include "ops.h"
#include "simd.h"

namespace amtml {
namespace {

constexpr char kOp[] = "multi_teacher_kd_loss";
// Exponentials are kept times 2^24, so that a probability may be as small as float32 can hold: where a teacher without
// weight stands alone, the gradient of its weight is the logarithm of what the others give that class.
constexpr int kScale = 24;
constexpr double kLogScale = kScale * 0.693147180559945309417;
constexpr int64_t kChunk = 1024;  // classes at a time after the exponentials: a chunk stays in the first-level cache

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

  bool in_place() const {  // whether no teacher needs to be converted
    bool all = true;
    for (const Matrix& m : teacher) all &= m.template in_place<A>();
    return all;
  }
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
struct Row {  // scratch of one thread: everything a row needs stays in cache until the row is done
  const Problem<A>& problem;
  Buffer<A> student, e, e1;  // exp((z - max z) / tau), exp(z - max z)
  int64_t teacher_pitch;     // classes, or 0 where the teachers are read in place
  Buffer<A> teacher, e_t;    // [teachers, classes]
  std::vector<const A*> x;   // the teachers' logits
  std::vector<A> weight, inverse, kl_t;
  std::vector<double> dot;
  Buffer<A> p, ratio, out;  // of one chunk
  const A* z = nullptr;
  A total = 0;          // of the weights
  A log_sum = 0;        // of the student at tau
  double rest = 0;      // what rounding log_sum to A cut off: it would bias every KL near 0
  double log_sum1 = 0;  // of the student at temperature 1

  explicit Row(const Problem<A>& pr)
      : problem(pr),
        student(pr.student.template in_place<A>() ? 0 : pr.classes),
        e(pr.classes),
        e1(pr.labels ? pr.classes : 0),
        teacher_pitch(pr.in_place() ? 0 : pr.classes),
        teacher(pr.teachers * teacher_pitch),
        e_t(pr.teachers * pr.classes),
        x(pr.teachers),
        weight(pr.teachers),
        inverse(pr.teachers),
        kl_t(pr.teachers),
        dot(pr.teachers),
        p(std::min(pr.classes, kChunk)),
        ratio(std::min(pr.classes, kChunk)),
        out(std::min(pr.classes, kChunk)) {}

  A* of_teacher(int64_t t) { return e_t.data() + t * problem.classes; }  // its exponentials
  const A* of_teacher(int64_t t) const { return e_t.data() + t * problem.classes; }
};

template <class A>
AMTML_INLINE A maximum(const A* z, int64_t n) {
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t c = 0; c < n; ++c) m = z[c] > m ? z[c] : m;
  return m;
}

// e = 2^kScale exp((z - m) / tau); returns its sum.
template <class A>
AMTML_INLINE double exponentials(const A* z, int64_t n, A m, A per_tau, A* e) {
  return block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) {
    return e[c] = exp_nonpositive<kScale>((z[c] - m) * per_tau);
  });
}

// The same where the sum is known already.
template <class A>
AMTML_INLINE void exponentials_again(const A* z, int64_t n, A m, A per_tau, A* e) {
#pragma omp simd
  for (int64_t c = 0; c < n; ++c) e[c] = exp_nonpositive<kScale>((z[c] - m) * per_tau);
}

template <class A>
AMTML_INLINE A rounded(double value, double* rest) {
  const A near = static_cast<A>(value);
  *rest = value - near;
  return near;
}

// KL(p_t || q) where p_t = 0 counts 0.
template <class A>
AMTML_INLINE A teacher_kl(const Row<A>& row, int64_t t, const A* stats, double teacher_log_sum, A per_tau) {
  const A *z = row.z, *x = row.x[t], *e = row.of_teacher(t);
  const A m = stats[0], m_t = stats[3 + 2 * t], inverse = row.inverse[t], log_sum = row.log_sum;
  double teacher_rest = 0;
  const A log_sum_t = rounded<A>(teacher_log_sum, &teacher_rest);
  const double sum = block_sum<A>(row.problem.classes, [&](int64_t c) __attribute__((always_inline)) {
    const A p = e[c] * inverse;
    return if_mass(p, p * (((x[c] - m_t) * per_tau - log_sum_t) - ((z[c] - m) * per_tau - log_sum)));
  });
  return static_cast<A>(sum + row.rest - teacher_rest);
}

// Fills the scratch from row i. With `again` the statistics are read, else made.
template <class A>
AMTML_INLINE void load(Row<A>& row, int64_t i, A* stats, bool again) {
  const Problem<A>& pr = row.problem;
  const int64_t n = pr.classes;
  const A per_tau = static_cast<A>(1 / pr.set.temperature);
  const A* z = row.z = load_row(pr.student, i, n, row.student.data());
  double log_sum = 0;
  if (again) {
    exponentials_again(z, n, stats[0], per_tau, row.e.data());
    if (pr.labels) exponentials_again(z, n, stats[0], A(1), row.e1.data());
    log_sum = -std::log(static_cast<double>(stats[1])) - kLogScale;
  } else {
    stats[0] = maximum(z, n);
    const double sum = exponentials(z, n, stats[0], per_tau, row.e.data());
    const double sum1 = pr.labels ? exponentials(z, n, stats[0], A(1), row.e1.data()) : 1;
    stats[1] = static_cast<A>(1 / sum);
    stats[2] = static_cast<A>(1 / sum1);
    log_sum = std::log(sum) - kLogScale;
    row.log_sum1 = std::log(sum1) - kLogScale;
  }
  row.log_sum = rounded<A>(log_sum, &row.rest);
  row.total = 0;
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const A w = row.weight[t] = pr.weight(i, t);
    const A* x = row.x[t] = load_row(pr.teacher[t], i, n, row.teacher.data() + (row.teacher_pitch * t));
    A *e = row.of_teacher(t), *stat = stats + 3 + 2 * t;
    if (again) {
      exponentials_again(x, n, stat[0], per_tau, e);
    } else {
      stat[0] = maximum(x, n);
      stat[1] = static_cast<A>(1 / exponentials(x, n, stat[0], per_tau, e));
    }
    row.total += w;
    row.inverse[t] = stat[1];
    const bool broken = !(std::abs(stat[1]) < std::numeric_limits<A>::infinity());
    if (w == 0 && broken) std::fill_n(e, n, A(0)), row.inverse[t] = 0;  // 0 * NaN is 0
    if (pr.set.mixture) continue;
    const A kl = teacher_kl(row, t, stats, -std::log(static_cast<double>(stat[1])) - kLogScale, per_tau);
    row.kl_t[t] = w == 0 && !(std::abs(kl) < std::numeric_limits<A>::infinity()) ? A(0) : kl;
  }
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

// What to make of a loaded row; null or false where it is not asked for.
template <class A, class T>
struct Wanted {
  bool kl;  // its value
  A *student_probs, *soft_targets;
  T* grad_student;
  A* grad_weights;
  A ce_grad, kl_grad;        // d loss / d CE, d loss / d KL of this row
  const A *grad_q, *grad_p;  // that come back through student_probs and soft_targets
};

// Everything that follows from the exponentials, in chunks that stay in the first-level cache. Returns the KL.
template <class A, class T>
AMTML_INLINE double finish(Row<A>& row, int64_t label, const A* stats, const Wanted<A, T>& want) {
  const Problem<A>& pr = row.problem;
  const int64_t classes = pr.classes, teachers = pr.teachers;
  const bool mixture = pr.set.mixture;
  const A per_tau = static_cast<A>(1 / pr.set.temperature), m = stats[0], inverse = stats[1], inverse1 = stats[2];
  const A log_sum = row.log_sum, total = row.total, kl_grad = want.kl_grad * per_tau, ce_grad = want.ce_grad;
  const A smoothing = static_cast<A>(pr.set.label_smoothing), even = smoothing / classes;
  constexpr A masked = -std::numeric_limits<A>::infinity();
  const bool need_log = mixture && (want.kl || want.grad_weights);
  A *p = row.p.data(), *ratio = row.ratio.data(), *out = row.out.data();
  double kl = 0, inner = 0;
  if (want.grad_weights) std::fill(row.dot.begin(), row.dot.end(), 0.0);
  if (want.grad_q) {
    const A *e = row.e.data(), *back = want.grad_q;
    inner = block_sum<A>(classes, [&](int64_t c) __attribute__((always_inline)) { return back[c] * (e[c] * inverse); });
  }
  for (int64_t start = 0; start < classes; start += kChunk) {
    const int64_t count = std::min(kChunk, classes - start);
    const A *z = row.z + start, *e = row.e.data() + start;
    std::fill_n(p, count, A(0));
    for (int64_t t = 0; t < teachers; ++t) {
      const A* e_t = row.of_teacher(t) + start;
      const A factor = row.weight[t] * row.inverse[t];
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) p[c] += factor * e_t[c];
    }
    if (need_log) {  // log p - log q, and 0 where p is 0
      kl += block_sum<A>(count, [&](int64_t c) __attribute__((always_inline)) {
        ratio[c] = if_mass(p[c], log_positive(p[c] == 0 ? A(1) : p[c]) - ((z[c] - m) * per_tau - log_sum));
        return if_mass(p[c], p[c] * ratio[c]);
      });
    }
    for (int64_t t = 0; want.grad_weights && t < teachers; ++t) {
      const A* e_t = row.of_teacher(t) + start;
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
      row.dot[t] += sum;
    }
    if (want.soft_targets) std::copy_n(p, count, want.soft_targets + start);
    if (want.student_probs) {
      A* q = want.student_probs + start;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) q[c] = e[c] * inverse;
    }
    if (!want.grad_student) continue;
    A* grad = out;
    if constexpr (std::is_same_v<A, T>) grad = want.grad_student + start;
    if (kl_grad == 0) std::fill_n(p, count, A(0));  // a teacher without weight in the loss may hold NaN
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) grad[c] = kl_gradient(kl_grad, total, e[c] * inverse, p[c]);
    if (pr.labels) {
      const A* e1 = row.e1.data() + start;
      const A ce_q = ce_grad * inverse1, flat = ce_grad * even;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) grad[c] += ce_q * e1[c] - flat;
      if (label >= start && label < start + count) grad[label - start] -= ce_grad * (1 - smoothing);
    }
    if (want.grad_q) {
      const A *back = want.grad_q + start, mean = static_cast<A>(inner), by = inverse * per_tau;
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) grad[c] += softmax_gradient(by * e[c], back[c], mean);
    }
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) grad[c] = z[c] == masked ? A(0) : grad[c];
    if constexpr (!std::is_same_v<A, T>) {
      for (int64_t c = 0; c < count; ++c) want.grad_student[start + c] = static_cast<T>(grad[c]);
    }
  }
  for (int64_t t = 0; t < teachers; ++t) {
    if (want.grad_weights) {
      const double slope = mixture ? row.inverse[t] != 0 : row.kl_t[t];
      const double through_kl = want.kl_grad == 0 ? 0 : want.kl_grad * slope;
      want.grad_weights[t] = static_cast<A>(row.dot[t] * row.inverse[t] + through_kl);
    }
    if (!mixture) kl += row.weight[t] == 0 ? 0 : row.weight[t] * row.kl_t[t];
  }
  return mixture && total != 0 ? kl + total * row.rest : kl;
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
    labels = dense(*given_labels);
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

}  // namespace

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
  auto make = [&](const Shape& shape) { return empty(student, shape, inputs.wide); };
  Tensor loss = make(value_shape), ce = make(value_shape), kl = make(value_shape);
  Tensor probs = make(need_probs ? Shape{n, c} : Shape{0}), targets = make(need_probs ? Shape{n, c} : Shape{0});
  Tensor stats = make({n, stats_size(num_teachers)});
  Tensor grad_student = make(need_student_grad ? Shape{n, c} : Shape{0});
  Tensor grad_weights = make(need_weights_grad ? Shape{n, num_teachers} : Shape{0});
  dispatch_wide(inputs.wide, [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> pr = inputs.problem<A>(student, teachers, weights, set);
    const Scale scale = reduction_scale(pr, reduction);
    auto data = [](const Tensor& t) { return static_cast<A*>(t.mutable_data_ptr()); };
    A *stat = data(stats), *q_out = data(probs), *p_out = data(targets), *dz = data(grad_student),
      *dw = data(grad_weights);
    std::vector<double> ce_rows(n), kl_rows(n);
    torch::stable::parallel_for(0, n, grain(c * (num_teachers + 2)), [&](int64_t begin, int64_t end) {
      Row<A> row(pr);
      vectorized([&] AMTML_BODY() {
        for (int64_t i = begin; i < end; ++i) {
          A* s = stat + i * stats_size(num_teachers);
          Wanted<A, A> want{true,
                            need_probs ? q_out + i * c : nullptr,
                            need_probs ? p_out + i * c : nullptr,
                            need_student_grad ? dz + i * c : nullptr,
                            need_weights_grad ? dw + i * num_teachers : nullptr,
                            static_cast<A>(ce_weight * scale.ce),
                            static_cast<A>(kl_weight * kl_scale * scale.kl),
                            nullptr,
                            nullptr};
          if (pr.ignored(i)) {
            std::fill_n(s, stats_size(num_teachers), A(0));
            if (need_probs) std::fill_n(want.student_probs, c, A(0)), std::fill_n(want.soft_targets, c, A(0));
            if (need_student_grad) std::fill_n(want.grad_student, c, A(0));
            if (need_weights_grad) std::fill_n(want.grad_weights, num_teachers, A(0));
            continue;
          }
          const int64_t label = pr.labels ? pr.labels[i] : 0;
          load(row, i, s, false);
          kl_rows[i] = kl_scale * finish(row, label, s, want);
          if (pr.labels) ce_rows[i] = row_ce(row, label, s);
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
    const Tensor incoming = dense(grad_loss, inputs.wide);
    const A* up = static_cast<const A*>(incoming.const_data_ptr());
    const A* saved = static_cast<const A*>(stats.const_data_ptr());
    const Matrix grad_q(grad_probs), grad_p(grad_targets);
    A* dw = static_cast<A*>(grad_weights.mutable_data_ptr());
    dispatch(student.scalar_type(), kOp, [&](auto element) {
      using T = decltype(element);
      T* dz = static_cast<T*>(grad_student.mutable_data_ptr());
      torch::stable::parallel_for(0, n, grain(c * (num_teachers + 2)), [&](int64_t begin, int64_t end) {
        Row<A> row(pr);
        std::vector<A> q_row(c), p_row(c), s(stats_size(num_teachers));
        vectorized([&] AMTML_BODY() {
          for (int64_t i = begin; i < end; ++i) {
            const double g = up[none ? i : 0];
            Wanted<A, T> want{false,
                              nullptr,
                              nullptr,
                              need_student_grad ? dz + i * c : nullptr,
                              need_weights_grad ? dw + i * num_teachers : nullptr,
                              static_cast<A>(g * ce_weight * scale.ce),
                              static_cast<A>(g * kl_weight * kl_scale * scale.kl),
                              nullptr,
                              nullptr};
            if (pr.ignored(i)) {
              if (need_student_grad) std::fill_n(want.grad_student, c, T(0));
              if (need_weights_grad) std::fill_n(want.grad_weights, num_teachers, A(0));
              continue;
            }
            std::copy_n(saved + i * stats_size(num_teachers), stats_size(num_teachers), s.data());
            load(row, i, s.data(), true);
            if (grad_q) want.grad_q = load_row(grad_q, i, c, q_row.data());
            if (grad_p) want.grad_p = load_row(grad_p, i, c, p_row.data());
            finish(row, pr.labels ? pr.labels[i] : 0, s.data(), want);
          }
        });
      });
    });
  });
  return {grad_student, grad_weights};
}

namespace {

// The operator, whose weights are the caller's: a wrong value there is an error. Those of an adapter (in AMTMLLoss, or
// with need_probs) may be NaN in a step that diverges, and then so is the loss.
Tensor8 checked_fwd(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                    std::optional<Tensor> labels, double temperature, double ce_weight, double kl_weight,
                    double kl_scale, std::string mode, std::string reduction, int64_t ignore_index,
                    double label_smoothing, bool need_student_grad, bool need_weights_grad, bool need_probs) {
  if (weights && weights->dim() == 2 && !need_probs) {
    const Matrix m(*weights);
    std::vector<double> scratch(weights->size(1));
    const int64_t rows = std::min<int64_t>(weights->size(0), m.row_stride == 0 ? 1 : weights->size(0));  // expanded
    for (int64_t i = 0; i < rows; ++i) {
      const double* w = load_row<double>(m, i, weights->size(1), scratch.data());
      for (int64_t t = 0; t < weights->size(1); ++t) {
        STD_TORCH_CHECK(w[t] >= 0 && w[t] < std::numeric_limits<double>::infinity(), kOp,
                        ": teacher_weights must be finite and not negative, got ", w[t]);
      }
    }
  }
  return multi_teacher_kd_fwd(student, std::move(teachers), std::move(weights), std::move(labels), temperature,
                              ce_weight, kl_weight, kl_scale, std::move(mode), std::move(reduction), ignore_index,
                              label_smoothing, need_student_grad, need_weights_grad, need_probs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("multi_teacher_kd_fwd", TORCH_BOX(&checked_fwd));
  m.impl("multi_teacher_kd_bwd", TORCH_BOX(&multi_teacher_kd_bwd));
}

}  // namespace amtml
