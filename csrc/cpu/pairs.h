// Distances between the rows of a matrix, and the way back from their gradient to the rows.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace amtml {

constexpr int64_t kPadding = 16;    // rows of the matrices are padded to a multiple of this, with r = 0
constexpr double kFixedRange = 64;  // the largest ratio of squared distances for which fixed point is exact enough
// The largest for which a double is, of results in A: see angle.cpp.
template <class A>
constexpr double kDoubleRange = sizeof(A) == 4 ? 0x1p50 : 0x1p28;

inline int64_t padded(int64_t n) { return padded(n, kPadding); }

// The rows of one tensor that take part, and all their distances.
template <class A>
struct Side {
  static constexpr int64_t kRows = 4;  // rows at a time while distances are measured
  int64_t n, stride, width, pitch;
  Buffer<double> x;         // [n, pitch], rows and columns of padding are 0
  Buffer<double> distance;  // [n, stride] squared
  Buffer<double> rest{0};   // [n, stride] after split(): what `distance` lacks
  Buffer<A> r;              // [n, stride] 1 / distance, 0 where degenerate
  double nearest = std::numeric_limits<double>::infinity(), farthest = 0;  // of the pairs that are not degenerate
  A unit = 2;                                                              // of distances in sums: see angle.cpp

  Side(const Tensor& t, const std::vector<int64_t>& kept, double eps)
      : n(kept.size()),
        stride(padded(n)),
        width(t.size(1)),
        pitch(padded(width)),
        x(padded(n, kRows) * pitch),
        distance(n * stride),
        r(n * stride) {
    const Matrix m(t);
    torch::stable::parallel_for(0, n, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        double* row = x.data() + i * pitch;
        const double* loaded = load_row<double>(m, kept[i], width, row);
        if (loaded != row) std::copy(loaded, loaded + width, row);
        std::fill(row + width, row + pitch, 0.0);
      }
    });
    std::fill(x.data() + n * pitch, x.data() + padded(n, kRows) * pitch, 0.0);
    measure(eps);
  }

  Buffer<double> transposed() const {
    Buffer<double> columns(width * stride);
    torch::stable::parallel_for(0, width, grain(n), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        for (int64_t i = 0; i < n; ++i) columns[c * stride + i] = x[i * pitch + c];
        std::fill(&columns[c * stride + n], &columns[c * stride] + stride, 0.0);
      }
    });
    return columns;
  }

  void measure(double eps) {
    const Buffer<double> columns = transposed();
    // A group of rows from the start and one from the end are a task: together they always have the same length.
    const int64_t groups = padded(n, kRows) / kRows, tasks = (groups + 1) / 2;
    std::vector<Range> ranges(tasks);
    torch::stable::parallel_for(0, tasks, grain(kRows * n * width), [&](int64_t begin, int64_t end) {
      vectorized([&] AMTML_BODY(auto lanes) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t other = groups - 1 - task;
          measure_rows<decltype(lanes)::value>(task * kRows, columns.data(), eps, ranges[task]);
          if (other != task) measure_rows<decltype(lanes)::value>(other * kRows, columns.data(), eps, ranges[task]);
        }
      });
    });
    for (const Range& range : ranges) {
      nearest = std::min(nearest, range.nearest);
      farthest = std::max(farthest, range.nan ? std::numeric_limits<double>::infinity() : range.farthest);
    }
  }

  struct Range {
    double nearest = std::numeric_limits<double>::infinity(), farthest = 0;
    bool nan = false;
  };

  // Vectors run over j, so that nothing is summed across one, for kRows rows at once: they share the loads. Each pair
  // is written by the row of its lower index alone.
  template <int kLanes>
  AMTML_INLINE void measure_rows(int64_t i0, const double* columns, double eps, Range& range) {
    constexpr int kDoubles = kLanes / 2, kVectors = 2, kCount = kVectors * kDoubles;
    using V = Vector<double, kDoubles>;
    const int64_t rows = std::min(kRows, n - i0);
    for (int64_t i = i0; i < i0 + rows; ++i) {
      distance[i * stride + i] = 0;
      r[i * stride + i] = 0;
      std::fill(&distance[i * stride + n], &distance[i * stride] + stride, 0.0);
      std::fill(&r[i * stride + n], &r[i * stride] + stride, A(0));
    }
    alignas(64) double low[kCount], high[kCount];  // of the pairs so far, in each lane
    std::fill_n(low, kCount, range.nearest), std::fill_n(high, kCount, range.farthest);
    int nans = 0;
    for (int64_t j0 = i0 / kCount * kCount; j0 < n; j0 += kCount) {
      typename V::type sums[kRows][kVectors] = {};
      const double *a = x.data() + i0 * pitch, *b = columns + j0;
      for (int64_t c = 0; c < width; ++c, ++a, b += stride) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          const typename V::type other = V::load(b + v * kDoubles);
#pragma GCC unroll 8
          for (int row = 0; row < kRows; ++row) {
            const typename V::type difference = a[row * pitch] - other;
            sums[row][v] += difference * difference;
          }
        }
      }
      alignas(64) double sum[kRows][kCount];
      alignas(64) A inverse[kRows][kCount];
      std::memcpy(sum, sums, sizeof(sum));
      for (int64_t row = 0; row < kRows; ++row) {
#pragma omp simd
        for (int64_t l = 0; l < kCount; ++l) {  // NaN is not degenerate, nor is infinity: its quotient is NaN
          inverse[row][l] = sum[row][l] <= eps * eps ? A(0) : static_cast<A>(std::sqrt(sum[row][l]) / sum[row][l]);
        }
      }
      const bool whole = j0 >= i0 + kRows && j0 + kCount <= n;
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t i = i0 + row, first = whole ? 0 : std::max(j0, i + 1) - j0;
        const int64_t last = whole ? kCount : std::min<int64_t>(kCount, n - j0);
        std::copy(sum[row] + first, sum[row] + last, &distance[i * stride + j0 + first]);
        std::copy(inverse[row] + first, inverse[row] + last, &r[i * stride + j0 + first]);
        for (int64_t l = first; l < last; ++l) {
          distance[(j0 + l) * stride + i] = sum[row][l];
          r[(j0 + l) * stride + i] = inverse[row][l];
        }
#pragma omp simd reduction(+ : nans)
        for (int64_t l = 0; l < kCount; ++l) {
          const bool regular = inverse[row][l] != 0 && l >= first && l < last;
          const double d = sum[row][l];
          low[l] = regular && d < low[l] ? d : low[l];
          high[l] = regular && d > high[l] ? d : high[l];
          nans += regular && d != d;
        }
      }
    }
    range = {*std::min_element(low, low + kCount), *std::max_element(high, high + kCount), range.nan || nans > 0};
  }

  // Some are too short beside others for their difference to be known. Not where one is infinite or NaN.
  bool exceeds_double() const { return farthest > kDoubleRange<A> * nearest && farthest < 1e300; }

  // The distances are the sum of term(0) and, after split(), term(1).
  const double* term(int t) const { return t == 0 ? distance.data() : rest.data(); }

  // Into `rest` what the distances lack. If they exceed a double they are measured once more: `distance` is then a
  // multiple of 2^-50 of the longest, or half of that, so that sums and differences are exact; the rest is off by 2^-53
  // of itself. Of three distances |u| is then off by 2^-53 times the largest, or 2^-103 times the longest of all,
  // whichever is less, and psi by 2^-78 times the ratio of the longest to the shortest of all.
  void split() {
    rest = Buffer<double>(n * stride);
    std::fill(rest.data(), rest.data() + n * stride, 0.0);
    if (!exceeds_double()) return;
    const Buffer<double> columns = transposed();
    int exponent = 0;
    std::frexp(farthest, &exponent);                     // below 2^exponent
    const double shift = std::ldexp(1.5, exponent + 1);  // adding it rounds to a multiple of 2^(exponent - 51)
    // A row from the start and one from the end are a task: together they always have the same length.
    torch::stable::parallel_for(0, (n + 1) / 2, grain(4 * n * width), [&](int64_t begin, int64_t end) {
      vectorized([&] AMTML_BODY() {
        for (int64_t task = begin; task < end; ++task) {
          split_row(task, columns.data(), shift);
          if (n - 1 - task != task) split_row(n - 1 - task, columns.data(), shift);
        }
      });
    });
  }

  // The pairs of row i with later ones.
  AMTML_INLINE void split_row(int64_t i, const double* columns, double shift) {
    double *high = &distance[i * stride], *low = &rest[i * stride];
    std::fill(high + i, high + n, 0.0);
    for (int64_t c = 0; c < width; ++c) {
      const double a = x[i * pitch + c], *b = columns + c * stride;
#pragma omp simd
      for (int64_t j = i + 1; j < n; ++j) {
        const double d = a - b[j], other = a - d;
        const double error = (a - (d + other)) + (other - b[j]);  // of d, exactly
        const double multiple = (d * d + shift) - shift;
        high[j] += multiple;
        low[j] += std::fma(d, d, -multiple) + 2 * d * error;
      }
    }
    for (int64_t j = i + 1; j < n; ++j) {
      distance[j * stride + i] = high[j];
      rest[j * stride + i] = low[j];
    }
  }

  // Distances of similar size: NaN, infinities and sides without a regular pair are not.
  bool fits_fixed_point() const {
    return farthest <= kFixedRange * nearest && 1e-30 < nearest && nearest <= farthest && farthest < 1e30;
  }

  // The unit of fixed point is 2^(2m + 1), the largest distance below 2^29.99 of it: the sum of two fits into 32 bits.
  void use_fixed_point() { unit = static_cast<A>(std::exp2(2 * std::floor((std::log2(farthest) - 30.99) / 2) + 3)); }
};

// scale * sum_j g_ij (x_i - x_j), g [n, stride] symmetric with a diagonal of 0; rows that were left out get 0.
template <class A>
Tensor grad_rows(const Tensor& like, const std::vector<int64_t>& kept, const Side<A>& side, const double* g,
                 double scale) {
  const int64_t n = side.n, width = side.width;
  Tensor grad = empty(like, {like.size(0), width}, dtype_of<A>);
  A* out = static_cast<A*>(grad.mutable_data_ptr());
  if (n < like.size(0)) std::fill_n(out, like.size(0) * width, A(0));
  constexpr int64_t kRows = 2, kSums = 2;  // rows at a time, and sums of each: one sum would wait for itself
  const int64_t groups = padded(n, kRows) / kRows;
  torch::stable::parallel_for(0, groups, grain(kRows * n * width), [&](int64_t begin, int64_t end) {
    vectorized([&] AMTML_BODY(auto lanes) {
      constexpr int kDoubles = decltype(lanes)::value / 2, kVectors = 2, kCount = kVectors * kDoubles;
      using V = Vector<double, kDoubles>;
      for (int64_t group = begin; group < end; ++group) {
        const int64_t i = group * kRows, rows = std::min(kRows, n - i);
        const double *a = side.x.data() + i * side.pitch, *weight = g + i * side.stride;
        const int64_t next = rows > 1 ? side.stride : 0;  // of a last row alone, both are the same
        for (int64_t c0 = 0; c0 < width; c0 += kCount) {
          typename V::type own[kRows][kVectors], sums[kSums][kRows][kVectors] = {};
          for (int row = 0; row < kRows; ++row) std::memcpy(own[row], a + row * side.pitch + c0, sizeof(own[row]));
          auto add = [&](int64_t j, auto& sum) __attribute__((always_inline)) {  // differences: a common offset cancels
            const double* b = side.x.data() + j * side.pitch + c0;
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) {
              const typename V::type other = V::load(b + v * kDoubles);
#pragma GCC unroll 8
              for (int row = 0; row < kRows; ++row) sum[row][v] += weight[row * next + j] * (own[row][v] - other);
            }
          };
          int64_t j = 0;
          for (; j + 1 < n; j += kSums) add(j, sums[0]), add(j + 1, sums[1]);
          if (j < n) add(j, sums[0]);
          for (int64_t row = 0; row < rows; ++row) {
            double sum[kSums][kCount];
            for (int s = 0; s < kSums; ++s) std::memcpy(sum[s], sums[s][row], sizeof(sum[s]));
            A* to = out + kept[i + row] * width + c0;
            const int64_t count = std::min<int64_t>(kCount, width - c0);
            for (int64_t l = 0; l < count; ++l) to[l] = static_cast<A>(scale * (sum[0][l] + sum[1][l]));
          }
        }
      }
    });
  });
  return grad;
}

}  // namespace amtml
