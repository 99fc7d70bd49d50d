// Sums over the rows of a distillation: by one block, or, of many rows, by kParts blocks whose sums the next kernel
// adds up.
#pragma once

#include "common.cuh"

namespace amtml::gpu {

#ifdef AMTML_EMULATED_CUDA  // so that few rows take the ways of many, too
constexpr int64_t kCountInline = 128, kSumAlone = 128;
constexpr int kSumThreads = 32;
#else
constexpr int64_t kCountInline = 1024;  // up to so many labels each block counts them for itself
constexpr int64_t kSumAlone = 8192;     // up to so many rows one block adds up
constexpr int kSumThreads = 1024;
#endif
constexpr int kParts = kWarp;  // of a count or a sum of more, each by a block of its own

struct RowSums {
  double ce, kl, count;  // of cross-entropies, of KLs, and of rows that are not ignored
};

struct SummedRows {
  const double *ce, *kl;  // [N]
  int64_t count;          // N
  const int64_t* labels;  // or null
  int64_t ignore_index;
  const RowSums* parts;  // [kParts], or null
};

// Of a pass over numbers, of which every block of the grid has a part.
__device__ inline int64_t first_of_grid() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ inline int64_t step_of_grid() { return int64_t{gridDim.x} * blockDim.x; }

__device__ inline RowSums block_sums(RowSums mine, double* scratch) {
  for (double* sum : {&mine.ce, &mine.kl, &mine.count}) {
    *sum = block_sum(*sum, scratch);
    __syncthreads();
  }
  return mine;
}

// The sums of rows first, first + step and so on of this thread, and of the like of its block.
__device__ inline RowSums sum_rows(const SummedRows& rows, int64_t first, int64_t step, double* scratch) {
  RowSums mine{};
#pragma unroll 4
  for (int64_t i = first; i < rows.count; i += step) {
    mine.ce += rows.ce[i];
    mine.kl += rows.kl[i];
    mine.count += !(rows.labels && rows.labels[i] == rows.ignore_index);
  }
  return block_sums(mine, scratch);
}

// All of them, for a block that does it alone, whichever block of its grid it is.
__device__ inline RowSums all_sums(const SummedRows& rows, double* scratch) {
  if (!rows.parts) return sum_rows(rows, threadIdx.x, blockDim.x, scratch);
  return block_sums(threadIdx.x < kParts ? rows.parts[threadIdx.x] : RowSums{}, scratch);
}

// Makes the parts: for more than kSumAlone rows.
void sum_parts(const SummedRows& rows, RowSums* parts, const OnDevice& on);

}  // namespace amtml::gpu
