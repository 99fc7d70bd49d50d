// RKD's distance loss: distances over their mean, compared pair by pair.
//
//   psi_ij = d_ij / mu,  mu = mean of d over the pairs that are not degenerate (K of them, ordered)
//   L = sum_ij huber_delta(psi_s - psi_t),  g = clamp(psi_s - psi_t, -delta, delta)
//   dL/dd_ij = (g_ij - (sum g psi) / K) / mu,  dL/dx_i = 2 sum_j dL/dd_ij (x_i - x_j) / d_ij
// Degenerate pairs have psi 0 and no gradient. All in float64: beside the distances themselves it costs nothing.
#include "../arithmetic.h"
#include "pairs.h"

namespace amtml {
namespace {

constexpr char kOp[] = "rkd_distance_loss";

// body(i) for all rows, each of n elements, in parallel.
template <class Body>
void for_rows(int64_t n, const Body& body) {
  torch::stable::parallel_for(0, n, grain(n), [&](int64_t begin, int64_t end) {
    vectorized([&] AMTML_BODY() {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  });
}

double sum_of(const std::vector<double>& rows) {
  double total = 0;
  for (const double row : rows) total += row;
  return total;
}

template <class A>
struct Normalized {  // one side
  const Side<A>& side;
  double mean, pairs;

  explicit Normalized(const Side<A>& s) : side(s) {
    const int64_t n = side.n;
    std::vector<double> sum(n), count(n);
    for_rows(n, [&] AMTML_BODY(int64_t i) {
      const double* d = side.distance.data() + i * side.stride;
      const A* r = side.r.data() + i * side.stride;
      double row_sum = 0, row_count = 0;
#pragma omp simd reduction(+ : row_sum, row_count)
      for (int64_t j = 0; j < n; ++j) {
        row_sum += r[j] == 0 ? 0 : std::sqrt(d[j]);
        row_count += r[j] == 0 ? 0 : 1;
      }
      sum[i] = row_sum;
      count[i] = row_count;
    });
    pairs = std::max(sum_of(count), 1.0);
    mean = sum_of(count) > 0 ? sum_of(sum) / pairs : 1;
  }

  AMTML_INLINE double psi(int64_t i, int64_t j) const {
    return side.r[i * side.stride + j] == 0 ? 0 : std::sqrt(side.distance[i * side.stride + j]) / mean;
  }

  // dL/dd over d, from g [n, stride] and the sum of g psi.
  std::vector<double> grad(const std::vector<double>& g, double g_psi) const {
    std::vector<double> out(g.size());
    for_rows(side.n, [&] AMTML_BODY(int64_t i) {
      const A* r = side.r.data() + i * side.stride;
      const double *from = g.data() + i * side.stride, level = g_psi / pairs;
      double* to = out.data() + i * side.stride;
#pragma omp simd
      for (int64_t j = 0; j < side.n; ++j) to[j] = r[j] == 0 ? 0 : (from[j] - level) / mean * r[j];
    });
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor> distance_fwd(const Tensor& student, const Tensor& teacher, double delta, double eps,
                                                Name reduction, bool need_student_grad, bool need_teacher_grad) {
  STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0), kOp,
                  ": student and teacher must be [N, C] with the same N");
  const bool is_double = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  const int64_t n = student.size(0);
  const double rows = static_cast<double>(n);
  double count = 1;
  if (reduction == "mean") count = rows * rows;
  if (reduction == "distinct") count = rows * (rows - 1);
  const double scale = 1 / std::max(count, 1.0);
  std::vector<int64_t> all(n);
  for (int64_t i = 0; i < n; ++i) all[i] = i;
  Tensor loss = empty(student, {}, wide);
  Tensor grad_student = empty_or_none(student, false, {}, wide), grad_teacher = empty_or_none(student, false, {}, wide);
  // r = 1 / d passes float's range below distances of 1e-38; eps may allow them
  dispatch_wide(is_double || eps < 1e-18 ? ScalarType::Double : ScalarType::Float, [&](auto zero) {
    using A = decltype(zero);
    const Side<A> s(student, all, eps), t(teacher, all, eps);
    const Normalized<A> ns(s), nt(t);
    const bool need_grad = need_student_grad || need_teacher_grad;
    std::vector<double> g(need_grad ? n * s.stride : 0), total(n), g_psi_s(n), g_psi_t(n);
    for_rows(n, [&] AMTML_BODY(int64_t i) {
      double sum = 0, sum_s = 0, sum_t = 0;
      for (int64_t j = 0; j < n; ++j) {
        const double ps = ns.psi(i, j), pt = nt.psi(i, j), x = ps - pt, slope = clamped(x, delta);
        sum += huber(x, slope, 0.5);
        sum_s += slope * ps;
        sum_t += slope * pt;
        if (need_grad) g[i * s.stride + j] = slope;
      }
      total[i] = sum;
      g_psi_s[i] = sum_s;
      g_psi_t[i] = sum_t;
    });
    const double value = sum_of(total) * scale;
    if (is_double) {
      *static_cast<double*>(loss.mutable_data_ptr()) = value;
    } else {
      *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(value);
    }
    auto back = [&](const Tensor& like, const Normalized<A>& side, double g_psi, double sign) {
      const std::vector<double> weight = side.grad(g, g_psi);
      const Tensor grad = grad_rows(like, all, side.side, weight.data(), sign * 2 * scale);
      return converted(grad, wide);
    };
    if (need_student_grad) grad_student = back(student, ns, sum_of(g_psi_s), 1);
    if (need_teacher_grad) grad_teacher = back(teacher, nt, sum_of(g_psi_t), -1);
  });
  return {loss, grad_student, grad_teacher};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) { m.impl("distance_fwd", TORCH_BOX(&distance_fwd)); }

}  // namespace
}  // namespace amtml
