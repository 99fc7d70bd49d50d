// Dual softmax of score matrices [B, R, K]: over R (columns), then over K (rows).
//
//   sequential: a = softmax_R(x), y = softmax_K(a)     dx = a (da - sum_R da a),  da = y (g - sum_K g y)
//   product:    y = softmax_R(x) softmax_K(x)          dx = 2 g y - a sum_R g y - b sum_K g y
//
// Columns are reduced in blocks of neighbors, so that vectors run along memory in both phases.
#include "shares.h"

namespace amtml {
namespace {

constexpr char kOp[] = "dual_softmax";
// Most columns that one task reduces together: their sums stay in the first-level cache.
constexpr int64_t kColumns = 1024;

struct Sizes {
  int64_t batch, rows, columns;
  // Of a task the columns, so many that each thread has a task, for memory is read best along whole rows; and the
  // tasks.
  int64_t width, blocks;

  explicit Sizes(const Tensor& t) : batch(t.size(0)), rows(t.size(1)), columns(t.size(2)) {
    const int64_t count = std::max<int64_t>(batch, 1), threads = (torch::stable::get_num_threads() + count - 1) / count;
    width = std::min(std::max<int64_t>(padded(columns / threads, 16), 128), kColumns);
    blocks = (columns + width - 1) / width;
  }
};

// Calls body(batch, first column, end column) for blocks of columns.
template <class F>
void for_columns(const Sizes& s, const F& body) {
  in_shares(s.batch * s.blocks, s.rows * s.width, [&](Shares& next) {
    vectorized([&] AMTML_BODY() {
      for (Share share; next(share);) {
        for (int64_t i = share.begin; i < share.end; ++i) {
          const int64_t first = i % s.blocks * s.width;
          body(i / s.blocks, first, std::min(first + s.width, s.columns));
        }
      }
    });
  });
}

// Calls body(first row, end row, scratch for a row), the rows of all batches.
template <class A, class F>
void for_rows(const Sizes& s, const F& body) {
  in_shares(s.batch * s.rows, s.columns, [&](Shares& next) {
    Buffer<A> scratch(s.columns);
    vectorized([&] AMTML_BODY() {
      for (Share share; next(share);) body(share.begin, share.end, scratch.data());
    });
  });
}

template <class A>
AMTML_INLINE A row_max(const A* x, int64_t n) {
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t k = 0; k < n; ++k) m = x[k] > m ? x[k] : m;
  return m;
}

template <class A>
void forward(const Sizes& size, bool sequential, const Source& x, const Target& y, A* softmax, A* row) {
  Buffer<A> column_max(size.batch * size.columns), column_sum(size.batch * size.columns);
  for_columns(size, [&] AMTML_BODY(int64_t b, int64_t begin, int64_t end) {
    const int64_t count = end - begin;
    A *m = &column_max[b * size.columns + begin], *sum = &column_sum[b * size.columns + begin];
    std::fill_n(m, count, -std::numeric_limits<A>::infinity());
    std::fill_n(sum, count, A(0));
    const int64_t start = b * size.rows * size.columns + begin, stop = start + size.rows * size.columns;
    for (int64_t at = start; at < stop; at += size.columns) {
      const A* v = x.read(at, count, softmax + at);  // where the exponentials will be
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) m[k] = v[k] > m[k] ? v[k] : m[k];
    }
    const bool in_place = x.dtype == dtype_of<A>;
    for (int64_t at = start; at < stop; at += size.columns) {
      const A* v = in_place ? reinterpret_cast<const A*>(x.data) + at : softmax + at;
      A* e = softmax + at;
#pragma omp simd
      for (int64_t k = 0; k < count; ++k) {
        e[k] = exp_nonpositive(v[k] - m[k]);
        sum[k] += e[k];
      }
    }
    for (int64_t k = 0; k < count; ++k) sum[k] = 1 / sum[k];  // a division takes as long as half an exponential
  });
  for_rows<A>(size, [&] AMTML_BODY(int64_t begin, int64_t end, A* scratch) {
    for (int64_t i = begin; i < end; ++i) {
      const A* inverse = &column_sum[i / size.rows * size.columns];
      A *a = softmax + i * size.columns, *e = scratch;
#pragma omp simd
      for (int64_t k = 0; k < size.columns; ++k) a[k] *= inverse[k];
      const A* v = sequential ? a : x.read(i * size.columns, size.columns, e);
      const A highest = row_max(v, size.columns);
      const A total = static_cast<A>(block_sum<A>(size.columns, [&](int64_t k) __attribute__((always_inline)) {
        return e[k] = exp_nonpositive(v[k] - highest);
      }));
      const A by = 1 / total;
      row[2 * i] = highest;
      row[2 * i + 1] = total;
      A* made = y.place(i * size.columns, e);
      if (sequential) {
#pragma omp simd
        for (int64_t k = 0; k < size.columns; ++k) made[k] = e[k] * by;
      } else {
#pragma omp simd
        for (int64_t k = 0; k < size.columns; ++k) made[k] = e[k] * by * a[k];
      }
      y.write(i * size.columns, size.columns, made);
    }
  });
}

// softmax and row are what forward made.
template <class A>
void backward(const Sizes& size, bool sequential, const A* g, const Source& x, const A* softmax, const A* row,
              const Target& dx) {
  const int64_t numel = size.batch * size.rows * size.columns;
  // Where the column sums start from: da (sequential), or g y and the part of dx that is already whole (product). da
  // lies where dx will.
  Buffer<A> apart(dx.in_place<A>() ? 0 : numel), rest(sequential ? 0 : numel);
  A* const weighted = dx.place(0, apart.data());
  for_rows<A>(size, [&] AMTML_BODY(int64_t begin, int64_t end, A* scratch) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = i * size.columns;
      const A highest = row[2 * i], by = 1 / row[2 * i + 1], *a = softmax + at, *up = g + at;
      A *e = scratch, *d = weighted + at;
      if (sequential) {
        const A inner = static_cast<A>(block_sum<A>(size.columns, [&](int64_t k) __attribute__((always_inline)) {
          e[k] = exp_nonpositive(a[k] - highest) * by;
          return up[k] * e[k];
        }));
#pragma omp simd
        for (int64_t k = 0; k < size.columns; ++k) d[k] = e[k] * (up[k] - inner);
      } else {
        const A* v = x.read(at, size.columns, e);
        const A inner = static_cast<A>(block_sum<A>(size.columns, [&](int64_t k) __attribute__((always_inline)) {
          e[k] = exp_nonpositive(v[k] - highest) * by;
          return up[k] * e[k] * a[k];
        }));
        A* whole = rest.data() + at;
#pragma omp simd
        for (int64_t k = 0; k < size.columns; ++k) {
          d[k] = up[k] * e[k] * a[k];
          whole[k] = 2 * d[k] - e[k] * inner;
        }
      }
    }
  });
  for_columns(size, [&] AMTML_BODY(int64_t b, int64_t begin, int64_t end) {
    const int64_t count = end - begin, start = b * size.rows * size.columns + begin;
    const int64_t stop = start + size.rows * size.columns;
    A totals[kColumns] = {};
    for (int64_t at = start; at < stop; at += size.columns) {
      const A *d = weighted + at, *a = softmax + at;
      if (sequential) {
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) totals[k] += d[k] * a[k];
      } else {
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) totals[k] += d[k];
      }
    }
    for (int64_t at = start; at < stop; at += size.columns) {
      const A *d = weighted + at, *a = softmax + at;
      A* made = weighted + at;
      if (sequential) {
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) made[k] = a[k] * (d[k] - totals[k]);
      } else {
        const A* whole = rest.data() + at;
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) made[k] = whole[k] - a[k] * totals[k];
      }
      dx.write(at, count, made);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> dual_softmax_fwd(const Tensor& scores, std::string mode) {
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
                        std::string mode) {
  STD_TORCH_CHECK(scores.dim() == 3, kOp, ": scores must be [B, R, K]");
  const Tensor input = dense(scores);
  const Sizes size(input);
  check_shape(kOp, "grad", grad, {size.batch, size.rows, size.columns});
  check_shape(kOp, "first", first, {size.batch, size.rows, size.columns});
  check_shape(kOp, "row_stats", row_stats, {size.batch, size.rows, 2});
  const ScalarType wide = wide_dtype(input.scalar_type());
  const Tensor incoming = dense(grad, wide);
  const Tensor grad_scores = empty(input, {size.batch, size.rows, size.columns}, input.scalar_type());
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    backward(size, mode == "sequential", static_cast<const A*>(incoming.const_data_ptr()), Source(input),
             static_cast<const A*>(first.const_data_ptr()), static_cast<const A*>(row_stats.const_data_ptr()),
             Target(grad_scores));
  });
  return grad_scores;
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("dual_softmax_fwd", TORCH_BOX(&dual_softmax_fwd));
  m.impl("dual_softmax_bwd", TORCH_BOX(&dual_softmax_bwd));
}

}  // namespace
}  // namespace amtml
