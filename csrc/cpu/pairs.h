// Distances between the rows of a matrix, and the way back from their gradient to the rows.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "simd.h"

namespace amtml {

constexpr int64_t kPadding = 16;    // rows of the matrices are padded to a multiple of this, with r = 0
constexpr double kFixedRange = 64;  // the largest ratio of squared distances for which fixed point is exact enough

// The rows of one tensor that take part, and all their distances.
template <class A>
struct Side {
  int64_t n, stride, width;
  std::vector<double> x;        // [n, width]
  std::vector<double> columns;  // [width, stride], while distances are measured
  Buffer<double> distance;      // [n, stride] squared
  Buffer<A> r;                  // [n, stride] 1 / distance, 0 where degenerate
  double nearest = std::numeric_limits<double>::infinity(), farthest = 0;  // of the pairs that are not degenerate
  A unit = 2;                                                              // of distances in sums: see angle.cpp

  Side(const Tensor& t, const std::vector<int64_t>& kept, double eps)
      : n(kept.size()),
        stride((n + kPadding - 1) / kPadding * kPadding),
        width(t.size(1)),
        x(n * width),
        distance(n * stride),
        r(n * stride) {
    const Matrix m(t);
    for (int64_t i = 0; i < n; ++i) {
      double* row = x.data() + i * width;
      const double* loaded = load_row<double>(m, kept[i], width, row);
      if (loaded != row) std::copy(loaded, loaded + width, row);
    }
    columns.resize(width * stride);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < width; ++c) columns[c * stride + i] = x[i * width + c];
    }
    measure(eps);
    columns = {};
  }

  // Row i and row n - 1 - i are one task: together they always have the same length.
  void measure(double eps) {
    const int64_t tasks = (n + 1) / 2;
    std::vector<std::array<double, 2>> range(tasks);
    torch::stable::parallel_for(0, tasks, grain(n * width), [&](int64_t begin, int64_t end) {
      vectorized([&] AMTML_BODY(auto lanes) {
        for (int64_t task = begin; task < end; ++task) {
          range[task] = {nearest, farthest};
          measure_row<decltype(lanes)::value>(task, eps, range[task]);
          if (n - 1 - task != task) measure_row<decltype(lanes)::value>(n - 1 - task, eps, range[task]);
        }
      });
    });
    for (const auto& [low, high] : range) {
      nearest = std::min(nearest, low);
      farthest = high > farthest || high != high ? high : farthest;  // NaN stays
    }
  }

  // Vectors run over j, so that nothing is summed across one. Each pair is written by the row of its lower index alone.
  template <int kLanes>
  AMTML_INLINE void measure_row(int64_t i, double eps, std::array<double, 2>& range) {
    constexpr int kDoubles = kLanes / 2, kVectors = kPadding / kDoubles;
    using V = Vector<double, kDoubles>;
    const double* a = x.data() + i * width;
    distance[i * stride + i] = 0;
    r[i * stride + i] = 0;
    std::fill(&distance[i * stride + n], &distance[i * stride] + stride, 0.0);
    std::fill(&r[i * stride + n], &r[i * stride] + stride, A(0));
    for (int64_t j0 = i / kPadding * kPadding; j0 < n; j0 += kPadding) {
      alignas(64) double sum[kPadding];
      alignas(64) A inverse[kPadding];
      typename V::type sums[kVectors] = {};
      for (int64_t c = 0; c < width; ++c) {
        const double* b = columns.data() + c * stride + j0;
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const typename V::type difference = a[c] - *reinterpret_cast<const typename V::loaded*>(b + v * kDoubles);
          sums[v] += difference * difference;
        }
      }
      std::memcpy(sum, sums, sizeof(sum));
#pragma omp simd
      for (int64_t l = 0; l < kPadding; ++l) {  // NaN is not degenerate
        inverse[l] = sum[l] <= eps * eps ? A(0) : static_cast<A>(1 / std::sqrt(sum[l]));
      }
      for (int64_t j = std::max(j0, i + 1); j < std::min(j0 + kPadding, n); ++j) {
        const double d = sum[j - j0];
        distance[i * stride + j] = distance[j * stride + i] = d;
        r[i * stride + j] = r[j * stride + i] = inverse[j - j0];
        if (inverse[j - j0] == 0) continue;
        range[0] = std::min(range[0], d);
        range[1] = d > range[1] || d != d ? d : range[1];
      }
    }
  }

  // Distances of similar size: NaN, infinities and sides without a regular pair are not.
  bool fits_fixed_point() const {
    return farthest <= kFixedRange * nearest && 1e-30 < nearest && nearest <= farthest && farthest < 1e30;
  }

  // The unit of fixed point is 2^(2m + 1), the largest distance below 2^29.99 of it: the sum of two fits into 32 bits.
  void use_fixed_point() { unit = static_cast<A>(std::exp2(2 * std::floor((std::log2(farthest) - 30.99) / 2) + 3)); }
};

// scale * sum_j g_ij (x_i - x_j), g [n, stride] symmetric; rows that were left out get 0.
template <class A>
Tensor grad_rows(const Tensor& like, const std::vector<int64_t>& kept, const Side<A>& side, const double* g,
                 double scale) {
  const int64_t n = side.n, width = side.width;
  Tensor grad = torch::stable::new_empty(like, {like.size(0), width}, dtype_of<A>);
  A* out = static_cast<A*>(grad.mutable_data_ptr());
  if (n < like.size(0)) std::fill_n(out, like.size(0) * width, A(0));
  torch::stable::parallel_for(0, n, grain(n * width), [&](int64_t begin, int64_t end) {
    vectorized([&] AMTML_BODY(auto lanes) {
      constexpr int kDoubles = decltype(lanes)::value / 2, kVectors = kPadding / kDoubles;
      using V = Vector<double, kDoubles>;
      for (int64_t i = begin; i < end; ++i) {
        const double *a = side.x.data() + i * width, *weight = g + i * side.stride;
        A* to = out + kept[i] * width;
        int64_t c0 = 0;
        for (; c0 + kPadding <= width; c0 += kPadding) {  // a vector of columns stays in registers
          typename V::type sums[kVectors] = {}, own[kVectors];
          std::memcpy(own, a + c0, sizeof(own));
          for (int64_t j = 0; j < n; ++j) {
            const double *b = side.x.data() + j * width + c0, by = j == i ? 0 : weight[j];
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {  // differences: the common offset cancels
              sums[v] += by * (own[v] - *reinterpret_cast<const typename V::loaded*>(b + v * kDoubles));
            }
          }
          double sum[kPadding];
          std::memcpy(sum, sums, sizeof(sum));
          for (int64_t l = 0; l < kPadding; ++l) to[c0 + l] = static_cast<A>(scale * sum[l]);
        }
        for (; c0 < width; ++c0) {
          double sum = 0;
          for (int64_t j = 0; j < n; ++j) sum += j == i ? 0 : weight[j] * (a[c0] - side.x[j * width + c0]);
          to[c0] = static_cast<A>(scale * sum);
        }
      }
    });
  });
  return grad;
}

}  // namespace amtml
