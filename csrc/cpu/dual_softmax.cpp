// Dual softmax of score matrices [B, R, K]: over R (columns), then over K (rows).
//
//   sequential: a = softmax_R(x), y = softmax_K(a)     dx = a (da - sum_R da a),  da = y (g - sum_K g y)
//   product:    y = softmax_R(x) softmax_K(x)          dx = 2 g y - a sum_R g y - b sum_K g y
//
// Columns are reduced in blocks of neighbours, so that vectors run along memory in both phases.
#include "simd.h"

namespace amtml {
namespace {

constexpr char kOp[] = "dual_softmax";
constexpr int64_t kColumns = 128;  // columns that one task reduces together

struct Sizes {
  int64_t batch, rows, columns, blocks;
  explicit Sizes(const Tensor& t)
      : batch(t.size(0)), rows(t.size(1)), columns(t.size(2)), blocks((t.size(2) + kColumns - 1) / kColumns) {}
};

// Calls body(batch, first column, end column) for blocks of columns.
template <class F>
void for_columns(const Sizes& s, const F& body) {
  torch::stable::parallel_for(0, s.batch * s.blocks, grain(s.rows * kColumns), [&](int64_t begin, int64_t end) {
    vectorized([&] AMTML_BODY() {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % s.blocks * kColumns;
        body(i / s.blocks, first, std::min(first + kColumns, s.columns));
      }
    });
  });
}

// Calls body(std::true_type{}) for "sequential", body(std::false_type{}) for "product": no branch is left in the loops.
template <class F>
void for_mode(const std::string& mode, const F& body) {
  if (mode == "sequential") {
    body(std::true_type{});
  } else {
    body(std::false_type{});
  }
}

template <class A, class T>
AMTML_INLINE A row_max(const T* x, int64_t n) {
  A m = -std::numeric_limits<A>::infinity();
#pragma omp simd reduction(max : m)
  for (int64_t k = 0; k < n; ++k) m = static_cast<A>(x[k]) > m ? static_cast<A>(x[k]) : m;
  return m;
}

std::tuple<Tensor, Tensor, Tensor> dual_softmax_fwd(const Tensor& scores, std::string mode) {
  STD_TORCH_CHECK(scores.dim() == 3, kOp, ": scores must be [B, R, K]");
  const Tensor input = dense(scores);
  const Sizes size(input);
  const ScalarType wide = wide_dtype(input.scalar_type());
  const Shape shape = {size.batch, size.rows, size.columns};
  Tensor out = empty(input, shape, input.scalar_type()), first = empty(input, shape, wide);
  Tensor row_stats = empty(input, {size.batch, size.rows, 2}, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    Buffer<A> column_max(size.batch * size.columns), column_sum(size.batch * size.columns);
    for_mode(mode, [&](auto is_sequential) {
      dispatch(input.scalar_type(), kOp, [&](auto element) {
        constexpr bool kSequential = decltype(is_sequential)::value;
        using T = decltype(element);
        const T* x = static_cast<const T*>(input.const_data_ptr());
        T* y = static_cast<T*>(out.mutable_data_ptr());
        A *softmax = static_cast<A*>(first.mutable_data_ptr()), *row = static_cast<A*>(row_stats.mutable_data_ptr());
        for_columns(size, [&] AMTML_BODY(int64_t b, int64_t begin, int64_t end) {
          A *m = &column_max[b * size.columns], *sum = &column_sum[b * size.columns];
          std::fill(m + begin, m + end, -std::numeric_limits<A>::infinity());
          std::fill(sum + begin, sum + end, A(0));
          const int64_t start = b * size.rows * size.columns, stop = start + size.rows * size.columns;
          for (int64_t at = start; at < stop; at += size.columns) {
            const T* v = x + at;
#pragma omp simd
            for (int64_t k = begin; k < end; ++k) m[k] = static_cast<A>(v[k]) > m[k] ? static_cast<A>(v[k]) : m[k];
          }
          for (int64_t at = start; at < stop; at += size.columns) {
            const T* v = x + at;
            A* e = softmax + at;
#pragma omp simd
            for (int64_t k = begin; k < end; ++k) {
              e[k] = exp_nonpositive(static_cast<A>(v[k]) - m[k]);
              sum[k] += e[k];
            }
          }
        });
        torch::stable::parallel_for(0, size.batch * size.rows, grain(size.columns), [&](int64_t begin, int64_t end) {
          Buffer<A> scratch(size.columns);
          vectorized([&] AMTML_BODY() {
            for (int64_t i = begin; i < end; ++i) {
              const A* sum = &column_sum[i / size.rows * size.columns];
              const T* v = x + i * size.columns;
              A *a = softmax + i * size.columns, *e = scratch.data();
#pragma omp simd
              for (int64_t k = 0; k < size.columns; ++k) a[k] /= sum[k];
              const A highest = kSequential ? row_max<A>(a, size.columns) : row_max<A>(v, size.columns);
              const A total = static_cast<A>(block_sum<A>(size.columns, [&](int64_t k) __attribute__((always_inline)) {
                return e[k] = exp_nonpositive((kSequential ? a[k] : static_cast<A>(v[k])) - highest);
              }));
              row[2 * i] = highest;
              row[2 * i + 1] = total;
#pragma omp simd
              for (int64_t k = 0; k < size.columns; ++k) {
                y[i * size.columns + k] = static_cast<T>(e[k] / total * (kSequential ? A(1) : a[k]));
              }
            }
          });
        });
      });
    });
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
  const bool sequential = mode == "sequential";
  const Tensor incoming = dense(grad, wide);
  Tensor grad_scores = empty(input, {size.batch, size.rows, size.columns}, input.scalar_type());
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const A* g = static_cast<const A*>(incoming.const_data_ptr());
    const A *softmax = static_cast<const A*>(first.const_data_ptr()),
            *row = static_cast<const A*>(row_stats.const_data_ptr());
    const int64_t numel = size.batch * size.rows * size.columns;
    // Where the column sums start from: da (sequential), or g y and the part of dx that is already whole (product). da
    // lies where dx will.
    const bool in_place = dtype_of<A> == input.scalar_type();
    Buffer<A> apart(in_place ? 0 : numel), rest(sequential ? 0 : numel);
    A* weighted = in_place ? static_cast<A*>(grad_scores.mutable_data_ptr()) : apart.data();
    for_mode(mode, [&](auto is_sequential) {
      dispatch(input.scalar_type(), kOp, [&](auto element) {
        constexpr bool kSequential = decltype(is_sequential)::value;
        using T = decltype(element);
        const T* x = static_cast<const T*>(input.const_data_ptr());
        T* dx = static_cast<T*>(grad_scores.mutable_data_ptr());
        torch::stable::parallel_for(0, size.batch * size.rows, grain(size.columns), [&](int64_t begin, int64_t end) {
          Buffer<A> scratch(size.columns);
          vectorized([&] AMTML_BODY() {
            for (int64_t i = begin; i < end; ++i) {
              const int64_t at = i * size.columns;
              const A highest = row[2 * i], total = row[2 * i + 1], *a = softmax + at, *up = g + at;
              A *e = scratch.data(), *d = weighted + at, *whole = rest.data() + (kSequential ? 0 : at);
              const A inner = static_cast<A>(block_sum<A>(size.columns, [&](int64_t k) __attribute__((always_inline)) {
                e[k] = exp_nonpositive((kSequential ? a[k] : static_cast<A>(x[at + k])) - highest) / total;
                return up[k] * e[k] * (kSequential ? A(1) : a[k]);
              }));
#pragma omp simd
              for (int64_t k = 0; k < size.columns; ++k) {
                if constexpr (kSequential) {
                  d[k] = e[k] * (up[k] - inner);
                } else {
                  d[k] = up[k] * e[k] * a[k];
                  whole[k] = 2 * d[k] - e[k] * inner;
                }
              }
            }
          });
        });
        for_columns(size, [&] AMTML_BODY(int64_t b, int64_t begin, int64_t end) {
          const int64_t start = b * size.rows * size.columns, stop = start + size.rows * size.columns;
          A totals[kColumns] = {};
          for (int64_t at = start; at < stop; at += size.columns) {
            const A *d = weighted + at, *a = softmax + at;
#pragma omp simd
            for (int64_t k = begin; k < end; ++k) totals[k - begin] += d[k] * (kSequential ? a[k] : A(1));
          }
          for (int64_t at = start; at < stop; at += size.columns) {
            const A *d = weighted + at, *a = softmax + at, *whole = rest.data() + (kSequential ? 0 : at);
#pragma omp simd
            for (int64_t k = begin; k < end; ++k) {
              const A total = totals[k - begin];
              dx[at + k] = static_cast<T>(kSequential ? a[k] * (d[k] - total) : whole[k] - a[k] * total);
            }
          }
        });
      });
    });
  });
  return grad_scores;
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("dual_softmax_fwd", TORCH_BOX(&dual_softmax_fwd));
  m.impl("dual_softmax_bwd", TORCH_BOX(&dual_softmax_bwd));
}

}  // namespace
}  // namespace amtml
