// What the teachers of a row name, [K] entries of all of them side by side, beside what topk_bucket.cu finds in the
// student's row. A row a block, of which each thread takes some of the entries; sorted by class, the first of a class
// speaks for it. All numbers are double: what an entry costs is small beside the row, and sums may be far below one
// another.
#pragma once

#include "../kd_settings.h"
#include "topk_entries.cuh"

namespace amtml::gpu {

constexpr int kNamedThreads = 256;  // at most, so that the places of a thread have a bit each
static_assert(kMaxEntries / kNamedThreads <= 32);

struct Named {
  EntryStarts start;
  int teachers, sorted;  // sorted: K, or the power of 2 above it
  int64_t classes;
  const int64_t* indices;        // [N, K]
  const float* log_probs;        // [N, K]
  const double *found, *logits;  // [N, kFound], [N, K]

  __device__ int entries() const { return start.of[teachers]; }
};

struct NamedScratch {
  double sums[kWarp];
  EntryKey keys[1];  // [sorted], to the end
};

// top + log: a difference to it keeps the digits that large logits would take.
struct LogSum {
  double top, log;
  __device__ double above(double other) const { return (top - other) + log; }
  __device__ double of(double x) const { return (x - top) - log; }  // x less this
  __device__ double log_share_in(const LogSum& all) const { return all.of(top) + log; }
};

// 1 less the mass that is named, to the last digits of what is left; no more than all may be named.
__device__ __forceinline__ double unnamed_mass(double log_mass) {
  const double rest = -expm1(log_mass);
  return rest < 0 ? 0 : rest;
}

// Of row i, in every thread.
struct Row {
  const Named& of;
  NamedScratch& s;
  int64_t i;

  __device__ const double* found() const { return of.found + i * kFound; }
  __device__ int64_t first() const { return i * of.entries(); }
  __device__ double logit(int m) const { return of.logits[first() + entry_of(s.keys[m])]; }
  __device__ double log_prob(int entry) const { return of.log_probs[first() + entry]; }
  __device__ double given(int entry) const { return exp(log_prob(entry)); }

  __device__ void load_keys() const {
#pragma unroll 1
    for (int m = threadIdx.x; m < of.sorted; m += blockDim.x) {
      const bool there = m < of.entries() && of.indices[first() + m] != kNobody;
      s.keys[m] = there ? entry_key(of.indices[first() + m], m) : kNoEntry;
    }
    sort_entries(s.keys, of.sorted);
  }

  // Calls use(m) for this thread's places that speak for a class.
  template <class Use>
  __device__ __forceinline__ void each_head(const Use& use) const {
#pragma unroll 1
    for (int m = threadIdx.x; m < of.entries() && s.keys[m] != kNoEntry; m += blockDim.x) {
      if (begins(s.keys, m)) use(m);
    }
  }

  // Calls use(entry) for those of teacher t that have the class at m.
  template <class Use>
  __device__ __forceinline__ void each_of(int t, int m, const Use& use) const {
    const int64_t c = class_of(s.keys[m]);
#pragma unroll 1
    for (; m < of.entries() && class_of(s.keys[m]) == c && entry_of(s.keys[m]) < of.start.of[t + 1]; ++m) {
      if (entry_of(s.keys[m]) >= of.start.of[t]) use(entry_of(s.keys[m]));
    }
  }
  // Whether teacher t names the class at m, and what it gives it.
  __device__ bool names(int t, int m) const {
    bool named = false;
    each_of(t, m, [&](int) { named = true; });
    return named;
  }
  __device__ bool names(int t, int m, double* p) const {
    bool named = false;
    *p = 0;
    each_of(t, m, [&](int entry) { named = true, *p += given(entry); });
    return named;
  }

  // Of the block.
  __device__ double sum(double x) const {
    x = block_sum(x, s.sums);
    __syncthreads();
    return x;
  }
  __device__ double max(double x) const {  // NaN is left out
#pragma unroll
    for (int by = kWarp / 2; by > 0; by /= 2) x = fmax(x, __shfl_xor_sync(~0u, x, by));
    if (threadIdx.x % kWarp == 0) s.sums[threadIdx.x / kWarp] = x;
    __syncthreads();
#pragma unroll 1
    for (unsigned w = 0; w < blockDim.x / kWarp; ++w) x = fmax(x, s.sums[w]);
    __syncthreads();
    return x;
  }

  // The logarithm of all that teacher t gives.
  __device__ double log_mass(int t) const {
    double top = -INFINITY, terms = 0;
#pragma unroll 1
    for (int m = of.start.of[t] + threadIdx.x; m < of.start.of[t + 1]; m += blockDim.x) top = fmax(top, log_prob(m));
    top = max(top);
    const double shift = fabs(top) == INFINITY ? 0 : top;
#pragma unroll 1
    for (int m = of.start.of[t] + threadIdx.x; m < of.start.of[t + 1]; m += blockDim.x)
      terms += exp(log_prob(m) - shift);
    return shift + log(sum(terms));
  }

  // Over the classes that nobody names, and over all, whose x are logits over tau.
  __device__ LogSum outside(double log, double tau) const {
    return log == -INFINITY ? LogSum{-INFINITY, 0} : LogSum{found()[0] / tau, log};
  }
  __device__ LogSum all(const LogSum& outside, double tau) const {
    double top = outside.top, terms = 0;
    each_head([&](int m) { top = fmax(top, logit(m) / tau); });
    top = max(top);
    each_head([&](int m) { terms += exp(logit(m) / tau - top); });
    return {top, log(exp(outside.above(top)) + sum(terms))};
  }
};

// --- the host's side

// Copies of what the kernels do not read in place.
struct NamedTensors {
  Tensor found, logits, indices, log_probs;
  Named of{};

  NamedTensors(const char* op, const Tensor& found_, const Tensor& logits_, const Tensor& indices_,
               const Tensor& log_probs_, const std::vector<int64_t>& sizes, int64_t classes)
      : found(dense(found_)), logits(dense(logits_)), indices(dense(indices_)), log_probs(dense(log_probs_)) {
    check_classes(op, classes);
    of.start = EntryStarts(op, sizes);
    of.teachers = static_cast<int>(sizes.size()), of.classes = classes;
    const int64_t n = found.size(0), entries = of.start.of[of.teachers];
    check_shape(op, "found", found, {n, kFound});
    check_shape(op, "z", logits, {n, entries});
    check_shape(op, "indices", indices, {n, entries});
    check_shape(op, "log_probs", log_probs, {n, entries});
    STD_TORCH_CHECK(found.scalar_type() == ScalarType::Double && logits.scalar_type() == ScalarType::Double, op,
                    ": found and z must be float64");
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, op, ": indices must be int64");
    STD_TORCH_CHECK(log_probs.scalar_type() == ScalarType::Float, op, ": log_probs must be float32");
    of.sorted = sorted_count(static_cast<int>(entries));
    of.indices = static_cast<const int64_t*>(indices.const_data_ptr());
    of.log_probs = static_cast<const float*>(log_probs.const_data_ptr());
    of.found = static_cast<const double*>(found.const_data_ptr());
    of.logits = static_cast<const double*>(logits.const_data_ptr());
  }

  // extra: bytes of shared memory behind the keys.
  Spread spread(size_t extra = 0) const {
    unsigned threads = kWarp;
    while (threads < static_cast<unsigned>(of.start.of[of.teachers]) && threads < kNamedThreads) threads *= 2;
    const size_t bytes = sizeof(NamedScratch) + of.sorted * sizeof(EntryKey) + extra;
    return {blocks(found.size(0)), threads, 1, bytes};
  }
};

inline double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

}  // namespace amtml::gpu
