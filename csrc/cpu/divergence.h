// What the two ways to compute any divergence share: what a pass over all rows reads and writes.
#pragma once

#include "divergence_rows.h"

namespace amtml::divergences {

template <class A>
struct Pass : KDPass<A> {
  const A* alphas;  // one a row, or null
  A *grad_alpha, *statistics;
};

// As KDStats has them: entropies of q and p, mass, agreement, and KL(p_t || q) of each teacher.
inline int64_t statistics_size(int64_t teachers) { return 4 + teachers; }

// d loss / d (D / tau) and d loss / d CE of a row.
struct RowGradients {
  double kl, ce;
};

// Writes what a row that counts has but for its student's gradient, from its D and CE and, in dot(t), d D / d weight.
template <class A, class Dot>
AMTML_INLINE RowGradients write_row(const Problem<A>& pr, const Pass<A>& pass, int64_t i, double distance, double ce,
                                    const Dot& dot) {
  const double tau = pr.temperature(i), g = pass.incoming(i);
  const double ce_weight = pass.alphas ? 1 - static_cast<double>(pass.alphas[i]) : pr.set.kd.ce_weight;
  const double kl_weight = pass.alphas ? pass.alphas[i] : pr.set.kd.kl_weight;
  const double squared = pr.set.t2_scale ? tau * tau : 1, kl = squared * distance;
  const double kl_grad = g * kl_weight * squared * pass.scale.kl;
  if (pass.forward()) {  // not 0 * infinity
    pass.kl[i] = kl_weight == 0 ? 0 : kl_weight * kl;
    pass.ce[i] = ce_weight == 0 ? 0 : ce_weight * ce;
  }
  if (pass.grad_alpha) {  // what is infinite has no gradient either where it has no weight
    const auto counted = [](double weight, double x) { return weight == 0 && !std::isfinite(x) ? 0 : x; };
    const double of_kl = counted(kl_weight, kl) * pass.scale.kl, of_ce = counted(ce_weight, ce) * pass.scale.ce;
    pass.grad_alpha[i] = static_cast<A>(g * (of_kl - of_ce));
  }
  for (int64_t t = 0; pass.grad_weights && t < pr.teachers; ++t) {
    pass.grad_weights[i * pr.teachers + t] = kl_grad == 0 ? A(0) : static_cast<A>(kl_grad * dot(t));
  }
  return {kl_grad / tau, g * ce_weight * pass.scale.ce};
}

// The same of a row that is ignored.
template <class A>
AMTML_INLINE void write_ignored_row(const Problem<A>& pr, const Pass<A>& pass, int64_t i) {
  const int64_t size = statistics_size(pr.teachers);
  if (pass.grad_weights) std::fill_n(pass.grad_weights + i * pr.teachers, pr.teachers, A(0));
  if (pass.grad_alpha) pass.grad_alpha[i] = 0;
  if (pass.statistics) std::fill_n(pass.statistics + i * size, size, A(0));
}

}  // namespace amtml::divergences
