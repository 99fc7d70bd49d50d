// The student's rows of a distillation that compares the classes which teachers name, and one class for all others, a
// row a block; csrc/cpu/topk_bucket.cpp has the formulas.
//
// Forward: which classes are named stands in shared memory, a bit each, so that one sweep leaves them out of the
// online maximum and sums; the statistics need another one. Backward: a sweep as if nobody named a class, then those
// that are named, behind a barrier. One kernel each for all dtypes, of which a branch unpacks 16 bytes: the sweeps are
// few instructions a class, and a kernel for each would take 0.4 MB.
//
// Traffic: a row in, once each way, one out in backward, 16 bytes an entry.
#include "../arithmetic.h"
#include "kd_rows.cuh"
#include "topk_named.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "topk_kd_loss";
constexpr int kMaxThreads = 256;
constexpr int64_t kSpan = int64_t{1} << 17;  // classes whose bits are in shared memory at a time

struct Problem : KDProblem {
  const int64_t* indices;  // [N, entries]
  int64_t entries;
  int bytes, per_pack;  // of a logit, and how many are 16 bytes
  float per_tau;
  double per_class;
  bool packs;  // whether rows can be read 16 bytes at a time
  bool second, total;

  __device__ int64_t index(int64_t i, int64_t j) const { return indices[i * entries + j]; }
  __device__ bool known(int64_t c) const { return c >= 0 && c < classes; }
  __device__ float logit(int64_t i, int64_t c) const {
    float x[1];
    load_row<1, AnyType>(student, i, c, x);
    return x[0];
  }
};

struct Scratch {
  double sums[3][kMaxThreads / kWarp];
  float most[kMaxThreads / kWarp];
  int64_t at[kMaxThreads / kWarp];
  float max, log_sum;
  uint32_t bits[1];  // [words], to the end
};

using Words = Packed<float>;  // 16 bytes of any dtype

// Those of row i from class c on; past the end of the row -inf.
template <bool kLast>
__device__ __forceinline__ Words read_words(const Problem& pr, int64_t i, int64_t c) {
  const char* const from = static_cast<const char*>(pr.student.data) + (i * pr.student.stride + c) * pr.bytes;
  if (pr.packs) return read<kLast>(reinterpret_cast<const Words*>(from));
  uint64_t low = 0, high = 0;
  const int bits = 8 * pr.bytes;
#pragma unroll 1
  for (int k = pr.per_pack - 1; k >= 0; --k) {
    uint64_t x = pr.bytes == 4 ? 0xff800000u : pr.student.dtype == ScalarType::Half ? 0xfc00u : 0xff80u;
    if (c + k < pr.classes) {
      x = pr.bytes == 4 ? reinterpret_cast<const uint32_t*>(from)[k] : reinterpret_cast<const uint16_t*>(from)[k];
    }
    high = high << bits | low >> (64 - bits);
    low = low << bits | x;
  }
  return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
          static_cast<uint32_t>(high >> 32)};
}

// Writes them, or as many numbers as there are.
__device__ __forceinline__ void write_words(const Problem& pr, void* to, const Words& made, int64_t there) {
  if (pr.packs) return write_through(static_cast<Words*>(to), made);
  uint64_t low = static_cast<uint64_t>(made.words[1]) << 32 | made.words[0];
  uint64_t high = static_cast<uint64_t>(made.words[3]) << 32 | made.words[2];
  const int bits = 8 * pr.bytes;
#pragma unroll 1
  for (int k = 0; k < least(there, pr.per_pack); ++k) {
    if (pr.bytes == 4) {
      static_cast<uint32_t*>(to)[k] = static_cast<uint32_t>(low);
    } else {
      static_cast<uint16_t*>(to)[k] = static_cast<uint16_t>(low);
    }
    low = low >> bits | high << (64 - bits);
    high >>= bits;
  }
}

// Calls use(x) for the four numbers that they are, or for twice four.
template <class Use>
__device__ __forceinline__ void unpack(const Problem& pr, Words words, const Use& use) {
#pragma unroll 1
  for (int left = pr.per_pack; left > 0; left -= 4) {
    float x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t word = words.words[k / 2];
      const uint16_t narrow = static_cast<uint16_t>(k % 2 ? word >> 16 : word);
      if (pr.bytes == 4) {
        x[k] = words.at(k);
      } else if (pr.student.dtype == ScalarType::Half) {
        Half half;
        std::memcpy(&half, &narrow, 2);
        x[k] = static_cast<float>(half);
      } else {
        const uint32_t bits = static_cast<uint32_t>(narrow) << 16;
        std::memcpy(&x[k], &bits, 4);
      }
    }
    words.words[0] = words.words[2], words.words[1] = words.words[3];
    use(x);
  }
}

// Calls use(x, bits, there, c) for four logits at a time of row i, as they are, a bit for each that is named, how many
// there are, and the first one's class.
template <class Use>
__device__ __forceinline__ void sweep(const Problem& pr, int64_t i, Scratch& s, const Use& use) {
  constexpr int kLoads = 2;  // under way at a time; what follows stands in the kernel once
  const int64_t step = blockDim.x * pr.per_pack;
  for (int64_t start = 0; start < pr.classes; start += kSpan) {
    const int64_t count = least(kSpan, pr.classes - start);
    __syncthreads();
#pragma unroll 1
    for (int64_t m = threadIdx.x; m < (count + 31) / 32; m += blockDim.x) s.bits[m] = 0;
    __syncthreads();
#pragma unroll 1
    for (int64_t j = threadIdx.x; j < pr.entries; j += blockDim.x) {
      const int64_t c = pr.index(i, j) - start;
      if (c >= 0 && c < count) atomicOr(&s.bits[static_cast<uint32_t>(c) / 32], 1u << (static_cast<uint32_t>(c) % 32));
    }
    __syncthreads();
    for (int64_t first = threadIdx.x * pr.per_pack; first < count; first += kLoads * step) {
      Words words[kLoads];
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int64_t c = first + u * step;
        words[u] = read_words<false>(pr, i, start + (c < count ? c : first));
      }
#pragma unroll 1
      for (int64_t c = first; c < least(first + kLoads * step, count); c += step) {
        uint32_t bits = s.bits[static_cast<uint32_t>(c) / 32] >> (static_cast<uint32_t>(c) % 32);
        int there = static_cast<int>(least(count - c, pr.per_pack));
        int64_t at = start + c;
        unpack(pr, words[0], [&](float (&x)[4]) {
          use(x, bits, there, at);
          bits >>= 4, there -= 4, at += 4;
        });
        words[0] = words[1];
      }
    }
  }
}

// The largest logit, and its class: of several the first. NaN is larger than all others; at < 0: none yet.
struct Largest {
  float most = 0;
  int64_t at = -1;

  __device__ __forceinline__ void take(float x, int64_t c) {
    const bool more = x > most || (x != x && most == most), same = x == most || (x != x && most != most);
    if (at < 0 || more || (same && c < at)) most = x, at = c;
  }
  __device__ void take(const Largest& other) {
    if (other.at >= 0) take(other.most, other.at);
  }
};

// Of the block, in thread 0.
__device__ inline int64_t largest_of_block(Largest mine, Scratch& s) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) {
    Largest other;
    other.most = __shfl_xor_sync(~0u, mine.most, by), other.at = __shfl_xor_sync(~0u, mine.at, by);
    mine.take(other);
  }
  if (threadIdx.x % kWarp == 0) s.most[threadIdx.x / kWarp] = mine.most, s.at[threadIdx.x / kWarp] = mine.at;
  __syncthreads();
#pragma unroll 1
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) {
    Largest other;
    other.most = s.most[w], other.at = s.at[w];
    mine.take(other);
  }
  return mine.at;
}

template <bool kStatistics>
__global__ void __launch_bounds__(kMaxThreads)
    forward_kernel(const __grid_constant__ Problem pr, double* all_found, double* all_named) {
  Scratch& s = shared<Scratch>();
  const int64_t i = blockIdx.x;
  double* const found = all_found + i * kFound;
  double* const named = all_named + i * pr.entries;
  const bool ignored = pr.ignored(i);
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < pr.entries; j += blockDim.x) {
    const int64_t c = ignored ? kNobody : pr.index(i, j);
    AMTML_DEVICE_CHECK(c == kNobody || pr.known(c), "topk_kd_loss: teacher_indices must be in [0, C)");
    named[j] = ignored ? 0.0f : c == kNobody ? -INFINITY : pr.known(c) ? pr.logit(i, c) : NAN;
  }
  if (ignored) {
    if (threadIdx.x < kFound) found[threadIdx.x] = 0;
    return;
  }

  const unsigned warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll 1
  for (int pass = 0; pass < (kStatistics ? 2 : 1); ++pass) {  // the second one for the statistics
    Online o{-INFINITY, 0, 0};
    double total = 0, entropy = 0;
    Largest largest;
    const float max = pass == 0 ? 0.0f : s.max, log_sum = pass == 0 ? 0.0f : s.log_sum;
    sweep(pr, i, s, [&](float (&x)[4], uint32_t bits, int there, int64_t c) {
      if (!kStatistics || pass == 0) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          if (pr.total && k < there) total += x[k];
          if (bits >> k & 1) x[k] = -INFINITY;
        }
        pr.second ? take<true>(o, x, pr.unit) : take<false>(o, x, pr.unit);
        return;
      }
      float terms = 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k < there) largest.take(x[k], c + k);
        if (k >= there || bits >> k & 1) continue;
        total += x[k];
        const float log_r = (x[k] - max) * pr.per_tau - log_sum;
        const float r = power_of_2(log_r * kLog2e);
        terms += r == 0 ? 0.0f : r * log_r;  // log_r is -inf for a finite mask, too
      }
      entropy += terms;
    });
    const float mine = warp_max(o.max);
    if (threadIdx.x % kWarp == 0) s.most[warp] = mine;
    __syncthreads();
    float top = -INFINITY;
#pragma unroll 1
    for (unsigned w = 0; w < warps; ++w) top = fmaxf(top, s.most[w]);
    const double sum = warp_sum(pass == 0 ? static_cast<double>(rescaled(o.sum, o.max, top, pr.unit)) : entropy);
    const double sum1 = warp_sum(static_cast<double>(rescaled(o.sum1, o.max, top, kLog2e)));
    total = warp_sum(total);
    if (threadIdx.x % kWarp == 0) s.sums[0][warp] = sum, s.sums[1][warp] = sum1, s.sums[2][warp] = total;
    __syncthreads();
    if (threadIdx.x < 3) {  // one for each of the sums
      double all = 0;
#pragma unroll 1
      for (unsigned w = 0; w < warps; ++w) all += s.sums[threadIdx.x][w];
      const bool log_of = pass == 0 && (threadIdx.x == 0 || (threadIdx.x == 1 && pr.second));
      if (log_of) all = log(all);
      if (pass == 0) {
        found[threadIdx.x < 2 ? 1 + threadIdx.x : 4] = all;
        if (threadIdx.x == 0) s.log_sum = static_cast<float>(all);
      } else if (threadIdx.x != 1) {
        found[threadIdx.x == 0 ? 5 : 6] = all;
      }
    }
    if (pass == 0 && threadIdx.x == 0) {
      AMTML_DEVICE_CHECK(!pr.labels || pr.has_label(i), "topk_kd_loss: labels must be in [0, C) or ignore_index");
      s.max = top == -INFINITY ? 0.0f : top;
      found[0] = s.max;
      found[3] = !pr.labels ? 0.0f : pr.has_label(i) ? pr.logit(i, pr.labels[i]) : NAN;
      if (!kStatistics) found[5] = found[6] = found[7] = 0;
    }
    __syncthreads();
    if (kStatistics && pass == 1) {
      const int64_t at = largest_of_block(largest, s);
      if (threadIdx.x == 0) found[7] = static_cast<double>(at);
    }
  }
}

// A gradient where nobody names the class: of one row, in every thread.
struct Outside {
  float max, a, b, d, unit;
  bool second;

  __device__ __forceinline__ float operator()(float z) const {
    float g = fmaf(a, exp2f((z - max) * unit), d);
    if (second) g = fmaf(b, exp2f((z - max) * kLog2e), g);
    return z == -INFINITY ? 0.0f : g;
  }
};

__device__ __forceinline__ void write_number(const Problem& pr, void* grads, int64_t at, float g) {
  if (pr.bytes == 4) {
    static_cast<float*>(grads)[at] = g;
  } else if (pr.student.dtype == ScalarType::Half) {
    static_cast<Half*>(grads)[at] = static_cast<Half>(g);
  } else {
    static_cast<BFloat16*>(grads)[at] = static_cast<BFloat16>(g);
  }
}

// Two 16-bit numbers.
__device__ __forceinline__ uint32_t both(const Problem& pr, float x, float y) {
  uint16_t bits[2];
  if (pr.student.dtype == ScalarType::Half) {
    const Half narrow[2] = {static_cast<Half>(x), static_cast<Half>(y)};
    std::memcpy(bits, narrow, 4);
  } else {
    const BFloat16 narrow[2] = {static_cast<BFloat16>(x), static_cast<BFloat16>(y)};
    std::memcpy(bits, narrow, 4);
  }
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

// of_sums [N, 4]: what comes back to the log-sums at tau and at 1, the label's logit and the mean; of_named: to the
// logits.
__global__ void __launch_bounds__(kMaxThreads)
    backward_kernel(const __grid_constant__ Problem pr, const double* of_sums, const double* of_named,
                    const double* found, void* grads) {
  const int64_t i = blockIdx.x, row = i * pr.classes;
  const bool ignored = pr.ignored(i);
  of_sums += i * 4, found += i * kFound, of_named += i * pr.entries;
  Outside outside{0, 0, 0, 0, pr.unit, !ignored && pr.second};
  if (!ignored) {
    outside.max = static_cast<float>(found[0]);
    outside.d = static_cast<float>(of_sums[3] * pr.per_class);
#pragma unroll 1
    for (int k = 0; k < 1 + pr.second; ++k) {  // without a class there is nothing to multiply, whatever comes back
      const double g = k == 0 ? of_sums[0] * pr.per_tau : of_sums[1], log_sum = found[1 + k];
      const float by = g == 0 || log_sum == -INFINITY ? 0.0f : static_cast<float>(g * exp(-log_sum));
      (k == 0 ? outside.a : outside.b) = by;
    }
  }
  const int per = pr.per_pack;
  for (int64_t c = threadIdx.x * per; c < pr.classes; c += blockDim.x * per) {
    Words made;
    unpack(pr, ignored ? Words{} : read_words<true>(pr, i, c), [&](float (&x)[4]) {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = ignored ? 0.0f : outside(x[k]);
      if (pr.bytes == 4) {
#pragma unroll
        for (int k = 0; k < 4; ++k) made.set(k, x[k]);
      } else {
        made.words[0] = made.words[2], made.words[1] = made.words[3];
#pragma unroll
        for (int k = 0; k < 2; ++k) made.words[2 + k] = both(pr, x[2 * k], x[2 * k + 1]);
      }
    });
    write_words(pr, static_cast<char*>(grads) + (row + c) * pr.bytes, made, pr.classes - c);
  }
  if (ignored) return;
  __syncthreads();
  const int64_t label = pr.has_label(i) ? pr.labels[i] : -1;
  const double at_label = pr.labels ? of_sums[2] : 0;
  if (threadIdx.x == 0 && label >= 0 && at_label != 0) {
    const float z = pr.logit(i, label);
    write_number(pr, grads, row + label, z == -INFINITY ? 0.0f : outside(z) + static_cast<float>(at_label));
  }
  __syncthreads();
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < pr.entries; j += blockDim.x) {
    const int64_t c = pr.index(i, j);
    if (!pr.known(c)) continue;
    const float g = static_cast<float>(of_named[j] + (c == label ? at_label : 0)) + outside.d;
    write_number(pr, grads, row + c, pr.logit(i, c) == -INFINITY ? 0.0f : g);
  }
}

// Of row blockIdx.x and bound blockIdx.y the last of the first `equal` classes that have it: every thread counts in a
// part of the row of its own.
__global__ void __launch_bounds__(kMaxThreads)
    last_kernel(Rows student, int64_t classes, Values bounds, const int64_t* equal, int64_t* last) {
  int* const counts = &shared<int>();
  const int64_t place = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y, wanted = equal[place];
  const float bound = bounds[place];
  const int64_t size = (classes + kMaxThreads - 1) / kMaxThreads, begin = least(threadIdx.x * size, classes);
  const int64_t end = least(begin + size, classes);
  int64_t before = 0, first = begin;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {  // in the first all are counted, in the second up to the one that is wanted
    int mine = 0;
#pragma unroll 1
    for (; first < end && (pass == 0 || before + mine < wanted); ++first) {
      float x[1];
      load_row<1, AnyType>(student, blockIdx.x, first, x);
      mine += x[0] == bound;
    }
    if (pass == 1) {
      last[place] = first - 1;
      return;
    }
    counts[threadIdx.x] = mine;
    __syncthreads();
    int64_t all = 0;
#pragma unroll 1
    for (unsigned k = 0; k < blockDim.x; ++k) {
      if (k == threadIdx.x) before = all;
      all += counts[k];
    }
    if (threadIdx.x == 0 && all < wanted) last[place] = classes - 1;
    if (before >= wanted || before + mine < wanted) return;
    first = begin;
  }
}

// --- the host's side

struct Inputs {
  Tensor student, indices;
  KDTensors own;
  Problem pr{};
  unsigned threads = kWarp;

  Inputs(const Tensor& student_, const Tensor& indices_, const std::optional<Tensor>& labels, double temperature,
         int64_t ignore_index, bool second, bool total, const OnDevice& on)
      : student(dense_rows(student_)), indices(dense(indices_)) {
    own.fill(pr, kOp, student, 1, std::nullopt, labels, {temperature, 1, 1, 1, "", "sum", ignore_index, 0}, on);
    STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == pr.rows, kOp, ": indices must be [N, K]");
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, kOp, ": indices must be int64");
    pr.indices = static_cast<const int64_t*>(indices.const_data_ptr());
    pr.entries = indices.size(1);
    pr.second = second, pr.total = total;
    dispatch_gpu(student.scalar_type(), kOp, [](auto) {});  // takes no others
    pr.bytes = static_cast<int>(student.element_size());
    pr.per_pack = 16 / pr.bytes;
    pr.per_tau = static_cast<float>(1 / temperature), pr.per_class = 1 / static_cast<double>(pr.classes);
    pr.packs = fits_packs(student, pr.per_pack);
    while (threads * pr.per_pack < pr.classes && threads < kMaxThreads) threads *= 2;
  }
};

std::tuple<Tensor, Tensor> topk_bucket_fwd(const Tensor& student, const Tensor& indices, std::optional<Tensor>,
                                           std::optional<Tensor> labels, double temperature, int64_t ignore_index,
                                           bool need_second, bool need_total, bool, bool need_statistics) {
  const OnDevice on(student);
  const Inputs in(student, indices, labels, temperature, ignore_index, need_second, need_total, on);
  const Problem& pr = in.pr;
  const Tensor found = empty(student, {pr.rows, kFound}, ScalarType::Double);
  const Tensor named = empty(student, {pr.rows, pr.entries}, ScalarType::Double);
  const size_t bytes = sizeof(Scratch) + (std::min(kSpan, pr.classes) + 31) / 32 * sizeof(uint32_t);
  launch(need_statistics ? forward_kernel<true> : forward_kernel<false>, {blocks(pr.rows), in.threads, 1, bytes}, on,
         pr, doubles(found), doubles(named));
  return {found, named};
}

Tensor topk_bucket_bwd(const Tensor& grad_sums, const Tensor& grad_z, const Tensor& student, const Tensor& indices,
                       std::optional<Tensor> labels, const Tensor& found, double temperature, int64_t ignore_index,
                       bool need_second, bool need_total, bool) {
  const OnDevice on(student);
  const Inputs in(student, indices, labels, temperature, ignore_index, need_second, need_total, on);
  const Problem& pr = in.pr;
  check_shape(kOp, "grad_sums", grad_sums, {pr.rows, 4});
  check_shape(kOp, "grad_z", grad_z, {pr.rows, pr.entries});
  check_shape(kOp, "found", found, {pr.rows, kFound});
  const Tensor sums = dense(grad_sums, ScalarType::Double), named = dense(grad_z, ScalarType::Double);
  const Tensor made = dense(found), grad = empty(student, {pr.rows, pr.classes}, student.scalar_type());
  launch(backward_kernel, {blocks(pr.rows), in.threads}, on, pr, doubles(sums), doubles(named), doubles(made),
         grad.mutable_data_ptr());
  return grad;
}

Tensor topk_bucket_last(const Tensor& student_, const Tensor& bounds, const Tensor& equal) {
  const OnDevice on(student_);
  const Tensor student = dense_rows(student_), of_bounds = dense(bounds), counts = dense(equal);
  const int64_t n = student.size(0), teachers = bounds.size(1);
  check_shape(kOp, "bounds", bounds, {n, teachers});
  check_shape(kOp, "equal", equal, {n, teachers});
  const Tensor last = empty(student, {n, teachers}, ScalarType::Long);
  launch(last_kernel, {dim3(blocks(n), static_cast<unsigned>(teachers)), kMaxThreads, 1, kMaxThreads * sizeof(int)}, on,
         Rows(student), student.size(1), Values(of_bounds), static_cast<const int64_t*>(counts.const_data_ptr()),
         static_cast<int64_t*>(last.mutable_data_ptr()));
  return last;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("topk_bucket_fwd", TORCH_BOX(&topk_bucket_fwd));
  m.impl("topk_bucket_bwd", TORCH_BOX(&topk_bucket_bwd));
  m.impl("topk_bucket_last", TORCH_BOX(&topk_bucket_last));
}

}  // namespace amtml::gpu
