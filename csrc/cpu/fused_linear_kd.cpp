// Matrix products between a chunk of rows and an output layer, float32: a few rows [r, .] and a weight of many [C, H].
//
//   logits      out[i, c] = scale (sum_k x[i, k] w[c, k] + bias[c])
//   grad_hidden out[i, j] = scale sum_c g[i, c] w[c, j]
//   grad_weight out[c, j] (+)= scale sum_i g[i, c] x[i, j]
//
// A product of a library packs the large factor first, which with a hundred rows takes as long as the product itself.
// Here the rows are packed, and the weight is read once, in the order in which it lies, in any dtype. Threads share
// parts of it that do not depend on how many they are.
#include "../common.h"
#include "shares.h"

namespace amtml {
namespace {

constexpr char kOp[] = "fused_linear_kd_loss";
constexpr int kUnit = 12;        // classes, or rows, of a tile
constexpr int kVectors = 2;      // beside one another in a tile
constexpr int kMost = 16 * 2;    // numbers in them, at most
constexpr int64_t kDepth = 128;  // classes at a time: their part of a packed weight stays in the first-level cache

// 24 sums under way, or 12 where there are but 16 registers.
template <int kLanes>
constexpr int kTile = kLanes == 16 ? kUnit : kUnit / 2;

// sums[r] = sum over k of a[r + k * a_pitch] times the vectors at b + k * width; or a[r * a_pitch + k].
template <int kLanes, bool kByRow>
AMTML_INLINE void multiply(int64_t depth, const float* a, int64_t a_pitch, const float* b,
                           typename Vector<float, kLanes>::type (&sums)[kTile<kLanes>][kVectors]) {
  using V = Vector<float, kLanes>;
#pragma GCC unroll 12
  for (int r = 0; r < kTile<kLanes>; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = typename V::type{};
  }
  for (int64_t k = 0; k < depth; ++k, b += kVectors * kLanes, a += kByRow ? 1 : a_pitch) {
    typename V::type x[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) x[v] = V::load(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kTile<kLanes>; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[r][v] += a[kByRow ? r * a_pitch : r] * x[v];
    }
  }
}

// A matrix as panels of the width of a tile: panel p holds columns p * width on of every row, 0 beyond the last.
template <int kLanes>
AMTML_INLINE void pack_columns(const Matrix& m, int64_t first, int64_t rows, int64_t columns, float* scratch,
                               float* to) {
  constexpr int kWidth = kVectors * kLanes;
  for (int64_t i = 0; i < rows; ++i) {
    const float* x = load_row(m, first + i, columns, scratch);
    for (int64_t start = 0; start < columns; start += kWidth) {
      float* out = to + start * rows + i * kWidth;
      const int64_t n = std::min<int64_t>(kWidth, columns - start);
      if (n == kWidth) {
#pragma omp simd
        for (int l = 0; l < kWidth; ++l) out[l] = x[start + l];
      } else {
        for (int l = 0; l < kWidth; ++l) out[l] = l < n ? x[start + l] : 0;
      }
    }
  }
}

// The same of the transpose: panel p holds rows p * width on.
template <int kLanes>
AMTML_INLINE void pack_rows(const Matrix& m, int64_t rows, int64_t columns, float* scratch, float* to) {
  constexpr int kWidth = kVectors * kLanes;
  std::fill_n(to, padded(rows, kWidth) * columns, 0.0f);
  for (int64_t i = 0; i < rows; ++i) {
    const float* x = load_row(m, i, columns, scratch);
    float* out = to + i / kWidth * kWidth * columns + i % kWidth;
    for (int64_t k = 0; k < columns; ++k) out[k * kWidth] = x[k];
  }
}

// A tile of kUnit rows of sums, written to `to`, one row after another.
template <int kLanes, bool kByRow>
AMTML_INLINE void multiply_unit(int64_t depth, const float* a, int64_t a_pitch, const float* b, float* to) {
  using V = Vector<float, kLanes>;
  typename V::type sums[kTile<kLanes>][kVectors];
#pragma GCC unroll 1
  for (int start = 0; start < kUnit; start += kTile<kLanes>) {
    multiply<kLanes, kByRow>(depth, a + (kByRow ? start * a_pitch : start), a_pitch, b, sums);
#pragma GCC unroll 12
    for (int r = 0; r < kTile<kLanes>; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) V::store(to + ((start + r) * kVectors + v) * kLanes, sums[r][v]);
    }
  }
}

void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check_shape(kOp, name, t, {rows, columns});
  STD_TORCH_CHECK(t.scalar_type() != ScalarType::Double, kOp, ": ", name, " must not be float64");
}

float* written(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
  check_shape(kOp, name, t, {rows, columns});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous(), kOp, ": ", name,
                  " must be float32 and contiguous");
  return static_cast<float*>(t.mutable_data_ptr());
}

void fused_linear_kd_logits_(const Tensor& out, const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias,
                             double scale) {
  const int64_t rows = hidden.size(0), width = hidden.size(1), classes = weight.size(0);
  check_matrix("hidden", hidden, rows, width), check_matrix("weight", weight, classes, width);
  float* to = written("out", out, rows, classes);
  if (bias) check_shape(kOp, "bias", *bias, {classes});
  const Tensor shifts = bias ? dense(*bias, ScalarType::Float) : out;
  const float* shift = bias ? static_cast<const float*>(shifts.const_data_ptr()) : nullptr;
  const float by = static_cast<float>(scale);
  const Matrix x(hidden), w(weight);
  Buffer<float> packed(padded(rows, kMost) * width), row(width);
  vectorized([&] AMTML_BODY(auto lanes) { pack_rows<lanes.value>(x, rows, width, row.data(), packed.data()); });
  in_shares((classes + kUnit - 1) / kUnit, kUnit * rows * width, [&](Shares& next) {
    Buffer<float> some(kUnit * width), sums(kUnit * kMost);
    vectorized([&] AMTML_BODY(auto lanes) {
      constexpr int kWidth = kVectors * lanes.value;
      float* tile = sums.data();
      for (Share share; next(share);) {
        for (int64_t unit = share.begin; unit < share.end; ++unit) {
          const int64_t c = unit * kUnit, n = std::min<int64_t>(kUnit, classes - c);
          const float* a = some.data();
          int64_t pitch = width;
          if (n == kUnit && w.in_place<float>()) {
            a = static_cast<const float*>(w.data) + c * w.row_stride, pitch = w.row_stride;
          } else {
            std::fill_n(some.data(), kUnit * width, 0.0f);
            for (int64_t r = 0; r < n; ++r) {
              const float* from = load_row(w, c + r, width, some.data() + r * width);
              if (from != some.data() + r * width) std::copy_n(from, width, some.data() + r * width);
            }
          }
          for (int64_t i = 0; i < rows; i += kWidth) {
            multiply_unit<lanes.value, true>(width, a, pitch, packed.data() + i * width, tile);
            const int64_t here = std::min<int64_t>(kWidth, rows - i);
            for (int64_t l = 0; l < here; ++l) {
              float* at = to + (i + l) * classes + c;
              for (int64_t r = 0; r < n; ++r) at[r] = by * (tile[r * kWidth + l] + (shift ? shift[c + r] : 0.0f));
            }
          }
        }
      }
    });
  });
}

void fused_linear_kd_grad_hidden_(const Tensor& out, const Tensor& grad, const Tensor& weight, double scale) {
  const int64_t rows = grad.size(0), classes = grad.size(1), width = weight.size(1);
  check_matrix("grad", grad, rows, classes), check_matrix("weight", weight, classes, width);
  float* to = written("out", out, rows, width);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.is_contiguous(), kOp,
                  ": grad must be float32 and contiguous");
  const float* g = static_cast<const float*>(grad.const_data_ptr());
  const Matrix w(weight);
  // Each part of the classes has sums of its own.
  const int64_t parts = classes < 4096 ? 1 : 2 * std::min<int64_t>(classes / 8192 + 1, 16);
  const int64_t each = padded((classes + parts - 1) / parts, kDepth);
  const int64_t units = (rows + kUnit - 1) / kUnit, wide = padded(width, kMost), size = units * kUnit * wide;
  Buffer<float> sums(parts * size);
  in_shares(parts, each * rows * width, [&](Shares& next) {
    Buffer<float> row(width), packed(kDepth * wide), of_rows(units * kUnit * kDepth), made(kUnit * kMost);
    vectorized([&] AMTML_BODY(auto lanes) {
      constexpr int kWidth = kVectors * lanes.value;
      float* tile = made.data();
      for (Share share; next(share);) {
        for (int64_t part = share.begin; part < share.end; ++part) {
          float* own = sums.data() + part * size;  // [panels, rows, kWidth]
          std::fill_n(own, size, 0.0f);
          const int64_t stop = std::min((part + 1) * each, classes);
          for (int64_t c = part * each; c < stop; c += kDepth) {
            const int64_t depth = std::min(kDepth, stop - c);
            pack_columns<lanes.value>(w, c, depth, width, row.data(), packed.data());
            for (int64_t unit = 0; unit < units; ++unit) {
              const int64_t n = std::min<int64_t>(kUnit, rows - unit * kUnit);
              float* at = of_rows.data() + unit * kUnit * depth;
              for (int64_t r = 0; r < kUnit; ++r) {
                const float* from = g + (unit * kUnit + r) * classes + c;
                for (int64_t k = 0; k < depth; ++k) at[k * kUnit + r] = r < n ? from[k] : 0.0f;
              }
            }
            for (int64_t j = 0; j < width; j += kWidth) {
              for (int64_t unit = 0; unit < units; ++unit) {
                multiply_unit<lanes.value, false>(depth, of_rows.data() + unit * kUnit * depth, kUnit,
                                                  packed.data() + j * depth, tile);
                float* total = own + j * units * kUnit + unit * kUnit * kWidth;
#pragma omp simd
                for (int l = 0; l < kUnit * kWidth; ++l) total[l] += tile[l];
              }
            }
          }
        }
      }
    });
  });
  const float by = static_cast<float>(scale);
  in_shares(rows, parts * width, [&](Shares& next) {
    Buffer<double> total(width);
    vectorized([&] AMTML_BODY(auto lanes) {
      constexpr int kWidth = kVectors * lanes.value;
      for (Share share; next(share);) {
        for (int64_t i = share.begin; i < share.end; ++i) {
          std::fill_n(total.data(), width, 0.0);
          for (int64_t part = 0; part < parts; ++part) {
            const float* own = sums.data() + part * size + i * kWidth;
            for (int64_t j = 0; j < width; j += kWidth) {
              const int64_t n = std::min<int64_t>(kWidth, width - j);
              for (int64_t l = 0; l < n; ++l) total[j + l] += own[j * units * kUnit + l];
            }
          }
          for (int64_t j = 0; j < width; ++j) to[i * width + j] = by * static_cast<float>(total[j]);
        }
      }
    });
  });
}

void fused_linear_kd_grad_weight_(const Tensor& out, const Tensor& grad, const Tensor& hidden, double scale, bool add) {
  const int64_t rows = grad.size(0), classes = grad.size(1), width = hidden.size(1);
  check_matrix("grad", grad, rows, classes), check_matrix("hidden", hidden, rows, width);
  float* to = written("out", out, classes, width);
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && grad.is_contiguous(), kOp,
                  ": grad must be float32 and contiguous");
  const float *g = static_cast<const float*>(grad.const_data_ptr()), by = static_cast<float>(scale);
  const Matrix x(hidden);
  Buffer<float> packed(rows * padded(width, kMost)), row(width);
  vectorized([&] AMTML_BODY(auto lanes) { pack_columns<lanes.value>(x, 0, rows, width, row.data(), packed.data()); });
  in_shares((classes + kUnit - 1) / kUnit, kUnit * rows * width, [&](Shares& next) {
    Buffer<float> of_rows(rows * kUnit), sums(kUnit * kMost);
    vectorized([&] AMTML_BODY(auto lanes) {
      constexpr int kWidth = kVectors * lanes.value;
      float* tile = sums.data();
      for (Share share; next(share);) {
        for (int64_t unit = share.begin; unit < share.end; ++unit) {
          const int64_t c = unit * kUnit, n = std::min<int64_t>(kUnit, classes - c);
          for (int64_t i = 0; i < rows; ++i) {
            for (int64_t r = 0; r < kUnit; ++r) of_rows[i * kUnit + r] = r < n ? g[i * classes + c + r] : 0.0f;
          }
          for (int64_t j = 0; j < width; j += kWidth) {
            multiply_unit<lanes.value, false>(rows, of_rows.data(), kUnit, packed.data() + j * rows, tile);
            const int64_t here = std::min<int64_t>(kWidth, width - j);
            for (int64_t r = 0; r < n; ++r) {
              float* at = to + (c + r) * width + j;
              const float* made = tile + r * kWidth;
              if (add) {
#pragma omp simd
                for (int64_t l = 0; l < here; ++l) at[l] += by * made[l];
              } else {
#pragma omp simd
                for (int64_t l = 0; l < here; ++l) at[l] = by * made[l];
              }
            }
          }
        }
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("fused_linear_kd_logits_", TORCH_BOX(&fused_linear_kd_logits_));
  m.impl("fused_linear_kd_grad_hidden_", TORCH_BOX(&fused_linear_kd_grad_hidden_));
  m.impl("fused_linear_kd_grad_weight_", TORCH_BOX(&fused_linear_kd_grad_weight_));
}

}  // namespace amtml
