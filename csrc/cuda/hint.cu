// The parts of the hint loss around torch's 1x1 convolution: channel normalization with adaptive average pooling, and
// the mean squared error of the result with its gradient.
//
//   r_p = 1 / max(|x_p|, 1e-12), y_p = x_p r_p,  pooled_o = mean over the window of o of y_p
//   dy_p = sum over the windows with p of g_o / size_o,  dx_p = r_p (dy_p - y_p <y_p, dy_p>), below 1e-12 r_p dy_p
//
// feature_map [N, c, H, W] in float32, bfloat16 or float16 with any strides -> pooled [N, c, height, width] float32,
// norms [N, H, W] float32 (if normalized): r, not the length. Without normalization r is 1.
//
// Grid: pooling, a block for some rows of an example's windows and all channels; its gradient, a block for up to 32
// pixels of an example and all channels. Threads are neighboring pixels by groups of channels. Mean squared error:
// blocks of 2048 elements, then one that adds their sums.
// Traffic: forward reads the map (normalized twice, the second time from cache) and writes the pooled one; backward
// reads the gradient and the map (both normalized twice, likewise) and writes the map's gradient. The error reads both
// sides once and writes the gradient. Bandwidth binds.
#include "../arithmetic.h"
#include "common.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "hint_loss";
constexpr int kThreads = 256, kPerThread = 8;
constexpr int kChannels = 4;           // of which a thread has loads under way
constexpr int kBlocks = 264;           // that pooling is cut into if there are rows enough: two for each multiprocessor
constexpr int kLargestSide = 1 << 15;  // of a map: products of two sides fit in 31 bits
constexpr int64_t kMostChannels = 1 << 30;  // whose steps are counted in 31 bits
constexpr float kSmallest = kSmallestNorm;

// [N, c, H, W] with any strides.
struct Map {
  int channels, height, width;
  int64_t sn, sc, sh, sw;

  explicit Map(const Tensor& t)
      : channels(static_cast<int>(t.size(1))),
        height(static_cast<int>(t.size(2))),
        width(static_cast<int>(t.size(3))),
        sn(t.stride(0)),
        sc(t.stride(1)),
        sh(t.stride(2)),
        sw(t.stride(3)) {}
  int64_t plane() const { return static_cast<int64_t>(height) * width; }
};

// kThreads threads as `lanes` neighbors by groups.
struct Place {
  int lane, group, groups;

  __device__ __forceinline__ explicit Place(int lanes)
      : lane(threadIdx.x % lanes), group(threadIdx.x / lanes), groups(kThreads / lanes) {}
};

int lanes_for(int64_t n) {
  int lanes = 1;
  while (lanes < n && lanes < kWarp) lanes *= 2;
  return lanes;
}

// The sum over all groups; `sums` [kThreads] is free again when the next barrier has passed.
__device__ __forceinline__ float sum_of_groups(float mine, const Place& at, float* sums) {
  sums[threadIdx.x] = mine;
  __syncthreads();
  float sum = 0;
  for (int g = 0; g < at.groups; ++g) sum += sums[g * (kThreads / at.groups) + at.lane];
  return sum;
}

// r of the pixels [first, end) of an example.
template <class T>
__device__ void normalize_pixels(const T* __restrict__ example, const Map& map, int first, int end, int lanes,
                                 float* scale) {
  const Place at(lanes);
  float* sums = &shared<float>();
  for (int start = first; start < end; start += lanes) {
    const int p = start + at.lane;
    const T* pixel = example + p / map.width * map.sh + p % map.width * map.sw;
    float squares = 0;
    for (int c = at.group; p < end && c < map.channels; c += kChannels * at.groups) {
      float x[kChannels];
#pragma unroll
      for (int u = 0; u < kChannels; ++u) {
        x[u] = static_cast<float>(pixel[least(c + u * at.groups, map.channels - 1) * map.sc]);
      }
#pragma unroll
      for (int u = 0; u < kChannels; ++u) squares += c + u * at.groups < map.channels ? x[u] * x[u] : 0;
    }
    const float length = sqrtf(sum_of_groups(squares, at, sums));
    if (at.group == 0 && p < end) scale[p] = 1 / (length < kSmallest ? kSmallest : length);
    __syncthreads();
  }
}

// Each block pools `rows` rows of one example's [height, width] outputs. Blocks whose windows overlap make some r
// twice, and write the same bits to the same place.
template <class T, bool kNormalize>
__global__ void pool_kernel(const T* features, Map map, int height, int width, int rows, int pixel_lanes, int lanes,
                            float* pooled, float* scales) {
  const int bands = (height + rows - 1) / rows, band = blockIdx.x % bands, first = band * rows;
  const int64_t n = blockIdx.x / bands;
  const int outputs = (first + rows < height ? rows : height - first) * width;
  const T* example = features + n * map.sn;
  float* scale = kNormalize ? scales + n * map.height * map.width : nullptr;
  if (kNormalize) {
    const int begin = window(first, map.height, height).begin,
              end = window(first + outputs / width - 1, map.height, height).end;
    normalize_pixels(example, map, begin * map.width, end * map.width, pixel_lanes, scale);
  }
  const Place at(lanes);
  for (int o = at.lane; o < outputs; o += lanes) {
    const auto down = window(first + o / width, map.height, height), across = window(o % width, map.width, width);
    const float share = 1 / static_cast<float>(down.size() * across.size());
    float* out = pooled + (n * map.channels * height + first) * width + o;
    for (int c = at.group; c < map.channels; c += kChannels * at.groups) {
      auto channel = [&](int u) { return least(c + u * at.groups, map.channels - 1); };  // the last one again behind it
      float sum[kChannels] = {};
      for (int a = down.begin; a < down.end; ++a) {
        float row[kChannels] = {};
        for (int b = across.begin; b < across.end; ++b) {
          const T* pixel = example + a * map.sh + b * map.sw;
          const float r = kNormalize ? scale[a * map.width + b] : 1;
#pragma unroll
          for (int u = 0; u < kChannels; ++u) {
            row[u] += static_cast<float>(pixel[channel(u) * map.sc]) * r;
          }
        }
#pragma unroll
        for (int u = 0; u < kChannels; ++u) sum[u] += row[u];
      }
#pragma unroll
      for (int u = 0; u < kChannels; ++u) {
        if (c + u * at.groups < map.channels) out[channel(u) * height * width] = sum[u] * share;
      }
    }
  }
}

// What comes back to a pixel before the normalization, for kChannels channels from c on.
struct Incoming {
  const float* grad;  // of the example
  Map map;            // [N, c, height, width]
  Window<int> down, across;
  const float* share;  // of the thread's lane: kKept that lie kWarp apart

  // Of the averages along one side a pixel takes part in two at most, for they are no more than the pixels.
  static constexpr int kEach = 2, kKept = 2 * kEach;

  __device__ __forceinline__ void load(int c, int step, float (&dy)[kChannels]) const {
#pragma unroll
    for (int u = 0; u < kChannels; ++u) dy[u] = 0;
    for (int y = down.begin; y < down.end; ++y) {
      for (int z = across.begin; z < across.end; ++z) {
        const float by = share[(y - down.begin) * kWarp] * share[(kEach + z - across.begin) * kWarp];
        const float* from = grad + y * map.sh + z * map.sw;
#pragma unroll
        for (int u = 0; u < kChannels; ++u) dy[u] += from[least(c + u * step, map.channels - 1) * map.sc] * by;
      }
    }
  }
};

template <class T, bool kNormalize>
__global__ void spread_kernel(const float* __restrict__ grad, Map from, const T* __restrict__ features, Map map,
                              const float* __restrict__ scales, int lanes, T* __restrict__ out) {
  float *sums = &shared<float>(), *shares = sums + kThreads;
  const Place at(lanes);
  const int plane = map.height * map.width, tiles = (plane + lanes - 1) / lanes;
  const int64_t n = blockIdx.x / tiles;
  const int p = blockIdx.x % tiles * lanes + at.lane, a = p / map.width, b = p % map.width;
  const int channels = p < plane ? map.channels : 0;
  const T* pixel = features + n * map.sn + a * map.sh + b * map.sw;
  const Incoming incoming{grad + n * from.sn, from, window(a, from.height, map.height),
                          window(b, from.width, map.width), shares + at.lane};
  if (at.group < Incoming::kKept) {  // each group of threads one of them; there are 8 groups or more
    const int k = at.group % Incoming::kEach;
    const auto of = at.group < Incoming::kEach ? window(incoming.down.begin + k, map.height, from.height)
                                               : window(incoming.across.begin + k, map.width, from.width);
    shares[at.group * kWarp + at.lane] = 1 / static_cast<float>(of.size());
  }
  __syncthreads();
  float inner = 0, r = 1;
  if (kNormalize) {
    for (int c = at.group; c < channels; c += kChannels * at.groups) {
      float dy[kChannels];
      incoming.load(c, at.groups, dy);
#pragma unroll
      for (int u = 0; u < kChannels; ++u) {
        const int channel = c + u * at.groups;
        const float x = static_cast<float>(pixel[least(channel, channels - 1) * map.sc]);
        inner += channel < channels ? x * dy[u] : 0;
      }
    }
    inner = sum_of_groups(inner, at, sums);
    if (p < plane) r = scales[n * plane + p];
    inner = r < 1 / kSmallest ? inner * r * r : 0;
  }
  for (int c = at.group; c < channels; c += kChannels * at.groups) {
    float dy[kChannels];
    incoming.load(c, at.groups, dy);
#pragma unroll
    for (int u = 0; u < kChannels; ++u) {
      const int channel = c + u * at.groups;
      if (channel >= channels) continue;
      if (kNormalize) dy[u] = (dy[u] - static_cast<float>(pixel[channel * map.sc]) * inner) * r;
      out[(n * map.channels + channel) * plane + p] = static_cast<T>(dy[u]);
    }
  }
}

struct Scratch {
  double sums[kWarp];
};

__global__ void mse_kernel(Values prediction, Values target, int64_t n, float scale, float* grad, double* partial) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kThreads * kPerThread;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = start + k * kThreads + threadIdx.x;
    if (i >= n) continue;
    const float difference = prediction[i] - target[i];
    sum += difference * difference;
    if (grad) grad[i] = scale * difference;
  }
  const double total = block_sum(static_cast<double>(sum), shared<Scratch>().sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void mean_kernel(const double* partial, int64_t count, double divisor, float* mean) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum, shared<Scratch>().sums);
  if (threadIdx.x == 0) *mean = static_cast<float>(sum / divisor);
}

void check_sides(const Tensor& feature_map) {
  STD_TORCH_CHECK(feature_map.dim() == 4, kOp, ": feature_map must be [N, c, H, W]");
  STD_TORCH_CHECK(feature_map.size(2) < kLargestSide && feature_map.size(3) < kLargestSide, kOp,
                  ": the CUDA kernels take maps of fewer than ", kLargestSide, " rows and columns");
  STD_TORCH_CHECK(feature_map.size(1) <= kMostChannels, kOp, ": the CUDA kernels take at most ", kMostChannels,
                  " channels, got ", feature_map.size(1));
}

std::tuple<Tensor, Tensor> hint_pool_fwd(const Tensor& feature_map, int64_t height, int64_t width, bool normalize) {
  check_sides(feature_map);
  const OnDevice on(feature_map);
  const Map map(feature_map);
  const int64_t n = feature_map.size(0);
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= map.height && width <= map.width, kOp, ": cannot pool [",
                  map.height, ", ", map.width, "] to [", height, ", ", width, "]");
  Tensor pooled = empty(feature_map, {n, map.channels, height, width}, ScalarType::Float);
  Tensor norms = empty_or_none(feature_map, normalize, {n, map.height, map.width}, ScalarType::Float);
  // Enough pixels for a warp's lanes, and no more blocks than are of use.
  const int64_t full = (kWarp * height + map.plane() - 1) / map.plane(), many = n * height / kBlocks;
  const int rows = static_cast<int>(std::min(height, std::max(full, many)));
  const int64_t bands = (height + rows - 1) / rows;
  dispatch_gpu(feature_map.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    launch(normalize ? &pool_kernel<T, true> : &pool_kernel<T, false>,
           {blocks(n * bands), kThreads, 1, sizeof(float) * kThreads}, on,
           static_cast<const T*>(feature_map.const_data_ptr()), map, static_cast<int>(height), static_cast<int>(width),
           rows, lanes_for(map.plane() * rows / height), lanes_for(rows * width),
           static_cast<float*>(pooled.mutable_data_ptr()), static_cast<float*>(norms.mutable_data_ptr()));
  });
  return {pooled, norms};
}

Tensor hint_pool_bwd(const Tensor& grad, const Tensor& feature_map, const Tensor& norms, bool normalize) {
  check_sides(feature_map);
  STD_TORCH_CHECK(grad.dim() == 4, kOp, ": grad must have 4 dimensions");
  const OnDevice on(feature_map);
  const Map map(feature_map);
  const int64_t n = feature_map.size(0);
  check_shape(kOp, "grad", grad, {n, map.channels, grad.size(2), grad.size(3)});
  if (normalize) check_shape(kOp, "norms", norms, {n, map.height, map.width});
  const Tensor incoming = converted(grad, ScalarType::Float), scales = dense(norms);
  const Map from(incoming);
  STD_TORCH_CHECK(from.height >= 1 && from.width >= 1 && from.height <= map.height && from.width <= map.width, kOp,
                  ": grad must have at least one row and column, and no more than feature_map");
  Tensor grad_map = empty(feature_map, {n, map.channels, map.height, map.width}, feature_map.scalar_type());
  const int lanes = lanes_for(map.plane());
  const size_t bytes = sizeof(float) * (kThreads + Incoming::kKept * kWarp);
  dispatch_gpu(feature_map.scalar_type(), kOp, [&](auto element) {
    using T = decltype(element);
    launch(normalize ? &spread_kernel<T, true> : &spread_kernel<T, false>,
           {blocks(n * blocks_for(map.plane(), lanes)), kThreads, 1, bytes}, on,
           static_cast<const float*>(incoming.const_data_ptr()), from,
           static_cast<const T*>(feature_map.const_data_ptr()), map, static_cast<const float*>(scales.const_data_ptr()),
           lanes, static_cast<T*>(grad_map.mutable_data_ptr()));
  });
  return grad_map;
}

std::tuple<Tensor, Tensor> hint_mse_fwd(const Tensor& prediction, const Tensor& target, bool need_grad) {
  Shape shape;
  for (int64_t d = 0; d < prediction.dim(); ++d) shape.push_back(prediction.size(d));
  check_shape(kOp, "target", target, shape);
  const OnDevice on(prediction);
  const Tensor u = dense(prediction), v = dense(target);
  const int64_t n = u.numel();
  Tensor loss = empty(u, {}, ScalarType::Float), grad = empty_or_none(u, need_grad, shape, ScalarType::Float);
  const unsigned blocks = blocks_for(n, kThreads * kPerThread);
  Tensor partial = empty(u, {blocks}, ScalarType::Double);
  const double divisor = static_cast<double>(std::max<int64_t>(n, 1));
  double* sums = static_cast<double*>(partial.mutable_data_ptr());
  float* out = need_grad ? static_cast<float*>(grad.mutable_data_ptr()) : nullptr;
  launch(mse_kernel, {blocks, kThreads, 1, sizeof(Scratch)}, on, Values(u), Values(v), n,
         static_cast<float>(2 / divisor), out, sums);
  launch(mean_kernel, {1, kThreads, 1, sizeof(Scratch)}, on, sums, static_cast<int64_t>(blocks), divisor,
         static_cast<float*>(loss.mutable_data_ptr()));
  return {loss, grad};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("hint_pool_fwd", TORCH_BOX(&hint_pool_fwd));
  m.impl("hint_pool_bwd", TORCH_BOX(&hint_pool_bwd));
  m.impl("hint_mse_fwd", TORCH_BOX(&hint_mse_fwd));
}

}  // namespace
}  // namespace amtml::gpu
