// What the losses over pairs of rows share: all distances of both sides, and the way back from pairs to rows.
//
//   E_ij = |x_i - x_j|^2 / 2,  r_ij = 1 / |x_i - x_j|, or 0 where |x_i - x_j| <= eps (degenerate)
//   dL/dx_i = sum_j W_ij (x_i - x_j),  W_ij = dL/dE_ij with E_ij = E_ji as one variable
//
// x [N, C] float32, bfloat16 or float16 with any strides; E, W and all sums in float64: differences first, so that what
// the rows have in common cancels exactly.
//
// Matrices of pairs are symmetric and kept as tiles. N is rounded up to blocks of kBlock rows; tile (X, Y) with X <= Y
// are the pairs of a row of X and a row of Y, row-major, Y (Y + 1) / 2 + X is its number, and that of a block with
// itself is whole: N^2 / 2 elements in all. A row that takes no part (padding, or masked) has E = r = 0 with every
// other, whatever it holds, so that no kernel after the first needs a mask for it.
//
// measure_kernel: a block makes one tile of both sides; one more looks at the rows. Reads the rows N / kBlock times
// (from L2), writes 12 N^2 bytes;
//   N^2 C float64 subtractions and multiply-adds for the two sides bind it from C of about 50 on, writing before that.
// row_gradient: a block owns kBlock rows and 32 columns and walks over all rows j. Reads W once for 32 columns and
//   N / kBlock times the rows (both from L2), writes 4 N C bytes; N^2 C subtractions and multiply-adds a side.
#pragma once

#include "../arithmetic.h"
#include "float_pair.cuh"
#include "points.cuh"

namespace amtml::gpu {

constexpr int kColumns = 32;        // of the gradient that a block of row_gradient owns
constexpr int kGradientRows = 128;  // rows j that it has in shared memory
constexpr int kGradientThreads = 256;
constexpr int kSideThreads = 256;  // of measure_kernel, for each side
// The wider side may have so many more than the other: what the narrower one has left is an int below 0 then.
constexpr int64_t kMostColumns = (int64_t{1} << 31) - 1;

// A setting that tests change, in the emulator alone.
inline int64_t test_setting([[maybe_unused]] const char* name, int64_t otherwise) {
#ifdef AMTML_EMULATED_CUDA
  if (const char* given = std::getenv(name)) return std::atoll(given);
#endif
  return otherwise;
}

// Whether to use blocks of 16 rows instead of 32: more of them, so that of few rows all work can run at once.
inline bool small_blocks(int64_t n) { return test_setting("AMTML_EMULATED_BLOCK", n <= 320 ? 16 : 32) == 16; }

inline void check_sides(const char* op, const Tensor& student, const Tensor& teacher) {
  for (const Tensor* t : {&student, &teacher}) {
    STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == student.size(0), op,
                    ": student and teacher must be [N, C] with the same N");
    STD_TORCH_CHECK(t->size(1) <= kMostColumns, op, ": the CUDA kernels take at most ", kMostColumns, " columns, got ",
                    t->size(1));
    dispatch_gpu(t->scalar_type(), op, [](auto) {});
  }
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// --- tiles

__host__ __device__ __forceinline__ int64_t tile_number(int64_t x, int64_t y) {
  return x <= y ? y * (y + 1) / 2 + x : x * (x + 1) / 2 + y;
}

struct BlockPair {
  int x, y;  // x <= y
};
__device__ __forceinline__ BlockPair blocks_of(int64_t tile) {
  int64_t y = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1) - 1) / 2);
  while (y * (y + 1) / 2 > tile) --y;
  while ((y + 1) * (y + 2) / 2 <= tile) ++y;
  return {static_cast<int>(tile - y * (y + 1) / 2), static_cast<int>(y)};
}

struct Tiling {
  int block;  // rows of one
  int blocks;

  Tiling(int64_t n, int rows_of_a_block) : block(rows_of_a_block), blocks(std::max(1u, blocks_for(n, block))) {}
  int64_t tiles() const { return tile_number(0, blocks); }
};

// --- distances

// Of one tile, or of all: sums over ordered pairs, and the range of half of the squared distances.
struct Summary {
  double distance[2];              // of those that are not degenerate, on either side
  double regular[2];               // how many they are
  double one_sided;                // how many are degenerate on one side alone
  double nearest[2], farthest[2];  // infinity and 0 where there is none; farthest is infinity where one is not finite
};

// E and r of both sides.
template <class T_, class A_, int kBlock_>
struct alignas(32) PairTile {
  using T = T_;
  using A = A_;
  using E = T;    // of distances in a triangle
  using Sum = T;  // of what must cancel, within a cube of triangles
  static constexpr int kBlock = kBlock_, kArea = kBlock * kBlock;
  T e[2][kArea];
  A r[2][kArea];
};

// What the first kernel finds out.
template <class Tile>
struct Distances {
  Tile* tiles;
  Summary* summaries;  // [tiles]
  bool* kept;          // [blocks, kBlock] which rows take part
  double* count;       // [1] how many they are
  float* weight;       // [blocks, kBlock] `given`, and 0 for the rows that take no part; or null
  const float* given;  // [N]
};

template <int kBlock>
struct MeasureScratch {
  static constexpr int kChunk = 2048 / kBlock;  // columns at a time
  double x[2][2][kChunk][kBlock + 1];           // side, block of rows; one more against bank conflicts
  bool takes_part[2][kBlock];
  bool regular[2][kBlock][kBlock];
  double sums[2 * kSideThreads / kWarp][5];
};

// |x_i - x_j|^2 of every 16th pair of rows in either direction.
template <int kBlock>
__device__ __forceinline__ void squared_distances(const Points& rows, BlockPair at, int64_t widest,
                                                  MeasureScratch<kBlock>& scratch, int side,
                                                  double (&squared)[kBlock / 16][kBlock / 16]) {
  constexpr int kPer = kBlock / 16, kChunk = MeasureScratch<kBlock>::kChunk;
  const int thread = threadIdx.x % kSideThreads, lane = thread % kWarp, ty = thread / 16, tx = thread % 16;
  auto& x = scratch.x[side];
  for (int64_t c0 = 0; c0 < widest; c0 += kChunk) {
    const int columns = static_cast<int>(least(kChunk, rows.width - c0));  // negative beyond the narrower side
    rows.read([&](const auto& at_element) {
#pragma unroll 4
      for (int row = thread / kWarp; row < 2 * kBlock; row += kSideThreads / kWarp) {
        const int which = row / kBlock, i = row % kBlock;
        const int64_t from = static_cast<int64_t>(which == 0 ? at.x : at.y) * kBlock + i;
        const bool keep = scratch.takes_part[which][i];
#pragma unroll
        for (int c = lane; c < kChunk; c += kWarp) {
          if (c < columns) x[which][c][i] = keep ? static_cast<double>(at_element(from, c0 + c)) : 0;
        }
      }
    });
    __syncthreads();
    for (int c = 0; c < columns; ++c) {
      double a[kPer], b[kPer];
#pragma unroll
      for (int p = 0; p < kPer; ++p) a[p] = x[0][c][ty + 16 * p], b[p] = x[1][c][tx + 16 * p];
#pragma unroll
      for (int p = 0; p < kPer; ++p) {
#pragma unroll
        for (int q = 0; q < kPer; ++q) {
          const double difference = a[p] - b[q];
          squared[p][q] += difference * difference;
        }
      }
    }
    __syncthreads();
  }
}

__device__ __forceinline__ double warp_least(double x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x = fmin(x, from_lane(x, by));
  return x;
}

// What a thread found out about its pairs.
struct Found {
  double distance = 0, nearest = INFINITY, farthest = 0;
  int regular = 0, one_sided = 0;
};

// Warps to the whole tile; the first half of the block is the first side.
template <int kBlock>
__device__ __forceinline__ void summarize(const Found& found, double ordered, MeasureScratch<kBlock>& scratch,
                                          Summary& summary) {
  const double of_warp[5] = {warp_sum(found.distance), static_cast<double>(warp_sum(found.regular)),
                             static_cast<double>(warp_sum(found.one_sided)), warp_least(found.nearest),
                             -warp_least(-found.farthest)};
  if (threadIdx.x % kWarp == 0) {
    for (int k = 0; k < 5; ++k) scratch.sums[threadIdx.x / kWarp][k] = of_warp[k];
  }
  __syncthreads();
  if (threadIdx.x >= kWarp) return;
  constexpr int kWarps = kSideThreads / kWarp;  // of a side: a lane has one of either, others have the first again
  const bool own = threadIdx.x < kWarps;
  double one_sided = 0;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const double* const mine = scratch.sums[side * kWarps + threadIdx.x % kWarps];
    const double distance = warp_sum(own ? mine[0] : 0), regular = warp_sum(own ? mine[1] : 0);
    one_sided += warp_sum(own ? mine[2] : 0);
    const double nearest = warp_least(mine[3]), farthest = -warp_least(-mine[4]);
    if (threadIdx.x != 0) continue;
    summary.distance[side] = ordered * distance, summary.regular[side] = ordered * regular;
    summary.nearest[side] = nearest, summary.farthest[side] = farthest;
  }
  if (threadIdx.x == 0) summary.one_sided = ordered * one_sided;
}

// Which rows take part and how many they are, and the weights without those of the others.
template <class Tile>
__device__ __forceinline__ void look_at_rows(const TakingPart& takes_part, int64_t padded, const Distances<Tile>& out) {
  int64_t count = 0;
  for (int64_t i = threadIdx.x; i < padded; i += 2 * kSideThreads) {
    const bool keep = takes_part(i);
    count += keep;
    out.kept[i] = keep;
    if (out.weight) out.weight[i] = keep ? out.given[i] : 0;
  }
  __syncthreads();
  double* const sums = &shared<MeasureScratch<Tile::kBlock>>().sums[0][0];
  const double total = block_sum(static_cast<double>(count), sums);  // exact below 2^53
  if (threadIdx.x == 0) *out.count = total;
}

template <class Tile>
__global__ void __launch_bounds__(2 * kSideThreads, 2)
    measure_kernel(Points first, Points second, TakingPart takes_part, int64_t padded, double eps,
                   Distances<Tile> out) {
  constexpr int kBlock = Tile::kBlock, kPer = kBlock / 16;
  let_next_start();
  wait_for_previous();
  if (blockIdx.x == gridDim.x - 1) return look_at_rows(takes_part, padded, out);
  auto& scratch = shared<MeasureScratch<kBlock>>();
  const int side = threadIdx.x / kSideThreads, thread = threadIdx.x % kSideThreads, ty = thread / 16, tx = thread % 16;
  const Points rows = side == 0 ? first : second;
  const BlockPair at = blocks_of(blockIdx.x);
  if (threadIdx.x < 2 * kBlock) {
    const int which = threadIdx.x / kBlock, i = threadIdx.x % kBlock;
    scratch.takes_part[which][i] = takes_part(static_cast<int64_t>(which == 0 ? at.x : at.y) * kBlock + i);
  }
  __syncthreads();
  double squared[kPer][kPer] = {};
  const int64_t widest = first.width > second.width ? first.width : second.width;
  squared_distances<kBlock>(rows, at, widest, scratch, side, squared);
  Tile& tile = out.tiles[blockIdx.x];
  Found found;
#pragma unroll
  for (int p = 0; p < kPer; ++p) {
#pragma unroll
    for (int q = 0; q < kPer; ++q) {
      const int i = ty + 16 * p, j = tx + 16 * q;
      const bool pair = scratch.takes_part[0][i] && scratch.takes_part[1][j] && (at.x != at.y || i != j);
      const double d = pair ? squared[p][q] : 0;
      const bool regular = pair && !(d <= eps * eps);  // NaN is not degenerate: it stays NaN
      const double root = sqrt(d);
      tile.e[side][i * kBlock + j] = static_cast<typename Tile::T>(d / 2);
      tile.r[side][i * kBlock + j] = regular ? static_cast<typename Tile::A>(root / d) : 0;  // NaN at infinity
      if (regular) {
        found.distance += root, ++found.regular;
        found.nearest = fmin(found.nearest, d / 2),
        found.farthest = fmax(found.farthest, d < INFINITY ? d / 2 : INFINITY);
      }
      scratch.regular[side][i][j] = regular;
    }
  }
  __syncthreads();
  const bool* const of_both = &scratch.regular[0][0][0];
  for (int e = threadIdx.x; e < Tile::kArea; e += 2 * kSideThreads)
    found.one_sided += of_both[e] != of_both[Tile::kArea + e];
  summarize<kBlock>(found, at.x == at.y ? 1 : 2, scratch, out.summaries[blockIdx.x]);
}

template <class Tile>
void measure(const Points& first, const Points& second, const TakingPart& takes_part, const Tiling& tiling, double eps,
             const Distances<Tile>& out, const OnDevice& on, bool early = false) {
  const Spread spread{blocks(tiling.tiles() + 1), 2 * kSideThreads, 1, sizeof(MeasureScratch<Tile::kBlock>), early};
  launch(measure_kernel<Tile>, spread, on, first, second, takes_part,
         static_cast<int64_t>(tiling.blocks) * Tile::kBlock, eps, out);
}

// --- back to the rows

template <int kBlock>
struct GradientScratch {
  double x[kGradientRows][kColumns];
  double weight[kGradientRows][kBlock + 2];  // row j, row i; two more against bank conflicts
};

// Writes factor * sum_j W_ij (x_i - x_j) for rows of block blockIdx.y and columns of blockIdx.x; 0 for rows that are
// not kept. weight(at, w) sets w to two elements of W, from `at` on. kGradientThreads threads, lanes along columns.
template <int kBlock, class Weight>
__device__ __forceinline__ void row_gradient(const Points& rows, int64_t n, const bool* kept, int blocks,
                                             const Weight& weight, double factor, float* out) {
  constexpr int kWarps = kGradientThreads / kWarp, kOwn = kBlock / kWarps, kArea = kBlock * kBlock;
  auto& scratch = shared<GradientScratch<kBlock>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own_block = blockIdx.y;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane;
  const int64_t i0 = static_cast<int64_t>(own_block) * kBlock + warp * kOwn;
  double own[kOwn], sum[kOwn] = {};
  const bool in_width = column < rows.width;
  // Rows from `first` on, `step` apart: all loads before the first use.
  auto load = [&](auto& to, int64_t first, int step) {
    constexpr int kCount = sizeof(to) / sizeof(to[0]);
    rows.read([&](const auto& at_element) {
      bool keep[kCount];
      float value[kCount];
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        const int64_t row = first + m * step;
        keep[m] = row < n && kept[row];
        value[m] = row < n && in_width ? at_element(row, column) : 0;
      }
#pragma unroll
      for (int m = 0; m < kCount; ++m) to[m] = keep[m] ? static_cast<double>(value[m]) : 0;
    });
  };
  load(own, i0, 1);
  for (int first_block = 0; first_block < blocks; first_block += kGradientRows / kBlock) {
    const int count = static_cast<int>(least(kGradientRows, static_cast<int64_t>(blocks - first_block) * kBlock));
    double x[kGradientRows / kWarps];
    load(x, static_cast<int64_t>(first_block) * kBlock + warp, kWarps);
#pragma unroll
    for (int m = 0; m < kGradientRows / kWarps; ++m) scratch.x[warp + m * kWarps][lane] = x[m];
#pragma unroll 1
    for (int e = 2 * threadIdx.x; e < count * kBlock; e += 2 * kGradientThreads) {  // in the order of memory
      const int other = first_block + e / kArea, row = e % kArea / kBlock, column = e % kBlock;
      double w[2];
      weight(tile_number(own_block, other) * kArea + e % kArea, w);
      auto* const of_tile = scratch.weight + e / kArea * kBlock;
      if (other >= own_block) {  // the tile's rows are i
        of_tile[column][row] = w[0], of_tile[column + 1][row] = w[1];
      } else {
        of_tile[row][column] = w[0], of_tile[row][column + 1] = w[1];
      }
    }
    __syncthreads();
    for (int j = 0; j < count; ++j) {
      const double x = scratch.x[j][lane];
#pragma unroll
      for (int p = 0; p < kOwn; ++p) sum[p] += scratch.weight[j][warp * kOwn + p] * (own[p] - x);
    }
    __syncthreads();
  }
#pragma unroll
  for (int p = 0; p < kOwn; ++p) {
    if (i0 + p < n && in_width) {
      out[(i0 + p) * rows.width + column] = kept[i0 + p] ? static_cast<float>(factor * sum[p]) : 0.0f;
    }
  }
}

}  // namespace amtml::gpu
