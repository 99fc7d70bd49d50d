// A product of matrices that are in cache, to be called from within a loop over parts of larger ones.
#pragma once

#include "simd.h"

namespace amtml {

constexpr int kProductRows = 4, kProductVectors = 2;  // their 8 sums under way hide the latency of one

// A factor that is read element by element: its transpose is as good.
template <class A>
struct Factor {
  const A* data;
  int64_t row_stride, column_stride;
};

template <int kLanes, class A>
AMTML_INLINE void add_tile(int64_t depth, const Factor<A>& a, const A* b, int64_t b_pitch, A* c, int64_t c_pitch) {
  using V = Vector<A, kLanes>;
  typename V::type sums[kProductRows][kProductVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kProductRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kProductVectors; ++v) sums[r][v] = V::load(c + r * c_pitch + v * kLanes);
  }
  const A* from = a.data;
  for (int64_t k = 0; k < depth; ++k, from += a.column_stride, b += b_pitch) {
#pragma GCC unroll 8
    for (int v = 0; v < kProductVectors; ++v) {
      const typename V::type x = V::load(b + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kProductRows; ++r) sums[r][v] += from[r * a.row_stride] * x;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kProductRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kProductVectors; ++v) V::store(c + r * c_pitch + v * kLanes, sums[r][v]);
  }
}

// c [rows, columns] += a [rows, depth] b [depth, columns]; rows of b and of c lie `pitch` apart. rows must be a
// multiple of kProductRows, columns of kProductVectors * kLanes.
template <int kLanes, class A>
AMTML_INLINE void add_product(int64_t rows, int64_t columns, int64_t depth, const Factor<A>& a, const A* b,
                              int64_t b_pitch, A* c, int64_t c_pitch) {
  for (int64_t j = 0; j < columns; j += kProductVectors * kLanes) {
    for (int64_t i = 0; i < rows; i += kProductRows) {
      add_tile<kLanes, A>(depth, {a.data + i * a.row_stride, a.row_stride, a.column_stride}, b + j, b_pitch,
                          c + i * c_pitch + j, c_pitch);
    }
  }
}

// to [columns, rows] = scale times x^T, by squares that fit in registers.
template <class A, class T>
AMTML_INLINE void transpose(int64_t rows, int64_t columns, const T* x, int64_t x_pitch, A* to, int64_t to_pitch,
                            A scale = 1) {
  constexpr int kSide = 4;
  const int64_t whole_rows = rows - rows % kSide, whole_columns = columns - columns % kSide;
  for (int64_t i = 0; i < whole_rows; i += kSide) {
    for (int64_t j = 0; j < whole_columns; j += kSide) {
      A square[kSide][kSide];
#pragma GCC unroll 4
      for (int r = 0; r < kSide; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kSide; ++c) square[c][r] = scale * static_cast<A>(x[(i + r) * x_pitch + j + c]);
      }
#pragma GCC unroll 4
      for (int c = 0; c < kSide; ++c) {
#pragma GCC unroll 4
        for (int r = 0; r < kSide; ++r) to[(j + c) * to_pitch + i + r] = square[c][r];
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) {
      to[j * to_pitch + i] = scale * static_cast<A>(x[i * x_pitch + j]);
    }
  }
}

}  // namespace amtml
