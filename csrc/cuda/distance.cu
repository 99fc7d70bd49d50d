// RKD's distance loss: distances over their mean, compared pair by pair.
//
//   psi_ij = d_ij / mu,  mu = mean of d over the pairs that are not degenerate (K of them, ordered)
//   L = sum_ij huber_delta(psi_s - psi_t),  g = clamp(psi_s - psi_t, -delta, delta)
//   dL/dd_ij = (g_ij - (sum g psi) / K) / mu,  dL/dx_i = 2 sum_j dL/dd_ij (x_i - x_j) / d_ij
//
// Degenerate pairs have psi 0 and no gradient. student, teacher [N, C] float32, bfloat16 or float16 with any strides;
// loss [] and gradients [N, C] float32. All in float64: beside the distances themselves it costs nothing.
// Three kernels:
//   measure_kernel  all distances, and their sums tile by tile (pairs.cuh)
//   compare_kernel  grid of at most kCompareBlocks: each adds up the sums of all tiles, then compares its own pairs.
//                   Reads 16 N^2 bytes: bandwidth
//   finish_kernel   the gradient of the rows (pairs.cuh), g made again, and in one more block the loss
#include "pairs.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "rkd_distance_loss";
constexpr int kCompareBlocks = 264, kCompareThreads = 256;

// What one block of compare_kernel adds.
struct Partial {
  double loss, g_psi[2];
};

// How a side's distances are normalized.
struct Norm {
  double mean, pairs;
};

struct Both {
  Norm side[2];
};

template <class Tile>
struct Pairs {
  const Tile* tiles;
  double delta;

  // psi of both sides, and the difference's derivative g.
  struct Compared {
    double psi[2], x, g;
  };
  __device__ __forceinline__ Compared compare(const Both& norm, int64_t tile, int at) const {
    Compared c;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const double r = tiles[tile].r[s][at];
      c.psi[s] = r == 0 ? 0 : 2 * tiles[tile].e[s][at] * r / norm.side[s].mean;
    }
    c.x = c.psi[0] - c.psi[1];
    c.g = clamped(c.x, delta);
    return c;
  }
};

struct CompareScratch {
  double sums[2][kWarp];
};

// Sums over the block one after another, in two pieces of scratch in turn: one barrier is enough then.
template <int kCount>
__device__ __forceinline__ void block_sums(double (&sums)[kCount]) {
  auto& scratch = shared<CompareScratch>();
#pragma unroll
  for (int k = 0; k < kCount; ++k) sums[k] = block_sum(sums[k], scratch.sums[k % 2]);
}

__device__ __forceinline__ Both norms(const Summary* summaries, int64_t tiles) {
  double sums[4] = {};
  for (int64_t i = threadIdx.x; i < tiles; i += kCompareThreads) {
#pragma unroll
    for (int s = 0; s < 2; ++s) sums[s] += summaries[i].distance[s], sums[2 + s] += summaries[i].regular[s];
  }
  block_sums(sums);
  Both norm;
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    norm.side[s].pairs = sums[2 + s] < 1 ? 1 : sums[2 + s];
    norm.side[s].mean = sums[2 + s] < 1 ? 1 : sums[s] / sums[2 + s];
  }
  return norm;
}

template <class Tile>
__global__ void __launch_bounds__(kCompareThreads, 4)
    compare_kernel(Pairs<Tile> pairs, const Summary* summaries, int64_t tiles, Both* norm_out, Partial* partial) {
  const Both norm = norms(summaries, tiles);
  double sums[3] = {};
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const BlockPair at = blocks_of(tile);
    const double ordered = at.x == at.y ? 1 : 2;
    for (int e = threadIdx.x; e < Tile::kArea; e += kCompareThreads) {
      const auto c = pairs.compare(norm, tile, e);
      sums[0] += ordered * huber(c.x, c.g, 0.5);
      sums[1] += ordered * c.g * c.psi[0];
      sums[2] += ordered * c.g * c.psi[1];
    }
  }
  __syncthreads();
  block_sums(sums);
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = {sums[0], {sums[1], sums[2]}};
  if (blockIdx.x == 0) *norm_out = norm;
}

// dL/dd over d of one side, but for the scale.
template <class Tile>
struct DistanceWeight {
  Pairs<Tile> pairs;
  Both norm;
  int side;
  double level;

  template <int kCount>
  __device__ __forceinline__ void operator()(int64_t at, double (&weight)[kCount]) const {
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      const int64_t tile = at / Tile::kArea;
      const int e = static_cast<int>(at % Tile::kArea) + m;
      const double r = pairs.tiles[tile].r[side][e];
      const double mean = side == 0 ? norm.side[0].mean : norm.side[1].mean;
      weight[m] = r == 0 ? 0 : (pairs.compare(norm, tile, e).g - level) / mean * r;
    }
  }
};

template <int kBlock>
union FinishScratch {
  GradientScratch<kBlock> gradient;
  CompareScratch sums;
};

struct Finish {
  int64_t n;
  double scale;
  int blocks, partials;
  const bool* kept;
  const Both* norm;
  const Partial* partial;
  float *grad_first, *grad_second;  // or null
  float* loss;
};

// Grid: (columns / 32, blocks of rows, 3): the sides, and the loss.
template <class Tile>
__global__ void __launch_bounds__(kGradientThreads, 2)
    finish_kernel(Points first, Points second, Pairs<Tile> pairs, Finish finish) {
  const int side = blockIdx.z;
  float* const out = side == 0 ? finish.grad_first : finish.grad_second;
  if (side < 2 ? !out : blockIdx.x + blockIdx.y > 0) return;
  double sums[1] = {};
  for (int i = threadIdx.x; i < finish.partials; i += kGradientThreads) {
    const Partial& partial = finish.partial[i];
    sums[0] += side == 2 ? partial.loss : side == 0 ? partial.g_psi[0] : partial.g_psi[1];
  }
  block_sums(sums);
  if (side == 2) {
    if (threadIdx.x == 0) *finish.loss = static_cast<float>(finish.scale * sums[0]);
    return;
  }
  __syncthreads();
  const Both norm = *finish.norm;
  const double level = sums[0] / (side == 0 ? norm.side[0].pairs : norm.side[1].pairs);
  const DistanceWeight<Tile> weight{pairs, norm, side, level};
  const Points rows = side == 0 ? first : second;
  const double factor = side == 0 ? 2 * finish.scale : -2 * finish.scale;
  row_gradient<Tile::kBlock>(rows, finish.n, finish.kept, finish.blocks, weight, factor, out);
}

struct Result {
  Tensor loss, grad_student, grad_teacher;
};

template <class Tile>
void run(const Tensor& student, const Tensor& teacher, double delta, double eps, double scale, const Result& result,
         const OnDevice& on) {
  TakingPart all;
  all.n = student.size(0);
  const Tiling tiling(all.n, Tile::kBlock);
  const int64_t tiles = tiling.tiles();
  const unsigned compared = static_cast<unsigned>(std::min<int64_t>(tiles, kCompareBlocks));
  Distances<Tile> found = {};
  Partial* partial = nullptr;
  Both* norm = nullptr;
  auto lay_out = [&](Pieces pieces) {
    found.tiles = pieces.take<Tile>(tiles), found.summaries = pieces.take<Summary>(tiles);
    found.kept = pieces.take<bool>(tiling.blocks * Tile::kBlock), found.count = pieces.take<double>(1);
    partial = pieces.take<Partial>(compared), norm = pieces.take<Both>(1);
    return pieces;
  };
  const Tensor scratch = memory_for(student, lay_out(Pieces()));
  lay_out(Pieces(scratch.mutable_data_ptr()));
  auto gradient = [](const Tensor& t) { return t.numel() > 0 ? data<float>(t) : nullptr; };
  const Points first(student), second(teacher);
  measure(first, second, all, tiling, eps, found, on);

  const Pairs<Tile> compare{found.tiles, delta};
  Finish finish;
  finish.n = all.n, finish.scale = scale, finish.blocks = tiling.blocks, finish.kept = found.kept;
  finish.norm = norm, finish.partial = partial, finish.partials = compared;
  finish.grad_first = gradient(result.grad_student), finish.grad_second = gradient(result.grad_teacher);
  finish.loss = data<float>(result.loss);
  launch(compare_kernel<Tile>, {compared, kCompareThreads, 1, sizeof(CompareScratch)}, on, compare,
         static_cast<const Summary*>(found.summaries), tiles, norm, partial);
  const bool any = finish.grad_first || finish.grad_second;
  const unsigned columns = any ? blocks_for(std::max(first.width, second.width), kColumns) : 1;
  const dim3 grid(columns, any ? tiling.blocks : 1, 3);
  launch(finish_kernel<Tile>, {grid, kGradientThreads, 1, sizeof(FinishScratch<Tile::kBlock>)}, on, first, second,
         compare, finish);
}

std::tuple<Tensor, Tensor, Tensor> distance_fwd(const Tensor& student, const Tensor& teacher, double delta, double eps,
                                                Name reduction, bool need_student_grad, bool need_teacher_grad) {
  check_sides(kOp, student, teacher);
  const double n = static_cast<double>(student.size(0));
  double count = 1;
  if (reduction == "mean") count = n * n;
  if (reduction == "distinct") count = n * (n - 1);
  auto gradient = [&](const Tensor& like, bool wanted) {
    return empty_or_none(like, wanted, {like.size(0), like.size(1)}, ScalarType::Float);
  };
  const Result result{empty(student, {}, ScalarType::Float), gradient(student, need_student_grad),
                      gradient(teacher, need_teacher_grad)};
  const OnDevice on(student);
  const double scale = 1 / std::max(count, 1.0);
  if (small_blocks(student.size(0))) {
    run<PairTile<double, double, 16>>(student, teacher, delta, eps, scale, result, on);
  } else {
    run<PairTile<double, double, 32>>(student, teacher, delta, eps, scale, result, on);
  }
  return {result.loss, result.grad_student, result.grad_teacher};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) { m.impl("distance_fwd", TORCH_BOX(&distance_fwd)); }

}  // namespace
}  // namespace amtml::gpu
