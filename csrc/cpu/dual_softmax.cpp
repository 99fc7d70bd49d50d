// Dual softmax of score matrices [B, R, K]: over R (columns), then over K (rows).
//
//   sequential: a = softmax_R(x), y = softmax_K(a)     dx = a (da - sum_R da a),  da = y (g - sum_K g y)
//   product:    y = softmax_R(x) softmax_K(x)          dx = 2 g y - a sum_R g y - b sum_K g y
//
// Every pass goes along rows, and a thread has the same rows in all of them, so that it finds them in its cache. What a
// column needs of all rows (its maximum, its sums) is made of parts, one for each group of rows: groups follow from the
// sizes alone, and with them every number.
#include "../arithmetic.h"
#include "shares.h"

namespace amtml {
namespace {

constexpr char kOp[] = "dual_softmax";
constexpr int64_t kGroups = 32;     // of rows, about, in all matrices together
constexpr int64_t kColumns = 2048;  // of a part at a time: they stay in the first-level cache

struct Sizes {
  int64_t batch, rows, columns;
  int64_t height, groups;  // rows of a group, groups of a matrix

  explicit Sizes(const Tensor& t) : batch(t.size(0)), rows(t.size(1)), columns(t.size(2)) {
    const int64_t wanted = std::max<int64_t>(kGroups / std::max<int64_t>(batch, 1), 1);
    height = std::max<int64_t>((rows + wanted - 1) / wanted, 1);
    groups = std::max<int64_t>((rows + height - 1) / height, 1);  // one without rows where there are none
  }
};

// Calls body(matrix, group of all matrices, first row, end row, scratch for a row), the rows of all matrices.
template <class A, class F>
void for_groups(const Sizes& s, const F& body) {
  in_shares(s.batch * s.groups, s.height * s.columns, [&](Shares& next) {
    Buffer<A> scratch(s.columns);
    vectorized([&] AMTML_BODY() {
      for (Share share; next(share);) {
        for (int64_t i = share.begin; i < share.end; ++i) {
          const int64_t b = i / s.groups, first = i % s.groups * s.height;
          body(b, i, b * s.rows + first, b * s.rows + std::min(first + s.height, s.rows), scratch.data());
        }
      }
    });
  });
}

// Calls body(first column, columns) for neighbors of a row.
template <class F>
AMTML_INLINE void for_columns(const Sizes& s, const F& body) {
  for (int64_t first = 0; first < s.columns; first += kColumns) body(first, std::min(kColumns, s.columns - first));
}

// Calls body(into, part, columns) for the parts [B, groups, K], one after the other, of each column: into [B, K], which
// starts as the first part.
template <class A, class F>
void combine(const Sizes& s, const Buffer<A>& parts, Buffer<A>& into, const F& body) {
  in_shares(s.batch * s.columns, s.groups, [&](Shares& next) {
    vectorized([&] AMTML_BODY() {
      for (Share share; next(share);) {
        for (int64_t i = share.begin; i < share.end;) {
          const int64_t b = i / s.columns, k = i % s.columns, count = std::min(share.end - i, s.columns - k);
          const A* part = parts.data() + b * s.groups * s.columns + k;
          std::copy_n(part, count, &into[i]);
          for (int64_t g = 1; g < s.groups; ++g) body(&into[i], part + g * s.columns, count);
          i += count;
        }
      }
    });
  });
}

template <class A>
AMTML_INLINE void take_sums(A* into, const A* part, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) into[k] += part[k];
}

template <class A>
AMTML_INLINE void take_maxima(A* into, const A* part, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) into[k] = part[k] > into[k] ? part[k] : into[k];
}

// exp(x) for 0 <= x <= 1, to 1 ulp; NaN stays NaN.
AMTML_INLINE float exp_of_share(float x) {
  float p = 3.1678448431e-4f;
  p = p * x + 1.2015976245e-3f;
  p = p * x + 8.4765283391e-3f;
  p = p * x + 4.1610289365e-2f;
  p = p * x + 1.6667737067e-1f;
  p = p * x + 4.9999925494e-1f;
  return p * (x * x) + x + 1.0f;
}
AMTML_INLINE double exp_of_share(double x) { return std::exp(x); }

// One of the matrices [B, R, K].
Matrix matrix_of(const Tensor& t, int64_t b) {
  Matrix m;
  m.dtype = t.scalar_type();
  m.data = static_cast<const char*>(t.const_data_ptr()) + b * t.stride(0) * bytes_of(m.dtype);
  m.row_stride = t.stride(1), m.column_stride = t.stride(2);
  return m;
}

// softmax: [B, R, K], for the softmax over R. row: of each row the maximum and the sum of its softmax over K; that of
// shares, in sequential mode, needs no maximum.
template <class A>
void forward(const Sizes& size, bool sequential, const Source& x, const Target& y, A* softmax, A* row) {
  const int64_t columns = size.columns;
  const bool in_place = x.dtype == dtype_of<A>;
  Buffer<A> parts(size.batch * size.groups * columns), highest(size.batch * columns), inverse(size.batch * columns);
  for_groups<A>(size, [&] AMTML_BODY(int64_t, int64_t group, int64_t begin, int64_t end, A*) {
    for_columns(size, [&] AMTML_BODY(int64_t first, int64_t count) {
      A* m = &parts[group * columns + first];
      std::fill_n(m, count, -std::numeric_limits<A>::infinity());
      for (int64_t at = begin * columns + first; at < end * columns; at += columns) {
        take_maxima(m, x.read(at, count, softmax + at), count);  // converted to where the exponentials will be
      }
    });
  });
  combine(size, parts, highest, [&] AMTML_BODY(A* m, const A* part, int64_t n) { take_maxima(m, part, n); });
  for_groups<A>(size, [&] AMTML_BODY(int64_t b, int64_t group, int64_t begin, int64_t end, A*) {
    for_columns(size, [&] AMTML_BODY(int64_t first, int64_t count) {
      const A* m = &highest[b * columns + first];
      A* sum = &parts[group * columns + first];
      std::fill_n(sum, count, A(0));
      for (int64_t at = begin * columns + first; at < end * columns; at += columns) {
        const A* v = in_place ? reinterpret_cast<const A*>(x.data) + at : softmax + at;
        A* e = softmax + at;
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) {
          e[k] = exp_nonpositive(v[k] - m[k]);
          sum[k] += e[k];
        }
      }
    });
  });
  combine(size, parts, inverse, [&] AMTML_BODY(A* sum, const A* part, int64_t n) { take_sums(sum, part, n); });
  for (int64_t k = 0; k < size.batch * columns; ++k) inverse[k] = 1 / inverse[k];
  for_groups<A>(size, [&] AMTML_BODY(int64_t b, int64_t, int64_t begin, int64_t end, A* e) {
    const A* by_column = &inverse[b * columns];
    for (int64_t i = begin; i < end; ++i) {
      A *a = softmax + i * columns, *made = y.place(i * columns, e);
      if (sequential) {
        row[2 * i] = 0;
        row[2 * i + 1] = static_cast<A>(block_sum<A>(columns, [&](int64_t k) __attribute__((always_inline)) {
          a[k] *= by_column[k];
          return e[k] = exp_of_share(a[k]);
        }));
        const A by = 1 / row[2 * i + 1];
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) made[k] = e[k] * by;
      } else {
        const A* v = x.read(i * columns, columns, e);
        const A m = row[2 * i] = maximum(v, columns);
        row[2 * i + 1] = static_cast<A>(block_sum<A>(columns, [&](int64_t k) __attribute__((always_inline)) {
          a[k] *= by_column[k];
          return e[k] = exp_nonpositive(v[k] - m);
        }));
        const A by = 1 / row[2 * i + 1];
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) made[k] = e[k] * by * a[k];
      }
      y.write(i * columns, columns, made);
    }
  });
}

// softmax and row are what forward made. Where dx will be lies first da (sequential), or what is whole already of dx.
template <class A>
void backward(const Sizes& size, bool sequential, const Tensor& grad, const Source& x, const A* softmax, const A* row,
              const Target& dx) {
  const int64_t columns = size.columns, numel = size.batch * size.rows * columns;
  Buffer<A> parts(size.batch * size.groups * columns), totals(size.batch * columns),
      apart(dx.in_place<A>() ? 0 : numel);
  A* const place = dx.place(0, apart.data());
  for_groups<A>(size, [&] AMTML_BODY(int64_t b, int64_t group, int64_t begin, int64_t end, A* e) {
    const Matrix g = matrix_of(grad, b);
    Buffer<A> converted(g.in_place<A>() ? 0 : columns);
    A* total = &parts[group * columns];
    std::fill_n(total, columns, A(0));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * columns;
      const A *up = load_row(g, i - b * size.rows, columns, converted.data()), *a = softmax + at;
      const A m = row[2 * i], by = 1 / row[2 * i + 1];
      A* d = place + at;
      if (sequential) {
        const A inner = static_cast<A>(block_sum<A>(columns, [&](int64_t k) __attribute__((always_inline)) {
          e[k] = exp_of_share(a[k]) * by;
          return up[k] * e[k];
        }));
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) {
          d[k] = softmax_gradient(e[k], up[k], inner);
          total[k] += d[k] * a[k];
        }
      } else {
        const A* v = x.read(at, columns, e);
        const A inner = static_cast<A>(block_sum<A>(columns, [&](int64_t k) __attribute__((always_inline)) {
          e[k] = exp_nonpositive(v[k] - m) * by;
          return up[k] * e[k] * a[k];
        }));
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) {
          const A weighted = up[k] * e[k] * a[k];
          total[k] += weighted;
          d[k] = 2 * weighted - e[k] * inner;
        }
      }
    }
  });
  combine(size, parts, totals, [&] AMTML_BODY(A* sum, const A* part, int64_t n) { take_sums(sum, part, n); });
  for_groups<A>(size, [&] AMTML_BODY(int64_t b, int64_t, int64_t begin, int64_t end, A*) {
    const A* total = &totals[b * columns];
    for (int64_t at = begin * columns; at < end * columns; at += columns) {
      const A* a = softmax + at;
      A* made = place + at;
      if (sequential) {
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) made[k] = softmax_gradient(a[k], made[k], total[k]);
      } else {
#pragma omp simd
        for (int64_t k = 0; k < columns; ++k) made[k] = made[k] - a[k] * total[k];
      }
      dx.write(at, columns, made);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> dual_softmax_fwd(const Tensor& scores, Name mode) {
  STD_TORCH_CHECK(scores.dim() == 3, kOp, ": scores must be [B, R, K]");
  const Tensor input = dense(scores);
  const Sizes size(input);
  const ScalarType wide = wide_dtype(input.scalar_type());
  const Shape shape = {size.batch, size.rows, size.columns};
  const Tensor out = empty(input, shape, input.scalar_type()), first = empty(input, shape, wide);
  const Tensor row_stats = empty(input, {size.batch, size.rows, 2}, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    forward(size, mode == "sequential", Source(input), Target(out), static_cast<A*>(first.mutable_data_ptr()),
            static_cast<A*>(row_stats.mutable_data_ptr()));
  });
  return {out, first, row_stats};
}

Tensor dual_softmax_bwd(const Tensor& grad, const Tensor& scores, const Tensor& first, const Tensor& row_stats,
                        Name mode) {
  STD_TORCH_CHECK(scores.dim() == 3, kOp, ": scores must be [B, R, K]");
  const Tensor input = dense(scores);
  const Sizes size(input);
  check_shape(kOp, "grad", grad, {size.batch, size.rows, size.columns});
  check_shape(kOp, "first", first, {size.batch, size.rows, size.columns});
  check_shape(kOp, "row_stats", row_stats, {size.batch, size.rows, 2});
  const ScalarType wide = wide_dtype(input.scalar_type());
  const Tensor grad_scores = empty(input, {size.batch, size.rows, size.columns}, input.scalar_type());
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    backward(size, mode == "sequential", grad, Source(input), static_cast<const A*>(first.const_data_ptr()),
             static_cast<const A*>(row_stats.const_data_ptr()), Target(grad_scores));
  });
  return grad_scores;
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("dual_softmax_fwd", TORCH_BOX(&dual_softmax_fwd));
  m.impl("dual_softmax_bwd", TORCH_BOX(&dual_softmax_bwd));
}

}  // namespace
}  // namespace amtml
