// Adaptive average pooling, and the way back: of one plane, or of an example with its channels last.
#pragma once

#include "../arithmetic.h"
#include "simd.h"

namespace amtml {

// What adaptive pooling of `in` places to `out` averages, the share of each place in that, and the averages that each
// place takes part in.
template <class A>
struct Axis {
  std::vector<Window<int64_t>> inputs, outputs;
  std::vector<A> share;
  int64_t size;  // of all windows, or 0 if they differ

  Axis(int64_t in, int64_t out) : size(in % out == 0 ? in / out : 0) {
    for (int64_t i = 0; i < out; ++i) {
      inputs.push_back(window(i, in, out));
      share.push_back(1 / static_cast<A>(inputs[i].size()));
    }
    for (int64_t i = 0; i < in; ++i) outputs.push_back(window(i, out, in));
  }
  int64_t in() const { return outputs.size(); }
  int64_t out() const { return inputs.size(); }

  // body(size) with the size as a constant where it is a frequent one: windows that do not need to be looked up, and
  // neighbors that fit in vectors. Whether it was.
  template <class Body>
  AMTML_INLINE bool of_constant_size(const Body& body) const {
    switch (size) {
      case 1:
        return body(std::integral_constant<int, 1>{}), true;
      case 2:
        return body(std::integral_constant<int, 2>{}), true;
      case 4:
        return body(std::integral_constant<int, 4>{}), true;
      default:
        return false;
    }
  }

  // averages = part times those of row.
  AMTML_INLINE void average(const A* row, A part, A* averages) const {
    const bool done = of_constant_size([&] AMTML_BODY(auto constant) {
      constexpr int kSize = decltype(constant)::value;
#pragma omp simd
      for (int64_t z = 0; z < out(); ++z) {
        A sum = row[z * kSize];
        for (int b = 1; b < kSize; ++b) sum += row[z * kSize + b];
        averages[z] = sum * (part / kSize);
      }
    });
    for (int64_t z = 0; !done && z < out(); ++z) {
      A sum = 0;
      for (int64_t b = inputs[z].begin; b < inputs[z].end; ++b) sum += row[b];
      averages[z] = sum * (part * share[z]);
    }
  }

  // The way back: row = part times what comes back from grad.
  AMTML_INLINE void spread(const A* grad, A part, A* row) const {
    const bool done = of_constant_size([&] AMTML_BODY(auto constant) {
      constexpr int kSize = decltype(constant)::value;
#pragma omp simd
      for (int64_t z = 0; z < out(); ++z) {
        for (int b = 0; b < kSize; ++b) row[z * kSize + b] = grad[z] * (part / kSize);
      }
    });
    if (done) return;
    std::fill_n(row, in(), A(0));
    for (int64_t z = 0; z < out(); ++z) {
      for (int64_t b = inputs[z].begin; b < inputs[z].end; ++b) row[b] += grad[z] * (part * share[z]);
    }
  }
};

// Averages one plane x times scale: sums of rows, along which vectors run, then of their neighbors. row: scratch.
template <class A>
AMTML_INLINE void pool(const A* x, const A* scale, const Axis<A>& down, const Axis<A>& across, A* row, A* pooled) {
  const int64_t w = across.in();
  for (int64_t y = 0; y < down.out(); ++y) {
    const Window<int64_t> rows = down.inputs[y];
    std::fill_n(row, w, A(0));
    for (int64_t p = rows.begin * w; p < rows.end * w; p += w) {
#pragma omp simd
      for (int64_t b = 0; b < w; ++b) row[b] += x[p + b] * scale[p + b];
    }
    across.average(row, down.share[y], pooled + y * across.out());
  }
}

// The way back: use(first, d) for each row of a plane, which starts at place `first`, with what comes back to it.
// shares: scratch for one row more than there are windows.
template <class A, class Use>
AMTML_INLINE void spread(const A* grad, const Axis<A>& down, const Axis<A>& across, A* shares, const Use& use) {
  const int64_t w = across.in();
  for (int64_t y = 0; y < down.out(); ++y) across.spread(grad + y * across.out(), down.share[y], shares + y * w);
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

// Whether the channels of a pixel of t [n, c, h, w] lie side by side, and the pixels as in a contiguous tensor.
inline bool is_channels_last(const Tensor& t) {
  if (t.is_contiguous()) return false;
  int64_t stride = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) != 1 && t.stride(d) != stride) return false;
    stride *= t.size(d);
  }
  return true;
}

inline Tensor empty_channels_last(const Tensor& like, const Shape& shape, ScalarType dtype) {
  const int64_t c = shape[1], h = shape[2], w = shape[3];
  return empty_strided(like, shape, {c * h * w, 1, c * w, c}, dtype);
}

// sums [averages, channels] += the pixels [begin, end) of row a of an example, each times its scale and its share in
// the averages. x is [end - begin, channels].
template <class A>
AMTML_INLINE void pool_pixels(const A* x, const A* scale, int64_t channels, int64_t a, int64_t begin, int64_t end,
                              const Axis<A>& down, const Axis<A>& across, A* sums) {
  for (int64_t b = begin; b < end; ++b, x += channels) {
    for (int64_t y = down.outputs[a].begin; y < down.outputs[a].end; ++y) {
      for (int64_t z = across.outputs[b].begin; z < across.outputs[b].end; ++z) {
        const A part = scale[b] * (down.share[y] * across.share[z]);
        A* sum = sums + (y * across.out() + z) * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) sum[c] += part * x[c];
      }
    }
  }
}

// The way back to the pixel (a, b): the gradients of the averages that it takes part in, [averages, channels] and times
// their shares already. sum: scratch for one pixel.
template <class A>
AMTML_INLINE const A* spread_to(int64_t a, int64_t b, const A* shares, int64_t channels, const Axis<A>& down,
                                const Axis<A>& across, A* sum) {
  const Window<int64_t> rows = down.outputs[a], columns = across.outputs[b];
  const A* first = shares + (rows.begin * across.out() + columns.begin) * channels;
  if (rows.size() == 1 && columns.size() == 1) return first;
  std::fill_n(sum, channels, A(0));
  for (int64_t y = rows.begin; y < rows.end; ++y) {
    for (int64_t z = columns.begin; z < columns.end; ++z) {
      const A* d = shares + (y * across.out() + z) * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) sum[c] += d[c];
    }
  }
  return sum;
}

}  // namespace amtml
