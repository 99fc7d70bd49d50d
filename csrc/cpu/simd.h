// Vector code without intrinsics: plain loops, compiled once per instruction set and chosen when they run, so that a
// library built on one machine runs on another.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "convert.h"

#define AMTML_INLINE inline __attribute__((always_inline))
// A lambda that is inlined into the caller, and so compiled for the caller's instruction set.
#define AMTML_BODY(...) (__VA_ARGS__) __attribute__((always_inline))

namespace amtml {

// body(), or body(lanes) with the number of floats in a vector as a constant.
template <int kLanes, class Body>
AMTML_INLINE void call(const Body& body) {
  if constexpr (std::is_invocable_v<Body>) {
    body();
  } else {
    body(std::integral_constant<int, kLanes>{});
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
#define AMTML_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2"
#define AMTML_AVX2 "avx2,fma,f16c,bmi,bmi2"

template <class Body>
__attribute__((target(AMTML_AVX512))) void run_avx512(const Body& body) {
  call<16>(body);
}
template <class Body>
__attribute__((target(AMTML_AVX2))) void run_avx2(const Body& body) {
  call<8>(body);
}

enum class Isa { baseline, avx2, avx512 };

// The widest that this processor has, or less: AMTML_CPU_VECTORS=baseline or avx2 (for tests; backend.py knows its
// values).
inline Isa isa() {
  static const Isa chosen = [] {
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* given = std::getenv("AMTML_CPU_VECTORS");
    const std::string most = given ? given : "";
    if (avx512 && most != "avx2" && most != "baseline") return Isa::avx512;
    return avx2 && most != "baseline" ? Isa::avx2 : Isa::baseline;
  }();
  return chosen;
}

// Runs body, an AMTML_BODY lambda, in the widest vectors that this processor has.
template <class Body>
void vectorized(const Body& body) {
  switch (isa()) {
    case Isa::avx512:
      return run_avx512(body);
    case Isa::avx2:
      return run_avx2(body);
    default:
      return call<4>(body);
  }
}
#else
template <class Body>
void vectorized(const Body& body) {
  call<4>(body);
}
#endif

// kCount numbers in one register, for sums that a plain loop would keep in memory. They are copied from and to any
// place: a reference to a vector says that it is aligned, and older Clang (16) forgets an attribute that says
// otherwise.
template <class A, int kCount>
struct Vector {
  typedef A type __attribute__((vector_size(kCount * sizeof(A))));
  static AMTML_INLINE type load(const A* x) {
    type v;
    std::memcpy(&v, x, sizeof v);
    return v;
  }
  static AMTML_INLINE void store(A* x, const type& v) { std::memcpy(x, &v, sizeof v); }
};

// kCount numbers in kParts registers: floats in one, and as many doubles beside them in two. GCC keeps vectors that are
// wider than a register in memory.
template <class T, int kCount, int kParts>
struct Lanes {
  static constexpr int kEach = kCount / kParts;
  using V = Vector<T, kEach>;
  typename V::type part[kParts];

  static AMTML_INLINE Lanes load(const T* x) {
    Lanes out;
    for (int p = 0; p < kParts; ++p) out.part[p] = V::load(x + p * kEach);
    return out;
  }
  static AMTML_INLINE Lanes all(T x) {
    Lanes out;
    for (int p = 0; p < kParts; ++p) out.part[p] = typename V::type{} + x;
    return out;
  }
  AMTML_INLINE void add_to(T* x) const {
    for (int p = 0; p < kParts; ++p) V::store(x + p * kEach, V::load(x + p * kEach) + part[p]);
  }
  friend AMTML_INLINE Lanes operator+(Lanes a, const Lanes& b) {
    for (int p = 0; p < kParts; ++p) a.part[p] += b.part[p];
    return a;
  }
  friend AMTML_INLINE Lanes operator-(Lanes a, const Lanes& b) {
    for (int p = 0; p < kParts; ++p) a.part[p] -= b.part[p];
    return a;
  }
  friend AMTML_INLINE Lanes operator-(Lanes a, T b) {
    for (int p = 0; p < kParts; ++p) a.part[p] -= b;
    return a;
  }
  friend AMTML_INLINE Lanes operator*(Lanes a, const Lanes& b) {
    for (int p = 0; p < kParts; ++p) a.part[p] *= b.part[p];
    return a;
  }
  // The smaller of the two, and the larger; the second if one is NaN.
  friend AMTML_INLINE Lanes least(Lanes a, const Lanes& b) {
    for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] < b.part[p] ? a.part[p] : b.part[p];
    return a;
  }
  friend AMTML_INLINE Lanes most(Lanes a, const Lanes& b) {
    for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] > b.part[p] ? a.part[p] : b.part[p];
    return a;
  }
  template <class U, int kInto>
  AMTML_INLINE Lanes<U, kCount, kInto> to() const {
    alignas(64) T from[kCount];
    alignas(64) U into[kCount];
    for (int p = 0; p < kParts; ++p) V::store(from + p * kEach, part[p]);
#pragma omp simd
    for (int l = 0; l < kCount; ++l) into[l] = static_cast<U>(from[l]);
    return Lanes<U, kCount, kInto>::load(into);
  }
};

// 2^kScale exp(x) for x <= 0, to 1 ulp; 0 where that is below the smallest normal number; NaN stays NaN. Cody-Waite
// reduction, then a minimax polynomial of degree 6, which misses exp by 3e-9.
template <int kScale = 0>
AMTML_INLINE float exp_nonpositive(float x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then sits in the low bits; with the exponent's bias it is 2^n's.
  constexpr float lowest = -88.0f - kScale * 0.693147181f, shift = 12582912.0f + 127 + kScale;
  const float y = x < lowest ? lowest : x;
  const float shifted = y * 1.44269504f + shift;
  const float n = shifted - shift;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3818697771e-3f;
  p = p * r + 8.3687156439e-3f;
  p = p * r + 4.1668292135e-2f;
  p = p * r + 1.6666521132e-1f;
  p = p * r + 4.9999994040e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = static_cast<int32_t>(static_cast<uint32_t>(bits) << 23);
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}
template <int kScale = 0>
AMTML_INLINE double exp_nonpositive(double x) {
  return std::exp(x) * (1 << kScale);
}

// log(x) for finite x > 0, to 1 ulp; NaN stays NaN. Cephes' logf.
AMTML_INLINE float log_positive(float x) {
  const bool small = x < 1.17549435e-38f;
  const float y = small ? x * 8388608.0f : x;  // 2^23: lifts subnormal numbers
  int32_t bits;
  std::memcpy(&bits, &y, 4);
  float e = static_cast<float>((bits >> 23) - 126 - (small ? 23 : 0));
  bits = (bits & 0x007fffff) | 0x3f000000;
  float m;
  std::memcpy(&m, &bits, 4);  // [0.5, 1)
  const bool low = m < 0.707106781f;
  e = low ? e - 1.0f : e;
  m = low ? m + m - 1.0f : m - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  float tail = p * m * z + e * -2.12194440e-4f;
  tail = tail - 0.5f * z;
  const float r = m + tail + e * 0.693359375f;
  return x == x ? r : x;
}
AMTML_INLINE double log_positive(double x) { return std::log(x); }

// x[0] op x[1] op ... of 2 kHalf numbers, half by half. (Not by the clause `reduction(max : x)`: Clang begins it with
// the lowest finite number, which would be the largest of many -inf.)
template <int kHalf, class T, class F>
AMTML_INLINE T folded(T* x, const F& op) {
  if constexpr (kHalf > 0) {
#pragma omp simd
    for (int l = 0; l < kHalf; ++l) x[l] = op(x[l], x[l + kHalf]);
    return folded<kHalf / 2>(x, op);
  }
  return x[0];
}

// sum of term(i) for i < n: blocks in A, their sum in double, so that the error does not grow with n. (A plain loop
// over floats with the clause `reduction` would add the lanes of its sum one after the other, in as much time as 100
// terms.)
struct Nothing {
  AMTML_INLINE void operator()(int64_t) const {}
};

template <class A, class F, class Between = Nothing>
AMTML_INLINE double block_sum(int64_t n, const F& term, const Between& between = {}) {
  if constexpr (sizeof(A) == 8) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += term(i);
    return sum;
  } else {
    constexpr int kLanes = 16, kBlock = 256;
    using Sum = Lanes<A, kLanes, 2>;
    using Total = Lanes<double, kLanes, 2>;
    const int64_t whole = n / kLanes * kLanes;
    Total total = Total::all(0);
    for (int64_t start = 0; start < whole; start += kBlock) {
      const int64_t stop = start + kBlock < whole ? start + kBlock : whole;
      Sum sum = Sum::all(0);
      for (int64_t i = start; i < stop; i += kLanes) {
        between(i);
        alignas(64) A terms[kLanes];
#pragma omp simd
        for (int l = 0; l < kLanes; ++l) terms[l] = term(i + l);
        sum = sum + Sum::load(terms);
      }
      for (int p = 0; p < 2; ++p) total.part[p] += __builtin_convertvector(sum.part[p], typename Total::V::type);
    }
    alignas(64) double t[kLanes / 2];
    alignas(32) double rest[4] = {};
    Total::V::store(t, total.part[0] + total.part[1]);
    int64_t i = whole;
    for (; i + 4 <= n; i += 4) {
#pragma omp simd
      for (int l = 0; l < 4; ++l) rest[l] += static_cast<double>(term(i + l));
    }
#pragma GCC unroll 1  // each copy of a term takes time to compile
    for (int l = 0; l < 3 && i < n; ++l, ++i) rest[l] += static_cast<double>(term(i));
    const auto plus = [](double a, double b) __attribute__((always_inline)) { return a + b; };
    return folded<kLanes / 4>(t, plus) + folded<2>(rest, plus);
  }
}

struct Larger {
  template <class A>
  AMTML_INLINE A operator()(A a, A b) const {
    return b > a ? b : a;
  }
};

// The largest of n numbers, NaN left out; -inf where there is none.
template <class A>
AMTML_INLINE A maximum(const A* x, int64_t n) {
  constexpr int kLanes = 64 / sizeof(A);
  constexpr Larger larger;
  alignas(64) A most[kLanes];
  for (int l = 0; l < kLanes; ++l) most[l] = -std::numeric_limits<A>::infinity();
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) most[l] = larger(most[l], x[i + l]);
  }
  A rest = -std::numeric_limits<A>::infinity();
  for (int64_t i = whole; i < n; ++i) rest = larger(rest, x[i]);
  return larger(folded<kLanes / 2>(most, larger), rest);
}

// An array that is not filled with zeros first, and starts at a cache line: no vector lies across two. It aligns
// itself: malloc keeps small blocks for the next of their size, but cuts aligned ones out of larger memory each time.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) {
    const size_t bytes = std::max<int64_t>(n, 1) * sizeof(T);
    memory_.reset(new char[bytes + kLine - 1]);
    const auto at = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((at + kLine - 1) / kLine * kLine);
    fill_for_tests(data_, bytes);
  }
  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<char[]> memory_;
  T* data_;
};

// n rounded up to a multiple.
inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How many items of `work` elements each a thread should get at least, so that starting it pays.
inline int64_t grain(int64_t work) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(work, 1)); }

}  // namespace amtml
