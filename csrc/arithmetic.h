// Arithmetic that the CPU's and the GPU's kernels share, so that the tests of one exercise what the other runs.
#pragma once

#include <limits>

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

// --- divergences D(p, q) = sum_c f(p_c, q_c)

enum class Divergence { forward_kl, reverse_kl, jsd, skew_kl, skew_reverse_kl, tvd };

// What a class adds: f(p, q), q df/dq and df/dp.
template <class A>
struct DivergenceTerm {
  A value, qb, a;
};

// log(ratio) where ratio = 1 + u: exact near 0 as well as far from it, with one logarithm and no division. Near 0 it is
// that of 1 + u as it is rounded, and what the rounding has taken off.
template <class A, class Log>
AMTML_SHARED A log_of_ratio(A u, A ratio, const Log& log) {
  const bool near = u > A(-0.5) && u < A(0.5);
  const A y = near ? A(1) + u : ratio;
  const A l = log(y);
  return near ? l + (u - (y - A(1))) : l;
}

// What p and q have in the mixture m = share.p p + share.q q. Both are made in float64: 1 - beta would lose a small
// beta in float32, and a beta near 1.
template <class A>
struct MixtureShares {
  A p, q;
};
template <class A>
MixtureShares<A> shares_of(Divergence kind, double beta) {
  if (kind == Divergence::skew_reverse_kl) return {static_cast<A>(1 - beta), static_cast<A>(beta)};
  return {static_cast<A>(beta), static_cast<A>(1 - beta)};
}

// log_p and log_q are read by the two KLs alone. A KL to a mixture is summed as x log(x / m) - x + m, of which every
// term is small where x is near m; divergence_constant is what the rest adds up to. Reverse KL leaves out the 1 of
// df/dq, which changes no gradient, and forward KL that of df/dp: beside it the small logarithms would be rounded away,
// so it is to be added to a sum over the classes. Where a class has no probability on one side, the logarithm of that
// side does not count.
template <Divergence kind, class A, class Log>
AMTML_SHARED DivergenceTerm<A> divergence_term(A p, A q, A log_p, A log_q, MixtureShares<A> share, const Log& log) {
  if constexpr (kind == Divergence::forward_kl) {
    const A ratio = log_p - log_q;
    return {if_mass(p, p * ratio), -p, p == 0 ? A(-1) : ratio};
  } else if constexpr (kind == Divergence::reverse_kl) {
    const A value = if_mass(q, q * (log_q - log_p));
    return {value, value, if_mass(q, -q / p)};
  } else if constexpr (kind == Divergence::tvd) {
    // The sign is not that of the difference, which may be fused with the product that q is: not 0 then where they are
    // equal.
    const A difference = p - q, sign = p > q ? A(0.5) : (p < q ? A(-0.5) : (p == q ? A(0) : difference));
    return {sign * difference, -q * sign, sign};
  } else {
    // Below `least` no class counts, and an infinite inverse would meet a 0.
    constexpr A least = std::numeric_limits<A>::min() * 64;
    const A m = share.p * p + share.q * q, inverse = A(1) / (m < least ? least : m);
    const A from_p = share.q * (p - q), from_q = share.p * (q - p);  // p - m and q - m, without cancellation
    const A p_m = p * inverse, q_m = q * inverse;
    // p may be above 1 (a mixture whose weights sum to more), and q / m 0 where q is not: nothing counts there.
    if constexpr (kind == Divergence::skew_kl) {
      const A of_p = log_of_ratio(from_p * inverse, p_m, log);
      return {if_mass(p, p * of_p) - from_p, -share.q * q * p_m, if_mass(p, of_p + A(1) - share.p * p_m)};
    } else if constexpr (kind == Divergence::skew_reverse_kl) {
      const A of_q = log_of_ratio(from_q * inverse, q_m, log);
      return {if_mass(q_m, q * of_q) - from_q, if_mass(q_m, q * (of_q - share.q * q_m)), -share.p * q_m};
    } else {
      const A of_p = if_mass(p, share.p * log_of_ratio(from_p * inverse, p_m, log));
      const A of_q = if_mass(q_m, share.q * log_of_ratio(from_q * inverse, q_m, log));
      return {p * of_p + q * of_q, q * of_q, p == 0 ? (q == 0 ? A(0) : -share.p) : of_p};
    }
  }
}

// The a of a class where p = q. A constant in a adds nothing to the gradient of mixed logits, p a less p times its sum.
// There this one is taken off: at high temperatures p is near q, and beside it the small differences would be rounded
// away.
template <class A>
AMTML_SHARED A slope_of_equals(Divergence kind, MixtureShares<A> share) {
  if (kind == Divergence::reverse_kl) return A(-1);
  if (kind == Divergence::skew_kl) return share.q;
  return kind == Divergence::skew_reverse_kl ? -share.p : A(0);
}

// What the terms leave out, of p with this mass and q with mass 1.
template <class A>
AMTML_SHARED A divergence_constant(Divergence kind, A mass, MixtureShares<A> share) {
  if (kind == Divergence::skew_kl) return share.q * (mass - A(1));
  if (kind == Divergence::skew_reverse_kl) return share.p * (A(1) - mass);
  return A(0);
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
