// Triplet angle loss by the law of cosines: value and gradient in one sweep over all triplets, O(N^2) memory.
//
//   psi(i, j, k) = 1/2 r_ij r_kj (D_ij + D_kj - D_ik),   D = squared distances, r = D^-1/2 or 0 where degenerate
//
// psi is symmetric in i, k, so pairs i < k are visited once. With g = clamp(psi_s - psi_t, -delta, delta) and
// h = 1/2 r_ij r_kj the gradient is
//   to D_kj (an arm):           sum_i g h - 1/2 r_kj^2 sum_i g psi
//   to D_ik (the far side):    -sum_j g h
// and from G = dL/dD:           dL/dx_i = 2 sum_j (G_ij + G_ji) (x_i - x_j).
// Rows are cut into blocks; a tile is a pair of blocks (i, k) and passes over the vertices j with its part of D and G
// in the first-level cache. Tiles that share no block run side by side, in an order that does not depend on the number
// of threads. kernels/README.md has the derivation, the precision and the measurements.
#include <algorithm>

#include "pairs.h"

namespace amtml {
namespace {

constexpr char kOp[] = "angle_loss";
constexpr int64_t kBlock = 64;  // rows of a block
constexpr int64_t kFlush = 64;  // vertices between two additions of a tile's far sides to G

// Two blocks of rows and a range of vertices.
struct Tile {
  int64_t i_block, k_block, first_vertex, last_vertex;
};

// What a tile writes: G of either side [n, stride], and the loss per vertex.
struct Sums {
  double *grad_first, *grad_second, *vertex_loss;
};

// Adds weight * the arms' gradient of vertex j to its row of G.
template <class A, class Sum>
AMTML_INLINE void add_arms(int64_t n, const A* r, const Sum* arm, const A* psi, double weight, double per_unit,
                           double* grad) {
#pragma omp simd
  for (int64_t k = 0; k < n; ++k) {
    const double rk = r[k];
    grad[k] += weight * (per_unit * arm[k] - 0.5 * rk * rk * psi[k]);
  }
}

// Distances in D (double, or int32_t fixed point), sums that must cancel in Sum, the rest in A. kGrads: of how many
// sides the gradient is asked for. Sums are made for the gradient of the first side; that of the second has the
// opposite sign.
template <class A, class D, class Sum, int kGrads>
AMTML_INLINE void run_tile(const Side<A>& first, const Side<A>& second, const Tile& tile, A delta,
                           const A* vertex_weight, const Sums& out) {
  constexpr int64_t kStrip = sizeof(D) == 4 ? 32 : 16;  // rows of the block at a time: what the cache holds
  const int64_t n = first.n, stride = first.stride;
  const D *d1 = first.template distances<D>(), *d2 = second.template distances<D>();
  const int64_t k0 = tile.k_block * kBlock, count = std::min(kBlock, stride - k0);  // padded
  const bool diagonal = tile.i_block == tile.k_block;
  const double per_unit1 = 1 / static_cast<double>(first.unit), per_unit2 = 1 / static_cast<double>(second.unit);
  alignas(64) D far1[kStrip * kBlock], far2[kStrip * kBlock];
  alignas(64) Sum far_sum1[kStrip * kBlock], far_sum2[kStrip * kBlock];
  alignas(64) Sum arm1[kBlock], arm2[kBlock], arm_i1[kStrip], arm_i2[kStrip];
  alignas(64) A psi1[kBlock], psi2[kBlock], psi_i1[kStrip], psi_i2[kStrip], rk1[kBlock], rk2[kBlock];
  const int64_t i_end = std::min((tile.i_block + 1) * kBlock, n);
  for (int64_t i0 = tile.i_block * kBlock; i0 < i_end; i0 += kStrip) {
    const int64_t strip = std::min(kStrip, i_end - i0);
    for (int64_t i = 0; i < strip; ++i) {
      std::copy_n(d1 + (i0 + i) * stride + k0, count, far1 + i * kBlock);
      std::copy_n(d2 + (i0 + i) * stride + k0, count, far2 + i * kBlock);
    }
    for (int64_t j0 = tile.first_vertex; j0 < tile.last_vertex; j0 += kFlush) {
      if (kGrads > 0) std::fill_n(far_sum1, strip * kBlock, Sum(0));
      if (kGrads > 1) std::fill_n(far_sum2, strip * kBlock, Sum(0));
      for (int64_t j = j0; j < std::min(j0 + kFlush, tile.last_vertex); ++j) {
        const D *dj1 = d1 + j * stride, *dj2 = d2 + j * stride;
        const A *rj1 = first.r.data() + j * stride, *rj2 = second.r.data() + j * stride;
        const D *dk1 = dj1 + k0, *dk2 = dj2 + k0;
        std::copy_n(rj1 + k0, count, rk1);
        std::copy_n(rj2 + k0, count, rk2);
        if (kGrads > 0) std::fill_n(arm1, count, Sum(0)), std::fill_n(psi1, count, A(0));
        if (kGrads > 1) std::fill_n(arm2, count, Sum(0)), std::fill_n(psi2, count, A(0));
        const Sum weight = static_cast<Sum>(vertex_weight ? vertex_weight[j] : A(1));
        double vertex = 0;
        for (int64_t i = 0; i < strip; ++i) {
          const A ri1 = rj1[i0 + i], ri2 = rj2[i0 + i];
          int64_t start = 0;
          if (diagonal) {  // pairs k <= i are counted at (k, i): without arms they add 0
            const int64_t self = i0 + i - k0;
            rk1[self] = rk2[self] = 0;
            start = (self + 1) / kLanes * kLanes;
          }
          Sum arm_sum1 = 0, arm_sum2 = 0;
          A psi_sum1 = 0, psi_sum2 = 0, loss = 0;
          if (ri1 != 0 || ri2 != 0) {
            const D dij1 = dj1[i0 + i], dij2 = dj2[i0 + i];
            const A half1 = ri1 / 2 * first.unit, half2 = ri2 / 2 * second.unit;
            const D *di1 = far1 + i * kBlock, *di2 = far2 + i * kBlock;
            Sum *fi1 = far_sum1 + i * kBlock, *fi2 = far_sum2 + i * kBlock;
#pragma omp simd reduction(+ : loss, arm_sum1, psi_sum1, arm_sum2, psi_sum2)
            for (int64_t k = start; k < count; ++k) {
              const A h1 = half1 * rk1[k], h2 = half2 * rk2[k];
              const A p1 = static_cast<A>(dij1 + dk1[k] - di1[k]) * h1;
              const A p2 = static_cast<A>(dij2 + dk2[k] - di2[k]) * h2;
              const A x = p1 - p2;
              const A above = x > delta ? delta : x;  // written so that NaN stays NaN
              const A g = above < -delta ? -delta : above;
              loss += g * (x - A(0.5) * g);
              if (kGrads > 0) {  // one rounded g h for the arms and the far side: they cancel exactly
                const Sum gh = static_cast<Sum>(g * h1);
                arm1[k] += gh;
                arm_sum1 += gh;
                fi1[k] += weight * gh;
                psi1[k] += g * p1;
                psi_sum1 += g * p1;
              }
              if (kGrads > 1) {
                const Sum gh = static_cast<Sum>(g * h2);
                arm2[k] += gh;
                arm_sum2 += gh;
                fi2[k] += weight * gh;
                psi2[k] += g * p2;
                psi_sum2 += g * p2;
              }
            }
          }
          vertex += loss;
          if (kGrads > 0) arm_i1[i] = arm_sum1, psi_i1[i] = psi_sum1;
          if (kGrads > 1) arm_i2[i] = arm_sum2, psi_i2[i] = psi_sum2;
        }
        out.vertex_loss[j] += 2 * vertex;  // both orders of each pair
        if (kGrads > 0) {
          double* row = out.grad_first + j * stride;
          add_arms(count, rj1 + k0, arm1, psi1, weight, per_unit1, row + k0);
          add_arms(strip, rj1 + i0, arm_i1, psi_i1, weight, per_unit1, row + i0);
        }
        if (kGrads > 1) {
          double* row = out.grad_second + j * stride;
          add_arms(count, rj2 + k0, arm2, psi2, weight, per_unit2, row + k0);
          add_arms(strip, rj2 + i0, arm_i2, psi_i2, weight, per_unit2, row + i0);
        }
      }
      auto add_far = [&](const Sum* sum, double per_unit, double* grad) __attribute__((always_inline)) {
        for (int64_t i = 0; i < strip; ++i) {
          double* row = grad + (i0 + i) * stride + k0;
#pragma omp simd
          for (int64_t k = 0; k < count; ++k) row[k] -= per_unit * sum[i * kBlock + k];
        }
      };
      if (kGrads > 0) add_far(far_sum1, per_unit1, out.grad_first);
      if (kGrads > 1) add_far(far_sum2, per_unit2, out.grad_second);
    }
  }
}

using Pair = std::pair<int64_t, int64_t>;

// Pairs of blocks in rounds: within a round no two pairs share a block. Round 0 pairs each block with itself, the
// others are those of a round-robin tournament (the circle method).
std::vector<std::vector<Pair>> rounds_of(int64_t blocks) {
  std::vector<std::vector<Pair>> rounds(1);
  for (int64_t b = 0; b < blocks; ++b) rounds[0].emplace_back(b, b);
  const int64_t seats = blocks + blocks % 2, turning = seats - 1;
  for (int64_t round = 0; round < turning && blocks > 1; ++round) {
    auto& pairs = rounds.emplace_back();
    for (int64_t seat = 0; seat < seats / 2; ++seat) {
      const int64_t a = (round + seat) % turning;
      const int64_t b = seat == 0 ? turning : (round + turning - seat) % turning;
      if (std::max(a, b) < blocks) pairs.emplace_back(std::min(a, b), std::max(a, b));
    }
  }
  return rounds;
}

// G + G^T, summed over the parts, in the first of them.
void symmetrize(const std::vector<std::vector<Pair>>& rounds, int64_t n, int64_t stride, int64_t parts, double* g) {
  for (const auto& pairs : rounds) {
    const int64_t tasks = static_cast<int64_t>(pairs.size());
    torch::stable::parallel_for(0, tasks, grain(2 * parts * kBlock * kBlock), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i0 = pairs[task].first * kBlock, j0 = pairs[task].second * kBlock;
        for (int64_t i = i0; i < std::min(i0 + kBlock, n); ++i) {
          for (int64_t j = std::max(j0, i); j < std::min(j0 + kBlock, n); ++j) {
            double sum = 0;
            for (int64_t p = 0; p < parts; ++p) sum += g[(p * n + i) * stride + j] + g[(p * n + j) * stride + i];
            g[i * stride + j] = g[j * stride + i] = sum;
          }
        }
      }
    });
  }
}

// i = k: psi is 1, or 0 where degenerate. That counts where one side alone is degenerate.
template <class A>
double diagonal_loss(const Side<A>& first, const Side<A>& second, int64_t j, A delta) {
  const A *r1 = first.r.data() + j * first.stride, *r2 = second.r.data() + j * first.stride;
  int64_t one_sided = 0;
  for (int64_t i = 0; i < first.n; ++i) one_sided += (r1[i] == 0) != (r2[i] == 0);
  const double g = std::min(A(1), delta);
  return static_cast<double>(one_sided) * (g * (1 - g / 2));
}

template <class A>
struct Result {
  std::vector<double> vertex_loss;  // [n], of the rows that were kept
  Tensor grad_first, grad_second;
};

template <class A>
struct Task {
  const std::vector<int64_t>& kept;
  Side<A> first, second;
  A delta;
  double scale;            // of the gradient
  const A* vertex_weight;  // [n], times each vertex' part of the gradient; or null for 1

  // Gradients of the first kGrads sides.
  template <class D, class Sum, int kGrads>
  Result<A> run(const Tensor& like_first, const Tensor& like_second) const {
    const int64_t n = first.n, stride = first.stride, blocks = (n + kBlock - 1) / kBlock;
    // Few blocks leave few tiles to run side by side; then the vertices are split, too, each part with a G of its own.
    const int64_t parts = std::clamp<int64_t>(std::min(1024 / std::max<int64_t>(n, 1), n / 16), 1, 8);
    const auto rounds = rounds_of(blocks);
    std::vector<double> g1(kGrads > 0 ? parts * n * stride : 0), g2(kGrads > 1 ? parts * n * stride : 0);
    std::vector<double> partial(std::max<int64_t>(blocks, 1) *
                                n);  // of the vertices' losses, one row a place in a round
    for (const auto& pairs : rounds) {
      const int64_t tasks = static_cast<int64_t>(pairs.size()) * parts;
      torch::stable::parallel_for(0, tasks, grain(kBlock * kBlock * n / parts), [&](int64_t begin, int64_t end) {
        vectorized([&] AMTML_BODY() {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t place = task / parts, part = task % parts;
            const auto [i_block, k_block] = pairs[place];
            const Tile tile{i_block, k_block, part * n / parts, (part + 1) * n / parts};
            const Sums out{g1.data() + (kGrads > 0 ? part * n * stride : 0),
                           g2.data() + (kGrads > 1 ? part * n * stride : 0), partial.data() + place * n};
            run_tile<A, D, Sum, kGrads>(first, second, tile, delta, vertex_weight, out);
          }
        });
      });
    }
    Result<A> result{std::vector<double>(n), torch::stable::new_empty(like_first, {0}, dtype_of<A>),
                     torch::stable::new_empty(like_first, {0}, dtype_of<A>)};
    for (int64_t j = 0; j < n; ++j) {
      double sum = diagonal_loss(first, second, j, delta);
      for (int64_t place = 0; place < blocks; ++place) sum += partial[place * n + j];
      result.vertex_loss[j] = sum;
    }
    if (kGrads > 0) {
      symmetrize(rounds, n, stride, parts, g1.data());
      result.grad_first = grad_rows(like_first, kept, first, g1.data(), 4 * scale);
    }
    if (kGrads > 1) {
      symmetrize(rounds, n, stride, parts, g2.data());
      result.grad_second = grad_rows(like_second, kept, second, g2.data(), -4 * scale);
    }
    return result;
  }

  template <class D, class Sum>
  Result<A> run(const Tensor& like_first, const Tensor& like_second, int grads) const {
    if (grads == 0) return run<D, Sum, 0>(like_first, like_second);
    if (grads == 1) return run<D, Sum, 1>(like_first, like_second);
    return run<D, Sum, 2>(like_first, like_second);
  }
};

struct Arguments {
  ScalarType wide;  // of the results
  ScalarType work;  // of the arithmetic: below eps = 1e-18 an r^2 can pass float's range, so all is made in double
  std::vector<int64_t> kept;  // the rows that take part

  Arguments(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& row_mask, double eps)
      : wide(student.scalar_type() == ScalarType::Double ? ScalarType::Double : wide_dtype(teacher.scalar_type())),
        work(eps < 1e-18 ? ScalarType::Double : wide) {
    STD_TORCH_CHECK(student.dim() == 2 && teacher.dim() == 2 && student.size(0) == teacher.size(0), kOp,
                    ": student and teacher must be [N, C] with the same N");
    if (row_mask) {
      check_shape(kOp, "row_mask", *row_mask, {student.size(0)});
      STD_TORCH_CHECK(row_mask->scalar_type() == ScalarType::Bool, kOp, ": row_mask must be bool");
    }
    const Tensor mask = row_mask ? torch::stable::contiguous(*row_mask) : student;
    const bool* keep = row_mask ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr;
    for (int64_t i = 0; i < student.size(0); ++i) {
      if (!keep || keep[i]) kept.push_back(i);
    }
  }

  // The gradients are scale * vertex_weight[j] times those of vertex j's loss.
  template <class A>
  Result<A> run(const Tensor& student, const Tensor& teacher, double delta, double eps, double scale,
                const A* vertex_weight, bool need_student, bool need_teacher) const {
    const bool swap = need_teacher && !need_student;  // the loss is the same with its sides exchanged
    const Tensor &one = swap ? teacher : student, &other = swap ? student : teacher;
    Task<A> task{kept, Side<A>(one, kept, eps), Side<A>(other, kept, eps), static_cast<A>(delta), scale, vertex_weight};
    const int grads = need_student + need_teacher;
    Result<A> result;
    bool fixed = false;
    if constexpr (std::is_same_v<A, float>) {
      fixed = task.first.fits_fixed_point() && task.second.fits_fixed_point();
      if (fixed) {
        task.first.quantize();
        task.second.quantize();
        result = task.template run<int32_t, float>(one, other, grads);
      }
    }
    if (!fixed) result = task.template run<double, double>(one, other, grads);
    if (swap) std::swap(result.grad_first, result.grad_second);
    return result;
  }

  Tensor finish(const Tensor& t) const { return work == wide ? t : torch::stable::to(t, wide); }
};

std::tuple<Tensor, Tensor, Tensor> angle_fwd(const Tensor& student, const Tensor& teacher,
                                             std::optional<Tensor> row_mask, double delta, double eps,
                                             std::string reduction, bool need_student_grad, bool need_teacher_grad) {
  const Arguments args(student, teacher, row_mask, eps);
  const bool none = reduction == "none";
  const double m = static_cast<double>(args.kept.size());
  double count = 1;
  if (reduction == "mean") count = m * m * m;
  if (reduction == "distinct") count = m * (m - 1) * (m - 2);
  if (none) count = m * m;
  const double scale = reduction == "distinct" && m < 3 ? 0 : 1 / std::max(count, 1.0);  // no triplet: 0
  Tensor loss = torch::stable::new_empty(student, none ? Shape{student.size(0)} : Shape{}, args.work);
  Tensor grad_student, grad_teacher;
  dispatch_wide(args.work, [&](auto zero) {
    using A = decltype(zero);
    const A* no_weight = nullptr;
    auto result = args.run<A>(student, teacher, delta, eps, scale, no_weight, need_student_grad && !none,
                              need_teacher_grad && !none);
    A* out = static_cast<A*>(loss.mutable_data_ptr());
    double total = 0;
    if (none) std::fill_n(out, student.size(0), A(0));
    for (size_t j = 0; j < args.kept.size(); ++j) {
      total += result.vertex_loss[j];
      if (none) out[args.kept[j]] = static_cast<A>(result.vertex_loss[j] * scale);
    }
    if (!none) out[0] = static_cast<A>(total * scale);
    grad_student = result.grad_first;
    grad_teacher = result.grad_second;
  });
  return {args.finish(loss), args.finish(grad_student), args.finish(grad_teacher)};
}

std::tuple<Tensor, Tensor> angle_bwd(const Tensor& grad_loss, const Tensor& student, const Tensor& teacher,
                                     std::optional<Tensor> row_mask, double delta, double eps, bool need_student_grad,
                                     bool need_teacher_grad) {
  const Arguments args(student, teacher, row_mask, eps);
  check_shape(kOp, "grad_loss", grad_loss, {student.size(0)});
  const double m = static_cast<double>(args.kept.size());
  Tensor grad_student, grad_teacher;
  dispatch_wide(args.work, [&](auto zero) {
    using A = decltype(zero);
    const Tensor incoming = torch::stable::to(torch::stable::contiguous(grad_loss), args.work);
    const A* all = static_cast<const A*>(incoming.const_data_ptr());
    std::vector<A> weight;
    for (const int64_t row : args.kept) weight.push_back(all[row]);
    auto result = args.run<A>(student, teacher, delta, eps, 1 / std::max(m * m, 1.0), weight.data(), need_student_grad,
                              need_teacher_grad);
    grad_student = result.grad_first;
    grad_teacher = result.grad_second;
  });
  return {args.finish(grad_student), args.finish(grad_teacher)};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("angle_fwd", TORCH_BOX(&angle_fwd));
  m.impl("angle_bwd", TORCH_BOX(&angle_bwd));
}

}  // namespace
}  // namespace amtml
