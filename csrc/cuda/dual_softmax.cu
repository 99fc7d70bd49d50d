// Dual softmax of score matrices [B, R, K]: over R (columns), then over K (rows).
//
//   sequential: a = softmax_R(x), y = softmax_K(a)     dx = a (da - sum_R da a),  da = y (g - sum_K g y)
//   product:    y = softmax_R(x) b, b = softmax_K(x)   dx = 2 g y - a sum_R g y - b sum_K g y
//
// scores [B, R, K] in float32, bfloat16 or float16, made contiguous -> result like it; first = a [B, R, K] float32;
// row_stats [B, R, 2] float32: what is subtracted before the exponentials of the softmax over K, and their sum. For
// "sequential" that is 0: a is at most 1.
//
// Grid. Forward: maxima and sums of columns, a block for 32 columns and a share of the rows; then blocks that take rows
// in turn, each thread the same columns of all of them. Backward: the same blocks find sum_K and, each over its rows,
// parts of sum_R; then blocks of columns by shares of the rows add those parts and write dx.
// Traffic: forward reads x twice, writes y and a; backward reads g and a (and x for "product") twice and writes dx. All
// of it along memory; bandwidth binds, for small matrices the two launches each way.
#include "common.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "dual_softmax";
constexpr int kWarps = 32;                      // most of a block
constexpr int kPer = 8;                         // columns of a thread, where rows are taken in turn
constexpr int kRows = 8;                        // loads that a thread has under way where columns are
constexpr int kGradWarps = 8, kRowsOfGrad = 2;  // the same in backward, which loads several numbers a row
constexpr int kBlocks = 128;      // that columns are cut into, at least, if there are rows enough: one a multiprocessor
constexpr int kThreads = 270336;  // that a GPU of 132 multiprocessors holds
constexpr int64_t kMostInt = 1 << 30;
constexpr float kNone = -INFINITY;

struct Sizes {
  int64_t batch;
  int rows, columns;

  explicit Sizes(const Tensor& t)
      : batch(t.size(0)), rows(static_cast<int>(t.size(1))), columns(static_cast<int>(t.size(2))) {}
  __device__ __forceinline__ int64_t row(int64_t b, int r) const { return (b * rows + r) * columns; }
};

// A maximum and the sum of exponentials below it, over what may be -inf or nothing.
struct Online {
  float max = kNone, sum = 0;

  __device__ __forceinline__ float base() const { return max == kNone ? 0 : max; }
  // A larger maximum, which the sum is then counted from.
  __device__ __forceinline__ void raise(float to) {
    const float before = max;
    max = fmaxf(max, to);
    sum *= expf(before - base());
  }
};

// --- columns

struct ColumnScratch {
  float max[kWarps][kWarp + 1], sum[kWarps][kWarp + 1];  // by warp and column; padded: read across warps
};

// Maxima and sums of 32 columns over a share of the rows: partial [B, splits, K].
template <class T>
__global__ void __launch_bounds__(1024, 1)
    column_kernel(const T* __restrict__ scores, Sizes size, int splits, float2* partial) {
  ColumnScratch& scratch = shared<ColumnScratch>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int tiles = (size.columns + kWarp - 1) / kWarp, tile = blockIdx.x % tiles, split = blockIdx.x / tiles % splits;
  const int64_t b = blockIdx.x / tiles / splits;
  const int share = (size.rows + splits - 1) / splits, first = split * share;
  const int end = static_cast<int>(least(first + share, size.rows)), k = tile * kWarp + lane;
  const int64_t step = static_cast<int64_t>(warps) * size.columns;  // from a row of this thread to the next
  const T* from = scores + size.row(b, first + warp) + k;
  Online mine;
  for (int r = k < size.columns ? first + warp : end; r < end; r += kRows * warps, from += kRows * step) {
    float x[kRows], highest = kNone;
#pragma unroll
    for (int u = 0; u < kRows; ++u) x[u] = r + u * warps < end ? static_cast<float>(from[u * step]) : kNone;
#pragma unroll
    for (int u = 0; u < kRows; ++u) highest = fmaxf(highest, x[u]);
    mine.raise(highest);
    const float base = mine.base();
#pragma unroll
    for (int u = 0; u < kRows; ++u) mine.sum += expf(x[u] - base);
  }
  scratch.max[warp][lane] = mine.max, scratch.sum[warp][lane] = mine.sum;
  __syncthreads();
  for (int c = warp; c < kWarp; c += warps) {  // a warp for a column, a lane for what a warp has found
    Online all;
    if (lane < warps) all.max = scratch.max[lane][c], all.sum = scratch.sum[lane][c];
    all.raise(warp_max(all.max));
    all.sum = warp_sum(all.sum);
    if (lane == 0 && tile * kWarp + c < size.columns) {
      partial[(b * splits + split) * size.columns + tile * kWarp + c] = {all.max, all.sum};
    }
  }
}

// --- rows: thread i has the columns (i + j threads) kWide ... of each kPer threads columns

struct RowScratch {
  float max[kWarps], sum[2][kWarps];
};

__device__ __forceinline__ float block_max(float x, float* scratch) {
  const unsigned warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  x = warp_max(x);
  if (warps == 1) return x;
  if (lane == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  return warp_max(lane < warps ? scratch[lane] : kNone);
}

template <int kWide>
struct Chunk {
  static constexpr int kParts = kPer / kWide;
  float at[kParts][kWide];

  __device__ __forceinline__ static int column(int start, int part) {
    return start + static_cast<int>(part * blockDim.x + threadIdx.x) * kWide;
  }
  // body(part, element) for those that the row of `columns` has.
  template <class F>
  __device__ __forceinline__ static void for_each(int start, int columns, const F& body) {
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      if (column(start, j) >= columns) continue;
#pragma unroll
      for (int e = 0; e < kWide; ++e) body(j, e);
    }
  }
  template <class T>
  __device__ __forceinline__ void load(const T* row, int start, int columns) {
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
#pragma unroll
      for (int e = 0; e < kWide; ++e) at[j][e] = 0;
      if (column(start, j) < columns) amtml::load<kWide>(row + column(start, j), at[j]);
    }
  }
  template <class T>
  __device__ __forceinline__ void store(T* row, int start, int columns) const {
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      if (column(start, j) < columns) amtml::store<kWide>(row + column(start, j), at[j]);
    }
  }
};

// What the softmax over R subtracts and multiplies by: all parts of column_kernel together.
template <int kWide>
struct ColumnSoftmax {
  Chunk<kWide> max, inverse;

  __device__ __forceinline__ void load(const float2* partial, int splits, int start, int columns) {
    Chunk<kWide>::for_each(start, columns, [&](int j, int e) {
      const float2* at = partial + Chunk<kWide>::column(start, j) + e;
      Online all;
#pragma unroll 1
      for (int s = 0; s < splits; ++s) {
        const float2 part = at[static_cast<int64_t>(s) * columns];
        Online other;
        other.max = part.x, other.sum = part.y;
        const float highest = fmaxf(all.max, part.x);
        all.raise(highest), other.raise(highest);
        all.sum += other.sum;
      }
      max.at[j][e] = all.max, inverse.at[j][e] = 1 / all.sum;
    });
  }
  __device__ __forceinline__ float operator()(int j, int e, float x) const {
    return expf(x - max.at[j][e]) * inverse.at[j][e];
  }
};

// Block i of `per` for a matrix takes its rows i, i + per, ... A row longer than the columns of all threads is read
// again instead of kept.
template <class T, int kWide, bool kSequential>
__global__ void __launch_bounds__(1024)
    row_kernel(const T* __restrict__ scores, const float2* __restrict__ partial, Sizes size, int splits, int per,
               T* __restrict__ out, float* __restrict__ first, float2* __restrict__ row_stats) {
  RowScratch& scratch = shared<RowScratch>();
  const int64_t b = blockIdx.x / per;
  const int columns = size.columns, span = blockDim.x * kPer;
  const float2* parts = partial + b * splits * columns;
  Chunk<kWide> x;
  ColumnSoftmax<kWide> a;
  // x, or a if that is what the softmax over K is of.
  auto read = [&](int64_t at, int start) {
    if (columns > span) a.load(parts, splits, start, columns);
    x.load(scores + at, start, columns);
    if (kSequential) Chunk<kWide>::for_each(start, columns, [&](int j, int e) { x.at[j][e] = a(j, e, x.at[j][e]); });
  };
  if (columns <= span) a.load(parts, splits, 0, columns);
  for (int r = blockIdx.x % per, turn = 0; r < size.rows; r += per, turn ^= 1) {
    const int64_t at = size.row(b, r);
    Online mine;
    if (kSequential) mine.max = 0;
    for (int start = 0; start < columns; start += span) {
      read(at, start);
      if (!kSequential) {
        float highest = kNone;
        Chunk<kWide>::for_each(start, columns, [&](int j, int e) { highest = fmaxf(highest, x.at[j][e]); });
        mine.raise(highest);
      }
      const float base = mine.base();
      Chunk<kWide>::for_each(start, columns, [&](int j, int e) { mine.sum += expf(x.at[j][e] - base); });
    }
    const float highest = kSequential ? 0 : block_max(mine.max, scratch.max);
    const float total = block_sum(mine.sum * expf(mine.max - highest), scratch.sum[turn]), inverse = 1 / total;
    if (threadIdx.x == 0) row_stats[b * size.rows + r] = {highest, total};
    for (int start = 0; start < columns; start += span) {
      if (columns > span) read(at, start);
      Chunk<kWide> y;
      Chunk<kWide>::for_each(start, columns, [&](int j, int e) {
        y.at[j][e] = expf(x.at[j][e] - highest) * inverse;
        if (kSequential) return;
        x.at[j][e] = a(j, e, x.at[j][e]);
        y.at[j][e] *= x.at[j][e];
      });
      x.store(first + at, start, columns);
      y.store(out + at, start, columns);
    }
  }
}

// --- backward

// The softmax over K, of a ("sequential") or of x.
struct RowSoftmax {
  float max, inverse;

  __device__ __forceinline__ explicit RowSoftmax(float2 stats) : max(stats.x), inverse(1 / stats.y) {}
  __device__ __forceinline__ float operator()(float x) const { return expf(x - max) * inverse; }
};

// sum_K g y of the rows that block i of `per` takes (inner [B, R]), and what these rows add to sum_R (partial
// [B, per, K]).
template <class T, int kWide, bool kSequential>
__global__ void __launch_bounds__(1024)
    back_row_kernel(const T* __restrict__ grad, const T* __restrict__ scores, const float* __restrict__ first,
                    const float2* __restrict__ row_stats, Sizes size, int per, float* __restrict__ inner,
                    float* __restrict__ partial) {
  RowScratch& scratch = shared<RowScratch>();
  const int64_t b = blockIdx.x / per;
  const int columns = size.columns, span = blockDim.x * kPer;
  float* sums = partial + static_cast<int64_t>(blockIdx.x) * columns;
  Chunk<kWide> g, a, y, total;  // of a row, and of all rows; y: the softmax over K; for "product" g becomes g y
  auto read = [&](int64_t at, int start, const RowSoftmax& softmax) {
    g.load(grad + at, start, columns);
    a.load(first + at, start, columns);
    if (!kSequential) y.load(scores + at, start, columns);
    Chunk<kWide>::for_each(start, columns, [&](int j, int e) {
      y.at[j][e] = softmax(kSequential ? a.at[j][e] : y.at[j][e]);
      if (!kSequential) g.at[j][e] *= a.at[j][e] * y.at[j][e];
    });
  };
  Chunk<kWide>::for_each(0, span, [&](int j, int e) { total.at[j][e] = 0; });
  for (int r = blockIdx.x % per, turn = 0; r < size.rows; r += per, turn ^= 1) {
    const int64_t at = size.row(b, r);
    const RowSoftmax softmax(row_stats[b * size.rows + r]);
    float sum = 0;
    for (int start = 0; start < columns; start += span) {
      read(at, start, softmax);
      Chunk<kWide>::for_each(start, columns,
                             [&](int j, int e) { sum += kSequential ? g.at[j][e] * y.at[j][e] : g.at[j][e]; });
    }
    sum = block_sum(sum, scratch.sum[turn]);
    if (threadIdx.x == 0) inner[b * size.rows + r] = sum;
    for (int start = 0; start < columns; start += span) {
      if (columns > span) {
        read(at, start, softmax);
        if (r >= per) total.load(sums, start, columns);
        if (r < per) Chunk<kWide>::for_each(0, span, [&](int j, int e) { total.at[j][e] = 0; });
      }
      Chunk<kWide>::for_each(start, columns, [&](int j, int e) {
        total.at[j][e] += kSequential ? y.at[j][e] * (g.at[j][e] - sum) * a.at[j][e] : g.at[j][e];
      });
      if (columns > span) total.store(sums, start, columns);
    }
  }
  if (columns <= span) total.store(sums, 0, columns);
}

struct GradScratch {
  float sum[kGradWarps][4 * kWarp];  // by warp and column
};

// dx of 32 kWide columns and a share of the rows: kGradWarps warps take the rows in turn.
template <class T, int kWide, bool kSequential>
__global__ void back_column_kernel(const T* __restrict__ grad, const T* __restrict__ scores,
                                   const float* __restrict__ first, const float2* __restrict__ row_stats,
                                   const float* __restrict__ inner, const float* __restrict__ partial, Sizes size,
                                   int per, int splits, T* __restrict__ out) {
  GradScratch& scratch = shared<GradScratch>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int tiles = (size.columns + kWarp * kWide - 1) / (kWarp * kWide), tile = blockIdx.x % tiles;
  const int share = (size.rows + splits - 1) / splits, start = blockIdx.x / tiles % splits * share;
  const int end = static_cast<int>(least(start + share, size.rows)), k = (tile * kWarp + lane) * kWide;
  const int64_t b = blockIdx.x / tiles / splits;
  float total[kWide] = {};
  if (k < size.columns) {
#pragma unroll 4
    for (int part = warp; part < per; part += kGradWarps) {
      float sum[kWide];
      load<kWide>(partial + (b * per + part) * size.columns + k, sum);
#pragma unroll
      for (int e = 0; e < kWide; ++e) total[e] += sum[e];
    }
  }
#pragma unroll
  for (int e = 0; e < kWide; ++e) scratch.sum[warp][lane * kWide + e] = total[e];
  __syncthreads();
  if (k >= size.columns) return;
#pragma unroll
  for (int e = 0; e < kWide; ++e) {
    total[e] = 0;
#pragma unroll
    for (int w = 0; w < kGradWarps; ++w) total[e] += scratch.sum[w][lane * kWide + e];
  }
  for (int r = start + warp; r < end; r += kRowsOfGrad * kGradWarps) {
    float g[kRowsOfGrad][kWide], a[kRowsOfGrad][kWide], x[kRowsOfGrad][kWide];
#pragma unroll
    for (int u = 0; u < kRowsOfGrad; ++u) {
      const int64_t at = size.row(b, static_cast<int>(least(r + u * kGradWarps, end - 1))) + k;
      load<kWide>(grad + at, g[u]);
      load<kWide>(first + at, a[u]);
      if (!kSequential) load<kWide>(scores + at, x[u]);
    }
#pragma unroll
    for (int u = 0; u < kRowsOfGrad; ++u) {
      if (r + u * kGradWarps >= end) continue;
      const int64_t row = b * size.rows + r + u * kGradWarps;
      const RowSoftmax softmax(row_stats[row]);
      float dx[kWide];
#pragma unroll
      for (int e = 0; e < kWide; ++e) {
        const float y = softmax(kSequential ? a[u][e] : x[u][e]);
        dx[e] = kSequential ? a[u][e] * (y * (g[u][e] - inner[row]) - total[e])
                            : 2 * g[u][e] * a[u][e] * y - y * inner[row] - a[u][e] * total[e];
      }
      store<kWide>(out + size.row(b, r + u * kGradWarps) + k, dx);
    }
  }
}

// --- launches

// run(T{}, kWide, kSequential) with the last two as constants. Rows of a multiple of 4 that start there are moved 4 at
// a time.
template <class F>
void dispatch_rows(const Tensor& scores, const void* also, const std::string& mode, const F& run) {
  dispatch_gpu(scores.scalar_type(), kOp, [&](auto element) {
    const auto start = reinterpret_cast<uintptr_t>(scores.const_data_ptr()) | reinterpret_cast<uintptr_t>(also);
    auto with = [&](auto wide) {
      if (mode == "sequential") {
        run(element, wide, std::true_type{});
      } else {
        run(element, wide, std::false_type{});
      }
    };
    if (scores.size(2) % 4 == 0 && start % (4 * sizeof(element)) == 0) {
      with(std::integral_constant<int, 4>{});
    } else {
      with(std::integral_constant<int, 1>{});
    }
  });
}

// What forward has saved, which a hook may give back at any address, at one from which 16 bytes at a time can be read.
Tensor aligned(const Tensor& t) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0) return t;
  const Tensor made = torch::stable::clone(t);
  keep_for_kernels(made);
  return made;
}

unsigned whole_warps(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>((threads + kWarp - 1) / kWarp, 1, kWarps) * kWarp);
}

// As many blocks of a matrix as make `wanted` of all of them, but no more than `most` and at least one.
int blocks_of_each(int64_t wanted, int64_t matrices, int64_t most) {
  return static_cast<int>(std::max<int64_t>(std::min(wanted / std::max<int64_t>(matrices, 1), most), 1));
}

void check(const Tensor& scores) {
  STD_TORCH_CHECK(scores.dim() == 3, kOp, ": scores must be [B, R, K]");
  STD_TORCH_CHECK(scores.size(1) < kMostInt && scores.size(2) < kMostInt, kOp,
                  ": the CUDA kernels take fewer than 2^30 rows and columns");
}

template <class T>
T* data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> dual_softmax_fwd(const Tensor& scores, Name mode) {
  check(scores);
  const OnDevice on(scores);
  const Tensor input = dense(scores);
  const Sizes size(input);
  const Shape shape = {size.batch, size.rows, size.columns};
  Tensor out = empty(input, shape, input.scalar_type()), first = empty(input, shape, ScalarType::Float);
  Tensor row_stats = empty(input, {size.batch, size.rows, 2}, ScalarType::Float);
  if (input.numel() == 0) return {out, first, row_stats};
  const int64_t tiles = blocks_for(size.columns, kWarp);
  const int splits = blocks_of_each(kBlocks, tiles * size.batch, blocks_for(size.rows, kWarp));
  Tensor partial = empty(input, {size.batch, splits, size.columns, 2}, ScalarType::Float);
  const unsigned threads = whole_warps((size.columns + kPer - 1) / kPer);
  // Where the columns' parts have to be put together first, a block does that for several rows.
  const int per = blocks_of_each(kThreads / threads, size.batch, blocks_for(size.rows, splits > 1 ? 4 : 1));
  dispatch_rows(input, nullptr, mode, [&](auto element, auto wide, auto sequential) {
    using T = decltype(element);
    const T* x = static_cast<const T*>(input.const_data_ptr());
    const unsigned column_threads = whole_warps(kWarp * blocks_for(blocks_for(size.rows, splits), kRows));
    launch(&column_kernel<T>, {blocks(tiles * splits * size.batch), column_threads, 1, sizeof(ColumnScratch)}, on, x,
           size, splits, data<float2>(partial));
    launch(&row_kernel<T, decltype(wide)::value, decltype(sequential)::value>,
           {blocks(per * size.batch), threads, 1, sizeof(RowScratch)}, on, x, data<float2>(partial), size, splits, per,
           data<T>(out), data<float>(first), data<float2>(row_stats));
  });
  return {out, first, row_stats};
}

Tensor dual_softmax_bwd(const Tensor& grad, const Tensor& scores, const Tensor& first, const Tensor& row_stats,
                        Name mode) {
  check(scores);
  if (grad.scalar_type() != scores.scalar_type() && scores.scalar_type() != ScalarType::Float) {
    const Tensor wide = converted(scores, ScalarType::Float);
    return converted(dual_softmax_bwd(grad, wide, first, row_stats, mode), scores.scalar_type());
  }
  const OnDevice on(scores);
  const Tensor input = dense(scores), incoming = dense(grad, scores.scalar_type());
  const Tensor softmax = aligned(dense(first)), stats = aligned(dense(row_stats));
  const Sizes size(input);
  const Shape shape = {size.batch, size.rows, size.columns};
  check_shape(kOp, "grad", grad, shape);
  check_shape(kOp, "first", first, shape);
  check_shape(kOp, "row_stats", row_stats, {size.batch, size.rows, 2});
  Tensor grad_scores = empty(input, shape, input.scalar_type());
  if (input.numel() == 0) return grad_scores;
  const unsigned threads = whole_warps((size.columns + kPer - 1) / kPer);
  // Half of the GPU's threads: each block's part of the columns' sums is written and read again.
  const int per = blocks_of_each(kThreads / threads / 2, size.batch, blocks_for(size.rows, 4));
  Tensor inner = empty(input, {size.batch, size.rows}, ScalarType::Float);
  Tensor partial = empty(input, {size.batch, per, size.columns}, ScalarType::Float);
  dispatch_rows(input, incoming.const_data_ptr(), mode, [&](auto element, auto wide, auto sequential) {
    using T = decltype(element);
    constexpr int kWide = decltype(wide)::value;
    constexpr bool kSequential = decltype(sequential)::value;
    const T *g = static_cast<const T*>(incoming.const_data_ptr()), *x = static_cast<const T*>(input.const_data_ptr());
    const float* a = static_cast<const float*>(softmax.const_data_ptr());
    const float2* rows = static_cast<const float2*>(stats.const_data_ptr());
    launch(&back_row_kernel<T, kWide, kSequential>, {blocks(per * size.batch), threads, 1, sizeof(RowScratch)}, on, g,
           x, a, rows, size, per, data<float>(inner), data<float>(partial));
    const int64_t tiles = blocks_for(size.columns, kWarp * kWide);
    const int splits = blocks_of_each(2 * kBlocks, tiles * size.batch, blocks_for(size.rows, kWarp));
    launch(&back_column_kernel<T, kWide, kSequential>,
           {blocks(tiles * splits * size.batch), kGradWarps * kWarp, 1, sizeof(GradScratch)}, on, g, x, a, rows,
           data<float>(inner), data<float>(partial), size, per, splits, data<T>(grad_scores));
  });
  return grad_scores;
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("dual_softmax_fwd", TORCH_BOX(&dual_softmax_fwd));
  m.impl("dual_softmax_bwd", TORCH_BOX(&dual_softmax_bwd));
}

}  // namespace
}  // namespace amtml::gpu
