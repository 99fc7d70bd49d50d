// All triangles of rows, each once: three angles on both sides, their Huber loss, and its gradient to the distances.
//
// A triangle j, i, k has an angle at each corner. With E and r as in pairs.cuh, at the corner j
//
//   h_j = r_ji r_jk,  psi_j = h_j (E_ji + E_jk - E_ik),  x_j = psi_j (one side) - psi_j (other)
//   g_j = clamp(x_j, -delta, delta),  its loss: g_j (x_j - g_j / 2)
//
// and with d r / d E = -r^3 every edge gets from the triangle
//
//   to W_ji:  (g h)_j + (g h)_i - (g h)_k - r_ji^2 [(g psi)_j + (g psi)_i]
//
// that is plus at its ends, where it is an arm, minus opposite; likewise W_jk and W_ik. Both orders of an angle's arms:
// all of it counts twice. The rounded float g h goes to all three edges, where 1 / distance then cancels exactly: two
// rows at distance e put +-1/e into two elements of W that meet in a third row's gradient. Hence E, its sums and those
// of g h are float64 (T; on other GPUs pairs of floats), all else float32 (A).
//
// Cubes. Rows are cut into blocks; a cube is three blocks J <= I <= K. Those with J + I + K = p modulo the number of
// blocks are phase p: any two blocks determine the third, so that in a phase every tile of W belongs to one cube alone.
// Phases run one after another, in one matrix W; or side by side, as many as there are slots with a W of their own.
// Nothing is summed in an order that depends on timing.
//
// triangles_kernel, grid (tiles, slots): the block of tile (J, I) leaves at once unless K >= I. It goes over corners of
// 16 x 16 pairs (i, k); every warp takes rows j of its own. A lane has 4 x 2 pairs of the corner in registers: E and r
// of both sides, and the sums that belong to (i, k), which are added over the warps at the end of the corner. What a
// row j adds to (j, i) and (j, k) is summed over the lanes by shuffles and kept in shared memory, where one warp alone
// touches row j. Where blocks coincide the whole cube is made all the same: each triangle then comes up in all orders,
// two or six times, every sum over the third row is complete in any of them, and only i = k and its like are left out.
//
// Work for a triangle and one gradient, as compiled for compute capability 9.0: in float64 78 instructions, of them 19
// float64 additions and 9 conversions from or to float64 (the slowest: 16 lanes a clock); in fixed point 71, of them 6
// conversions from integers (64 lanes a clock). Registers limit what runs at once: 12 and 16 warps of a multiprocessor.
// Traffic: 3 tiles of E and r, and 3 of W read and written: 3.8 bytes a triangle at kBlock = 32, 7.5 at 16.
#pragma once

#include "pairs.cuh"

namespace amtml::gpu {

// How distances are kept, by what the lengths of the edges are. The choice is made on the device.
//
// Fixed point: if all squared distances of a side are within a factor of 64 of each other, E is kept in 32 bits, in
// units of a power of 4 with the largest below 2^30 of them, so that two of them add up in 32 bits. Three roundings of
// half a unit are then at most 1.8e-7 in psi, and nothing cancels that would need float64 in sums over a cube. r is
// scaled by the root of the unit. Of the two forms of triangles_kernel one leaves at once.
//
// Split: if some edges are much shorter than others, what the law of cosines leaves of three E is a small part of them.
// E is then measured once more and kept in two doubles, of which the first is a multiple of 2^-50 of the longest E or
// half of that, so that its sums are exact. csrc/cpu/pairs.h has the same two, and says how exact they are.
//
// For few rows no kernel looks before: each block of triangles_kernel sees whether its own cube needs splitting, and
// then has the cube's E in shared memory.
constexpr double kFixedRange = 64;
template <class T>  // how far the squares may differ for T: of the lengths a factor of 2^25; of floats in pairs, 2^20
constexpr double kUnsplitRange = std::is_same_v<T, FloatPair> ? 0x1p40 : 0x1p50;

// Whether fixed point is tried: of few rows, the kernels that look for it would take longer than it saves.
template <class Tile>
constexpr bool kTriesFixed = Tile::kBlock == 32 && sizeof(typename Tile::A) == sizeof(float);

// Half of the squared distances of a side.
struct Range {
  double nearest = INFINITY, farthest = 0;

  __device__ __forceinline__ void add(const Summary& summary, int side) {
    nearest = fmin(nearest, summary.nearest[side]), farthest = fmax(farthest, summary.farthest[side]);
  }
  __device__ __forceinline__ bool allows_fixed() const {
    return farthest <= kFixedRange * nearest && 1e-30 < nearest && farthest < 1e30;
  }
  template <class T>
  __device__ __forceinline__ bool needs_split() const {
    return farthest > kUnsplitRange<T> * nearest && farthest < 1e300;
  }
  // farthest, even rounded, is below 2^exponent.
  __device__ __forceinline__ int exponent() const {
    int exponent = 0;
    frexp(1.01 * farthest, &exponent);
    return exponent;
  }
  // Adding it rounds a squared distance, below 2^(exponent + 1), to a multiple of 2^(exponent - 50).
  __device__ __forceinline__ double shift() const { return ldexp(1.5, exponent() + 2); }
};

struct Form {
  bool fixed, split;
  double per_unit[2];  // fixed: of either side
  float root[2];       // fixed: of the unit
  double shift[2];     // split: of either side
};

// Lie where a PairTile lies: r is in the same place.
template <class Pair>
struct alignas(32) FixedTile {
  using T = typename Pair::T;
  using A = typename Pair::A;
  using E = int32_t;
  using Sum = A;
  static constexpr int kBlock = Pair::kBlock, kArea = Pair::kArea;
  union {
    E e[2][kArea];
    unsigned char space[2 * kArea * sizeof(T)];
  };
  A r[2][kArea];
};
struct Split {
  double multiple, rest;

  __device__ __forceinline__ Split operator+(Split b) const { return {multiple + b.multiple, rest + b.rest}; }
  __device__ __forceinline__ Split operator-(Split b) const { return {multiple - b.multiple, rest - b.rest}; }
  __device__ __forceinline__ explicit operator float() const { return static_cast<float>(multiple + rest); }
  __device__ __forceinline__ explicit operator double() const { return multiple + rest; }
};
template <class Pair>
struct alignas(32) SplitTile {
  using T = typename Pair::T;
  using A = typename Pair::A;
  using E = Split;
  using Sum = T;
  static constexpr int kBlock = Pair::kBlock, kArea = Pair::kArea;
  double e[2][kArea];  // the multiples; the rests are elsewhere
  A r[2][kArea];
};
template <class Tile>
constexpr bool is_fixed = std::is_same_v<typename Tile::E, int32_t>;
template <class Tile>
constexpr bool is_split = std::is_same_v<typename Tile::E, Split>;

using FormScratch = Range[kGradientThreads / kWarp][2];

// One block.
template <class T>
__global__ void __launch_bounds__(kGradientThreads) form_kernel(const Summary* summaries, int64_t tiles, Form* out) {
  let_next_start();
  wait_for_previous();
  auto& scratch = shared<FormScratch>();
  Range range[2];
  for (int64_t i = threadIdx.x; i < tiles; i += kGradientThreads) {
#pragma unroll
    for (int side = 0; side < 2; ++side) range[side].add(summaries[i], side);
  }
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    range[side] = {warp_least(range[side].nearest), -warp_least(-range[side].farthest)};
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp][side] = range[side];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  Form form{true, false};
  for (int side = 0; side < 2; ++side) {
    Range all;
    for (int warp = 0; warp < kGradientThreads / kWarp; ++warp) {
      all.nearest = fmin(all.nearest, scratch[warp][side].nearest);
      all.farthest = fmax(all.farthest, scratch[warp][side].farthest);
    }
    form.fixed &= all.allows_fixed(), form.split |= all.needs_split<T>();
    const int m = (all.exponent() - 29) >> 1;  // the unit is 4^m: farthest is below 2^30 of it, even rounded
    form.per_unit[side] = ldexp(1.0, -2 * m), form.root[side] = ldexpf(1.0f, m);
    form.shift[side] = all.shift();
  }
  *out = form;
}

// Distances of a tile in fixed point.
template <class Pair>
__device__ __forceinline__ void fix(Pair& from, const Form& form) {
  constexpr int kCount = 2 * Pair::kArea / kGradientThreads;
  auto& to = reinterpret_cast<FixedTile<Pair>&>(from);
  static_assert(sizeof(FixedTile<Pair>) == sizeof(Pair));
  int32_t e[kCount];
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    const int at = m * kGradientThreads + threadIdx.x, side = m < kCount / 2 ? 0 : 1;
    e[m] = static_cast<int32_t>(static_cast<double>((&from.e[0][0])[at]) * form.per_unit[side] + 0.5);
    (&to.r[0][0])[at] *= form.root[side];
  }
  __syncthreads();  // all have been read
#pragma unroll
  for (int m = 0; m < kCount; ++m) (&to.e[0][0])[m * kGradientThreads + threadIdx.x] = e[m];
}

// What distances are measured from.
struct Rows {
  Points first, second;
  const bool* kept;  // [blocks, kBlock]
};

// Distances between two blocks of a side's rows as two doubles.
template <int kBlock>
__device__ __forceinline__ void split(const Points& rows, const bool* kept, BlockPair at, double shift,
                                      double* multiples, double* rests) {
  for (int e = threadIdx.x; e < kBlock * kBlock; e += blockDim.x) {
    const int64_t i = static_cast<int64_t>(at.x) * kBlock + e / kBlock;
    const int64_t j = static_cast<int64_t>(at.y) * kBlock + e % kBlock;
    double sum = 0, rest = 0;
    if (kept[i] && kept[j]) {
      rows.read([&](const auto& at_element) {
        for (int64_t c = 0; c < rows.width; ++c) {
          const double a = at_element(i, c), b = at_element(j, c), d = a - b, other = a - d;
          const double error = (a - (d + other)) + (other - b);  // of d, exactly
          const double multiple = (d * d + shift) - shift;
          sum += multiple;
          rest += fma(d, d, -multiple) + 2 * d * error;
        }
      });
    }
    multiples[e] = sum / 2, rests[e] = rest / 2;
  }
}

// Brings the tiles into their form. Grid: tiles.
template <class Pair>
__global__ void __launch_bounds__(kGradientThreads)
    reform_kernel(Pair* tiles, double* rests, const __grid_constant__ Rows rows, const Form* form) {
  let_next_start();
  wait_for_previous();
  Pair& tile = tiles[blockIdx.x];
  if (form->fixed) fix(tile, *form);
  if (form->split) {
    static_assert(sizeof(SplitTile<Pair>) == sizeof(Pair));
    auto& to = reinterpret_cast<SplitTile<Pair>&>(tile);
    for (int side = 0; side < 2; ++side) {
      split<Pair::kBlock>(side == 0 ? rows.first : rows.second, rows.kept, blocks_of(blockIdx.x), form->shift[side],
                          to.e[side], rests + (2 * static_cast<int64_t>(blockIdx.x) + side) * Pair::kArea);
    }
  }
}

enum class Kind {
  kLoss,
  kGradient,    // of the first kPlanes sides, and the loss
  kWeighted,    // the same with a weight for each vertex; no loss
  kVertexLoss,  // losses instead of gradients: plane 0 of a pair (a, b) with a before b is for row a, plane 1 for row b
};

template <class Tile_, Kind kKind_, int kPlanes_>
struct Config {
  using Tile = Tile_;
  using T = typename Tile::T;
  using A = typename Tile::A;
  using E = typename Tile::E;
  static constexpr Kind kKind = kKind_;
  static constexpr int kBlock = Tile::kBlock, kArea = Tile::kArea, kPlanes = kPlanes_;
  static constexpr int kI = sizeof(A) == 8 || is_split<Tile> ? 2 : 4, kK = 2;  // pairs of a lane
  static constexpr int kLanesI = 4, kLanesK = kWarp / kLanesI;                 // lanes of a corner
  static constexpr int kRowsI = kI * kLanesI, kRowsK = kK * kLanesK;           // rows of a corner
  static constexpr int kWarps = kBlock == 16 && sizeof(A) == 4 ? 8 : 4;  // few rows: all that can run at once should
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kResident =  // on a multiprocessor
      kWarps == 8 ? 1 : (sizeof(A) == 4 && kPlanes <= 1 ? 3 : 2) + (is_fixed<Tile> ? 1 : 0);
};

template <class Tile>
struct Triangles {
  const Tile* tiles;
  const Form* form;          // where fixed point is tried, and with it
  const double* rests;       // [tiles, 2, kArea] of split distances
  const Summary* summaries;  // [tiles] otherwise
  const float* weight;       // [blocks, kBlock], or null
  typename Tile::T* sums;    // [planes, slots, tiles, kArea]
  double* loss;              // [slots, tiles], or null
  int64_t tile_count;
  int64_t plane;      // elements of a plane of sums
  int blocks, phase;  // of slot 0
  bool first;         // of the launches: sums are not added to what is there
  typename Tile::A delta;

  // The same with distances of another form.
  template <class Other>
  __host__ __device__ __forceinline__ Triangles<Other> with() const {
    return {reinterpret_cast<const Other*>(tiles),
            form,
            rests,
            summaries,
            weight,
            sums,
            loss,
            tile_count,
            plane,
            blocks,
            phase,
            first,
            delta};
  }
};

// The numbers of three blocks and of the tiles between them.
struct Cube {
  enum Side { kJI, kJK, kIK };
  int j, i, k;
  int tile[3];

  __device__ __forceinline__ Cube(int ji, int phase, int blocks) {
    const BlockPair at = blocks_of(ji);
    j = at.x, i = at.y, k = (phase + 2 * blocks - j - i) % blocks;
    tile[kJI] = ji, tile[kJK] = k * (k + 1) / 2 + j, tile[kIK] = k * (k + 1) / 2 + i;
  }
  __device__ __forceinline__ BlockPair blocks(Side side) const { return {side == kIK ? i : j, side == kJI ? i : k}; }
  __device__ __forceinline__ bool exists() const { return k >= i; }
  __device__ __forceinline__ bool diagonal() const { return j == i || i == k; }
  // In how many orders each triangle comes up.
  __device__ __forceinline__ int orders() const { return j == k ? 6 : diagonal() ? 2 : 1; }
  // Of an angle, how much of its loss to take each time: of three equal blocks, the tile (j, i) is not stored.
  __device__ __forceinline__ double share() const { return j == k ? 0.25 : 1.0 / orders(); }
};

// --- sums of an edge

// Of a gradient: the two parts of W.
template <class T, class A>
struct alignas(16) GradientSum {
  T gh;
  A gpsi;

  __device__ __forceinline__ void operator+=(const GradientSum& b) { gh += b.gh, gpsi += b.gpsi; }
  __device__ __forceinline__ GradientSum from(int by) const { return {from_lane(gh, by), from_lane(gpsi, by)}; }
  __device__ __forceinline__ T total(A r) const {
    if constexpr (!std::is_same_v<T, FloatPair>) return arm_gradient<T>(gh, r, gpsi);
    return gh + static_cast<T>(-(r * r) * gpsi);
  }
};

template <class T, class A>
struct LossSum {
  A loss;

  __device__ __forceinline__ void operator+=(const LossSum& b) { loss += b.loss; }
  __device__ __forceinline__ LossSum from(int by) const { return {from_lane(loss, by)}; }
  __device__ __forceinline__ T total(A) const { return static_cast<T>(loss); }
};

template <class C>
using SumOf = std::conditional_t<C::kKind == Kind::kVertexLoss, LossSum<typename C::Tile::Sum, typename C::A>,
                                 GradientSum<typename C::Tile::Sum, typename C::A>>;

// Which of kCount sums sum_over_lanes leaves to a lane.
template <int kCount>
__device__ __forceinline__ int left_to(int lane, int by) {
  int at = 0;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, by *= 2) at += lane & by ? half : 0;
  return at;
}

// Sums over the kLanes lanes that differ in the bits from `by` on: each time half of the lanes take over half of the
// sums. The total of the one that is left to this lane.
template <int kCount, int kLanes, class Sum>
__device__ __forceinline__ Sum sum_over_lanes(Sum (&sums)[kCount], int lane, int by) {
  const int end = by * kLanes;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, by *= 2) {
    const bool upper = lane & by;
#pragma unroll
    for (int m = 0; m < half; ++m) {
      const Sum given = upper ? sums[m] : sums[m + half];
      if (upper) sums[m] = sums[m + half];
      sums[m] += given.from(by);
    }
  }
#pragma unroll
  for (; by < end; by *= 2) sums[0] += sums[0].from(by);
  return sums[0];
}

template <class C>
struct CubeScratch {
  static constexpr int kPlanes = C::kPlanes > 0 ? C::kPlanes : 1;
  SumOf<C> ji[kPlanes][C::kBlock][C::kBlock], jk[kPlanes][C::kBlock][C::kBlock];  // row j of either belongs to a warp
  SumOf<C> ik[C::kWarps][C::kI][C::kK][kWarp];                                    // of every lane
  double loss[kWarp];
  typename C::A thread_loss[C::kThreads];  // this and what follows is here because registers are scarce
  Cube cube;
  double* partial_loss;
};

// Of a cube that its block splits: the tiles.
template <class C>
struct SplitScratch : CubeScratch<C> {
  alignas(16) double multiples[3][2][C::kArea], rests[3][2][C::kArea];
};

// The same triangles with split distances, and what shared memory they take where they can come up.
template <class C>
using InTwo = Config<SplitTile<typename C::Tile>, C::kKind, C::kPlanes>;
template <class C>
constexpr size_t kScratchBytes =
    kTriesFixed<typename C::Tile> ? sizeof(CubeScratch<C>)
                                  : std::max(sizeof(CubeScratch<C>), sizeof(SplitScratch<InTwo<C>>));

// --- one triangle

template <class E, class A>
struct Edge {
  E e;
  A r;
};

// Not to be contracted with what it is added to: a product that goes to several places must be the same in all of them.
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }

// At j, i and k. kDiagonal: the triangle comes up in other orders, too, and gives the same bits in all of them.
template <bool kDiagonal, class E, class A>
__device__ __forceinline__ void angles(const Edge<E, A>& ji, const Edge<E, A>& jk, const Edge<E, A>& ik, A (&h)[3],
                                       A (&psi)[3]) {
  const E difference = ji.e - jk.e;
  const E at_i = kDiagonal ? ji.e + ik.e - jk.e : ik.e + difference;
  const E at_k = kDiagonal ? jk.e + ik.e - ji.e : ik.e - difference;
  h[0] = product(ji.r, jk.r), h[1] = product(ji.r, ik.r), h[2] = product(jk.r, ik.r);
  psi[0] = product(static_cast<A>(between_arms(ji.e, jk.e, ik.e)), h[0]);
  psi[1] = product(static_cast<A>(at_i), h[1]);
  psi[2] = product(static_cast<A>(at_k), h[2]);
}

// What a triangle adds to its edges; g and h at j, i and k.
template <class T, class A>
__device__ __forceinline__ void add_gradient(const A (&g)[3], const A (&h)[3], const A (&psi)[3], GradientSum<T, A>& ji,
                                             GradientSum<T, A>& jk, GradientSum<T, A>& ik) {
  const T at_j = static_cast<T>(product(g[0], h[0])), at_i = static_cast<T>(product(g[1], h[1]));
  const T at_k = static_cast<T>(product(g[2], h[2])), difference = at_i - at_k;
  ji.gh += at_j + difference;
  jk.gh += at_j - difference;
  ik.gh += at_i + at_k - at_j;
  ji.gpsi += g[0] * psi[0], ji.gpsi += g[1] * psi[1];
  jk.gpsi += g[0] * psi[0], jk.gpsi += g[2] * psi[2];
  ik.gpsi += g[1] * psi[1], ik.gpsi += g[2] * psi[2];
}

// --- one corner of a cube

// What a lane keeps of it in registers.
template <class C>
struct Corner {
  using Tile = typename C::Tile;
  using E = typename C::E;
  using A = typename C::A;
  static constexpr int kPlanes = CubeScratch<C>::kPlanes;

  int i, k;  // of the lane's first pair, within their blocks
  Edge<E, A> edge[2][C::kI][C::kK];
  SumOf<C> sum[kPlanes][C::kI][C::kK];
  A weight_i[C::kI], weight_k[C::kK];

  __device__ __forceinline__ Corner(const Triangles<Tile>& all, const Cube& cube, int i0, int k0, int lane)
      : i(i0 + lane / C::kLanesK * C::kI), k(k0 + lane % C::kLanesK * C::kK) {
#pragma unroll
    for (int p = 0; p < C::kI; ++p) {
      load_edges<C::kK>(all, cube, Cube::kIK, 0, (i + p) * C::kBlock + k, edge[0][p]);
      load_edges<C::kK>(all, cube, Cube::kIK, 1, (i + p) * C::kBlock + k, edge[1][p]);
#pragma unroll
      for (int q = 0; q < C::kK; ++q) {
#pragma unroll
        for (int s = 0; s < kPlanes; ++s) sum[s][p][q] = {};
      }
      if constexpr (C::kKind == Kind::kWeighted) weight_i[p] = all.weight[cube.i * C::kBlock + i + p];
    }
    if constexpr (C::kKind == Kind::kWeighted) {
#pragma unroll
      for (int q = 0; q < C::kK; ++q) weight_k[q] = all.weight[cube.k * C::kBlock + k + q];
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void load_edges(const Triangles<Tile>& all, const Cube& cube, Cube::Side of,
                                                    int side, int at, Edge<E, A> (&to)[kCount]) {
    const Tile& tile = all.tiles[cube.tile[of]];
    const auto r = *reinterpret_cast<const Pack<A, kCount>*>(&tile.r[side][at]);
    if constexpr (is_split<Tile>) {
      const double *multiples, *rests;
      if constexpr (kTriesFixed<Tile>) {
        multiples = tile.e[side], rests = all.rests + (2 * static_cast<int64_t>(cube.tile[of]) + side) * C::kArea;
      } else {
        const auto& own = shared<SplitScratch<C>>();
        multiples = own.multiples[of][side], rests = own.rests[of][side];
      }
      const auto multiple = *reinterpret_cast<const Pack<double, kCount>*>(multiples + at);
      const auto rest = *reinterpret_cast<const Pack<double, kCount>*>(rests + at);
#pragma unroll
      for (int m = 0; m < kCount; ++m) to[m] = {{multiple.at[m], rest.at[m]}, r.at[m]};
    } else {
      const auto e = *reinterpret_cast<const Pack<E, kCount>*>(&tile.e[side][at]);
#pragma unroll
      for (int m = 0; m < kCount; ++m) to[m] = {e.at[m], r.at[m]};
    }
  }

  // All triangles of row j of its block with the lane's pairs. kDiagonal: where blocks coincide, a row may be met
  // twice.
  template <bool kDiagonal>
  __device__ __forceinline__ A add_row(const Triangles<Tile>& all, int j, int lane, CubeScratch<C>& scratch) {
    const Cube& cube = scratch.cube;
    Edge<E, A> ji[2][C::kI], jk[2][C::kK];
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      load_edges<C::kI>(all, cube, Cube::kJI, s, j * C::kBlock + i, ji[s]);
      load_edges<C::kK>(all, cube, Cube::kJK, s, j * C::kBlock + k, jk[s]);
    }
    SumOf<C> sum_ji[kPlanes][C::kI] = {}, sum_jk[kPlanes][C::kK] = {};
    A weight_j = 1, loss = 0;
    if constexpr (C::kKind == Kind::kWeighted) weight_j = all.weight[cube.j * C::kBlock + j];
#pragma unroll
    for (int q = 0; q < C::kK; ++q) {
#pragma unroll
      for (int p = 0; p < C::kI; ++p) {
        A h[2][3], psi[2][3], g[3], value[3];
#pragma unroll
        for (int s = 0; s < 2; ++s) angles<kDiagonal>(ji[s][p], jk[s][q], edge[s][p][q], h[s], psi[s]);
#pragma unroll
        for (int m = 0; m < 3; ++m) {
          const A x = psi[0][m] - psi[1][m];
          g[m] = clamped(x, all.delta);
          if constexpr (kDiagonal) {
            if (same_arms(cube, m, j, i + p, k + q)) g[m] = 0;
          }
          value[m] = huber(x, g[m], A(0.5));
        }
        if constexpr (C::kKind == Kind::kVertexLoss) {
          const A share = static_cast<A>(cube.share());
          sum_ji[0][p].loss += share * value[0];
          sum[0][p][q].loss += share * value[1];
          sum[1][p][q].loss += share * value[2];
        } else {
          if constexpr (C::kKind == Kind::kWeighted) {
            g[0] *= weight_j, g[1] *= weight_i[p], g[2] *= weight_k[q];
          } else {
#pragma unroll
            for (int m = 0; m < 3; ++m) loss += value[m];
          }
#pragma unroll
          for (int s = 0; s < C::kPlanes; ++s) add_gradient(g, h[s], psi[s], sum_ji[s][p], sum_jk[s][q], sum[s][p][q]);
        }
      }
    }
#pragma unroll
    for (int s = 0; s < C::kPlanes; ++s) {
      const SumOf<C> of_ji = sum_over_lanes<C::kI, C::kLanesK>(sum_ji[s], lane, 1);
      const SumOf<C> of_jk = sum_over_lanes<C::kK, C::kLanesI>(sum_jk[s], lane, C::kLanesK);
      const int at_i = i + left_to<C::kI>(lane, 1), at_k = k + left_to<C::kK>(lane, C::kLanesK);
      if (lane % C::kLanesK < C::kI) add(scratch.ji[s][j][at_i], of_ji, k < C::kRowsK);
      if (lane / C::kLanesK < C::kK) add(scratch.jk[s][j][at_k], of_jk, i < C::kRowsI);
    }
    return loss;
  }

  // Whether corner m's two arms are one.
  static __device__ __forceinline__ bool same_arms(const Cube& cube, int m, int j, int i, int k) {
    if (m == 0) return cube.i == cube.k && i == k;
    if (m == 1) return cube.j == cube.k && j == k;
    return cube.j == cube.i && j == i;
  }
  static __device__ __forceinline__ void add(SumOf<C>& to, SumOf<C> sum, bool first) {
    if (!first) sum += to;
    to = sum;
  }
};

// --- a cube

// Stores kCount elements of W, or adds to them. place(m) is where the m-th lies in its tile, sum(m) what it gets. All
// that is read is read before anything is written, so that one latency is waited for and not kCount.
template <class C, int kCount, class Place, class Sum>
__device__ __forceinline__ void store_sums(const Triangles<typename C::Tile>& all, int plane, int64_t tile,
                                           const Place& place, const Sum& sum) {
  auto* const to = all.sums + plane * all.plane + (blockIdx.y * all.tile_count + tile) * C::kArea;
  const auto& r = all.tiles[tile].r[plane];
  using T = typename C::T;
  T total[kCount];
  double per_unit = 1;
  if constexpr (is_fixed<typename C::Tile> && C::kKind != Kind::kVertexLoss) per_unit = all.form->per_unit[plane];
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    const auto of_cube = sum(m).total(r[place(m)]);
    if constexpr (is_fixed<typename C::Tile>) {
      total[m] = T(static_cast<double>(of_cube) * per_unit);
    } else {
      total[m] = of_cube;
    }
    if (!all.first) total[m] += to[place(m)];
  }
#pragma unroll
  for (int m = 0; m < kCount; ++m) to[place(m)] = total[m];
}

// Adds a corner's sums over the warps.
template <class C>
__device__ __forceinline__ void store_corner(const Triangles<typename C::Tile>& all, const Corner<C>& corner, int i0,
                                             int k0, CubeScratch<C>& scratch) {
#pragma unroll
  for (int s = 0; s < C::kPlanes; ++s) {
#pragma unroll
    for (int p = 0; p < C::kI; ++p) {
#pragma unroll
      for (int q = 0; q < C::kK; ++q) {
        scratch.ik[threadIdx.x / kWarp][p][q][threadIdx.x % kWarp] = corner.sum[s][p][q];
      }
    }
    __syncthreads();
    constexpr int kPairs = C::kRowsI * C::kRowsK;  // can be fewer than threads
    auto row = [](int m) { return static_cast<int>(m * C::kThreads + threadIdx.x) / C::kRowsK; };
    const int k = threadIdx.x % C::kRowsK;
    if (static_cast<int>(threadIdx.x) < kPairs) {
      store_sums<C, (kPairs + C::kThreads - 1) / C::kThreads>(
          all, s, scratch.cube.tile[Cube::kIK], [&](int m) { return (i0 + row(m)) * C::kBlock + k0 + k; },
          [&](int m) {
            const int i = row(m), lane = i / C::kI * C::kLanesK + k / C::kK;
            SumOf<C> sum = scratch.ik[0][i % C::kI][k % C::kK][lane];
#pragma unroll
            for (int warp = 1; warp < C::kWarps; ++warp) sum += scratch.ik[warp][i % C::kI][k % C::kK][lane];
            return sum;
          });
    }
    __syncthreads();
  }
}

// The sums of (j, i) and (j, k), each warp those of its own rows j. Of two tiles that are one, one is enough.
template <class C>
__device__ __forceinline__ void store_rows(const Triangles<typename C::Tile>& all, const CubeScratch<C>& scratch) {
  constexpr int kCount = C::kArea / C::kThreads;
  const Cube& cube = scratch.cube;
  const bool keep_ji = cube.j != cube.k, keep_jk = cube.j != cube.i && cube.i != cube.k;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, column = lane % C::kBlock;
  auto row = [&](int m) { return (m * kWarp + lane) / C::kBlock * C::kWarps + warp; };
  auto place = [&](int m) { return row(m) * C::kBlock + column; };
  __syncwarp();
#pragma unroll
  for (int s = 0; s < C::kPlanes; ++s) {
    if (keep_ji) {
      store_sums<C, kCount>(all, s, cube.tile[Cube::kJI], place, [&](int m) { return scratch.ji[s][row(m)][column]; });
    }
    if (keep_jk) {
      store_sums<C, kCount>(all, s, cube.tile[Cube::kJK], place, [&](int m) { return scratch.jk[s][row(m)][column]; });
    }
  }
}

template <class C, bool kDiagonal>
__device__ __forceinline__ void sweep(const Triangles<typename C::Tile>& all, CubeScratch<C>& scratch) {
  const int lane = threadIdx.x % kWarp;
  scratch.thread_loss[threadIdx.x] = 0;
  for (int i0 = 0; i0 < C::kBlock; i0 += C::kRowsI) {
    for (int k0 = 0; k0 < C::kBlock; k0 += C::kRowsK) {
      Corner<C> corner(all, scratch.cube, i0, k0, lane);
      typename C::A loss = 0;
#pragma unroll 1
      for (int n = 0; n < C::kBlock; n += C::kWarps) {  // as many for every warp: the compiler sees that none diverges
        loss += corner.template add_row<kDiagonal>(all, n + threadIdx.x / kWarp, lane, scratch);
      }
      scratch.thread_loss[threadIdx.x] += loss;
      store_corner(all, corner, i0, k0, scratch);
    }
  }
  store_rows(all, scratch);
}

template <class C>
__device__ __forceinline__ void run_cube(const Triangles<typename C::Tile>& all, const Cube& cube,
                                         double* partial_loss) {
  auto& scratch = shared<CubeScratch<C>>();
  if (threadIdx.x == 0) scratch.cube = cube, scratch.partial_loss = partial_loss;
  __syncthreads();
  if (is_split<typename C::Tile> || cube.diagonal()) {  // split is rare, and what serves both is half of the code
    sweep<C, true>(all, scratch);
  } else {
    sweep<C, false>(all, scratch);
  }
  if (!scratch.partial_loss) return;
  const double loss =
      block_sum(static_cast<double>(scratch.thread_loss[threadIdx.x]), scratch.loss) / scratch.cube.orders();
  if (threadIdx.x == 0) *scratch.partial_loss = all.first ? loss : *scratch.partial_loss + loss;
}

// Whether the cube needs splitting. Then its distances are in shared memory after the next barrier.
template <class C>
__device__ __forceinline__ bool split_cube(const Triangles<typename C::Tile>& all, const Rows& rows, const Cube& cube) {
  Range range[2];
#pragma unroll
  for (const int tile : cube.tile) {
#pragma unroll
    for (int side = 0; side < 2; ++side) range[side].add(all.summaries[tile], side);
  }
  if (!range[0].needs_split<typename C::T>() && !range[1].needs_split<typename C::T>()) return false;
  auto& scratch = shared<SplitScratch<InTwo<C>>>();
#pragma unroll 1
  for (int n = 0; n < 6; ++n) {
    const int side = n % 2;
    const Cube::Side of = static_cast<Cube::Side>(n / 2);
    const Points points = side == 0 ? rows.first : rows.second;
    const double shift = side == 0 ? range[0].shift() : range[1].shift();
    split<C::kBlock>(points, rows.kept, cube.blocks(of), shift, scratch.multiples[of][side], scratch.rests[of][side]);
  }
  return true;
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kResident)
    triangles_kernel(Triangles<typename C::Tile> all, const __grid_constant__ Rows rows) {
  using Tile = typename C::Tile;
  let_next_start();
  wait_for_previous();
  if constexpr (kTriesFixed<Tile>) {
    if (all.form->fixed != is_fixed<Tile>) return;
  }
  const int phase = all.phase + blockIdx.y;
  if (phase >= all.blocks) return;
  const Cube cube(blockIdx.x, phase, all.blocks);
  double* const partial_loss = all.loss ? all.loss + blockIdx.y * all.tile_count + blockIdx.x : nullptr;
  if (!cube.exists()) {
    if (threadIdx.x == 0 && partial_loss && all.first) *partial_loss = 0;
    return;
  }
  if constexpr (!is_fixed<Tile>) {
    static_assert(InTwo<C>::kThreads == C::kThreads && sizeof(CubeScratch<InTwo<C>>) <= sizeof(CubeScratch<C>));
    bool split;
    if constexpr (kTriesFixed<Tile>) {
      split = all.form->split;
    } else {
      split = split_cube<C>(all, rows, cube);
    }
    if (split) return run_cube<InTwo<C>>(all.template with<SplitTile<Tile>>(), cube, partial_loss);
  }
  run_cube<C>(all, cube, partial_loss);
}

}  // namespace amtml::gpu
