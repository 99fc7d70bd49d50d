// Triplet angle loss by the law of cosines: value and gradient in one sweep over all triplets, O(N^2) memory.
//
//   psi(i, j, k) = 1/2 r_ij r_kj (D_ij + D_kj - D_ik),   D = squared distances, r = D^-1/2 or 0 where degenerate
//
// psi is symmetric in i, k, so pairs i < k are visited once. With g = clamp(psi_s - psi_t, -delta, delta) and
// h = 1/2 r_ij r_kj the gradient is
//   to D_kj (an arm):           sum_i g h - 1/2 r_kj^2 sum_i g psi
//   to D_ik (the far side):    -sum_j g h
// and from G = dL/dD:           dL/dx_i = 2 sum_j (G_ij + G_ji) (x_i - x_j).
// Where one arm is much longer than the other, u = D_ij + D_kj - D_ik is a small part of D: of squared distances off by
// a part e each, psi is off by e times the ratio of its arms. A double has e = 2^-53, times C^1/2 or so. If the longest
// distance of a side is more than 2^25 times the shortest (2^14 where results are double), D has two terms:
// Side::split. Rows are cut into blocks; a tile is a pair of blocks (i, k) and passes over the vertices j with its part
// of D and G in the first-level cache. Tiles that share no block run side by side, in an order that does not depend on
// the number of threads. kernels/README.md has the derivation, the precision and the measurements.
#include <algorithm>
#include <memory>

#include "../arithmetic.h"
#include "ops.h"
#include "pairs.h"

namespace amtml {
namespace {

constexpr char kOp[] = "angle_loss";
constexpr int64_t kBlock = 64;  // rows of a block

// Two blocks of rows and a range of vertices.
struct Tile {
  int64_t i_block, k_block, first_vertex, last_vertex;
};

// Squared distances as they enter sums, in units of Side::unit: 32-bit fixed point, or float64 with the unit 2, so that
// the 1/2 of psi is in it.
template <class D>
AMTML_INLINE D in_units(double distance, double per_unit) {
  if constexpr (std::is_same_v<D, int32_t>) return static_cast<int32_t>(distance * per_unit + 0.5);
  return distance * per_unit;
}

// One row at kLanes vertices: what its arms are, and the sums that belong to them. r is scaled by (unit / 2)^1/2, so
// that the product of two is h per unit of distance.
template <class A, class D, int kTerms, class Sum, int kLanes, int kGrads>
struct alignas(64) Cell {
  D distance[kTerms][2][kLanes];
  A r[2][kLanes];
  Sum arm[kGrads][kLanes];  // sum g h
  A psi[kGrads][kLanes];    // sum g psi
};

// A block of rows over a range of vertices. The rows of one vector of vertices lie side by side: the order in which the
// innermost loop meets them.
template <class A, class D, int kTerms, class Sum, int kLanes, int kVectors, int kGrads>
struct Block {
  Cell<A, D, kTerms, Sum, kLanes, kGrads> cell[kVectors][kBlock];

  AMTML_INLINE void load(const Side<A>* const (&sides)[2], int64_t i0, int64_t rows, int64_t j0, int64_t vectors) {
    for (int s = 0; s < 2; ++s) {
      const double per_unit = 1 / static_cast<double>(sides[s]->unit);
      const A scale = std::sqrt(sides[s]->unit / 2);  // exact: a power of 2
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t from = (i0 + i) * sides[s]->stride + j0;
        for (int64_t v = 0; v < vectors; ++v) {
          auto& c = cell[v][i];
          const A* r = sides[s]->r.data() + from + v * kLanes;
          for (int t = 0; t < kTerms; ++t) {
            const double* distance = sides[s]->term(t) + from + v * kLanes;
#pragma omp simd
            for (int l = 0; l < kLanes; ++l) c.distance[t][s][l] = in_units<D>(distance[l], per_unit);
          }
#pragma omp simd
          for (int l = 0; l < kLanes; ++l) c.r[s][l] = r[l] * scale;
          for (int l = 0; s < kGrads && l < kLanes; ++l) c.arm[s][l] = 0, c.psi[s][l] = 0;
        }
      }
    }
  }

  // Adds the gradient of the arms to G of either side.
  AMTML_INLINE void store(const Side<A>* const (&sides)[2], int64_t i0, int64_t rows, int64_t j0, int64_t vectors,
                          const A* weight, double* const (&grad)[2]) const {
    for (int s = 0; s < kGrads; ++s) {
      const double per_unit = 1 / static_cast<double>(sides[s]->unit);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t v = 0; v < vectors; ++v) {
          const auto& c = cell[v][i];
          double* g = grad[s] + (i0 + i) * sides[s]->stride + j0 + v * kLanes;
#pragma omp simd
          for (int l = 0; l < kLanes; ++l) {
            const double r = c.r[s][l];
            g[l] += weight[v * kLanes + l] * per_unit * arm_gradient<double>(c.arm[s][l], r, c.psi[s][l]);
          }
        }
      }
    }
  }
};

// Row i, a cell of it, with the rows k of b: everything that is summed over k stays in registers. far_distance are the
// D_ik of both sides, far_sum [k] what belongs to them. One rounded g h goes to the arms and to the far side: there
// they cancel exactly.
template <class A, class D, int kTerms, class Sum, int kLanes, int kGrads>
AMTML_INLINE void sweep(Cell<A, D, kTerms, Sum, kLanes, kGrads>& a, Cell<A, D, kTerms, Sum, kLanes, kGrads>* b,
                        int64_t k_begin, int64_t k_end, const D (&far_distance)[kTerms][2][kBlock],
                        Sum (*far_sum)[kBlock][kLanes], A delta, const A* weight, A* loss) {
  constexpr int kParts = sizeof(Sum) / sizeof(A);  // registers of doubles for one of A
  using Values = Lanes<A, kLanes, 1>;
  using Distances = Lanes<D, kLanes, kParts>;
  using Sums = Lanes<Sum, kLanes, kParts>;
  Distances distance[kTerms][2];
  for (int t = 0; t < kTerms; ++t) {
    for (int s = 0; s < 2; ++s) distance[t][s] = Distances::load(a.distance[t][s]);
  }
  const Values r[2] = {Values::load(a.r[0]), Values::load(a.r[1])}, half = Values::all(A(0.5));
  const Values highest = Values::all(delta), lowest = Values::all(-delta);
  const Sums w = Values::load(weight).template to<Sum, kParts>();
  Values total = Values::all(0), psi_a[2] = {total, total};
  const Sums zero = Sums::all(0);
  Sums arm_a[2] = {zero, zero};
  for (int64_t k = k_begin; k < k_end; ++k) {
    auto& c = b[k];
    Values h[2], psi[2];
    for (int s = 0; s < 2; ++s) {
      Distances u = between_arms(distance[0][s], Distances::load(c.distance[0][s]), far_distance[0][s][k]);
      for (int t = 1; t < kTerms; ++t) {
        u = u + between_arms(distance[t][s], Distances::load(c.distance[t][s]), far_distance[t][s][k]);
      }
      h[s] = r[s] * Values::load(c.r[s]);
      psi[s] = u.template to<A, 1>() * h[s];
    }
    const Values x = psi[0] - psi[1];
    const Values g = most(lowest, least(highest, x));  // NaN stays NaN
    total = total + huber(x, g, half);
    for (int s = 0; s < kGrads; ++s) {  // that of the second side has the opposite sign
      const Values gpsi = g * psi[s];
      const Sums gh = (g * h[s]).template to<Sum, kParts>();
      arm_a[s] = arm_a[s] + gh;
      psi_a[s] = psi_a[s] + gpsi;
      gh.add_to(c.arm[s]);
      gpsi.add_to(c.psi[s]);
      (w * gh).add_to(far_sum[s][k]);
    }
  }
  for (int s = 0; s < kGrads; ++s) arm_a[s].add_to(a.arm[s]), psi_a[s].add_to(a.psi[s]);
  total.add_to(loss);
}

// grad[k] -= per_unit * the sum over the lanes of far_sum[k]. As a tree: in a chain each addition waits for the last.
template <int kLanes, class Sum>
AMTML_INLINE void reduce_far(Sum (*far_sum)[kLanes], int64_t k_begin, int64_t k_end, double per_unit, double* grad) {
  for (int64_t k = k_begin; k < k_end; ++k) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
      for (int l = 0; l < half; ++l) far_sum[k][l] += far_sum[k][l + half];
    }
    grad[k] -= per_unit * static_cast<double>(far_sum[k][0]);
  }
}

// Distances in D (double, or int32_t fixed point), as sums of kTerms of them; sums that must cancel in Sum, the rest in
// A. kGrads: of how many sides the gradient is asked for.
template <int kLanes, int kVectors, class A, class D, int kTerms, class Sum, int kGrads>
AMTML_INLINE void run_tile(const Side<A>* const (&sides)[2], const Tile& tile, A delta, const A* vertex_weight,
                           Block<A, D, kTerms, Sum, kLanes, kVectors, kGrads>* blocks, double* const (&grad)[2],
                           double* vertex_loss) {
  constexpr int kColumns = kLanes * kVectors;  // vertices at a time
  constexpr int64_t kStrip = 4;                // rows i at a time: their far sums stay in cache
  const bool diagonal = tile.i_block == tile.k_block;
  auto &block_i = blocks[0], &block_k = blocks[diagonal ? 0 : 1];
  const int64_t n = sides[0]->n, stride = sides[0]->stride;
  const int64_t i0 = tile.i_block * kBlock, rows_i = std::min(kBlock, n - i0);
  const int64_t k0 = tile.k_block * kBlock, rows_k = std::min(kBlock, n - k0);
  const double per_unit[2] = {1 / static_cast<double>(sides[0]->unit), 1 / static_cast<double>(sides[1]->unit)};
  for (int64_t j0 = tile.first_vertex; j0 < tile.last_vertex; j0 += kColumns) {
    const int64_t columns = std::min<int64_t>(kColumns, tile.last_vertex - j0), vectors = columns / kLanes;
    alignas(64) A weight[kColumns];
    double loss[kColumns] = {};
    for (int64_t j = 0; j < columns; ++j) weight[j] = vertex_weight && j0 + j < n ? vertex_weight[j0 + j] : A(1);
    block_i.load(sides, i0, rows_i, j0, vectors);
    if (!diagonal) block_k.load(sides, k0, rows_k, j0, vectors);
    for (int64_t is = 0; is < rows_i; is += kStrip) {
      const int64_t i_end = std::min(is + kStrip, rows_i);
      alignas(64) A strip_loss[kColumns] = {};
      alignas(64) D far_distance[kStrip][kTerms][2][kBlock];
      alignas(64) Sum far_sum[kStrip][kGrads > 0 ? kGrads : 1][kBlock][kLanes];
      for (int64_t i = is; i < i_end; ++i) {
        for (int s = 0; s < 2; ++s) {
          for (int t = 0; t < kTerms; ++t) {
            const double* d = sides[s]->term(t) + (i0 + i) * stride + k0;
            for (int64_t k = 0; k < rows_k; ++k) far_distance[i - is][t][s][k] = in_units<D>(d[k], per_unit[s]);
          }
          if (s < kGrads) std::memset(far_sum[i - is][s], 0, rows_k * sizeof(far_sum[0][0][0]));
        }
      }
      for (int64_t v = 0; v < vectors; ++v) {
        for (int64_t i = is; i < i_end; ++i) {
          sweep<A, D, kTerms, Sum, kLanes, kGrads>(block_i.cell[v][i], block_k.cell[v], diagonal ? i + 1 : 0, rows_k,
                                                   far_distance[i - is], far_sum[i - is], delta, weight + v * kLanes,
                                                   strip_loss + v * kLanes);
        }
      }
      for (int64_t i = is; i < i_end; ++i) {
        for (int s = 0; s < kGrads; ++s) {
          reduce_far<kLanes>(far_sum[i - is][s], diagonal ? i + 1 : 0, rows_k, per_unit[s],
                             grad[s] + (i0 + i) * stride + k0);
        }
      }
      for (int64_t j = 0; j < columns; ++j) loss[j] += strip_loss[j];
    }
    block_i.store(sides, i0, rows_i, j0, vectors, weight, grad);
    if (!diagonal) block_k.store(sides, k0, rows_k, j0, vectors, weight, grad);
    for (int64_t j = 0; j < std::min(columns, n - j0); ++j)
      vertex_loss[j0 + j] += 2 * loss[j];  // both orders of a pair
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

// G + G^T, summed over the parts, in the first of them; 0 on the diagonal.
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
            g[i * stride + j] = g[j * stride + i] = i == j ? 0 : sum;
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
  return static_cast<double>(one_sided) * one_sided_huber<double>(delta);
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
  template <class D, int kTerms, class Sum, int kGrads>
  Result<A> run(const Tensor& like_first, const Tensor& like_second) const {
    const int64_t n = first.n, stride = first.stride, blocks = (n + kBlock - 1) / kBlock;
    // Few blocks leave few tiles to run side by side; then the vertices are split, too, each part with a G of its own.
    const int64_t parts = std::clamp<int64_t>(std::min(1024 / std::max<int64_t>(n, 1), n / 64), 1, 8);
    const auto rounds = rounds_of(blocks);
    std::vector<double> g1(kGrads > 0 ? parts * n * stride : 0), g2(kGrads > 1 ? parts * n * stride : 0);
    std::vector<double> partial(blocks * n);  // losses of the vertices, a row for each place in a round
    const Side<A>* const sides[2] = {&first, &second};
    for (const auto& pairs : rounds) {
      const int64_t tasks = static_cast<int64_t>(pairs.size()) * parts;
      torch::stable::parallel_for(0, tasks, grain(kBlock * kBlock * n / parts), [&](int64_t begin, int64_t end) {
        vectorized([&] AMTML_BODY(auto lanes) {
          constexpr int kLanes = decltype(lanes)::value * 4 / sizeof(A), kVectors = 64 / kLanes;
          using Rows = Block<A, D, kTerms, Sum, kLanes, kVectors, kGrads>;
          const std::unique_ptr<Rows[]> blocks(new Rows[2]);  // not make_unique: that would fill them with zeros
          for (int64_t task = begin; task < end; ++task) {
            const int64_t place = task / parts, part = task % parts, columns = stride / kPadding;
            const auto [i_block, k_block] = pairs[place];
            const Tile tile{i_block, k_block, part * columns / parts * kPadding,
                            (part + 1) * columns / parts * kPadding};
            double* const grad[2] = {kGrads > 0 ? g1.data() + part * n * stride : nullptr,
                                     kGrads > 1 ? g2.data() + part * n * stride : nullptr};
            run_tile(sides, tile, delta, vertex_weight, blocks.get(), grad, partial.data() + place * n);
          }
        });
      });
    }
    Result<A> result{std::vector<double>(n), empty(like_first, {0}, dtype_of<A>), empty(like_first, {0}, dtype_of<A>)};
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

  template <class D, int kTerms, class Sum>
  Result<A> run(const Tensor& like_first, const Tensor& like_second, int grads) const {
    if (grads == 0) return run<D, kTerms, Sum, 0>(like_first, like_second);
    if (grads == 1) return run<D, kTerms, Sum, 1>(like_first, like_second);
    return run<D, kTerms, Sum, 2>(like_first, like_second);
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
    const Tensor mask = row_mask ? dense(*row_mask) : student;
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
    const bool split = task.first.exceeds_double() || task.second.exceeds_double();
    bool fixed = false;
    if constexpr (std::is_same_v<A, float>) {
      fixed = task.first.fits_fixed_point() && task.second.fits_fixed_point();
      if (fixed) {
        task.first.use_fixed_point();
        task.second.use_fixed_point();
        result = task.template run<int32_t, 1, float>(one, other, grads);
      }
    }
    if (split) {
      task.first.split();
      task.second.split();
      result = task.template run<double, 2, double>(one, other, grads);
    } else if (!fixed) {
      result = task.template run<double, 1, double>(one, other, grads);
    }
    if (swap) std::swap(result.grad_first, result.grad_second);
    return result;
  }

  Tensor finish(const Tensor& t) const { return converted(t, wide); }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> angle_fwd(const Tensor& student, const Tensor& teacher,
                                             std::optional<Tensor> row_mask, double delta, double eps, Name reduction,
                                             bool need_student_grad, bool need_teacher_grad) {
  const Arguments args(student, teacher, row_mask, eps);
  const bool none = reduction == "none";
  const double m = static_cast<double>(args.kept.size());
  double count = 1;
  if (reduction == "mean") count = m * m * m;
  if (reduction == "distinct") count = m * (m - 1) * (m - 2);
  if (none) count = m * m;
  const double scale = reduction == "distinct" && m < 3 ? 0 : 1 / std::max(count, 1.0);  // no triplet: 0
  Tensor loss = empty(student, none ? Shape{student.size(0)} : Shape{}, args.work);
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
    const Tensor incoming = dense(grad_loss, args.work);
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

}  // namespace amtml
