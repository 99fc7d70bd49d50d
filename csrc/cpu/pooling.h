// Adaptive average pooling of one plane, and the way back.
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
  // neighbours that fit in vectors. Whether it was.
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

}  // namespace amtml
