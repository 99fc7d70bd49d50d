// Rows of few classes: 16 at once, each in a lane of its own. A row at a time, most of the time would go into the ends
// of vectors, and into what a row costs besides its classes. In float32.
#pragma once

#include "kd_rows.h"

namespace amtml {

constexpr int64_t kFew = 63;  // classes at most: of more, a row fills vectors, and 16 rows the first-level cache
constexpr int kRows = 16;

// f(l) for each of the rows.
template <class F>
AMTML_INLINE void each_row(const F& f) {
#pragma omp simd
  for (int l = 0; l < kRows; ++l) f(l);
}

// A number of each row.
template <class T>
struct Each {
  alignas(64) T of[kRows];

  AMTML_INLINE T& operator[](int l) { return of[l]; }
  AMTML_INLINE T operator[](int l) const { return of[l]; }
  AMTML_INLINE void fill(T value) { std::fill_n(of, kRows, value); }
};

// The sum of term(c, l) over the classes c, of each row l.
template <class F>
AMTML_INLINE void sum_classes(int64_t classes, Each<double>& sum, const F& term) {
  using Total = Lanes<double, kRows, 2>;
  Total total = Total::all(0);
  for (int64_t c = 0; c < classes; ++c) {
    Each<float> terms;
    each_row([&](int l) __attribute__((always_inline)) { terms[l] = term(c, l); });
    using Part = Vector<float, kRows / 2>;
    for (int p = 0; p < 2; ++p) {
      total.part[p] += __builtin_convertvector(Part::load(terms.of + p * kRows / 2), Total::V::type);
    }
  }
  for (int p = 0; p < 2; ++p) Total::V::store(sum.of + p * kRows / 2, total.part[p]);
}

// Classes of the rows, class after class: class c of row l is at [c * kRows + l].
struct Columns : Buffer<float> {
  explicit Columns(int64_t classes) : Buffer<float>(classes * kRows) {}
  AMTML_INLINE float* at(int64_t c) { return data() + c * kRows; }
  AMTML_INLINE const float* at(int64_t c) const { return data() + c * kRows; }
};

// Which rows of the matrices are at hand. The last ones may be fewer than there are lanes: the others repeat the last.
struct Group {
  int64_t first;
  int count;
  int64_t row(int l) const { return first + std::min(l, count - 1); }
};

// 4 x 4 numbers, whose rows become columns.
AMTML_INLINE void transpose_4x4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  using V = Vector<float, 4>;
  const V::type a = V::load(from), b = V::load(from + from_stride), c = V::load(from + 2 * from_stride),
                d = V::load(from + 3 * from_stride);
#ifdef __clang__
#define AMTML_SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
  typedef int Places __attribute__((vector_size(16)));
#define AMTML_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, Places{__VA_ARGS__})
#endif
  const V::type ab = AMTML_SHUFFLE(a, b, 0, 4, 1, 5), cd = AMTML_SHUFFLE(c, d, 0, 4, 1, 5);
  const V::type ab2 = AMTML_SHUFFLE(a, b, 2, 6, 3, 7), cd2 = AMTML_SHUFFLE(c, d, 2, 6, 3, 7);
  V::store(to, AMTML_SHUFFLE(ab, cd, 0, 1, 4, 5));
  V::store(to + to_stride, AMTML_SHUFFLE(ab, cd, 2, 3, 6, 7));
  V::store(to + 2 * to_stride, AMTML_SHUFFLE(ab2, cd2, 0, 1, 4, 5));
  V::store(to + 3 * to_stride, AMTML_SHUFFLE(ab2, cd2, 2, 3, 6, 7));
#undef AMTML_SHUFFLE
}

// The same of more: `to` has a row for each of the columns. (The last four are taken from the end: some are taken
// twice.)
AMTML_INLINE void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                            int64_t to_stride) {
  if (rows < 4 || columns < 4) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = from[i * from_stride + j];
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += 4) {
    const int64_t row = std::min(i, rows - 4);
    for (int64_t j = 0; j < columns; j += 4) {
      const int64_t column = std::min(j, columns - 4);
      transpose_4x4(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
    }
  }
}

// The group's rows of a matrix of any dtype, as columns. scratch: of as many numbers.
AMTML_INLINE void load_columns(const Matrix& m, const Group& group, int64_t classes, float* scratch, Columns& to) {
  const bool full = group.count == kRows;
  if (full && m.row_stride == 1) {  // pixels of one map: they lie as columns
    for (int64_t c = 0; c < classes; ++c) {
      const int64_t at = group.first + c * m.column_stride;
      widen(static_cast<const char*>(m.data) + at * bytes_of(m.dtype), m.dtype, 1, kRows, to.at(c));
    }
    return;
  }
  if (full && m.in_place<float>()) {
    transpose(load_row(m, group.first, classes, scratch), m.row_stride, kRows, classes, to.data(), kRows);
    return;
  }
  if (full && m.column_stride == 1 && m.row_stride == classes) {  // one row after another
    load_row(m, group.first, classes * kRows, scratch);
  } else {
    for (int l = 0; l < kRows; ++l) {
      const float* row = load_row(m, group.row(l), classes, scratch + l * classes);
      if (row != scratch + l * classes) std::copy_n(row, classes, scratch + l * classes);
    }
  }
  transpose(scratch, classes, kRows, classes, to.data(), kRows);
}

// And back to their place in `to`: what was made of rows that count, zeros for the others.
AMTML_INLINE void store_columns(const Columns& from, const Group& group, const Each<bool>& on, int64_t classes,
                                float* scratch, const Target& to) {
  const int64_t first = group.first * classes;
  float* rows = group.count == kRows ? to.place(first, scratch) : scratch;
  transpose(from.data(), kRows, classes, kRows, rows, classes);
  for (int l = 0; l < kRows; ++l) {
    if (!on[l]) std::fill_n(rows + l * classes, classes, 0.0f);
  }
  if (rows == scratch && to.in_place<float>()) {
    std::copy_n(rows, group.count * classes, to.place(first, scratch));
  } else {
    to.write(first, group.count * classes, rows);
  }
}

// log(x) of normal x > 0, to 1 ulp; NaN stays NaN. fdlibm's log, in plain arithmetic: a library's takes a call a
// number.
AMTML_INLINE double log_normal(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  const uint64_t of_exponent = bits >> 52 | 0x4330000000000000,
                 of_mantissa = (bits & 0xfffffffffffff) | 0x3ff0000000000000;
  double e, m;
  std::memcpy(&e, &of_exponent, 8);  // 2^52 and the exponent with its bias
  std::memcpy(&m, &of_mantissa, 8);  // [1, 2)
  const bool high = m > 1.41421356237309505;
  e = (e - 4503599627371519.0) + (high ? 1.0 : 0.0);
  m *= high ? 0.5 : 1.0;
  const double f = m - 1, s = f / (2 + f), z = s * s, half = 0.5 * f * f;
  double p = 1.479819860511658591e-01;
  p = p * z + 1.531383769920937332e-01;
  p = p * z + 1.818357216161805012e-01;
  p = p * z + 2.222219843214978396e-01;
  p = p * z + 2.857142874366239149e-01;
  p = p * z + 3.999999999940941908e-01;
  p = p * z + 6.666666666666735130e-01;
  const double tail = s * (half + p * z) + e * 1.90821492927058770002e-10;
  const double r = e * 6.93147180369123816490e-01 - ((half - tail) - f);
  return x == x ? r : x;
}

// Softmax<float> of a group's rows, in one chunk: e = 2^kScale exp((x - m) / tau), and e inverse is the probability.
struct FewSoftmax {
  Columns e;
  Each<float> per_tau, m, inverse, log_sum;
  Each<double> sum, rest;  // of e; what rounding log_sum cut off

  explicit FewSoftmax(int64_t classes) : e(classes) {}

  // Of these logits, at the rows' temperatures in per_tau.
  AMTML_INLINE void make(const Columns& x, int64_t classes) {
    find_maximum(x, classes);
    raise(x, classes);
  }
  AMTML_INLINE void find_maximum(const Columns& x, int64_t classes) {
    using Most = Lanes<float, kRows, 2>;
    Most found = Most::all(-std::numeric_limits<float>::infinity());
    for (int64_t c = 0; c < classes; ++c) found = most(Most::load(x.at(c)), found);  // NaN left out
    for (int p = 0; p < 2; ++p) Most::V::store(m.of + p * kRows / 2, found.part[p]);
  }
  // The same at temperature 1 of the logits that another softmax has at tau: its power tau, if that is 1, 2 or 4. (0
  // where rows have their own: none is to depend on its neighbors'.)
  AMTML_INLINE void make(const Columns& x, int64_t classes, const FewSoftmax& at_tau, double tau) {
    static_assert(kScale == 24);  // 2^kScale is not to be raised
    m = at_tau.m;
    per_tau.fill(1);
    if (tau != 1 && tau != 2 && tau != 4) return raise(x, classes);
    const int power = static_cast<int>(tau);
    const float scale = power == 4 ? 1.0f / (1 << 18) : 1.0f / (1 << 12);
    sum_classes(classes, sum, [&](int64_t c, int l) __attribute__((always_inline)) {
      const float from = at_tau.e.at(c)[l], y = from * scale, square = y * y;
      return e.at(c)[l] = power == 4 ? square * square : power == 2 ? square : from;
    });
    invert();
  }
  AMTML_INLINE void take_logarithms() {
    Each<double> log;
    each_row([&](int l) __attribute__((always_inline)) { log[l] = log_normal(sum[l]) - kLogScale; });
    for (int l = 0; l < kRows; ++l) log_sum[l] = rounded<float>(log[l], &rest.of[l]);
  }
  AMTML_INLINE bool finite(int l) const { return std::abs(inverse[l]) < std::numeric_limits<float>::infinity(); }
  AMTML_INLINE double exact_log_sum(int l) const { return static_cast<double>(log_sum[l]) + rest[l]; }

  // Makes every probability of these rows 0.
  AMTML_INLINE void clear(const Each<bool>& rows, int64_t classes) {
    for (int64_t c = 0; c < classes; ++c) {
      float* to = e.at(c);
      for (int l = 0; l < kRows; ++l) to[l] = rows[l] ? 0.0f : to[l];
    }
    for (int l = 0; l < kRows; ++l) {
      if (rows[l]) inverse[l] = 0, rest[l] = 0;
    }
  }

 private:
  AMTML_INLINE void raise(const Columns& x, int64_t classes) {
    Each<float> top;
    each_row([&](int l) __attribute__((always_inline)) {
      top[l] = m[l] == -std::numeric_limits<float>::infinity() ? 0.0f : m[l];
    });
    sum_classes(classes, sum, [&](int64_t c, int l) __attribute__((always_inline)) {
      return e.at(c)[l] = exp_nonpositive<kScale>((x.at(c)[l] - top[l]) * per_tau[l]);
    });
    invert();
  }
  AMTML_INLINE void invert() {
    each_row([&](int l) __attribute__((always_inline)) {
      const double none = std::numeric_limits<double>::quiet_NaN();
      sum[l] = m[l] == -std::numeric_limits<float>::infinity() ? none : sum[l];
      inverse[l] = static_cast<float>(1 / sum[l]);
    });
  }
};

// -(1 - s) log q1_y - s / C sum_c log q1_c, of the labels y.
AMTML_INLINE void cross_entropy(const Columns& z, const FewSoftmax& q1, const Each<int64_t>& label, int64_t classes,
                                double smoothing, Each<double>& out) {
  Each<double> below;
  if (smoothing != 0) {
    sum_classes(classes, below, [&](int64_t c, int l) __attribute__((always_inline)) { return q1.m[l] - z.at(c)[l]; });
  }
  for (int l = 0; l < kRows; ++l) {
    const double log_sum = q1.exact_log_sum(l), label_term = log_sum - (z.at(label[l])[l] - q1.m[l]);
    out[l] = smoothing == 0 ? label_term : (1 - smoothing) * label_term + smoothing * (log_sum + below[l] / classes);
  }
}

}  // namespace amtml
