// Triplet angle loss by the law of cosines: value and gradient in one loop over vertices, O(N^2) memory.
//
//   psi(i, j, k) = 1/2 r_ij r_kj (D_ij + D_kj - D_ik),   D = squared distances, r = D^-1/2 or 0 where degenerate
//
// psi is symmetric in i, k, so pairs i < k are visited once. With g = clamp(psi_s - psi_t, -delta, delta) the gradient
// is
//   to D_kj (an arm):          sum_i g (1/2 r_ij r_kj - 1/2 r_kj^2 psi) = 1/2 r_kj (sum_i g r_ij) - 1/2 r_kj^2 (sum_i g
//   psi) to D_ik (the far side):    -sum_j g 1/2 r_ij r_kj
// and from G = dL/dD:          dL/dx_i = 2 sum_j (G_ij + G_ji) (x_i - x_j).
// D, the sum in brackets, the arms' sums and G are made in float64: they cancel when one arm is much shorter than the
// other, which is what the rows of a trained network look like. The rest is in A. kernels/README.md has the derivation.
#include <algorithm>
#include <limits>

#include "simd.h"

namespace amtml {
namespace {

constexpr char kOp[] = "angle_loss";
constexpr int64_t kGradBytes = 600 << 20;  // that the threads' gradient matrices may take together

struct Rows {  // one side of the loss
  int64_t n = 0, width = 0;
  std::vector<double> x;         // [n, width]
  std::vector<double> distance;  // [n, n] squared; 0 for masked rows

  Rows(const Tensor& t, const bool* mask) : n(t.size(0)), width(t.size(1)), x(n * width), distance(n * n) {
    const Matrix m(t);
    for (int64_t i = 0; i < n; ++i) {
      double* row = x.data() + i * width;
      const double* loaded = load_row<double>(m, i, width, row);
      if (loaded != row) std::copy(loaded, loaded + width, row);
      if (mask && !mask[i]) std::fill(row, row + width, 0.0);
    }
    torch::stable::parallel_for(0, n, grain(n * width), [&](int64_t begin, int64_t end) {
      vectorized([&] AMTML_BODY() {
        for (int64_t i = begin; i < end; ++i) {
          const double* a = x.data() + i * width;
          for (int64_t j = 0; j < n; ++j) {  // both halves: each thread writes its own rows only
            const double* b = x.data() + j * width;
            double sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t c = 0; c < width; ++c) sum += (a[c] - b[c]) * (a[c] - b[c]);
            distance[i * n + j] = mask && !(mask[i] && mask[j]) ? 0 : sum;
          }
        }
      });
    });
  }
};

// r of all arms of vertex j. NaN stays NaN: `>` alone would take it for degenerate.
template <class A>
AMTML_INLINE void inverse_lengths(const double* distance, int64_t n, double eps, A* r) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const double d = distance[k];
    r[k] = d <= eps * eps ? A(0) : static_cast<A>(1 / std::sqrt(d));
  }
}

template <class A>
struct Vertex {               // the working arrays of one thread, for one side
  std::vector<A> r, arm_psi;  // r_kj; sum_i g psi
  std::vector<double> arm;    // sum_i g r_ij
  explicit Vertex(int64_t n) : r(n), arm_psi(n), arm(n) {}
};

// The loss of vertex j, and scale * its gradient to D added to grad_s, grad_t [n, n] where asked for.
template <class A, bool kStudent, bool kTeacher>
AMTML_INLINE double vertex_loss(int64_t j, const Rows& student, const Rows& teacher, A delta, double eps, double scale,
                                Vertex<A>& vs, Vertex<A>& vt, double* grad_s, double* grad_t) {
  const int64_t n = student.n;
  const double *dj_s = student.distance.data() + j * n, *dj_t = teacher.distance.data() + j * n;
  A *rs = vs.r.data(), *rt = vt.r.data();
  inverse_lengths(dj_s, n, eps, rs);
  inverse_lengths(dj_t, n, eps, rt);
  double *arm_s = vs.arm.data(), *arm_t = vt.arm.data();
  A *psi_s = vs.arm_psi.data(), *psi_t = vt.arm_psi.data();
  if (kStudent) std::fill_n(arm_s, n, 0.0), std::fill_n(psi_s, n, A(0));
  if (kTeacher) std::fill_n(arm_t, n, 0.0), std::fill_n(psi_t, n, A(0));

  double pairs = 0, diagonal = 0;
  for (int64_t i = 0; i < n; ++i) {
    const A ri_s = rs[i], ri_t = rt[i];
    if (ri_s == 0 && ri_t == 0) continue;  // degenerate on both sides: nothing from here
    if (ri_s == 0 || ri_t == 0) {          // i = k: psi is 1 on one side and 0 on the other
      const A g = std::min(A(1), delta);
      diagonal += g * (1 - g / 2);
    }
    const double *di_s = student.distance.data() + i * n, *di_t = teacher.distance.data() + i * n;
    const double dij_s = dj_s[i], dij_t = dj_t[i];
    double *far_s = grad_s + i * n, *far_t = grad_t + i * n;
    const A half_s = ri_s / 2, half_t = ri_t / 2;
    const double scale_s = scale * ri_s, scale_t = scale * ri_t;
    A loss = 0, psi_i_s = 0, psi_i_t = 0;
    double arm_i_s = 0, arm_i_t = 0;
#pragma omp simd reduction(+ : loss, arm_i_s, psi_i_s, arm_i_t, psi_i_t)
    for (int64_t k = i + 1; k < n; ++k) {
      const A ps = static_cast<A>(dij_s + dj_s[k] - di_s[k]) * (half_s * rs[k]);
      const A pt = static_cast<A>(dij_t + dj_t[k] - di_t[k]) * (half_t * rt[k]);
      const A x = ps - pt;
      const A above = x > delta ? delta : x;  // written so that NaN stays NaN
      const A g = above < -delta ? -delta : above;
      loss += g * (x - A(0.5) * g);
      if (kStudent) {
        const double along = static_cast<double>(g) * rs[k];
        arm_s[k] += static_cast<double>(g) * ri_s;
        arm_i_s += along;
        psi_s[k] += g * ps;
        psi_i_s += g * ps;
        far_s[k] -= along * scale_s;
      }
      if (kTeacher) {
        const double along = static_cast<double>(g) * rt[k];
        arm_t[k] += static_cast<double>(g) * ri_t;
        arm_i_t += along;
        psi_t[k] += g * pt;
        psi_i_t += g * pt;
        far_t[k] += along * scale_t;
      }
    }
    pairs += loss;
    if (kStudent) arm_s[i] += arm_i_s, psi_s[i] += psi_i_s;
    if (kTeacher) arm_t[i] += arm_i_t, psi_t[i] += psi_i_t;
  }
  auto add_arms = [&](const A* r, const double* arm, const A* psi, double sign, double* grad)
                      __attribute__((always_inline)) {
#pragma omp simd
                        for (int64_t k = 0; k < n; ++k)
                          grad[j * n + k] += sign * r[k] * (arm[k] - static_cast<double>(r[k]) * psi[k]);
                      };
  if (kStudent) add_arms(rs, arm_s, psi_s, scale, grad_s);
  if (kTeacher) add_arms(rt, arm_t, psi_t, -scale, grad_t);
  return 2 * pairs + diagonal;  // both orders of each pair; `scale` carries the same 2 against the 1/2 of the gradient
}

// dL/dx from the parts of G that each thread gathered. Overwrites parts[0].
template <class A>
Tensor grad_rows(const Tensor& like, ScalarType wide, const Rows& rows, std::vector<std::vector<double>>& parts) {
  const int64_t n = rows.n, width = rows.width;
  Tensor grad = torch::stable::new_empty(like, {n, width}, wide);
  A* out = static_cast<A*>(grad.mutable_data_ptr());
  double* g = parts[0].data();
  for (size_t p = 1; p < parts.size(); ++p) {
    torch::stable::parallel_for(0, n * n, grain(1), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) g[i] += parts[p][i];
    });
  }
  constexpr int64_t tile = 32;
  for (int64_t i0 = 0; i0 < n; i0 += tile) {
    for (int64_t j0 = i0; j0 < n; j0 += tile) {
      for (int64_t i = i0; i < std::min(i0 + tile, n); ++i) {
        for (int64_t j = std::max(j0, i); j < std::min(j0 + tile, n); ++j) {
          g[i * n + j] = g[j * n + i] = g[i * n + j] + g[j * n + i];
        }
      }
    }
  }
  torch::stable::parallel_for(0, n, grain(n * width), [&](int64_t begin, int64_t end) {
    std::vector<double> sum(width);
    vectorized([&] AMTML_BODY() {
      for (int64_t i = begin; i < end; ++i) {
        std::fill(sum.begin(), sum.end(), 0.0);
        const double* a = rows.x.data() + i * width;
        double* s = sum.data();
        for (int64_t j = 0; j < n; ++j) {
          const double* b = rows.x.data() + j * width;
          const double weight = g[i * n + j];
          if (i == j) continue;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) s[c] += weight * (a[c] - b[c]);  // differences: the common offset cancels
        }
        for (int64_t c = 0; c < width; ++c) out[i * width + c] = static_cast<A>(2 * s[c]);
      }
    });
  });
  return grad;
}

template <class A>
struct Result {
  std::vector<double> vertex_loss;
  Tensor grad_student, grad_teacher;
};

// scale(j) weighs vertex j's loss in the gradient.
template <class A, class Scale>
Result<A> run(const Tensor& student, const Tensor& teacher, const bool* mask, double delta, double eps,
              const Scale& scale, bool need_student, bool need_teacher, ScalarType wide) {
  const Rows s(student, mask), t(teacher, mask);
  const int64_t n = s.n;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t bytes = std::max<int64_t>(1, n * n * 8 * (need_student + need_teacher));  // of one part
  const int64_t parts = std::max<int64_t>(1, std::min({threads, n, n * n * n / 65536, kGradBytes / bytes}));
  using Grads = std::vector<std::vector<double>>;
  Grads grads_s(parts), grads_t(parts);  // one matrix a part: no atomics, a fixed order of summation
  Result<A> result{std::vector<double>(n), torch::stable::new_empty(student, {0}, wide),
                   torch::stable::new_empty(student, {0}, wide)};
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t part = first; part < last; ++part) {
      if (need_student) grads_s[part].assign(n * n, 0.0);
      if (need_teacher) grads_t[part].assign(n * n, 0.0);
      Vertex<A> vs(n), vt(n);
      auto vertices = [&](auto student_grad, auto teacher_grad) {
        vectorized([&] AMTML_BODY() {
          for (int64_t j = part * n / parts; j < (part + 1) * n / parts; ++j) {
            result.vertex_loss[j] = vertex_loss<A, decltype(student_grad)::value, decltype(teacher_grad)::value>(
                j, s, t, static_cast<A>(delta), eps, static_cast<double>(scale(j)), vs, vt, grads_s[part].data(),
                grads_t[part].data());
          }
        });
      };
      using Yes = std::true_type;
      using No = std::false_type;
      if (need_student && need_teacher) {
        vertices(Yes{}, Yes{});
      } else if (need_student) {
        vertices(Yes{}, No{});
      } else if (need_teacher) {
        vertices(No{}, Yes{});
      } else {
        vertices(No{}, No{});
      }
    }
  });
  if (n > 0 && need_student) result.grad_student = grad_rows<A>(student, wide, s, grads_s);
  if (n > 0 && need_teacher) result.grad_teacher = grad_rows<A>(teacher, wide, t, grads_t);
  if (n == 0 && need_student) result.grad_student = torch::stable::new_empty(student, {0, s.width}, wide);
  if (n == 0 && need_teacher) result.grad_teacher = torch::stable::new_empty(teacher, {0, t.width}, wide);
  return result;
}

struct Arguments {
  ScalarType wide;      // of the results
  ScalarType work;      // of the arithmetic: below eps = 1e-18 an r^2 can pass float's range, so all is made in double
  Tensor mask_storage;  // keeps the contiguous mask alive
  const bool* mask = nullptr;
  int64_t rows;  // that take part

  Arguments(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& row_mask, double eps)
      : wide(student.scalar_type() == ScalarType::Double ? ScalarType::Double : wide_dtype(teacher.scalar_type())),
        work(eps < 1e-18 ? ScalarType::Double : wide),
        rows(student.size(0)) {
    STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0), kOp,
                    ": student and teacher must be [N, C] with the same N");
    if (!row_mask) return;
    check_shape(kOp, "row_mask", *row_mask, {student.size(0)});
    STD_TORCH_CHECK(row_mask->scalar_type() == ScalarType::Bool, kOp, ": row_mask must be bool");
    mask_storage = torch::stable::contiguous(*row_mask);
    mask = static_cast<const bool*>(mask_storage.const_data_ptr());
    rows = std::count(mask, mask + student.size(0), true);
  }

  Tensor finish(const Tensor& t) const { return work == wide ? t : torch::stable::to(t, wide); }
};

std::tuple<Tensor, Tensor, Tensor> angle_fwd(const Tensor& student, const Tensor& teacher,
                                             std::optional<Tensor> row_mask, double delta, double eps,
                                             std::string reduction, bool need_student_grad, bool need_teacher_grad) {
  const Arguments args(student, teacher, row_mask, eps);
  const bool none = reduction == "none";
  const double m = static_cast<double>(args.rows);
  double count = 1;
  if (reduction == "mean") count = m * m * m;
  if (reduction == "distinct") count = m * (m - 1) * (m - 2);
  if (none) count = m * m;
  const double scale = reduction == "distinct" && args.rows < 3 ? 0 : 1 / std::max(count, 1.0);  // no triplet: 0
  Tensor loss = torch::stable::new_empty(student, none ? Shape{student.size(0)} : Shape{}, args.work);
  Tensor grad_student, grad_teacher;
  dispatch_wide(args.work, [&](auto zero) {
    using A = decltype(zero);
    auto result = run<A>(
        student, teacher, args.mask, delta, eps, [=](int64_t) { return scale; }, need_student_grad && !none,
        need_teacher_grad && !none, args.work);
    A* out = static_cast<A*>(loss.mutable_data_ptr());
    double total = 0;
    for (int64_t j = 0; j < student.size(0); ++j) {
      total += result.vertex_loss[j];
      if (none) out[j] = static_cast<A>(result.vertex_loss[j] * scale);
    }
    if (!none) out[0] = static_cast<A>(total * scale);
    grad_student = result.grad_student;
    grad_teacher = result.grad_teacher;
  });
  return {args.finish(loss), args.finish(grad_student), args.finish(grad_teacher)};
}

std::tuple<Tensor, Tensor> angle_bwd(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                     std::optional<Tensor> row_mask, double delta, double eps, bool need_student_grad,
                                     bool need_teacher_grad) {
  const Arguments args(student, teacher, row_mask, eps);
  check_shape(kOp, "grad_loss", grad_loss, {student.size(0)});
  const double scale = 1 / std::max(static_cast<double>(args.rows) * args.rows, 1.0);
  Tensor grad_student, grad_teacher;
  dispatch_wide(args.work, [&](auto zero) {
    using A = decltype(zero);
    const Tensor incoming = torch::stable::to(torch::stable::contiguous(grad_loss), args.work);
    const A* g = static_cast<const A*>(incoming.const_data_ptr());
    auto result = run<A>(
        student, teacher, args.mask, delta, eps, [=](int64_t j) { return g[j] * scale; }, need_student_grad,
        need_teacher_grad, args.work);
    grad_student = result.grad_student;
    grad_teacher = result.grad_teacher;
  });
  return {args.finish(grad_student), args.finish(grad_teacher)};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("angle_fwd", TORCH_BOX(&angle_fwd));
  m.impl("angle_bwd", TORCH_BOX(&angle_bwd));
}

}  // namespace
}  // namespace amtml
