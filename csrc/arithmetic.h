// Arithmetic that the CPU's and the GPU's kernels share, so that the tests of one exercise what the other runs.
#pragma once

#ifdef __CUDACC__
#define AMTML_SHARED __host__ __device__ __forceinline__
#else
#define AMTML_SHARED inline __attribute__((always_inline))
#endif

namespace amtml {

// --- distillation: probabilities p of the teachers and q of the student

// What a class contributes: nothing where it has no probability, whatever its logarithm is.
template <class A>
AMTML_SHARED A if_mass(A probability, A term) {
  return probability == 0 ? A(0) : term;
}

// d/dz of KL(p || q) with q = softmax(z / tau) and p of mass `total`, times scale: that has the 1 / tau.
template <class A>
AMTML_SHARED A kl_gradient(A scale, A total, A q, A p) {
  return scale * (total * q - p);
}

// d/dw_t of the mixture's KL is sum_c p_t (log p - log q + 1), over the classes that have mass in p. This is what a
// class adds to it, times the sum of the exponentials of teacher t, of which e is one; but for the 1, which is to be
// added at the end: sum_c p_t = 1, and beside it the small logarithms would be rounded away. log_ratio = log p - log q,
// in the logarithm of which e has the logarithm `one`.
template <class A>
AMTML_SHARED A mixture_gradient(A e, A p, A log_ratio, A one = A(1)) {
  const A term = e == 0 ? A(0) : e * log_ratio;
  return p == 0 ? -e * one : term;
}

// d/dx of sum g y with y = softmax(x), where mean = sum g y.
template <class A>
AMTML_SHARED A softmax_gradient(A y, A g, A mean) {
  return y * (g - mean);
}

// --- angles and distances: A is a number, V a number or a vector of them

// x between -limit and limit; NaN stays NaN.
template <class A>
AMTML_SHARED A clamped(A x, A limit) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (sizeof(A) == 4) {  // two instructions
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(limit));
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(x), "f"(-limit));
    return x;
  }
#endif
  const A low = x > limit ? limit : x;
  return low < -limit ? -limit : low;
}

// Huber's loss of x, whose derivative is g = clamped(x, delta).
template <class V>
AMTML_SHARED V huber(const V& x, const V& g, const V& half) {
  return g * (x - half * g);
}

// The same of a cosine that is 1 on one side and, of a degenerate pair, 0 on the other.
template <class A>
AMTML_SHARED A one_sided_huber(A delta) {
  const A g = delta < 1 ? delta : A(1);
  return huber(A(1), g, A(0.5));
}

// The inner product of two arms times 2, from squared distances: those of the arms and the one opposite.
template <class V, class W>
AMTML_SHARED V between_arms(const V& arm, const V& other, const W& opposite) {
  return arm + other - opposite;
}

// dL/d of an arm's squared distance: the sum of g h less r^2 times that of g psi.
template <class A>
AMTML_SHARED A arm_gradient(A gh, A r, A gpsi) {
  return gh - r * r * gpsi;
}

// --- pooling and norms

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
