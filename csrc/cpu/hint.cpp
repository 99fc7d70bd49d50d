// The parts of the hint loss around torch's 1x1 convolution: channel normalisation with average pooling, and the mean
// squared error with its gradient.
#include "../arithmetic.h"
#include "simd.h"

namespace amtml {
namespace {

constexpr char kOp[] = "hint_loss";

// What adaptive pooling of `in` places to `out` averages, the share of each place in that, and the averages that each
// place takes part in.
template <class A>
struct Axis {
  std::vector<Window<int64_t>> inputs, outputs;
  std::vector<A> share;

  Axis(int64_t in, int64_t out) {
    for (int64_t i = 0; i < out; ++i) {
      inputs.push_back(window(i, in, out));
      share.push_back(1 / static_cast<A>(inputs[i].size()));
    }
    for (int64_t i = 0; i < in; ++i) outputs.push_back(window(i, out, in));
  }
  int64_t in() const { return outputs.size(); }
  int64_t out() const { return inputs.size(); }
};

// Averages one plane x times scale: sums of rows, along which vectors run, then of their neighbours. row: scratch.
template <class T, class A>
AMTML_INLINE void pool(const T* x, const A* scale, const Axis<A>& down, const Axis<A>& across, A* row, A* pooled) {
  const int64_t w = across.in();
  for (int64_t y = 0; y < down.out(); ++y) {
    const Window<int64_t> rows = down.inputs[y];
    std::fill_n(row, w, A(0));
    for (int64_t p = rows.begin * w; p < rows.end * w; p += w) {
#pragma omp simd
      for (int64_t b = 0; b < w; ++b) row[b] += static_cast<A>(x[p + b]) * scale[p + b];
    }
    for (int64_t z = 0; z < across.out(); ++z) {
      A sum = 0;
      for (int64_t b = across.inputs[z].begin; b < across.inputs[z].end; ++b) sum += row[b];
      *pooled++ = sum * (down.share[y] * across.share[z]);
    }
  }
}

// The way back: use(first, d) for each row of a plane, which starts at place `first`, with what comes back to it.
// shares: scratch for one row more than there are windows.
template <class A, class Use>
AMTML_INLINE void spread(const A* grad, const Axis<A>& down, const Axis<A>& across, A* shares, const Use& use) {
  const int64_t w = across.in();
  std::fill_n(shares, down.out() * w, A(0));
  for (int64_t y = 0; y < down.out(); ++y) {
    for (int64_t z = 0; z < across.out(); ++z) {
      const A share = *grad++ * (down.share[y] * across.share[z]);
      for (int64_t b = across.inputs[z].begin; b < across.inputs[z].end; ++b) shares[y * w + b] += share;
    }
  }
  A* sum = shares + down.out() * w;
  for (int64_t a = 0; a < down.in(); ++a) {
    const Window<int64_t> windows = down.outputs[a];
    const A* d = shares + windows.begin * w;
    if (windows.size() > 1) {  // two, where windows overlap
#pragma omp simd
      for (int64_t b = 0; b < w; ++b) sum[b] = d[b] + d[w + b];
      d = sum;
    }
    use(a * w, d);
  }
}

// The length of each pixel of an example over its channels, and 1 / that.
template <class T, class A>
AMTML_INLINE void norms_of(const T* example, int64_t channels, int64_t plane, A* length, A* scale) {
  std::fill_n(length, plane, A(0));
  for (int64_t c = 0; c < channels; ++c) {
    const T* x = example + c * plane;
#pragma omp simd
    for (int64_t p = 0; p < plane; ++p) length[p] += static_cast<A>(x[p]) * static_cast<A>(x[p]);
  }
  for (int64_t p = 0; p < plane; ++p) {
    length[p] = std::sqrt(length[p]);
    scale[p] = 1 / std::max(length[p], A(kSmallestNorm));
  }
}

std::tuple<Tensor, Tensor> hint_pool_fwd(const Tensor& feature_map, int64_t height, int64_t width, bool normalize) {
  STD_TORCH_CHECK(feature_map.dim() == 4, kOp, ": feature_map must be [N, c, H, W]");
  const int64_t n = feature_map.size(0), channels = feature_map.size(1), h = feature_map.size(2),
                w = feature_map.size(3), plane = h * w;
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= h && width <= w, kOp, ": cannot pool [", h, ", ", w, "] to [",
                  height, ", ", width, "]");
  const ScalarType wide = wide_dtype(feature_map.scalar_type());
  const Tensor x = dense(feature_map);
  Tensor pooled = empty(x, {n, channels, height, width}, wide);
  Tensor norms = empty_or_none(x, normalize, {n, h, w}, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const Axis<A> down(h, height), across(w, width);
    A *out = static_cast<A*>(pooled.mutable_data_ptr()), *norm = static_cast<A*>(norms.mutable_data_ptr());
    dispatch(x.scalar_type(), kOp, [&](auto element) {
      using T = decltype(element);
      const T* in = static_cast<const T*>(x.const_data_ptr());
      torch::stable::parallel_for(0, n, grain(channels * plane), [&](int64_t begin, int64_t end) {
        std::vector<A> scale(plane, A(1)), row(w);
        vectorized([&] AMTML_BODY() {
          for (int64_t i = begin; i < end; ++i) {
            const T* example = in + i * channels * plane;
            if (normalize) norms_of(example, channels, plane, norm + i * plane, scale.data());
            for (int64_t c = i * channels; c < (i + 1) * channels; ++c) {
              pool(in + c * plane, scale.data(), down, across, row.data(), out + c * height * width);
            }
          }
        });
      });
    });
  });
  return {pooled, norms};
}

// y = x r with r = 1 / |x|, or 1 / kSmallestNorm where |x| is less:  dx = r dy - x inner, inner = r^3 <x, dy> or 0
// there.
template <class T, class A>
AMTML_INLINE void inner_products(const A* grad, const T* example, int64_t channels, const A* length,
                                 const Axis<A>& down, const Axis<A>& across, A* shares, A* scale, A* inner) {
  const int64_t plane = down.in() * across.in();
  std::fill_n(inner, plane, A(0));
  for (int64_t c = 0; c < channels; ++c) {
    const T* x = example + c * plane;
    spread(grad + c * down.out() * across.out(), down, across, shares, [&] AMTML_BODY(int64_t first, const A* d) {
#pragma omp simd
      for (int64_t b = 0; b < across.in(); ++b) inner[first + b] += d[b] * static_cast<A>(x[first + b]);
    });
  }
#pragma omp simd
  for (int64_t p = 0; p < plane; ++p) {
    const bool small = length[p] < A(kSmallestNorm);
    scale[p] = 1 / (small ? A(kSmallestNorm) : length[p]);
    inner[p] = small ? A(0) : inner[p] * scale[p] * scale[p] * scale[p];
  }
}

Tensor hint_pool_bwd(const Tensor& grad, const Tensor& feature_map, const Tensor& norms, bool normalize) {
  STD_TORCH_CHECK(feature_map.dim() == 4 && grad.dim() == 4, kOp, ": feature_map and grad must have 4 dimensions");
  const int64_t n = feature_map.size(0), channels = feature_map.size(1), h = feature_map.size(2),
                w = feature_map.size(3), height = grad.size(2), width = grad.size(3), plane = h * w;
  check_shape(kOp, "grad", grad, {n, channels, height, width});
  const ScalarType wide = wide_dtype(feature_map.scalar_type());
  const Tensor x = normalize ? dense(feature_map) : feature_map;  // else it is not read
  const Tensor incoming = dense(grad, wide);
  Tensor grad_map = empty(x, {n, channels, h, w}, x.scalar_type());
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const Axis<A> down(h, height), across(w, width);
    const A *g = static_cast<const A*>(incoming.const_data_ptr()),
            *norm = static_cast<const A*>(norms.const_data_ptr());
    dispatch(x.scalar_type(), kOp, [&](auto element) {
      using T = decltype(element);
      const T* in = static_cast<const T*>(x.const_data_ptr());
      T* out = static_cast<T*>(grad_map.mutable_data_ptr());
      torch::stable::parallel_for(0, n, grain(channels * plane), [&](int64_t begin, int64_t end) {
        std::vector<A> scratch((height + 1) * w), scale(normalize ? plane : 0), inner(normalize ? plane : 0);
        vectorized([&] AMTML_BODY() {
          for (int64_t i = begin; i < end; ++i) {
            A *shares = scratch.data(), *r = scale.data(), *along = inner.data();
            const A* from = g + i * channels * height * width;
            if (normalize) {
              inner_products(from, in + i * channels * plane, channels, norm + i * plane, down, across, shares, r,
                             along);
            }
            for (int64_t c = i * channels; c < (i + 1) * channels; ++c, from += height * width) {
              spread(from, down, across, shares, [&] AMTML_BODY(int64_t first, const A* d) {
                const T* source = in + c * plane + first;
                T* target = out + c * plane + first;
#pragma omp simd
                for (int64_t b = 0; b < w; ++b) {
                  target[b] = static_cast<T>(
                      normalize ? d[b] * r[first + b] - static_cast<A>(source[b]) * along[first + b] : d[b]);
                }
              });
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
