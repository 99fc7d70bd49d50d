// Arithmetic that the CPU's and the GPU's kernels share, so that the tests of one exercise what the other runs.
#pragma once

#ifdef __CUDACC__
#define AMTML_SHARED __host__ __device__ __forceinline__
#else
#define AMTML_SHARED inline __attribute__((always_inline))
#endif

namespace amtml {

// What a class contributes: nothing where it has no probability, whatever its logarithm is.
template <class A>
AMTML_SHARED A if_mass(A probability, A term) {
  return probability == 0 ? A(0) : term;
}

// Whether a value takes the place of the maximum so far: it is larger, or the first NaN.
template <class A>
AMTML_SHARED bool beats(A value, A best) {
  return value > best || (value != value && best == best);
}

// What adaptive pooling of `in` places to `out` averages into place i, as torch has it; and, with `in` and `out`
// exchanged, the averages that place i takes part in.
template <class Int>
struct Window {
  Int begin, end;

  AMTML_SHARED Int size() const { return end - begin; }
};
template <class Int>
AMTML_SHARED Window<Int> window(Int i, Int in, Int out) {
  return {i * in / out, ((i + 1) * in + out - 1) / out};
}

constexpr double kSmallestNorm = 1e-12;  // that a vector is divided by, as in torch.nn.functional.normalize

}  // namespace amtml
