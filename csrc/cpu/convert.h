// Numbers of any dtype as float or double, and back: so that a kernel has one body, whatever it reads and writes. Rows
// of its own type are used where they lie; others pass through a scratch that stays in the first-level cache.
#pragma once

#include "../common.h"

namespace amtml {

// n numbers, `stride` of them apart, as A; and n of A, rounded, as `dtype`.
template <class A>
void widen(const void* from, ScalarType dtype, int64_t stride, int64_t n, A* to);
template <class A>
void narrow(const A* from, int64_t n, void* to, ScalarType dtype);
// The same, number i to place at[i].
template <class A>
void scatter(const A* from, const int64_t* at, int64_t n, void* to, ScalarType dtype);

inline int64_t bytes_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

// Contiguous numbers of any dtype, to be read.
struct Source {
  const char* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  Source() = default;
  explicit Source(const Tensor& t) : data(static_cast<const char*>(t.const_data_ptr())), dtype(t.scalar_type()) {}
  explicit operator bool() const { return data != nullptr; }

  // n numbers from place i on: where they lie if they are A's, else in scratch.
  template <class A>
  const A* read(int64_t i, int64_t n, A* scratch) const {
    const char* from = data + i * bytes_of(dtype);
    if (dtype == dtype_of<A>) return reinterpret_cast<const A*>(from);
    widen(from, dtype, 1, n, scratch);
    return scratch;
  }
};

// The same, to be written: the results are made in `place`, and `write` rounds them to where they belong.
struct Target {
  char* data = nullptr;
  ScalarType dtype = ScalarType::Float;

  Target() = default;
  explicit Target(const Tensor& t) : data(static_cast<char*>(t.mutable_data_ptr())), dtype(t.scalar_type()) {}
  explicit Target(float* numbers) : data(reinterpret_cast<char*>(numbers)) {}
  explicit operator bool() const { return data != nullptr; }

  template <class A>
  bool in_place() const {
    return dtype == dtype_of<A>;
  }
  template <class A>
  A* place(int64_t i, A* scratch) const {
    return in_place<A>() ? reinterpret_cast<A*>(data) + i : scratch;
  }
  template <class A>
  void write(int64_t i, int64_t n, const A* made) const {
    if (!in_place<A>()) narrow(made, n, data + i * bytes_of(dtype), dtype);
  }
  template <class A>
  void scatter(int64_t first, const int64_t* at, int64_t n, const A* made) const {
    amtml::scatter(made, at, n, data + first * bytes_of(dtype), dtype);
  }
  void clear(int64_t i, int64_t n) const { std::fill_n(data + i * bytes_of(dtype), n * bytes_of(dtype), char(0)); }
};

// Memory that will be read soon, asked for while something else is computed.
struct Ahead {
  const char* at = nullptr;
  int64_t step = 0;  // 0: there is nothing to ask for
  inline __attribute__((always_inline)) void operator()(int64_t i) const {
    if (step != 0) __builtin_prefetch(at + i * step, 0, 2);
  }
  Ahead from(int64_t i) const { return {at + i * step, step}; }
};

// A strided matrix of any dtype, read a row at a time.
struct Matrix {
  const void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t row_stride = 0, column_stride = 0;

  Matrix() = default;
  explicit Matrix(const Tensor& t)
      : data(t.const_data_ptr()), dtype(t.scalar_type()), row_stride(t.stride(0)), column_stride(t.stride(1)) {}
  explicit Matrix(const std::optional<Tensor>& t) : Matrix(t ? Matrix(*t) : Matrix()) {}
  explicit operator bool() const { return data != nullptr; }

  Ahead ahead(int64_t i, int64_t rows) const {
    if (i >= rows || column_stride != 1) return {};
    return {static_cast<const char*>(data) + i * row_stride * bytes_of(dtype), bytes_of(dtype)};
  }
  // Whether a row is A's in memory already, so that load_row needs no scratch.
  template <class A>
  bool in_place() const {
    return column_stride == 1 && dtype == dtype_of<A>;
  }
};

// n values of row i, from column `first` on, contiguous and of type A: in place where they are that already, else
// converted into scratch.
template <class A>
const A* load_part(const Matrix& m, int64_t i, int64_t first, int64_t n, A* scratch) {
  const int64_t at = i * m.row_stride + first * m.column_stride;
  const char* from = static_cast<const char*>(m.data) + at * bytes_of(m.dtype);
  if (m.in_place<A>()) return reinterpret_cast<const A*>(from);
  widen(from, m.dtype, m.column_stride, n, scratch);
  return scratch;
}
template <class A>
const A* load_row(const Matrix& m, int64_t i, int64_t n, A* scratch) {
  return load_part(m, i, 0, n, scratch);
}

}  // namespace amtml
