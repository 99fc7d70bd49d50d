// The entries of a row, of all teachers side by side, sorted by class in shared memory: so what the teachers say of a
// class stands together, and in one order whatever the timing.
#pragma once

#include "common.cuh"

namespace amtml::gpu {

constexpr int64_t kMaxEntries = 8192;  // of a row; amtml_fast/backend.py has this number, too
// A class has 32 bits of a key, and int counts the classes that are -inf.
constexpr int64_t kMaxClasses = (int64_t{1} << 31) - 1;

// Class and column of an entry. After all others stand keys of kNoEntry.
using EntryKey = unsigned long long;
constexpr EntryKey kNoEntry = ~EntryKey{0};

__device__ __forceinline__ EntryKey entry_key(int64_t c, int entry) {
  return static_cast<EntryKey>(c) << 32 | static_cast<unsigned>(entry);
}
__device__ __forceinline__ int64_t class_of(EntryKey key) { return static_cast<int64_t>(key >> 32); }
__device__ __forceinline__ int entry_of(EntryKey key) { return static_cast<int>(key & 0xffffffffu); }

// Bitonic; count is a power of 2.
__device__ inline void sort_entries(EntryKey* keys, int count) {
  for (int size = 2; size <= count; size *= 2) {
    for (int by = size / 2; by > 0; by /= 2) {
      __syncthreads();
      for (int m = threadIdx.x; m < count; m += blockDim.x) {
        const int other = m ^ by;
        if (other < m) continue;  // the other one's thread does both
        const EntryKey a = keys[m], b = keys[other];
        if ((a > b) == ((m & size) == 0)) keys[m] = b, keys[other] = a;
      }
    }
  }
  __syncthreads();
}

// Whether a class begins at place m of the sorted entries.
__device__ __forceinline__ bool begins(const EntryKey* keys, int m) {
  return m == 0 || class_of(keys[m]) != class_of(keys[m - 1]);
}

// --- the host's side

inline void check_classes(const char* op, int64_t classes) {
  STD_TORCH_CHECK(classes <= kMaxClasses, op, ": the CUDA kernels take at most ", kMaxClasses, " classes, got ",
                  classes);
}

// Where each teacher's entries begin; the last number is how many there are.
struct EntryStarts {
  int of[kMaxTeachers + 1];

  EntryStarts() = default;
  EntryStarts(const char* op, const std::vector<int64_t>& sizes) {
    const int64_t teachers = static_cast<int64_t>(sizes.size());
    STD_TORCH_CHECK(teachers >= 1 && teachers <= kMaxTeachers, op, ": the CUDA kernels take 1 to ", kMaxTeachers,
                    " teachers, got ", teachers);
    int64_t entries = 0;
    for (int64_t t = 0; t < teachers; ++t) {
      of[t] = static_cast<int>(entries);
      entries += sizes[t];
      STD_TORCH_CHECK(sizes[t] >= 1 && entries <= kMaxEntries, op, ": the CUDA kernels take 1 to ", kMaxEntries,
                      " classes a row from all teachers together, got sizes that add up to ", entries);
    }
    of[teachers] = static_cast<int>(entries);
  }
};

inline int sorted_count(int entries) {  // the power of 2 from `entries` on
  int count = 1;
  while (count < entries) count *= 2;
  return count;
}

}  // namespace amtml::gpu
