// Teacher weights: pooling, scores and their softmax in one launch; backward writes the map's gradient in one pass.
//
//   b = max or mean over H x W of B,  gamma_t = sum_c v_c theta_tc b_c,  w = softmax_t gamma
//   dgamma_t = w_t sum_s w_s (g_t - g_s),  db_c = sum_t dgamma_t theta_tc v_c,  d(theta_t v) = sum_n dgamma_nt b_n
//
// features [N, d, H, W] or [N, d] in float32, bfloat16 or float16 with any strides; theta [T, d], v [d] float32
//   -> weights [N, T], pooled [N, d] float32, index [N, d] int32: where the maximum stands first in its plane.
//
// Grid: a block an example, both ways: lanes run over the pixels of a plane, or over channels where those are
// neighbors in memory. The gradient of theta and v takes a block for 8 channels, over all examples: in the same launch
// where the weights are at hand (AMTMLLoss), else in a second one.
// Traffic: forward reads the map, backward writes it, 16 bytes a thread where sizes and strides allow; bandwidth binds
// from a few megabytes on, below that the launches. Besides pooled and index (8 N d bytes each way).
//
// A score is summed in pairs of floats: the softmax turns its absolute error into a relative one of the weight. The
// slopes dgamma are made of differences of g, for weights near 1 leave nothing of g_t - sum_s g_s w_s but its rounding.
#include "../arithmetic.h"
#include "float_pair.cuh"
#include "ops.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "teacher_weights";
constexpr int kVectors = 4;                     // loads that a thread has under way, if there is that much to do
constexpr int kFewExamples = 512;               // from here on small blocks: several on a multiprocessor
constexpr int kKept = 2048;                     // up to so many pooled numbers stay in shared memory
constexpr int kSpread = 512;                    // channels whose gradient one block writes
constexpr int kSlice = 8, kTeachersAtOnce = 4;  // of the parameters' gradient: kSlice * kTeachersAtOnce is a warp
constexpr int kExamplesAtOnce = 1024;           // up to so many, a block of the map's threads does for a slice
constexpr int kMaxWeights = 2048;               // 20 bytes of shared memory each

constexpr int64_t kMaxChannels = 65535 * kSpread;  // that many blocks has a grid along y

constexpr int least(int a, int b) { return a < b ? a : b; }

// A feature map, or one of its examples. Strides of dimensions of size 1 count as 0.
struct Map {
  int64_t sn, sc, sh, sw, step;
  int channels, pixels, width;
  bool even;  // pixel p stands p steps from the first

  explicit Map(const Tensor& t) {
    auto size = [&](int64_t d) { return d < t.dim() ? t.size(d) : 1; };
    auto stride = [&](int64_t d) { return size(d) > 1 ? t.stride(d) : 0; };
    sn = stride(0), sc = stride(1), sh = stride(2), sw = stride(3);
    channels = static_cast<int>(size(1)), pixels = static_cast<int>(size(2) * size(3));
    width = static_cast<int>(size(3));
    even = size(2) == 1 || width == 1 || sh == width * sw;
    step = width == 1 ? sh : sw;
  }
  bool by_channels() const { return sc == 1; }
  // Whether `count` neighbors can be moved at once: channels, or pixels of a plane.
  bool divides(int64_t count) const {
    auto whole = [&](int64_t x) { return x % count == 0; };
    if (by_channels()) return whole(sn) && whole(channels) && whole(sh) && whole(sw);
    return whole(sn) && whole(sc) && whole(pixels) && even && step == 1;
  }
  __device__ __forceinline__ int64_t offset(int p) const { return even ? p * step : p / width * sh + p % width * sw; }
};

struct Factors {
  const float *theta, *v;
  int teachers, channels;
};

// a b c, with what its rounding cuts off.
__device__ __forceinline__ FloatPair product(float a, float b, float c) {
  const float ab = __fmul_rn(a, b), abc = __fmul_rn(ab, c);
  if (!(fabsf(abc) < INFINITY)) return FloatPair(abc);
  return {abc, __fmaf_rn(__fmaf_rn(a, b, -ab), c, __fmaf_rn(ab, c, -abc))};
}

// Beyond float's range infinite, as a plain sum is, and not NaN.
__device__ __forceinline__ FloatPair plus(FloatPair a, FloatPair b) {
  const float plain = a.high + b.high;
  return fabsf(plain) < INFINITY ? a + b : FloatPair(plain);
}

// What a block keeps in shared memory; the arrays follow one another.
struct Kept {
  float* value;                      // [values]: what groups of threads found, or gradients of channels
  int* at;                           // as many
  FloatPair* partial;                // [max(T, warps)]
  float* pooled;                     // [d], if that is at most kKept
  float *weight, *incoming, *slope;  // [T]

  static size_t bytes(int values, int pooled, int teachers, int threads) {
    return 8 * (static_cast<size_t>(values) + std::max(teachers, threads / kWarp)) + 4 * (pooled + 3 * teachers);
  }
  __device__ Kept(int values, int pooled_channels, int teachers) {
    value = reinterpret_cast<float*>(&shared<Pack<float, 4>>());
    at = reinterpret_cast<int*>(value + values);
    partial = reinterpret_cast<FloatPair*>(at + values);
    pooled = reinterpret_cast<float*>(partial + std::max<int>(teachers, blockDim.x / kWarp));
    weight = pooled + pooled_channels, incoming = weight + teachers, slope = incoming + teachers;
  }
};

// The maximum of pixels and where it stands first, or their sum.
template <bool kMax>
struct Pool {
  float value;
  int at;

  __device__ __forceinline__ static Pool from(int first) { return {kMax ? -INFINITY : 0.0f, first}; }
  __device__ __forceinline__ void take(float x, int p) {
    if (!kMax) {
      value += x;
    } else if (beats(x, value)) {
      value = x, at = p;
    }
  }
  __device__ __forceinline__ void merge(Pool other) {
    if (!kMax) {
      value += other.value;
    } else if (beats(other.value, value) || (!beats(value, other.value) && other.at < at)) {
      *this = other;
    }
  }
};

// Takes the vectors first, first + step, ... below `count` into the pools of their elements; `vector` has their
// addresses, `place` the pixels of their elements. Several loads are under way at a time: what would lie behind the end
// is the last vector again, which changes no maximum.
template <int kWide, bool kMax, class Vector, class Place>
__device__ __forceinline__ void take_all(Pool<kMax> (&pool)[kWide], int first, int count, int step,
                                         const Vector& vector, const Place& place) {
  for (int j = first; j < count; j += kVectors * step) {
    float x[kVectors][kWide];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) load<kWide>(vector(least(j + u * step, count - 1)), x[u]);
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const int i = least(j + u * step, count - 1);
#pragma unroll
      for (int e = 0; e < kWide; ++e) pool[e].take(kMax || j + u * step < count ? x[u][e] : 0, place(i, e));
    }
  }
}

// Where the pooled numbers of an example go.
struct Pooled {
  float *pooled, *kept;
  int* index;
  int pixels;

  template <bool kMax>
  __device__ __forceinline__ void set(int channel, Pool<kMax> pool) const {
    const float value = kMax ? pool.value : pool.value / static_cast<float>(pixels);
    pooled[channel] = value;
    kept[channel] = value;
    if (kMax) index[channel] = pool.at;
  }
};

// Pools the planes of an example: `lanes` threads a plane, kWide neighboring pixels at a time.
template <int kWide, bool kMax, class T>
__device__ void pool_planes(const T* __restrict__ example, const Map& map, int lanes, const Pooled& to) {
  const int lane = threadIdx.x % lanes, planes = blockDim.x / lanes, vectors = map.pixels / kWide;
  for (int first = 0; first < map.channels; first += planes) {
    const int c = first + threadIdx.x / lanes;
    Pool<kMax> pool[kWide];
#pragma unroll
    for (int e = 0; e < kWide; ++e) pool[e] = Pool<kMax>::from(lane * kWide + e);
    if (c < map.channels) {
      const T* plane = example + c * map.sc;
      take_all<kWide, kMax>(
          pool, lane, vectors, lanes, [&](int j) { return plane + (kWide > 1 ? j * kWide : map.offset(j)); },
          [](int j, int e) { return j * kWide + e; });
    }
#pragma unroll
    for (int e = 1; e < kWide; ++e) pool[0].merge(pool[e]);
    for (int by = lanes / 2; by > 0; by /= 2) {
      const float value = __shfl_xor_sync(0xffffffffu, pool[0].value, by);
      pool[0].merge({value, __shfl_xor_sync(0xffffffffu, pool[0].at, by)});
    }
    if (lane == 0 && c < map.channels) to.set(c, pool[0]);
  }
}

// Pools an example whose channels are neighbors: `lanes` threads run over them, kWide at a time, and the groups of so
// many threads share the pixels.
template <int kWide, bool kMax, class T>
__device__ void pool_channels(const T* __restrict__ example, const Map& map, int lanes, const Kept& kept,
                              const Pooled& to) {
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  const int vectors = map.channels / kWide, tile = lanes * kWide;
  for (int first = 0; first < vectors; first += lanes) {
    Pool<kMax> pool[kWide];
#pragma unroll
    for (int e = 0; e < kWide; ++e) pool[e] = Pool<kMax>::from(group);
    if (first + lane < vectors) {
      const T* start = example + (first + lane) * kWide;
      take_all<kWide, kMax>(
          pool, group, map.pixels, groups, [&](int p) { return start + map.offset(p); }, [](int p, int) { return p; });
    }
#pragma unroll
    for (int e = 0; e < kWide; ++e) {
      kept.value[threadIdx.x * kWide + e] = pool[e].value;
      kept.at[threadIdx.x * kWide + e] = pool[e].at;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tile; i += blockDim.x) {
      Pool<kMax> all = {kept.value[i], kept.at[i]};
      for (int g = 1; g < groups; ++g) all.merge({kept.value[g * tile + i], kept.at[g * tile + i]});
      if (first * kWide + i < map.channels) to.set(first * kWide + i, all);
    }
    __syncthreads();
  }
}

// Eq 5 and 6 for one example: kept.weight, which the first warp writes last.
__device__ __forceinline__ void weigh(const Factors& factors, const float* pooled, const Kept& kept) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int teachers = factors.teachers, parts = std::max(warps / teachers, 1);  // warps that share a teacher
  for (int job = warp; job < teachers * parts; job += warps) {
    const float* theta = factors.theta + static_cast<int64_t>(job / parts) * factors.channels;
    FloatPair score(0.0f);
    for (int c = job % parts * kWarp + lane; c < factors.channels; c += parts * kWarp) {
      score = plus(score, product(theta[c], factors.v[c], pooled[c]));
    }
#pragma unroll
    for (int by = kWarp / 2; by > 0; by /= 2) score = plus(score, from_lane(score, by));
    if (lane == 0) kept.partial[job] = score;
  }
  __syncthreads();
  if (warp > 0) return;
  float highest = -INFINITY, sum = 0;
  for (int t = lane; t < teachers; t += kWarp) {
    FloatPair score = kept.partial[t * parts];
    for (int part = 1; part < parts; ++part) score = plus(score, kept.partial[t * parts + part]);
    kept.partial[t * parts] = score;
    highest = fmaxf(highest, score.high);
  }
  highest = warp_max(highest);
  for (int t = lane; t < teachers; t += kWarp) {
    const FloatPair score = plus(kept.partial[t * parts], FloatPair(-highest));
    kept.weight[t] = expf(score.high) * (1 + score.low);
    sum += kept.weight[t];
  }
  sum = warp_sum(sum);
  for (int t = lane; t < teachers; t += kWarp) kept.weight[t] /= sum;
}

template <class T, int kWide, bool kByChannels, bool kMax>
__global__ void forward_kernel(const T* features, Map map, Factors factors, int lanes, float* weights, float* pooled,
                               int* index) {
  let_next_start();
  const int64_t example = blockIdx.x;
  const Kept kept(kByChannels ? blockDim.x * kWide : 0, least(map.channels, kKept), factors.teachers);
  Pooled to{pooled + example * map.channels, kept.pooled, kMax ? index + example * map.channels : nullptr, map.pixels};
  if (map.channels > kKept) to.kept = to.pooled;
  if constexpr (kByChannels) {
    pool_channels<kWide, kMax>(features + example * map.sn, map, lanes, kept, to);
  } else {
    pool_planes<kWide, kMax>(features + example * map.sn, map, lanes, to);
  }
  __syncthreads();
  weigh(factors, to.kept, kept);
  if (threadIdx.x >= kWarp) return;
  for (int t = threadIdx.x; t < factors.teachers; t += kWarp) weights[example * factors.teachers + t] = kept.weight[t];
}

// dL/dgamma of teacher t, from weights and what comes back to them: either maps a teacher to its number. 0 where
// nothing comes back, whatever the weights are.
template <class Weight, class Back>
__device__ __forceinline__ float slope_of(int teachers, int t, const Weight& weight, const Back& back) {
  float sum = 0;
  for (int s = 0; s < teachers; ++s) {
    const float apart = back(t) - back(s);
    sum += if_mass(apart, weight(s) * apart);
  }
  return if_mass(sum, weight(t) * sum);
}

// Of the block's example.
__device__ __forceinline__ void set_slopes(int teachers, const Kept& kept, float* slopes) {
  for (int t = threadIdx.x; t < teachers; t += blockDim.x) {
    kept.slope[t] =
        slope_of(teachers, t, [&](int s) { return kept.weight[s]; }, [&](int s) { return kept.incoming[s]; });
    if (slopes) slopes[t] = kept.slope[t];
  }
}

// Writes the gradient of `count` channels whole: kept.value where kept.at is the pixel, or everywhere where it is -1.
template <int kWide, bool kByChannels, class T>
__device__ void spread_gradient(T* out, const Map& map, int count, int lanes, const Kept& kept) {
  const int lane = threadIdx.x % lanes, group = threadIdx.x / lanes, groups = blockDim.x / lanes;
  if constexpr (kByChannels) {
    for (int p = group; p < map.pixels; p += groups) {
      T* row = out + map.offset(p);
      for (int c = lane * kWide; c < count; c += lanes * kWide) {
        float x[kWide];
#pragma unroll
        for (int e = 0; e < kWide; ++e) x[e] = kept.at[c + e] < 0 || kept.at[c + e] == p ? kept.value[c + e] : 0;
        store<kWide>(row + c, x);
      }
    }
  } else {
    for (int c = group; c < count; c += groups) {
      const float value = kept.value[c];
      const int at = kept.at[c];
      T* plane = out + c * map.sc;
      for (int p = lane * kWide; p < map.pixels; p += lanes * kWide) {
        float x[kWide];
#pragma unroll
        for (int e = 0; e < kWide; ++e) x[e] = at < 0 || at == p + e ? value : 0;
        store<kWide>(plane + (kWide > 1 ? p : map.offset(p)), x);
      }
    }
  }
}

// --- the gradients of theta and v

struct Parameters {
  const float* slopes;   // [N, T], or null: made of the weights
  const float* weights;  // [N, T]
  WeightsIncoming incoming;
  const float* pooled;  // [N, d]
  int64_t examples;
  Factors factors;
  Decay decay;
  float *grad_theta, *grad_v;

  __device__ __forceinline__ float slope(int64_t i, int t) const {
    if (slopes) return slopes[i * factors.teachers + t];
    return slope_of(
        factors.teachers, t, [&](int s) { return weights[i * factors.teachers + s]; },
        [&](int s) { return incoming.values[i * incoming.sn + s * incoming.st]; });
  }
};

struct SliceSums {
  float warp[kWarp][kWarp];
};

// For kSlice channels: threads are examples by channels, teachers come four at a time.
__device__ __forceinline__ void parameters_of_slice(const Parameters& of, int slice) {
  SliceSums& sums = shared<SliceSums>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int c = slice * kSlice + threadIdx.x % kSlice, groups = blockDim.x / kSlice;
  const int teachers = of.factors.teachers, channels = of.factors.channels;
  const bool inside = c < channels;
  const float decays = of.decay.upstream ? of.decay.factor * *of.decay.upstream : 0;
  const float v = inside ? of.factors.v[c] : 0;
  float total = 0;
  for (int first = 0; first < teachers; first += kTeachersAtOnce) {
    float sum[kTeachersAtOnce] = {};
#pragma unroll 4
    for (int64_t i = threadIdx.x / kSlice; i < of.examples; i += groups) {
      const float b = inside ? of.pooled[i * channels + c] : 0;
#pragma unroll
      for (int u = 0; u < kTeachersAtOnce; ++u) {
        if (first + u >= teachers) continue;
        const float slope = of.slope(i, first + u);
        sum[u] += if_mass(slope, slope * b);
      }
    }
#pragma unroll
    for (int u = 0; u < kTeachersAtOnce; ++u) {
#pragma unroll
      for (int by = kSlice; by < kWarp; by *= 2) sum[u] += __shfl_xor_sync(0xffffffffu, sum[u], by);
      if (lane < kSlice) sums.warp[warp][u * kSlice + lane] = sum[u];
    }
    __syncthreads();
    if (warp == 0) {  // a lane has a teacher and a channel
      const int t = first + lane / kSlice;
      float all = 0;
      for (int w = 0; w < warps; ++w) all += sums.warp[w][lane];
      if (inside && t < teachers) {
        const int64_t at = static_cast<int64_t>(t) * channels + c;
        const float theta = of.factors.theta[at];
        of.grad_theta[at] = of.decay.upstream ? all * v + decays * theta : all * v;
        total += all * theta;
      }
    }
    __syncthreads();
  }
  if (warp > 0) return;
#pragma unroll
  for (int by = kSlice; by < kWarp; by *= 2) total += __shfl_xor_sync(0xffffffffu, total, by);
  if (inside && lane < kSlice) of.grad_v[c] = of.decay.upstream ? total + decays * v : total;
}

__global__ void __launch_bounds__(1024) parameters_kernel(const __grid_constant__ Parameters of) {
  wait_for_previous();
  parameters_of_slice(of, blockIdx.x);
}

// A block an example, and one for each slice of the parameters behind them. `out` and `slopes` [N, T] are null where
// they are not wanted, `index` where the pool was an average.
template <class T, int kWide, bool kByChannels>
__global__ void backward_kernel(WeightsIncoming grad, Factors factors, const float* pooled, const int* index, Map map,
                                int lanes, T* out, float* slopes, const __grid_constant__ Parameters parameters) {
  let_next_start();
  wait_for_previous();
  const int64_t example = blockIdx.x;
  if (example >= parameters.examples) {
    if (blockIdx.y == 0) parameters_of_slice(parameters, static_cast<int>(example - parameters.examples));
    return;
  }
  const int teachers = factors.teachers, first = blockIdx.y * kSpread;
  const int count = least(factors.channels - first, kSpread);
  const Kept kept(out ? least(factors.channels, kSpread) : 0, 0, teachers);
  for (int t = threadIdx.x; t < teachers; t += blockDim.x) {
    kept.incoming[t] = grad.values[example * grad.sn + t * grad.st];
  }
  weigh(factors, pooled + example * factors.channels, kept);
  __syncthreads();
  set_slopes(teachers, kept, slopes && first == 0 ? slopes + example * teachers : nullptr);
  if (!out) return;
  __syncthreads();
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    const float* theta = factors.theta + first + c;
    float sum = 0;
    for (int t = 0; t < teachers; ++t) sum += kept.slope[t] * theta[static_cast<int64_t>(t) * factors.channels];
    sum *= factors.v[first + c];
    kept.value[c] = index ? sum : sum / static_cast<float>(map.pixels);
    kept.at[c] = index ? index[example * factors.channels + first + c] : -1;
  }
  __syncthreads();
  spread_gradient<kWide, kByChannels>(out + example * map.sn + first * map.sc, map, count, lanes, kept);
}

int power_of_2(int64_t n, int most) {  // the smallest from n on, but at most `most`
  int power = 1;
  while (power < n && power < most) power *= 2;
  return power;
}

int threads_for(const Map& map, int64_t n, int wide) {
  const int64_t vectors = static_cast<int64_t>(map.channels) * map.pixels / wide;
  return std::max(power_of_2((vectors + kVectors - 1) / kVectors, n < kFewExamples ? 512 : 256), kWarp);
}

// Lanes of a row of memory: the channels of a pixel, or a plane. Forward gives each lane several loads of a plane, and
// so fewer lanes have to agree on the maximum; every thread should have a plane, though.
int lanes_for(const Map& map, int threads, int wide, bool forward) {
  if (map.by_channels()) return power_of_2((forward ? map.channels : least(map.channels, kSpread)) / wide, threads);
  const int vectors = map.pixels / wide, all = power_of_2(vectors, kWarp);
  if (!forward) return all;
  const int busy = threads / power_of_2(map.channels, threads);
  return std::min(all, std::max(power_of_2((vectors + kVectors - 1) / kVectors, kWarp), busy));
}

// run(T{}, wide, by_channels) with the last two as constants: how to walk over a map of these strides.
template <class F>
void dispatch_layout(const Map& map, ScalarType dtype, const void* data, const F& run) {
  dispatch_gpu(dtype, kOp, [&](auto element) {
    using T = decltype(element);
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = map.divides(kWide) && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    auto with = [&](auto count) {
      if (map.by_channels()) {
        run(element, count, std::true_type{});
      } else {
        run(element, count, std::false_type{});
      }
    };
    if (wide) {
      with(std::integral_constant<int, kWide>{});
    } else {
      with(std::integral_constant<int, 1>{});
    }
  });
}

void check(const Tensor& features, const Tensor& theta, const Tensor& v) {
  STD_TORCH_CHECK(features.dim() == 2 || (features.dim() == 4 && features.size(2) * features.size(3) > 0), kOp,
                  ": features must be [N, d], or [N, d, H, W] with at least one pixel");
  STD_TORCH_CHECK(theta.dim() == 2 && theta.size(0) > 0, kOp, ": theta must be [T, d] with T >= 1");
  check_shape(kOp, "theta", theta, {theta.size(0), features.size(1)});
  check_shape(kOp, "v", v, {features.size(1)});
  STD_TORCH_CHECK(theta.scalar_type() == ScalarType::Float && v.scalar_type() == ScalarType::Float, kOp,
                  ": the CUDA kernels take theta and v in float32");
  STD_TORCH_CHECK(features.dim() == 2 || features.size(2) * features.size(3) < 1 << 30, kOp,
                  ": the CUDA kernels take fewer than 2^30 pixels");
  STD_TORCH_CHECK(features.size(1) <= kMaxChannels, kOp, ": the CUDA kernels take at most ", kMaxChannels,
                  " channels, got ", features.size(1));
  STD_TORCH_CHECK(theta.size(0) <= kMaxWeights, kOp, ": the CUDA kernels take at most ", kMaxWeights, " teachers");
}

const float* floats(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* floats(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> teacher_weights_fwd(const Tensor& features, const Tensor& theta, const Tensor& v,
                                                       bool use_max) {
  check(features, theta, v);
  const OnDevice on(features);
  const Map map(features);
  const int64_t n = features.size(0), teachers = theta.size(0), d = map.channels;
  Tensor weights = empty(theta, {n, teachers}, ScalarType::Float), pooled = empty(theta, {n, d}, ScalarType::Float);
  Tensor index = empty_or_none(theta, use_max, {n, d}, ScalarType::Int);
  const Tensor th = dense(theta), vv = dense(v);
  const Factors factors{floats(th), floats(vv), static_cast<int>(teachers), map.channels};
  dispatch_layout(map, features.scalar_type(), features.const_data_ptr(), [&](auto element, auto wide, auto channels) {
    using T = decltype(element);
    constexpr int kWide = decltype(wide)::value;
    constexpr bool kByChannels = decltype(channels)::value;
    const int threads = threads_for(map, n, kWide), lanes = lanes_for(map, threads, kWide, true);
    const size_t bytes =
        Kept::bytes(kByChannels ? threads * kWide : 0, least(map.channels, kKept), factors.teachers, threads);
    auto kernel =
        use_max ? &forward_kernel<T, kWide, kByChannels, true> : &forward_kernel<T, kWide, kByChannels, false>;
    launch(kernel, {blocks(n), static_cast<unsigned>(threads), 1, bytes}, on,
           static_cast<const T*>(features.const_data_ptr()), map, factors, lanes, floats(weights), floats(pooled),
           static_cast<int*>(index.mutable_data_ptr()));
  });
  return {weights, pooled, index};
}

void teacher_weights_backward(const WeightsIncoming& incoming, const Tensor& features, const Tensor& theta,
                              const Tensor& v, const Tensor& pooled, const Tensor& index, bool use_max,
                              const Tensor& map_like, const WeightsGrads& grads, float* slopes, const float* weights,
                              const Decay& decay, const OnDevice& on, bool early) {
  check(features, theta, v);
  const int64_t n = features.size(0), teachers = theta.size(0), d = features.size(1);
  check_shape(kOp, "pooled", pooled, {n, d});
  if (use_max) check_shape(kOp, "index", index, {n, d});
  const Tensor th = dense(theta), vv = dense(v), b = dense(pooled, ScalarType::Float), at = dense(index);
  const Factors factors{floats(th), floats(vv), static_cast<int>(teachers), static_cast<int>(d)};
  const bool from_weights = weights && n <= kExamplesAtOnce;  // else by way of the slopes
  const bool at_once = from_weights && grads.features && grads.theta;
  const unsigned slices = grads.theta ? blocks_for(d, kSlice) : 0;
  const Parameters parameters{
      from_weights ? nullptr : slopes, weights, incoming, floats(b), n, factors, decay, grads.theta, grads.v};
  if (grads.features || (grads.theta && !from_weights)) {
    const Map map(map_like);
    const int* places = use_max ? static_cast<const int*>(at.const_data_ptr()) : nullptr;
    dispatch_layout(map, features.scalar_type(), grads.features, [&](auto element, auto wide, auto channels) {
      using T = decltype(element);
      constexpr int kWide = decltype(wide)::value;
      const unsigned threads = grads.features ? threads_for(map, n, kWide) : 4 * kWarp;
      const dim3 grid(blocks(n + (at_once ? slices : 0)), grads.features ? blocks_for(d, kSpread) : 1);
      const size_t bytes = Kept::bytes(grads.features ? least(map.channels, kSpread) : 0, 0, factors.teachers, threads);
      launch(&backward_kernel<T, kWide, decltype(channels)::value>,
             {grid, threads, 1, std::max(bytes, at_once ? sizeof(SliceSums) : 0), early}, on, incoming, factors,
             floats(b), places, map, lanes_for(map, threads, kWide, false), static_cast<T*>(grads.features),
             grads.theta && !from_weights ? slopes : nullptr, parameters);
      early = true;
    });
  }
  if (at_once) return;
  const int threads = std::max(power_of_2(n * kSlice, 1024), kWarp);
  launch(parameters_kernel, {slices, static_cast<unsigned>(threads), 1, sizeof(SliceSums), early}, on, parameters);
}

namespace {

std::tuple<Tensor, Tensor, Tensor> teacher_weights_bwd(const Tensor& grad, const Tensor& features, const Tensor& theta,
                                                       const Tensor& v, const Tensor& pooled, const Tensor& index,
                                                       bool use_max, bool need_features, bool need_parameters) {
  check(features, theta, v);
  const OnDevice on(features);
  const int64_t n = features.size(0), teachers = theta.size(0), d = features.size(1);
  check_shape(kOp, "grad", grad, {n, teachers});
  const Tensor incoming = grad.scalar_type() == ScalarType::Double ? converted(grad, ScalarType::Float) : grad;
  Tensor grad_features =
      need_features ? torch::stable::empty_like(features) : empty(features, {0}, features.scalar_type());
  Tensor grad_theta = empty_or_none(theta, need_parameters, {teachers, d}, ScalarType::Float);
  Tensor grad_v = empty_or_none(theta, need_parameters, {d}, ScalarType::Float);
  Tensor slopes = empty_or_none(theta, need_parameters, {n, teachers}, ScalarType::Float);
  const WeightsGrads grads{need_features ? grad_features.mutable_data_ptr() : nullptr,
                           need_parameters ? floats(grad_theta) : nullptr, need_parameters ? floats(grad_v) : nullptr};
  teacher_weights_backward({Values(incoming), incoming.stride(0), incoming.stride(1)}, features, theta, v, pooled,
                           index, use_max, need_features ? grad_features : features, grads, floats(slopes), nullptr,
                           {nullptr, 0}, on, false);
  return {grad_features, grad_theta, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("teacher_weights_fwd", TORCH_BOX(&teacher_weights_fwd));
  m.impl("teacher_weights_bwd", TORCH_BOX(&teacher_weights_bwd));
}

}  // namespace
}  // namespace amtml::gpu
