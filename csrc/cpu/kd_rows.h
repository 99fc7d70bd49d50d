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

constexpr int64_t kChunk = 1024;  // classes at a time: what a row has of a chunk stays in the first-level cache

template <class A>
AMTML_INLINE A rounded(double value, double* rest) {
  // Not a plain A: where GCC 12 pairs two of these, it takes double(float(value)) for value, and the rest for 0
  // (findings/gcc_forgets_a_rounding.sh).
  volatile A kept = static_cast<A>(value);
  const A near = kept;
  *rest = value - near;
  return near;
}

// What a softmax of more classes than these is known to have: its maximum, and the logarithm of sum exp((x - m) / tau).
struct Normal {
  double maximum, log_sum;
};

// The softmax of a row of logits x at one temperature. Chunk by chunk, so that logits are converted, searched for their
// maximum and raised while they are in the first-level cache: e = 2^kScale exp((x - m_k) / tau) with the maximum m_k of
// chunk k, and e by(k) is the probability.
template <class A>
struct Softmax {
  const A* x = nullptr;
  A per_tau = 1;
  A m = 0, inverse = 0;  // maximum of all; inverse of sum 2^kScale exp((x - m) / tau)
  A log_sum = 0;         // of exp((x - m) / tau)
  double rest = 0;       // what rounding log_sum to A cut off: it would bias every KL near 0
  Buffer<A> e;

  explicit Softmax(int64_t classes) : e(classes), classes_(classes), chunks_((classes + kChunk - 1) / kChunk) {}

  A by(int64_t k) const { return chunks_[k].by; }
  AMTML_INLINE A log(int64_t c) const { return (x[c] - m) * per_tau - log_sum; }
  double sum() const {  // of 2^kScale exp((x - m) / tau), where m was not known; of a row of -inf 0
    double all = 0;
    for (const Chunk& chunk : chunks_) all += chunk.factor * chunk.sum;
    return all;
  }
  double exact_log_sum() const { return static_cast<double>(log_sum) + rest; }
  int64_t chunk_of_maximum() const {  // the first that has it
    int64_t k = 0;
    while (chunks_[k].most != m) ++k;
    return k;
  }
  A shift() const { return m - m == 0 ? m : A(0); }  // by which logits change nothing but the rounding
  bool finite() const { return std::abs(inverse) < std::numeric_limits<A>::infinity(); }

  // Makes every probability 0.
  AMTML_INLINE void clear(int64_t n) {
    std::fill_n(e.data(), n, A(0));
    for (Chunk& chunk : chunks_) chunk.by = 0;
    inverse = 0, rest = 0;
  }

  // Begins a row, with its maximum and its inverse sum, or that sum's logarithm, if they are known. Chunks are added
  // then, and it is ended.
  AMTML_INLINE void begin(A by_tau) { per_tau = by_tau, known_ = false; }
  AMTML_INLINE void begin(A by_tau, A maximum, A inverse_sum) {
    per_tau = by_tau, m = maximum, inverse = inverse_sum, known_ = true;
    known_sum_ = 1 / static_cast<double>(inverse_sum);
  }
  // These logits are less by `taken_off`.
  AMTML_INLINE void begin(A by_tau, const Normal& of_all, double taken_off) {
    double cut;
    per_tau = by_tau, m = rounded<A>(of_all.maximum - taken_off, &cut), known_ = true;
    known_sum_ = std::exp(of_all.log_sum + cut * by_tau + kLogScale);
    inverse = static_cast<A>(1 / known_sum_);
  }
  AMTML_INLINE void add(int64_t k, const A* logits, int64_t n, const Ahead& ahead) {
    chunks_[k].most = known_ ? m : maximum(logits, n);
    raise(k, logits, n, ahead);
  }
  // The same of what another softmax has at tau, where this one is at 1: its power tau, if that is 1, 2 or 4.
  AMTML_INLINE void add(int64_t k, const A* logits, int64_t n, const Softmax& at_tau) {
    static_assert(kScale == 24);  // 2^kScale is not to be raised
    Chunk& chunk = chunks_[k];
    chunk.most = at_tau.chunks_[k].most;
    const A *from = at_tau.e.data() + k * kChunk, tau = per_tau / at_tau.per_tau;
    A* to = e.data() + k * kChunk;
    if (tau == 4) {
      chunk.sum = block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) {
        const A y = from[c] * (A(1) / (1 << 18)), square = y * y;
        return to[c] = square * square;
      });
    } else if (tau == 2) {
      chunk.sum = block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) {
        const A y = from[c] * (A(1) / (1 << 12));
        return to[c] = y * y;
      });
    } else if (tau == 1) {
      std::copy_n(from, n, to);
      chunk.sum = at_tau.chunks_[k].sum;
    } else {
      raise(k, logits, n, {});
    }
  }
  AMTML_INLINE void end(bool need_log) {
    double sum = chunks_[0].sum;
    if (known_) {
      for (Chunk& chunk : chunks_) chunk.by = inverse;
      sum = known_sum_;
    } else {
      m = chunks_[0].most;
      if (chunks_.size() > 1) sum = joined();
      if (m == kNone) sum = std::numeric_limits<double>::quiet_NaN();
      inverse = static_cast<A>(1 / sum);
      for (Chunk& chunk : chunks_) {
        chunk.by = chunk.factor == 1 ? inverse : static_cast<A>(chunk.factor / sum);
        if (chunk.by < std::numeric_limits<A>::min() && chunk.factor > 0) lower(chunk, sum);
      }
    }
    if (need_log) log_sum = rounded<A>(std::log(sum) - kLogScale, &rest);
  }

  // All this of a row of logits.
  AMTML_INLINE void make(const A* logits, int64_t n) {
    x = logits;
    for (int64_t k = 0, first = 0; first < n; ++k, first += kChunk) add(k, x + first, std::min(kChunk, n - first), {});
    end(true);
  }
  // The same of row i of a matrix. What has to be converted goes to scratch, all of it (keep), or, where nobody asks
  // for a logarithm, chunk after chunk: x is null then.
  AMTML_INLINE void make(const Matrix& from, int64_t i, int64_t n, A* scratch, bool keep, const Ahead& ahead) {
    for (int64_t k = 0, first = 0; first < n; ++k, first += kChunk) {
      const int64_t count = std::min(kChunk, n - first);
      const A* part = load_part(from, i, first, count, scratch + (keep ? first : 0));
      if (k == 0) x = keep || part != scratch ? part : nullptr;
      add(k, part, count, ahead.from(first));
    }
    end(keep);
  }

 private:
  static constexpr A kNone = -std::numeric_limits<A>::infinity();
  struct Chunk {
    A most, by;
    double sum, factor = 1;  // sum of its e; exp((most - m) / tau)
  };
  int64_t classes_;
  std::vector<Chunk> chunks_;
  bool known_ = false;
  double known_sum_ = 0;  // of 2^kScale exp((x - m) / tau)

  AMTML_INLINE void raise(int64_t k, const A* logits, int64_t n, const Ahead& ahead) {
    Chunk& chunk = chunks_[k];
    const A top = chunk.most == kNone ? A(0) : chunk.most, by_tau = per_tau;
    A* to = e.data() + k * kChunk;
    const auto exponential = [&](int64_t c) __attribute__((always_inline)) {
      return to[c] = exp_nonpositive<kScale>((logits[c] - top) * by_tau);
    };
    chunk.sum = block_sum<A>(n, exponential, ahead);
  }
  // Of a chunk so far below the maximum that an A cannot hold its factor beside 2^-kScale: takes 2^kScale off its e.
  void lower(Chunk& chunk, double sum) {
    chunk.by = static_cast<A>(chunk.factor / sum * (1 << kScale));
    if (chunk.by == 0) return;  // and so are all its probabilities
    const int64_t first = (&chunk - chunks_.data()) * kChunk, end = std::min(first + kChunk, classes_);
    for (int64_t c = first; c < end; ++c) e[c] *= A(1) / (1 << kScale);
  }
  // The sum of several chunks, and m.
  double joined() {
    for (const Chunk& chunk : chunks_) m = chunk.most > m ? chunk.most : m;
    double sum = 0;
    for (Chunk& chunk : chunks_) {
      chunk.factor = chunk.most == m ? 1 : std::exp((static_cast<double>(chunk.most) - m) * per_tau);
      sum += chunk.factor * chunk.sum;
    }
    return sum;
  }
};

// A student's row in the scratch of one thread. Statistics, kept for backward: its maximum, and the inverse sums at tau
// and at 1. (No log-sums: at 60,000 classes their last bit is already 5e-7 of a probability.)
template <class A>
struct StudentRow {
  Softmax<A> q, q1;  // at tau, and, where it is labeled, at 1
  bool labeled;
  Buffer<A> converted;

  StudentRow(const Matrix& student, int64_t classes, bool labeled)
      : q(classes), q1(labeled ? classes : 0), labeled(labeled), converted(student.in_place<A>() ? 0 : classes) {}

  // With `again` the statistics are read, else made.
  AMTML_INLINE void load(const Matrix& student, int64_t i, int64_t n, A per_tau, A* stats, bool again,
                         const Ahead& ahead) {
    if (again) {
      q.begin(per_tau, stats[0], stats[1]);
      q1.begin(1, stats[0], stats[2]);
    } else {
      q.begin(per_tau);
      q1.begin(1);
    }
    load(student, i, n, ahead);
    if (!again) stats[0] = q.m, stats[1] = q.inverse, stats[2] = labeled ? q1.inverse : A(1);
  }
  // The same where both have begun.
  AMTML_INLINE void load(const Matrix& student, int64_t i, int64_t n, const Ahead& ahead) {
    for (int64_t k = 0, first = 0; first < n; ++k, first += kChunk) {
      const int64_t count = std::min(kChunk, n - first);
      const A* part = load_part(student, i, first, count, converted.data() + first);
      if (k == 0) q.x = part;
      q.add(k, part, count, ahead.from(first));
      if (labeled) q1.add(k, part, count, q);
    }
    q.end(true);
    if (labeled) q1.end(true);
  }
};

// -(1 - s) log q1_y - s / C sum_c log q1_c
template <class A>
AMTML_INLINE double cross_entropy(const StudentRow<A>& row, int64_t n, int64_t label, double smoothing) {
  const A *z = row.q.x, m = row.q.m;
  const double log_sum = row.q1.exact_log_sum();
  const double label_term = log_sum - (z[label] - m);
  if (smoothing == 0) return label_term;  // not 0 * infinity
  const double below = block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) { return m - z[c]; });
  return (1 - smoothing) * label_term + smoothing * (log_sum + below / static_cast<double>(n));
}

// --- sums of exponentials in double

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// top + log: a difference to it keeps the digits that large logits would take.
struct LogSum {
  double top = 0, log = 0;
  double above(double other) const { return (top - other) + log; }
  double of(double x) const { return (x - top) - log; }  // x less this
};

inline double log_of_sum(const double* x, int64_t n) {  // of exp(x)
  double top = -kInfinity, sum = 0;
  for (int64_t j = 0; j < n; ++j) top = x[j] > top ? x[j] : top;
  if (std::isinf(top)) return std::any_of(x, x + n, [](double v) { return v != v; }) ? top - top : top;
  for (int64_t j = 0; j < n; ++j) sum += std::exp(x[j] - top);
  return top + std::log(sum);
}

// --- reductions over rows

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

// The classes [N, K] that teachers name, in rows that count; `none` stands for no class.
inline void check_indices(const char* op, const Tensor& indices, const std::optional<Tensor>& labels, int64_t classes,
                          int64_t ignore_index, std::optional<int64_t> none = std::nullopt) {
  const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
  const int64_t* y = labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr;
  const int64_t rows = indices.size(0), each = indices.size(1);
  for (int64_t i = 0; i < rows; ++i) {
    if (y && y[i] == ignore_index) continue;
    for (int64_t j = i * each; j < (i + 1) * each; ++j) {
      STD_TORCH_CHECK((index[j] >= 0 && index[j] < classes) || index[j] == none, op,
                      ": teacher_indices must be in [0, ", classes, "), got ", index[j], " in row ", i);
    }
  }
}

// The caller's weights [N, T], in rows that count.
inline void check_weights(const char* op, const Tensor& weights, const std::optional<Tensor>& labels,
                          int64_t ignore_index) {
  if (weights.dim() != 2) return;
  const Matrix m(weights);
  const bool expanded = m.row_stride == 0;
  const int64_t teachers = weights.size(1), rows = expanded ? std::min<int64_t>(weights.size(0), 1) : weights.size(0);
  const int64_t* y = labels && !expanded ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr;
  dispatch(m.dtype, op, [&](auto zero) {
    const auto* data = static_cast<const decltype(zero)*>(m.data);
    for (int64_t i = 0; i < rows; ++i) {
      if (y && y[i] == ignore_index) continue;
      for (int64_t t = 0; t < teachers; ++t) {
        const double w = static_cast<double>(data[i * m.row_stride + t * m.column_stride]);
        STD_TORCH_CHECK(w >= 0 && w < std::numeric_limits<double>::infinity(), op,
                        ": teacher_weights must be finite and not negative, got ", w);
      }
    }
  });
}

}  // namespace amtml
