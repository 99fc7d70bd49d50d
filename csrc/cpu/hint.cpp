// The hint loss: channel normalization with average pooling; then the 1x1 convolution with the mean squared error and
// its gradients, in one pass; and that error alone, for predictions that are made elsewhere.
#include "pooling.h"
#include "product.h"

namespace amtml {
namespace {

constexpr char kOp[] = "hint_loss";
constexpr int64_t kPiece = 4096;  // numbers at a time that are not A's in memory, where a plane or a pixel has no more

// Planes, or pixels with the channels last, of `length` numbers that are taken together.
int64_t in_a_piece(int64_t length) { return std::max<int64_t>(kPiece / std::max<int64_t>(length, 1), 1); }

// The lengths of pixels from their squares, in place, and 1 / that.
template <class A>
AMTML_INLINE void lengths_of(int64_t pixels, A* length, A* scale) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    length[p] = std::sqrt(length[p]);
    scale[p] = 1 / std::max(length[p], A(kSmallestNorm));
  }
}

// y = x r with r = 1 / |x|, or 1 / kSmallestNorm where |x| is less:  dx = r dy - x inner, inner = r^3 <x, dy> or 0
// there. inner is <x, dy> at first; scale becomes r.
template <class A>
AMTML_INLINE void factors_of(int64_t pixels, const A* length, A* scale, A* inner) {
#pragma omp simd
  for (int64_t p = 0; p < pixels; ++p) {
    const bool small = length[p] < A(kSmallestNorm);
    scale[p] = 1 / (small ? A(kSmallestNorm) : length[p]);
    inner[p] = small ? A(0) : inner[p] * scale[p] * scale[p] * scale[p];
  }
}

// Adaptive pooling of maps, and the way back; scratch of one thread.
template <class A>
struct Pooling {
  int64_t channels;
  const Axis<A>&down, &across;
  int64_t plane, averages;
  bool last;        // the channels
  Buffer<A> scale;  // [plane]
  Buffer<A> inner;  // [plane], for the way back through norms
  Buffer<A> sums;   // of the averages
  Buffer<A> piece;  // what is not A's in memory

  Pooling(int64_t channels_, const Axis<A>& down_, const Axis<A>& across_, bool last_, bool in_place, bool back)
      : channels(channels_),
        down(down_),
        across(across_),
        plane(down.in() * across.in()),
        averages(down.out() * across.out()),
        last(last_),
        scale(plane),
        inner(back ? plane : 0),
        sums(last ? (averages + 1) * channels : (down.out() + 1) * across.in()),
        piece(in_place ? 0 : in_a_piece(last ? channels : plane) * (last ? channels : plane)) {
    std::fill_n(scale.data(), plane, A(1));
  }

  // run(c, count, x) for all planes of the example that starts at `first`, `count` of them from c on in x.
  template <class Run>
  AMTML_INLINE void each_piece(const Source& map, int64_t first, const Run& run) {
    const int64_t step = in_a_piece(plane);
    for (int64_t c = 0; c < channels; c += step) {
      const int64_t count = std::min(step, channels - c);
      run(c, count, map.read(first + c * plane, count * plane, piece.data()));
    }
  }

  // The norms of all pixels, and 1 / that in scale.
  AMTML_INLINE void norms_of(const Source& map, int64_t first, A* length) {
    std::fill_n(length, plane, A(0));
    each_piece(map, first, [&] AMTML_BODY(int64_t, int64_t count, const A* x) {
      for (int64_t c = 0; c < count; ++c, x += plane) {
#pragma omp simd
        for (int64_t p = 0; p < plane; ++p) length[p] += x[p] * x[p];
      }
    });
    lengths_of(plane, length, scale.data());
  }

  // pooled [channels, averages] from the example that starts at `first`; length, if not null, becomes its norms.
  AMTML_INLINE void forward(const Source& map, int64_t first, A* length, A* pooled) {
    if (last) return forward_last(map, first, length, pooled);
    if (length) norms_of(map, first, length);
    each_piece(map, first, [&] AMTML_BODY(int64_t c, int64_t count, const A* x) {
      for (int64_t i = 0; i < count; ++i) {
        pool(x + i * plane, scale.data(), down, across, sums.data(), pooled + (c + i) * averages);
      }
    });
  }

  AMTML_INLINE void forward_last(const Source& map, int64_t first, A* length, A* pooled) {
    const int64_t w = across.in(), step = in_a_piece(channels);
    std::fill_n(sums.data(), averages * channels, A(0));
    for (int64_t a = 0; a < down.in(); ++a) {
      for (int64_t begin = 0; begin < w; begin += step) {
        const int64_t end = std::min(begin + step, w), pixel = a * w + begin;
        const A* x = map.read(first + pixel * channels, (end - begin) * channels, piece.data());
        for (int64_t b = 0; length && b < end - begin; ++b) {
          A square = 0;
#pragma omp simd reduction(+ : square)
          for (int64_t c = 0; c < channels; ++c) square += x[b * channels + c] * x[b * channels + c];
          length[pixel + b] = square;
        }
        if (length) lengths_of(end - begin, length + pixel, scale.data() + begin);
        pool_pixels(x, scale.data(), channels, a, begin, end, down, across, sums.data());
      }
    }
    transpose(averages, channels, sums.data(), channels, pooled, averages);
  }

  // The way back, from grad [channels, averages] to `out`. length is null without norms, and the map is not read then.
  AMTML_INLINE void backward(const A* grad, const Source& map, int64_t first, const A* length, const Target& out) {
    if (last) return backward_last(grad, map, first, length, out);
    if (length) inner_products(grad, map, first, length);
    const A *r = scale.data(), *along = inner.data();
    const int64_t w = across.in(), step = in_a_piece(plane);
    for (int64_t c = 0; c < channels; c += step) {
      const int64_t count = std::min(step, channels - c), at = first + c * plane;
      const A* source = length ? map.read(at, count * plane, piece.data()) : nullptr;
      A* made = out.place(at, piece.data());  // may be the source: each number is read before it is written
      for (int64_t i = 0; i < count; ++i) {
        spread(grad + (c + i) * averages, down, across, sums.data(), [&] AMTML_BODY(int64_t row, const A* d) {
          A* target = made + i * plane + row;
          if (!length) {
            std::copy_n(d, w, target);
            return;
          }
          const A* x = source + i * plane + row;
#pragma omp simd
          for (int64_t b = 0; b < w; ++b) target[b] = d[b] * r[row + b] - x[b] * along[row + b];
        });
      }
      out.write(at, count * plane, made);
    }
  }

  AMTML_INLINE void inner_products(const A* grad, const Source& map, int64_t first, const A* length) {
    std::fill_n(inner.data(), plane, A(0));
    A* products = inner.data();
    each_piece(map, first, [&] AMTML_BODY(int64_t c, int64_t count, const A* x) {
      for (int64_t i = 0; i < count; ++i, x += plane) {
        spread(grad + (c + i) * averages, down, across, sums.data(), [&] AMTML_BODY(int64_t row, const A* d) {
#pragma omp simd
          for (int64_t b = 0; b < across.in(); ++b) products[row + b] += d[b] * x[row + b];
        });
      }
    });
    factors_of(plane, length, scale.data(), products);
  }

  AMTML_INLINE void backward_last(const A* grad, const Source& map, int64_t first, const A* length, const Target& out) {
    const int64_t w = across.in(), step = in_a_piece(channels);
    A *shares = sums.data(), *sum = shares + averages * channels, *r = scale.data(), *along = inner.data();
    transpose(channels, averages, grad, averages, shares, channels);
    for (int64_t o = 0; o < averages; ++o) {
      const A share = down.share[o / across.out()] * across.share[o % across.out()];
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) shares[o * channels + c] *= share;
    }
    for (int64_t a = 0; a < down.in(); ++a) {
      for (int64_t begin = 0; begin < w; begin += step) {
        const int64_t count = std::min(step, w - begin), at = first + (a * w + begin) * channels;
        const A* source = length ? map.read(at, count * channels, piece.data()) : nullptr;
        A* made = out.place(at, piece.data());
        for (int64_t b = 0; length && b < count; ++b) {
          const A *d = spread_to(a, begin + b, shares, channels, down, across, sum), *x = source + b * channels;
          A product = 0;
#pragma omp simd reduction(+ : product)
          for (int64_t c = 0; c < channels; ++c) product += d[c] * x[c];
          along[b] = product;
        }
        if (length) factors_of(count, length + a * w + begin, r, along);
        for (int64_t b = 0; b < count; ++b) {
          const A* d = spread_to(a, begin + b, shares, channels, down, across, sum);
          A* target = made + b * channels;
          if (!length) {
            std::copy_n(d, channels, target);
            continue;
          }
          const A *x = source + b * channels, by = r[b], less = along[b];
#pragma omp simd
          for (int64_t c = 0; c < channels; ++c) target[c] = d[c] * by - x[c] * less;
        }
        out.write(at, count * channels, made);
      }
    }
  }
};

std::tuple<Tensor, Tensor> hint_pool_fwd(const Tensor& feature_map, int64_t height, int64_t width, bool normalize) {
  STD_TORCH_CHECK(feature_map.dim() == 4, kOp, ": feature_map must be [N, c, H, W]");
  const int64_t n = feature_map.size(0), channels = feature_map.size(1), h = feature_map.size(2),
                w = feature_map.size(3), plane = h * w;
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= h && width <= w, kOp, ": cannot pool [", h, ", ", w, "] to [",
                  height, ", ", width, "]");
  const ScalarType wide = wide_dtype(feature_map.scalar_type());
  const bool last = is_channels_last(feature_map);
  const Tensor x = last ? feature_map : dense(feature_map);
  Tensor pooled = empty(x, {n, channels, height, width}, wide);
  Tensor norms = empty_or_none(x, normalize, {n, h, w}, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const Axis<A> down(h, height), across(w, width);
    A *out = static_cast<A*>(pooled.mutable_data_ptr()), *norm = static_cast<A*>(norms.mutable_data_ptr());
    const Source in(x);
    torch::stable::parallel_for(0, n, grain(channels * plane), [&](int64_t begin, int64_t end) {
      Pooling<A> pooling(channels, down, across, last, in.dtype == wide, false);
      vectorized([&] AMTML_BODY() {
        for (int64_t i = begin; i < end; ++i) {
          pooling.forward(in, i * channels * plane, normalize ? norm + i * plane : nullptr,
                          out + i * channels * height * width);
        }
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
  const bool last = is_channels_last(feature_map);
  const Tensor x = normalize && !last ? dense(feature_map) : feature_map;  // read only with norms
  const Tensor incoming = dense(grad, wide);
  const Shape shape{n, channels, h, w};
  Tensor grad_map = last ? empty_channels_last(x, shape, x.scalar_type()) : empty(x, shape, x.scalar_type());
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const Axis<A> down(h, height), across(w, width);
    const A *g = static_cast<const A*>(incoming.const_data_ptr()),
            *norm = static_cast<const A*>(norms.const_data_ptr());
    const Source in(x);
    const Target out(grad_map);
    torch::stable::parallel_for(0, n, grain(channels * plane), [&](int64_t begin, int64_t end) {
      Pooling<A> pooling(channels, down, across, last, in.dtype == wide, normalize);
      vectorized([&] AMTML_BODY() {
        for (int64_t i = begin; i < end; ++i) {
          pooling.backward(g + i * channels * height * width, in, i * channels * plane,
                           normalize ? norm + i * plane : nullptr, out);
        }
      });
    });
  });
  return grad_map;
}

constexpr int64_t kPixels = 64;  // of a block
constexpr int64_t kGroups = 16;  // that the blocks are cut into at most: each adds up a gradient of the weight

// A map [n, channels, pixels], or [n, pixels, channels] with the channels last, as a matrix: the pixels of all examples
// are its columns, [first, end) of them a block.
template <class A>
struct Columns {
  A* data;
  int64_t channels, pixels;
  bool last;

  // run(x, y, count) for all neighbors in one channel of an example, x in the map and y in panel [channels, kPixels].
  template <class Panel, class Run>
  AMTML_INLINE void each_run(int64_t first, int64_t end, Panel* panel, const Run& run) const {
    for (int64_t j = first; j < end;) {
      const int64_t p = j % pixels, count = std::min(pixels - p, end - j);
      A* x = data + j / pixels * channels * pixels + p;
      for (int64_t c = 0; c < channels; ++c) run(x + c * pixels, panel + c * kPixels + j - first, count);
      j += count;
    }
  }
  // panel = by times the block, or the block = by times the panel.
  template <class Panel>
  AMTML_INLINE void read(int64_t first, int64_t end, Panel by, Panel* panel) const {
    if (last) return transpose(end - first, channels, data + first * channels, channels, panel, kPixels, by);
    each_run(first, end, panel, [by] AMTML_BODY(const Panel* x, Panel* y, int64_t count) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[i] = by * x[i];
    });
  }
  template <class Panel>
  AMTML_INLINE void write(int64_t first, int64_t end, Panel by, const Panel* panel) const {
    if (last) return transpose(channels, end - first, panel, kPixels, data + first * channels, channels, by);
    each_run(first, end, panel, [by] AMTML_BODY(Panel* x, const Panel* y, int64_t count) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x[i] = by * y[i];
    });
  }
};

// The error d = W v - u of one block of pixels after the other, and its gradients scale W^T d, -scale d and, without
// the scale, d v^T: a block stays in cache from the first to the last.
template <class A>
struct Error {
  Columns<const A> v, u;
  Columns<A> grad_v, grad_u;  // data is null where it is not asked for
  const A* weight;            // [rows_u, pitch], with zeros behind u.channels and v.channels
  int64_t rows_u, rows_v, pitch;
  A scale;

  // Of a block. Zeros at first; what a short block leaves as it was goes into numbers that nobody reads.
  struct Panels {
    std::vector<A> v, d, grad, transposed;

    explicit Panels(const Error& e)
        : v(e.rows_v * kPixels), d(e.rows_u * kPixels), grad(e.rows_v * kPixels), transposed(kPixels * e.pitch) {}
  };

  // The sum of the squares of columns [first, end); grad_weight [rows_u, pitch] (if not null) += d v^T.
  template <int kLanes>
  AMTML_INLINE double run(int64_t first, int64_t end, Panels& panels, A* grad_weight) const {
    A *x = panels.v.data(), *d = panels.d.data(), *g = panels.grad.data(), *transposed = panels.transposed.data();
    const int64_t count = end - first;
    v.read(first, end, A(1), x);
    u.read(first, end, A(-1), d);
    add_product<kLanes, A>(rows_u, kPixels, v.channels, {weight, pitch, 1}, x, kPixels, d, kPixels);
    for (int64_t c = 0; c < u.channels; ++c) std::fill(d + c * kPixels + count, d + (c + 1) * kPixels, A(0));
    if (grad_v.data) {
      std::fill_n(g, rows_v * kPixels, A(0));
      add_product<kLanes, A>(rows_v, kPixels, u.channels, {weight, 1, pitch}, d, kPixels, g, kPixels);
      grad_v.write(first, end, scale, g);
    }
    if (grad_u.data) grad_u.write(first, end, -scale, d);
    if (grad_weight) {
      transpose(rows_v, kPixels, x, kPixels, transposed, pitch);
      add_product<kLanes, A>(rows_u, padded(v.channels, kProductVectors * kLanes), count, {d, kPixels, 1}, transposed,
                             pitch, grad_weight, pitch);
    }
    return block_sum<A>(u.channels * kPixels, [&] AMTML_BODY(int64_t i) { return d[i] * d[i]; });
  }
};

// weight as [rows, pitch], with zeros behind it.
template <class A>
std::vector<A> padded_weight(const Tensor& weight, int64_t rows, int64_t pitch) {
  std::vector<A> out(rows * pitch);
  const Matrix m(weight);
  for (int64_t i = 0; i < weight.size(0); ++i) {
    A* to = out.data() + i * pitch;
    const A* row = load_row(m, i, weight.size(1), to);
    if (row != to) std::copy_n(row, weight.size(1), to);
  }
  return out;
}

// out = scale times the sum over the groups of partial [groups, rows, pitch].
template <class A>
void add_groups(const A* partial, int64_t groups, int64_t rows, int64_t pitch, double scale, Tensor& out) {
  const int64_t width = out.size(1);
  A* to = static_cast<A*>(out.mutable_data_ptr());
  std::vector<double> sums(width);
  for (int64_t i = 0; i < out.size(0); ++i) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t group = 0; group < groups; ++group) {
      const A* from = partial + (group * rows + i) * pitch;
      for (int64_t j = 0; j < width; ++j) sums[j] += from[j];
    }
    for (int64_t j = 0; j < width; ++j) to[i * width + j] = static_cast<A>(scale * sums[j]);
  }
}

// Work is cut into blocks and groups by the sizes alone: the same sums at any thread count. The sum of the squares.
template <class A>
double run_blocks(const Error<A>& error, int64_t columns, Tensor* grad_weight) {
  const int64_t blocks = (columns + kPixels - 1) / kPixels, size = error.rows_u * error.pitch;
  // Together the groups take no more memory than W v and d would.
  const int64_t groups = std::max<int64_t>(std::min({blocks, 2 * columns / error.pitch, kGroups}), 1);
  const int64_t work = columns / groups * error.v.channels * error.u.channels;
  std::vector<double> squares(blocks);
  Buffer<A> partial(grad_weight ? groups * size : 0);
  torch::stable::parallel_for(0, groups, grain(work), [&](int64_t begin, int64_t end) {
    typename Error<A>::Panels panels(error);
    vectorized([&] AMTML_BODY(auto lanes) {
      constexpr int kLanes = decltype(lanes)::value * 4 / sizeof(A);
      for (int64_t group = begin; group < end; ++group) {
        A* sum = grad_weight ? partial.data() + group * size : nullptr;
        if (sum) std::fill_n(sum, size, A(0));
        for (int64_t b = group * blocks / groups; b < (group + 1) * blocks / groups; ++b) {
          squares[b] = error.template run<kLanes>(b * kPixels, std::min((b + 1) * kPixels, columns), panels, sum);
        }
      }
    });
  });
  if (grad_weight) add_groups(partial.data(), groups, error.rows_u, error.pitch, error.scale, *grad_weight);
  double total = 0;
  for (const double sum : squares) total += sum;
  return total;
}

using Tensor4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Tensor4 hint_fwd(const Tensor& student, const Tensor& teacher, const Tensor& weight, bool need_student_grad,
                 bool need_teacher_grad, bool need_weight_grad) {
  STD_TORCH_CHECK(student.dim() == 4 && weight.dim() == 2, kOp, ": student must be [N, c, h, w], weight [c_t, c_s]");
  const int64_t n = student.size(0), c_s = student.size(1), c_t = weight.size(0), h = student.size(2),
                w = student.size(3), columns = n * h * w;
  check_shape(kOp, "teacher", teacher, {n, c_t, h, w});
  check_shape(kOp, "weight", weight, {c_t, c_s});
  bool is_double = false;
  for (const Tensor* t : {&student, &teacher, &weight}) is_double |= t->scalar_type() == ScalarType::Double;
  const ScalarType wide = is_double ? ScalarType::Double : ScalarType::Float;
  auto map = [&](const Tensor& t) {
    const Tensor x = converted(t, wide);
    return is_channels_last(x) ? x : dense(x);
  };
  const Tensor v = map(student), u = map(teacher);
  const bool v_last = is_channels_last(v), u_last = is_channels_last(u);
  auto map_or_none = [&](bool needed, bool last, const Shape& shape) {
    return needed && last ? empty_channels_last(v, shape, wide) : empty_or_none(v, needed, shape, wide);
  };
  Tensor loss = empty(v, {}, wide), grad_student = map_or_none(need_student_grad, v_last, {n, c_s, h, w}),
         grad_teacher = map_or_none(need_teacher_grad, u_last, {n, c_t, h, w}),
         grad_weight = empty_or_none(v, need_weight_grad, {c_t, c_s}, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    auto out = [](Tensor& t, bool needed) { return needed ? static_cast<A*>(t.mutable_data_ptr()) : nullptr; };
    const int64_t pixels = h * w, rows_u = padded(c_t, kProductRows), rows_v = padded(c_s, kProductRows);
    // Whole vectors of any width, and 16 more: at a power of 2 a column would fall into few sets of the cache.
    const int64_t pitch = padded(c_s, 32) + 16;
    const std::vector<A> factors = padded_weight<A>(weight, rows_u, pitch);
    const double count = static_cast<double>(std::max<int64_t>(columns * c_t, 1));
    const Error<A> error{{static_cast<const A*>(v.const_data_ptr()), c_s, pixels, v_last},
                         {static_cast<const A*>(u.const_data_ptr()), c_t, pixels, u_last},
                         {out(grad_student, need_student_grad), c_s, pixels, v_last},
                         {out(grad_teacher, need_teacher_grad), c_t, pixels, u_last},
                         factors.data(),
                         rows_u,
                         rows_v,
                         pitch,
                         static_cast<A>(2 / count)};
    *out(loss, true) = static_cast<A>(run_blocks(error, columns, need_weight_grad ? &grad_weight : nullptr) / count);
  });
  return {loss, grad_student, grad_teacher, grad_weight};
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
    const Source a(u), b(v);
    torch::stable::parallel_for(0, blocks, 4, [&](int64_t begin, int64_t end) {
      std::vector<A> left(block), right(block);
      vectorized([&] AMTML_BODY() {
        for (int64_t k = begin; k < end; ++k) {
          const int64_t count = std::min(block, n - k * block);
          const A *x = a.read(k * block, count, left.data()), *y = b.read(k * block, count, right.data());
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
  m.impl("hint_fwd", TORCH_BOX(&hint_fwd));
  m.impl("hint_mse_fwd", TORCH_BOX(&hint_mse_fwd));
}

}  // namespace
}  // namespace amtml
