// Two floats in place of a double, for GPUs on which float64 is slow.
#pragma once

#include "common.cuh"

namespace amtml::gpu {

// high is the sum rounded to float, low what that cuts off: about 48 bits. Sums are exact to a few units of the last of
// them, counted from the larger operand. Every step is an addition: there is nothing that could be contracted.
struct FloatPair {
  float high, low;

  FloatPair() = default;
  __host__ __device__ __forceinline__ explicit FloatPair(float x) : high(x), low(0) {}
  __host__ __device__ __forceinline__ explicit FloatPair(double x)
      : high(static_cast<float>(x)), low(static_cast<float>(x - static_cast<double>(high))) {}
  __host__ __device__ __forceinline__ FloatPair(float high_, float low_) : high(high_), low(low_) {}

  __host__ __device__ __forceinline__ explicit operator float() const { return high; }
  __host__ __device__ __forceinline__ explicit operator double() const {
    return static_cast<double>(high) + static_cast<double>(low);
  }

  __device__ __forceinline__ FloatPair operator-() const { return {-high, -low}; }
  __device__ __forceinline__ FloatPair operator+(FloatPair b) const {
    const float sum = __fadd_rn(high, b.high), part = __fadd_rn(sum, -high);
    const float rest = __fadd_rn(__fadd_rn(high, -__fadd_rn(sum, -part)), __fadd_rn(b.high, -part));
    const float lower = __fadd_rn(rest, __fadd_rn(low, b.low)), total = __fadd_rn(sum, lower);
    return {total, __fadd_rn(lower, -__fadd_rn(total, -sum))};
  }
  __device__ __forceinline__ FloatPair operator-(FloatPair b) const { return *this + -b; }
  __device__ __forceinline__ FloatPair& operator+=(FloatPair b) { return *this = *this + b; }
};

// The value of the lane whose number differs in the bits of `by`.
template <class T>
__device__ __forceinline__ T from_lane(T value, int by) {
  return __shfl_xor_sync(0xffffffffu, value, by);
}
__device__ __forceinline__ FloatPair from_lane(FloatPair value, int by) {
  return {from_lane(value.high, by), from_lane(value.low, by)};
}

}  // namespace amtml::gpu
