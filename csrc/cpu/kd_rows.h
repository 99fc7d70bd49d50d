// The rows of a distillation: softmax and cross-entropy of the student, and sums over rows. Shared by the losses that
// set teachers against it.
#pragma once

#include "../kd_settings.h"
#include "simd.h"

namespace amtml {

// Exponentials are kept times 2^24, so that a probability may be as small as float32 can hold: where a teacher without
// weight stands alone, the gradient of its weight is the logarithm of what the others give that class.
constexpr int kScale = 24;
constexpr double kLogScale = kScale * 0.693147180559945309417;

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

// A student's row in the scratch of one thread. Statistics, kept for backward: its maximum, inverse sums at tau and
// at 1. Not log-sums: at 60,000 classes their last bit is already 5e-7 of a probability.
template <class A>
struct StudentRow {
  Buffer<A> converted, e, e1;  // exp((z - max z) / tau), exp(z - max z)
  bool labeled;
  const A* z = nullptr;
  A log_sum = 0;        // at tau
  double rest = 0;      // what rounding log_sum to A cut off: it would bias every KL near 0
  double log_sum1 = 0;  // at temperature 1

  StudentRow(const Matrix& student, int64_t classes, bool labeled)
      : converted(student.in_place<A>() ? 0 : classes), e(classes), e1(labeled ? classes : 0), labeled(labeled) {}

  // With `again` the statistics are read, else made.
  AMTML_INLINE void load(const Matrix& student, int64_t i, int64_t n, A per_tau, A* stats, bool again) {
    z = load_row(student, i, n, converted.data());
    double log_sum_at_tau = 0;
    if (again) {
      exponentials_again(z, n, stats[0], per_tau, e.data());
      if (labeled) exponentials_again(z, n, stats[0], A(1), e1.data());
      log_sum_at_tau = -std::log(static_cast<double>(stats[1])) - kLogScale;
    } else {
      stats[0] = maximum(z, n);
      const double sum = exponentials(z, n, stats[0], per_tau, e.data());
      const double sum1 = labeled ? exponentials(z, n, stats[0], A(1), e1.data()) : 1;
      stats[1] = static_cast<A>(1 / sum);
      stats[2] = static_cast<A>(1 / sum1);
      log_sum_at_tau = std::log(sum) - kLogScale;
      log_sum1 = std::log(sum1) - kLogScale;
    }
    log_sum = rounded<A>(log_sum_at_tau, &rest);
  }
};

// -(1 - s) log q1_y - s / C sum_c log q1_c
template <class A>
AMTML_INLINE double cross_entropy(const StudentRow<A>& row, int64_t n, int64_t label, A m, double smoothing) {
  const double log_sum = row.log_sum1;
  const A* z = row.z;
  const double label_term = log_sum - (z[label] - m);
  if (smoothing == 0) return label_term;  // not 0 * infinity
  const double below = block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) { return m - z[c]; });
  return (1 - smoothing) * label_term + smoothing * (log_sum + below / static_cast<double>(n));
}

// Denominators of the two terms, from the reduction and the rows that count.
struct Scale {
  double ce, kl;
};

inline Scale reduction_scale(const int64_t* labels, int64_t rows, int64_t classes, const KDSettings& set) {
  if (set.each_row() || set.reduction == "sum") return {1, 1};
  const int64_t count = labels ? rows - std::count(labels, labels + rows, set.ignore_index) : rows;
  const double by = static_cast<double>(std::max<int64_t>(count, 1));
  return {1 / by, set.reduction == "mean" ? 1 / (by * classes) : 1 / by};
}

// What a pass over all rows reads and writes; null where it is not asked for.
template <class A>
struct KDPass {
  A* stats;            // that forward makes
  double *ce, *kl;     // each row's losses, of forward, too
  const A* saved;      // the statistics, in backward
  const A* grad_loss;  // one number, or one each row
  bool each_row;
  Scale scale;  // of both terms
  Target grad_student;
  A* grad_weights;

  bool forward() const { return saved == nullptr; }
  double incoming(int64_t i) const { return forward() ? 1 : grad_loss[each_row ? i : 0]; }
};

// The numbers of a tensor; null where there are none.
template <class A>
A* data(const Tensor& t) {
  return t.numel() ? static_cast<A*>(t.mutable_data_ptr()) : nullptr;
}

// Loss, ce and kl, reduced or of every row; ce and kl may be null.
template <class A>
void reduce_rows(const KDSettings& set, const Scale& scale, const std::vector<double>& ce_rows,
                 const std::vector<double>& kl_rows, A* loss, A* ce, A* kl) {
  const bool none = set.each_row();
  auto write = [&](int64_t i, double ce_value, double kl_value) {  // not 0 * infinity
    loss[i] = static_cast<A>((set.ce_weight == 0 ? 0 : set.ce_weight * ce_value) +
                             (set.kl_weight == 0 ? 0 : set.kl_weight * kl_value));
    if (ce) ce[i] = static_cast<A>(ce_value);
    if (kl) kl[i] = static_cast<A>(kl_value);
  };
  double ce_sum = 0, kl_sum = 0;
  for (size_t i = 0; i < kl_rows.size(); ++i) {
    ce_sum += ce_rows[i];
    kl_sum += kl_rows[i];
    if (none) write(i, ce_rows[i], kl_rows[i]);
  }
  if (!none) write(0, ce_sum * scale.ce, kl_sum * scale.kl);
}

// The labels, contiguous.
inline std::optional<Tensor> checked_labels(const char* op, const std::optional<Tensor>& given, int64_t rows,
                                            int64_t classes, int64_t ignore_index) {
  if (!given) return std::nullopt;
  check_shape(op, "labels", *given, {rows});
  STD_TORCH_CHECK(given->scalar_type() == ScalarType::Long, op, ": labels must be int64");
  const Tensor labels = dense(*given);
  const int64_t* y = static_cast<const int64_t*>(labels.const_data_ptr());
  for (int64_t i = 0; i < rows; ++i) {
    STD_TORCH_CHECK(y[i] == ignore_index || (y[i] >= 0 && y[i] < classes), op, ": labels[", i, "] must be in [0, ",
                    classes, ") or ignore_index ", ignore_index, ", got ", y[i]);
  }
  return labels;
}

// The caller's weights [N, T].
inline void check_weights(const char* op, const Tensor& weights) {
  if (weights.dim() != 2) return;
  const Matrix m(weights);
  std::vector<double> scratch(weights.size(1));
  const int64_t rows = std::min<int64_t>(weights.size(0), m.row_stride == 0 ? 1 : weights.size(0));  // expanded
  for (int64_t i = 0; i < rows; ++i) {
    const double* w = load_row<double>(m, i, weights.size(1), scratch.data());
    for (int64_t t = 0; t < weights.size(1); ++t) {
      STD_TORCH_CHECK(w[t] >= 0 && w[t] < std::numeric_limits<double>::infinity(), op,
                      ": teacher_weights must be finite and not negative, got ", w[t]);
    }
  }
}

}  // namespace amtml
