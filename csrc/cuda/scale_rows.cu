// Gradients that forward has made for an incoming gradient of 1, times that gradient: rows of float32, in place.
#include "common.cuh"

namespace amtml::gpu {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kMostBlocks = 2048;  // along a row, and of rows: a launch that has nothing to do is short

// `by` holds one factor a row, or one for all. A factor of 1, what `loss.backward()` sends, moves nothing.
__global__ void scale_kernel(float* rows, int64_t count, int64_t length, const float* by, bool each_row) {
  for (int64_t i = blockIdx.y; i < count; i += gridDim.y) {
    const float factor = by[each_row ? i : 0];
    if (factor == 1) {
      if (each_row) continue;
      return;
    }
    for (int64_t c = blockIdx.x * kThreads + threadIdx.x; c < length; c += gridDim.x * kThreads) {
      rows[i * length + c] *= factor;
    }
  }
}

void scale_rows_(const Tensor& rows, const Tensor& by) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Float && rows.is_contiguous(),
                  "scale_rows_: rows must be float32 and contiguous");
  const OnDevice on(rows);
  const Tensor factors = dense(by, ScalarType::Float);
  const bool each_row = by.dim() != 0;
  if (each_row) check_shape("scale_rows_", "by", by, {rows.size(0)});
  const int64_t count = each_row ? rows.size(0) : 1, length = count ? rows.numel() / count : 0;
  if (rows.numel() == 0) return;
  const dim3 grid(std::min(blocks_for(length, kThreads), kMostBlocks),
                  static_cast<unsigned>(std::min<int64_t>(count, kMostBlocks)));
  launch(scale_kernel, {grid, kThreads}, on, static_cast<float*>(rows.mutable_data_ptr()), count, length,
         static_cast<const float*>(factors.const_data_ptr()), each_row);
}

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) { m.impl("scale_rows_", TORCH_BOX(&scale_rows_)); }

}  // namespace
}  // namespace amtml::gpu
