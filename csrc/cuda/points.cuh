// What the losses of pairs and triplets are made of: rows as points in space, and which of them take part.
#pragma once

#include "common.cuh"

namespace amtml::gpu {

// [N, C] of any strides.
struct Points {
  const void* data;
  ScalarType dtype;
  int64_t row_stride, column_stride, width;

  explicit Points(const Tensor& t)
      : data(t.const_data_ptr()),
        dtype(t.scalar_type()),
        row_stride(t.stride(0)),
        column_stride(t.stride(1)),
        width(t.size(1)) {}
  Points(const float* dense, int64_t columns)
      : data(dense), dtype(ScalarType::Float), row_stride(columns), column_stride(1), width(columns) {}

  // use(at) where at(row, column) is an element: loads that follow one another then lie between no branches.
  template <class Use>
  __device__ __forceinline__ void read(const Use& use) const {
    if (dtype == ScalarType::Float) return use(reader<float>());
    if (dtype == ScalarType::Half) return use(reader<Half>());
    use(reader<BFloat16>());
  }
  template <class T>
  __device__ __forceinline__ auto reader() const {
    return [this](int64_t row, int64_t column) {
      return static_cast<float>(static_cast<const T*>(data)[row * row_stride + column * column_stride]);
    };
  }
};

// Which of the n rows take part: all, or those whose label is not `skip` (of a mask of bools: 0).
struct TakingPart {
  const void* labels = nullptr;
  int64_t n = 0, stride = 0, skip = 0;
  size_t size = 1;  // of a label

  __device__ __forceinline__ bool operator()(int64_t row) const {
    if (row >= n) return false;
    if (!labels) return true;
    const int64_t at = row * stride;
    if (size == 1) return static_cast<const bool*>(labels)[at] != (skip != 0);
    if (size == 4) return static_cast<const int32_t*>(labels)[at] != skip;
    return static_cast<const int64_t*>(labels)[at] != skip;
  }
};

}  // namespace amtml::gpu
