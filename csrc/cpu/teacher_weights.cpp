// Teacher weights: pool, scores and softmax in one pass over the feature map; backward scatters into the gradient only.
//
//   b = maxpool(B),  gamma_t = sum_d v_d theta_td b_d,  w = softmax_t gamma
//   dgamma_t = w_t (g_t - sum_s g_s w_s),  db_d = sum_t dgamma_t theta_td v_d,  d(theta_t v) = sum_n dgamma_nt b_n
#include "../arithmetic.h"
#include "ops.h"
#include "shares.h"

namespace amtml {
namespace {

constexpr char kOp[] = "teacher_weights";
constexpr int64_t kPiece = 4096;  // numbers at a time of a map that is not A's in memory

struct Map {  // [n, channels, height, width] or [n, channels], with any strides
  int64_t n, channels, height, width;
  int64_t sn, sc, sh, sw;
  explicit Map(const Tensor& t)
      : n(t.size(0)),
        channels(t.size(1)),
        height(t.dim() == 4 ? t.size(2) : 1),
        width(t.dim() == 4 ? t.size(3) : 1),
        sn(t.stride(0)),
        sc(t.stride(1)),
        sh(t.dim() == 4 ? t.stride(2) : 1),
        sw(t.dim() == 4 ? t.stride(3) : 1) {}
  int64_t pixels() const { return height * width; }
  // Whether a pixel's channels lie side by side. (A single channel is a plane, whatever its stride.)
  bool channels_last() const { return sc == 1 && (channels > 1 || pixels() == 1); }
  bool dense_plane() const { return (sw == 1 || width == 1) && (sh == width || height == 1); }
  int64_t offset(int64_t pixel) const {
    return dense_plane() ? pixel : pixel / width * sh + pixel % width * sw;  // a division costs more than the rest
  }
};

// A map, read in pieces as A: in place where it is that already. Scratch of one thread.
template <class A>
struct Pieces {
  const Map& map;
  Source source;
  Buffer<A> scratch;

  Pieces(const Map& m, const Source& from) : map(m), source(from), scratch(std::max(kPiece, m.width)) {}

  // Pixels [p, p + n) of a channel that starts at `first`; whole rows of it where they are not side by side.
  const A* of_plane(int64_t first, int64_t p, int64_t n) {
    if (map.dense_plane()) return source.read(first + p, n, scratch.data());
    for (int64_t row = 0; row < n; row += map.width) {
      const int64_t from = first + (p + row) / map.width * map.sh;
      widen(source.data + from * bytes_of(source.dtype), source.dtype, map.sw, map.width, scratch.data() + row);
    }
    return scratch.data();
  }

  // run(c, p, n, x) for all channels c of an example: x has its pixels [p, p + n).
  template <class Run>
  AMTML_INLINE void each_plane(int64_t example, const Run& run) {
    const int64_t pixels = map.pixels();
    const bool together = map.dense_plane() && map.sc == pixels && pixels < kPiece;  // several small planes
    const int64_t planes = together ? kPiece / pixels : 1;
    const int64_t most = map.dense_plane() ? kPiece : std::max<int64_t>(kPiece / map.width, 1) * map.width;
    for (int64_t c = 0; c < map.channels; c += planes) {
      const int64_t count = std::min(planes, map.channels - c);
      for (int64_t p = 0; p < pixels; p += most) {
        const int64_t n = std::min(most, pixels - p);
        const A* x = of_plane(example + c * map.sc, p, count * n);
        for (int64_t i = 0; i < count; ++i) run(c + i, p, n, x + i * n);
      }
    }
  }

  // run(p, c, n, x) for all pixels p of an example with its channels last: x has its channels [c, c + n).
  template <class Run>
  AMTML_INLINE void each_pixel(int64_t example, const Run& run) {
    const int64_t pixels = map.pixels(), channels = map.channels;
    const bool dense = map.sw == channels && map.sh == map.width * channels && channels < kPiece;
    const int64_t step = dense ? kPiece / std::max<int64_t>(channels, 1) : 1;
    for (int64_t p = 0; p < pixels; p += step) {
      const int64_t first = example + p / map.width * map.sh + p % map.width * map.sw;
      const int64_t count = std::min(step, pixels - p);
      for (int64_t c = 0; c < channels; c += kPiece) {
        const int64_t n = std::min(kPiece, channels - c);
        const A* x = source.read(first + c, count * n, scratch.data());
        for (int64_t i = 0; i < count; ++i) run(p + i, c, n, x + i * n);
      }
    }
  }
};

// Where the maximum of a dense plane stands first; the first NaN, if there is one. First the maximum, in vertical
// vectors, then its place, from the last vector to the first. The last vector may overlap the one before.
template <int kLanes, class A>
AMTML_INLINE int64_t first_maximum(const A* plane, int64_t pixels) {
  using Values = typename Vector<A, kLanes>::type;
  using Place = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;  // as wide as A, for the selects
  using Places = typename Vector<Place, kLanes>::type;
  auto scalar = [&] {
    int64_t at = 0;
    for (int64_t p = 1; p < pixels; ++p) at = beats(plane[p], plane[at]) ? p : at;
    return at;
  };
  if (pixels < kLanes) return scalar();
  Values best = Vector<A, kLanes>::load(plane);
  Places nan = best != best;
  auto take = [&](int64_t p) __attribute__((always_inline)) {
    const Values value = Vector<A, kLanes>::load(plane + p);
    best = value > best ? value : best;
    nan |= value != value;
  };
  int64_t last = kLanes;
  for (; last + kLanes <= pixels; last += kLanes) take(last);
  if (last < pixels) take(pixels - kLanes);
  alignas(64) A each[kLanes];
  Vector<A, kLanes>::store(each, best);
  const A highest = folded<kLanes / 2>(each, Larger());
  Place any = 0;
#pragma omp simd reduction(| : any)
  for (int l = 0; l < kLanes; ++l) any |= nan[l];
  if (any) return scalar();
  Places at, lane;
  for (int l = 0; l < kLanes; ++l) lane[l] = l, at[l] = std::numeric_limits<int32_t>::max();
  auto find = [&](int64_t p) __attribute__((always_inline)) {
    const Places place = lane + static_cast<Place>(p);
    const Values value = Vector<A, kLanes>::load(plane + p);
    at = value == highest ? place : at;
  };
  if (last < pixels) find(pixels - kLanes);
  for (last -= kLanes; last >= 0; last -= kLanes) find(last);
  Place first = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(min : first)
  for (int l = 0; l < kLanes; ++l) first = at[l] < first ? at[l] : first;
  return first;
}

// Maximum of each channel and the first place where it stands; NaN wins, as in torch's max_pool.
template <int kLanes, class A>
AMTML_INLINE void max_pool(Pieces<A>& pieces, int64_t example, A* pooled, int32_t* index) {
  if (pieces.map.channels_last()) {  // vectors run over channels
    pieces.each_pixel(example, [&] AMTML_BODY(int64_t p, int64_t first, int64_t n, const A* x) {
      A* best = pooled + first;
      int32_t* at = index + first;
      if (p == 0) {
        for (int64_t c = 0; c < n; ++c) best[c] = x[c], at[c] = 0;
        return;
      }
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        const bool better = x[c] > best[c] || (x[c] != x[c] && best[c] == best[c]);
        best[c] = better ? x[c] : best[c];
        at[c] = better ? static_cast<int32_t>(p) : at[c];
      }
    });
    return;
  }
  pieces.each_plane(example, [&] AMTML_BODY(int64_t c, int64_t p, int64_t n, const A* x) {
    const int64_t at = first_maximum<kLanes>(x, n);
    if (p > 0 && !beats(x[at], pooled[c])) return;
    pooled[c] = x[at];
    index[c] = static_cast<int32_t>(p + at);
  });
}

// Mean of each channel. sums: scratch of as many.
template <class A>
AMTML_INLINE void avg_pool(Pieces<A>& pieces, int64_t example, A* pooled, double* sums) {
  const int64_t pixels = pieces.map.pixels();
  if (pieces.map.channels_last()) {
    pieces.each_pixel(example, [&] AMTML_BODY(int64_t p, int64_t first, int64_t n, const A* x) {
      double* sum = sums + first;
      if (p == 0) {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) sum[c] = x[c];
      } else {
#pragma omp simd
        for (int64_t c = 0; c < n; ++c) sum[c] += x[c];
      }
      if (p + 1 < pixels) return;
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) pooled[first + c] = static_cast<A>(sum[c] / static_cast<double>(pixels));
    });
    return;
  }
  double sum = 0;
  pieces.each_plane(example, [&] AMTML_BODY(int64_t c, int64_t p, int64_t n, const A* x) {
    const double part = block_sum<A>(n, [&](int64_t i) __attribute__((always_inline)) { return x[i]; });
    sum = p == 0 ? part : sum + part;
    if (p + n == pixels) pooled[c] = static_cast<A>(sum / static_cast<double>(pixels));
  });
}

// The gradient of an example that starts at `first`: db [d] at the place `at` of each channel, or everywhere if at is
// null.
void spread(const Target& dx, const Map& map, int64_t first, const double* db, const int32_t* at) {
  dispatch(dx.dtype, kOp, [&](auto element) {
    using T = decltype(element);
    T* example = reinterpret_cast<T*>(dx.data) + first;
    if (at) {
      for (int64_t c = 0; c < map.channels; ++c) example[c * map.sc + map.offset(at[c])] = static_cast<T>(db[c]);
      return;
    }
    if (map.channels_last()) {
      vectorized([&] AMTML_BODY() {
        for (int64_t p = 0; p < map.pixels(); ++p) {
          T* pixel = example + map.offset(p);
          for (int64_t c = 0; c < map.channels; ++c) pixel[c] = static_cast<T>(db[c]);
        }
      });
      return;
    }
    vectorized([&] AMTML_BODY() {
      for (int64_t c = 0; c < map.channels; ++c) {
        const T even = static_cast<T>(db[c]);
        T* plane = example + c * map.sc;
        for (int64_t p = 0; p < map.pixels(); ++p) plane[map.offset(p)] = even;
      }
    });
  });
}

ScalarType check(const Tensor& features, const Tensor& theta, const Tensor& v) {
  STD_TORCH_CHECK(features.dim() == 2 || (features.dim() == 4 && features.size(2) * features.size(3) > 0), kOp,
                  ": features must be [N, d], or [N, d, H, W] with at least one pixel");
  STD_TORCH_CHECK(theta.dim() == 2 && theta.size(0) > 0, kOp, ": theta must be [T, d] with T >= 1");
  check_shape(kOp, "theta", theta, {theta.size(0), features.size(1)});
  check_shape(kOp, "v", v, {features.size(1)});
  const ScalarType wide = theta.scalar_type();
  STD_TORCH_CHECK(
      wide == v.scalar_type() &&
          (wide == ScalarType::Double || (wide == ScalarType::Float && features.scalar_type() != ScalarType::Double)),
      kOp, ": theta and v must both be float32, or float64 if an input is");
  return wide;
}

// theta_t * v, [T, d].
template <class A>
std::vector<double> effective(const Tensor& theta, const Tensor& v) {
  const Tensor th = dense(theta), vv = dense(v);
  const A *a = static_cast<const A*>(th.const_data_ptr()), *b = static_cast<const A*>(vv.const_data_ptr());
  const int64_t teachers = theta.size(0), d = theta.size(1);
  std::vector<double> out(teachers * d);
  for (int64_t t = 0; t < teachers; ++t) {
    for (int64_t c = 0; c < d; ++c) out[t * d + c] = static_cast<double>(a[t * d + c]) * b[c];
  }
  return out;
}

// Eq 5 and 6 for one example, in double: the softmax turns an absolute error of a score into a relative one, and
// backward takes differences of weights near 1.
template <class A>
AMTML_INLINE void weigh(const double* factors, const A* pooled, int64_t teachers, int64_t d, double* weights) {
  double highest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t t = 0; t < teachers; ++t) {
    const double* f = factors + t * d;
    double score = 0;
#pragma omp simd reduction(+ : score)
    for (int64_t c = 0; c < d; ++c) score += f[c] * pooled[c];
    weights[t] = score;
    highest = score > highest ? score : highest;
  }
  for (int64_t t = 0; t < teachers; ++t) sum += weights[t] = std::exp(weights[t] - highest);
  for (int64_t t = 0; t < teachers; ++t) weights[t] /= sum;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> teacher_weights_fwd(const Tensor& features, const Tensor& theta, const Tensor& v,
                                                       bool use_max) {
  const ScalarType wide = check(features, theta, v);
  const Map map(features);
  // Where a maximum stands is kept in 32 bits; backward writes there.
  STD_TORCH_CHECK(!use_max || map.pixels() <= int64_t{1} << 31, kOp,
                  ": features must have at most 2^31 pixels for a maximum, got [", map.height, ", ", map.width, "]");
  const int64_t teachers = theta.size(0), d = map.channels;
  Tensor weights = empty(theta, {map.n, teachers}, wide);
  Tensor pooled = empty(theta, {map.n, d}, wide);
  Tensor index = empty_or_none(theta, use_max, {map.n, d}, ScalarType::Int);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const std::vector<double> factors = effective<A>(theta, v);
    A *w = static_cast<A*>(weights.mutable_data_ptr()), *b = static_cast<A*>(pooled.mutable_data_ptr());
    int32_t* at = static_cast<int32_t*>(index.mutable_data_ptr());
    const Source x(features);
    in_shares(map.n, d * map.pixels(), [&](Shares& next) {
      Pieces<A> pieces(map, x);
      std::vector<double> gamma(teachers), sums(d);
      vectorized([&] AMTML_BODY(auto lanes) {
        for (Share share; next(share);) {
          for (int64_t i = share.begin; i < share.end; ++i) {
            if (use_max) {
              max_pool<decltype(lanes)::value>(pieces, i * map.sn, b + i * d, at + i * d);
            } else {
              avg_pool(pieces, i * map.sn, b + i * d, sums.data());
            }
            weigh(factors.data(), b + i * d, teachers, d, gamma.data());
            for (int64_t t = 0; t < teachers; ++t) w[i * teachers + t] = static_cast<A>(gamma[t]);
          }
        }
      });
    });
  });
  return {weights, pooled, index};
}

std::tuple<Tensor, Tensor, Tensor> teacher_weights_bwd(const Tensor& grad, const Tensor& features, const Tensor& theta,
                                                       const Tensor& v, const Tensor& pooled, const Tensor& index,
                                                       bool use_max, bool need_features, bool need_parameters) {
  const ScalarType wide = check(features, theta, v);
  const Map map(features);
  const int64_t n = map.n, teachers = theta.size(0), d = map.channels;
  check_shape(kOp, "grad", grad, {n, teachers});
  check_shape(kOp, "pooled", pooled, {n, d});
  Tensor grad_features =
      need_features ? torch::stable::empty_like(features) : empty(features, {0}, features.scalar_type());
  Tensor grad_theta = empty_or_none(theta, need_parameters, {teachers, d}, wide);
  Tensor grad_v = empty_or_none(theta, need_parameters, {d}, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const std::vector<double> factors = effective<A>(theta, v);
    const Tensor incoming = dense(grad, wide);
    const A* g = static_cast<const A*>(incoming.const_data_ptr());
    const A* b = static_cast<const A*>(pooled.const_data_ptr());
    std::vector<double> score(n * teachers);                                          // dL/dgamma
    const Map out(grad_features.dim() == features.dim() ? grad_features : features);  // where dense, features' strides
    const int64_t size = d * map.pixels();
    const bool together = n == 1 || out.sn == size;  // an example's gradient is one piece of memory
    const bool sparse = use_max && map.pixels() > 1;
    const int32_t* at = static_cast<const int32_t*>(index.const_data_ptr());
    const Target dx(grad_features);
    if (need_features && sparse && !together) dx.clear(0, n * size);
    torch::stable::parallel_for(0, n, grain(need_features ? size : d * teachers), [&](int64_t begin, int64_t end) {
      std::vector<double> w(teachers), db(d);
      for (int64_t i = begin; i < end; ++i) {
        vectorized([&] AMTML_BODY() {
          const A* of_weights = g + i * teachers;
          // An example to whose weights nothing comes back counts nothing, whatever its features are.
          if (std::any_of(of_weights, of_weights + teachers, [](A x) { return x != 0; })) {
            weigh(factors.data(), b + i * d, teachers, d, w.data());
            double inner = 0;
            for (int64_t t = 0; t < teachers; ++t) inner += of_weights[t] * w[t];
            for (int64_t t = 0; t < teachers; ++t) score[i * teachers + t] = w[t] * (of_weights[t] - inner);
          }
          if (!need_features) return;
          std::fill(db.begin(), db.end(), 0.0);
          for (int64_t t = 0; t < teachers; ++t) {
            const double by = score[i * teachers + t], *f = factors.data() + t * d;
#pragma omp simd
            for (int64_t c = 0; c < d; ++c) db[c] += by * f[c];
          }
          const double pixels = use_max ? 1 : static_cast<double>(map.pixels());
#pragma omp simd
          for (int64_t c = 0; c < d; ++c) db[c] = static_cast<A>(db[c] / pixels);
        });
        if (!need_features) continue;
        if (sparse && together) dx.clear(i * size, size);
        spread(dx, out, i * out.sn, db.data(), sparse ? at + i * d : nullptr);
      }
    });
    if (!need_parameters) return;
    const Tensor th = dense(theta), vv = dense(v);
    const A *a = static_cast<const A*>(th.const_data_ptr()), *scale = static_cast<const A*>(vv.const_data_ptr());
    A *da = static_cast<A*>(grad_theta.mutable_data_ptr()), *dv = static_cast<A*>(grad_v.mutable_data_ptr());
    torch::stable::parallel_for(0, d, grain(n * teachers), [&](int64_t begin, int64_t end) {
      const int64_t width = end - begin;
      std::vector<double> sum(teachers * width);
      vectorized([&] AMTML_BODY() {
        for (int64_t i = 0; i < n; ++i) {
          const A* row = b + i * d + begin;
          for (int64_t t = 0; t < teachers; ++t) {
            const double by = score[i * teachers + t];
            if (by == 0) continue;  // 0 * NaN is 0
            double* s = sum.data() + t * width;
#pragma omp simd
            for (int64_t c = 0; c < width; ++c) s[c] += by * row[c];
          }
        }
      });
      for (int64_t c = 0; c < width; ++c) {
        double total = 0;
        for (int64_t t = 0; t < teachers; ++t) {
          const int64_t at = t * d + begin + c;
          da[at] = static_cast<A>(sum[t * width + c] * scale[begin + c]);
          total += sum[t * width + c] * a[at];
        }
        dv[begin + c] = static_cast<A>(total);
      }
    });
  });
  return {grad_features, grad_theta, grad_v};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("teacher_weights_fwd", TORCH_BOX(&teacher_weights_fwd));
  m.impl("teacher_weights_bwd", TORCH_BOX(&teacher_weights_bwd));
}

}  // namespace amtml
