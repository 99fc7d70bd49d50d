// The parts of the hint loss around torch's 1x1 convolution: channel normalisation with average pooling, and the mean
// squared error with its gradient.
#include "simd.h"

namespace amtml {
namespace {

constexpr char kOp[] = "hint_loss";
constexpr double kSmallestNorm = 1e-12;  // as torch.nn.functional.normalize

struct Window {
  int64_t begin, end;
};

// The inputs that average into output i of `out`, as torch's adaptive pooling has them.
inline Window window(int64_t i, int64_t in, int64_t out) { return {i * in / out, ((i + 1) * in + out - 1) / out}; }

std::tuple<Tensor, Tensor> hint_pool_fwd(const Tensor& feature_map, int64_t height, int64_t width, bool normalize) {
  STD_TORCH_CHECK(feature_map.dim() == 4, kOp, ": feature_map must be [N, c, H, W]");
  const int64_t n = feature_map.size(0), channels = feature_map.size(1), h = feature_map.size(2),
                w = feature_map.size(3);
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= h && width <= w, kOp, ": cannot pool [", h, ", ", w, "] to [",
                  height, ", ", width, "]");
  const ScalarType wide = wide_dtype(feature_map.scalar_type());
  const Tensor x = dense(feature_map);
  Tensor pooled = empty(x, {n, channels, height, width}, wide);
  Tensor norms = empty_or_none(x, normalize, {n, h, w}, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    A *out = static_cast<A*>(pooled.mutable_data_ptr()), *norm = static_cast<A*>(norms.mutable_data_ptr());
    const int64_t plane = h * w;
    dispatch(x.scalar_type(), kOp, [&](auto element) {
      using T = decltype(element);
      const T* in = static_cast<const T*>(x.const_data_ptr());
      torch::stable::parallel_for(0, n, grain(channels * plane), [&](int64_t begin, int64_t end) {
        std::vector<A> scale(plane, A(1)), row(plane);
        vectorized([&] AMTML_BODY() {
          for (int64_t i = begin; i < end; ++i) {
            const T* example = in + i * channels * plane;
            A *s = scale.data(), *r = row.data();
            if (normalize) {
              A* squares = norm + i * plane;
              std::fill_n(squares, plane, A(0));
              for (int64_t c = 0; c < channels; ++c) {
                const T* source = example + c * plane;
#pragma omp simd
                for (int64_t p = 0; p < plane; ++p) {
                  const A value = static_cast<A>(source[p]);
                  squares[p] += value * value;
                }
              }
              for (int64_t p = 0; p < plane; ++p) {
                squares[p] = std::sqrt(squares[p]);
                s[p] = 1 / (squares[p] < A(kSmallestNorm) ? A(kSmallestNorm) : squares[p]);
              }
            }
            for (int64_t c = 0; c < channels; ++c) {
              const T* source = example + c * plane;
#pragma omp simd
              for (int64_t p = 0; p < plane; ++p) r[p] = static_cast<A>(source[p]) * s[p];
              A* target = out + (i * channels + c) * height * width;
              for (int64_t y = 0; y < height; ++y) {
                const Window rows = window(y, h, height);
                for (int64_t z = 0; z < width; ++z) {
                  const Window columns = window(z, w, width);
                  double sum = 0;
                  for (int64_t a = rows.begin; a < rows.end; ++a) {
                    for (int64_t b = columns.begin; b < columns.end; ++b) sum += r[a * w + b];
                  }
                  target[y * width + z] =
                      static_cast<A>(sum / double((rows.end - rows.begin) * (columns.end - columns.begin)));
                }
              }
            }
          }
        });
      });
    });
  });
  return {pooled, norms};
}

Tensor hint_pool_bwd(const Tensor& grad, const Tensor& feature_map, const Tensor& norms, bool normalize) {
  STD_TORCH_CHECK(feature_map.dim() == 4 && grad.dim() == 4, kOp, ": feature_map and grad must have 4 dimensions");
  const int64_t n = feature_map.size(0), channels = feature_map.size(1), h = feature_map.size(2),
                w = feature_map.size(3), height = grad.size(2), width = grad.size(3), plane = h * w;
  check_shape(kOp, "grad", grad, {n, channels, height, width});
  const ScalarType wide = wide_dtype(feature_map.scalar_type());
  const Tensor x = dense(feature_map);
  const Tensor incoming = dense(grad, wide);
  Tensor grad_map = empty(x, {n, channels, h, w}, x.scalar_type());
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const A *g = static_cast<const A*>(incoming.const_data_ptr()),
            *norm = static_cast<const A*>(norms.const_data_ptr());
    dispatch(x.scalar_type(), kOp, [&](auto element) {
      using T = decltype(element);
      const T* in = static_cast<const T*>(x.const_data_ptr());
      T* out = static_cast<T*>(grad_map.mutable_data_ptr());
      torch::stable::parallel_for(0, n, grain(channels * plane), [&](int64_t begin, int64_t end) {
        std::vector<A> spread(channels * plane), inner(plane);
        vectorized([&] AMTML_BODY() {
          for (int64_t i = begin; i < end; ++i) {
            std::fill(spread.begin(), spread.end(), A(0));
            std::fill(inner.begin(), inner.end(), A(0));
            const T* example = in + i * channels * plane;
            const A* lengths = norm + (normalize ? i * plane : 0);
            for (int64_t c = 0; c < channels; ++c) {
              A *d = spread.data() + c * plane, *dot = inner.data();
              const A* source = g + (i * channels + c) * height * width;
              for (int64_t y = 0; y < height; ++y) {
                const Window rows = window(y, h, height);
                for (int64_t z = 0; z < width; ++z) {
                  const Window columns = window(z, w, width);
                  const A share = source[y * width + z] / A((rows.end - rows.begin) * (columns.end - columns.begin));
                  for (int64_t a = rows.begin; a < rows.end; ++a) {
                    for (int64_t b = columns.begin; b < columns.end; ++b) d[a * w + b] += share;
                  }
                }
              }
              if (normalize) {
#pragma omp simd
                for (int64_t p = 0; p < plane; ++p) dot[p] += d[p] * static_cast<A>(example[c * plane + p]);
              }
            }
            for (int64_t c = 0; c < channels; ++c) {
              const A* d = spread.data() + c * plane;
              T* target = out + (i * channels + c) * plane;
              for (int64_t p = 0; p < plane; ++p) {
                A value = d[p];
                if (normalize) {  // y = x / |x|:  dx = (dy - y <y, dy>) / |x|, and dy / smallest below it
                  const A length = lengths[p];
                  value =
                      length < A(kSmallestNorm)
                          ? value / A(kSmallestNorm)
                          : (value - static_cast<A>(example[c * plane + p]) / length * (inner[p] / length)) / length;
                }
                target[p] = static_cast<T>(value);
              }
            }
          }
        });
      });
    });
  });
  return grad_map;
}

std::tuple<Tensor, Tensor> hint_mse_fwd(const Tensor& prediction, const Tensor& target, bool need_grad) {
  Shape shape;
  for (int64_t d = 0; d < prediction.dim(); ++d) shape.push_back(prediction.size(d));
  check_shape(kOp, "target", target, shape);
  const bool is_double = prediction.scalar_type() == ScalarType::Double || target.scalar_type() == ScalarType::Double;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  const Tensor u = dense(prediction), v = dense(target);
  const int64_t n = u.numel();
  Tensor loss = empty(u, {}, wide), grad = empty_or_none(u, need_grad, shape, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    constexpr int64_t block = 8192;  // fixed blocks: the same sum at any thread count
    const int64_t blocks = (n + block - 1) / block;
    std::vector<double> sums(blocks);
    const A scale = A(2) / static_cast<A>(std::max<int64_t>(n, 1));
    A* out = static_cast<A*>(grad.mutable_data_ptr());
    Matrix a, b;  // one row of n values each
    a.data = u.const_data_ptr(), a.dtype = u.scalar_type(), a.column_stride = 1, a.row_stride = block;
    b.data = v.const_data_ptr(), b.dtype = v.scalar_type(), b.column_stride = 1, b.row_stride = block;
    torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
      std::vector<A> left(block), right(block);
      vectorized([&] AMTML_BODY() {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t count = std::min(block, n - k * block);
          const A *x = load_row(a, k, count, left.data()), *y = load_row(b, k, count, right.data());
          sums[k] = block_sum<A>(
              count, [&](int64_t i) __attribute__((always_inline)) { return (x[i] - y[i]) * (x[i] - y[i]); });
          if (!need_grad) continue;
          A* d = out + k * block;
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) d[i] = scale * (x[i] - y[i]);
        }
      });
    });
    double total = 0;
    for (double sum : sums) total += sum;
    *static_cast<A*>(loss.mutable_data_ptr()) = static_cast<A>(total / static_cast<double>(std::max<int64_t>(n, 1)));
  });
  return {loss, grad};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("hint_pool_fwd", TORCH_BOX(&hint_pool_fwd));
  m.impl("hint_pool_bwd", TORCH_BOX(&hint_pool_bwd));
  m.impl("hint_mse_fwd", TORCH_BOX(&hint_mse_fwd));
}

}  // namespace
}  // namespace amtml
