// Distillation from teachers that give their largest classes only: cross-entropy, KL and their gradients, a row a
// block.
//
//   q = softmax(z / tau), p = sum_t w_t p_t; csrc/cpu/topk_kd.cpp has the formulas.
//
// student [N, C] in place; indices and log_probs [N, K], of all teachers side by side. The K entries of a row are
// sorted by class in shared memory, so that what the teachers say of a class stands together, and in one order whatever
// the timing. Then two sweeps over the student: maximum and sums online, and the gradient as if p were one number b
// everywhere, which it is but for the classes that are named (0 unless the tail is "uniform"). Those are set right
// last.
//
// Traffic: a row in (twice, the second time from cache), one out where the gradient is made, 12 K bytes of entries.
#include "../arithmetic.h"
#include "kd_rows.cuh"
#include "topk_entries.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "topk_kd_loss";
constexpr int kMaxThreads = 256, kMaxWarps = kMaxThreads / kWarp;

struct Problem : KDProblem {
  EntryStarts start;
  int sorted;              // K, or the power of 2 above it
  const int64_t* indices;  // [N, K]
  const float* log_probs;  // [N, K]
  bool renormalize, uniform;

  __device__ int entries() const { return start.of[teachers]; }
  __device__ bool has_ce() const { return labels && ce_weight != 0; }
};

struct Scratch {
  Online part[kMaxWarps];
  float max, inverse, inverse1, log_sum, log_sum1;
  double rest;                                       // what rounding log_sum to float32 cuts off
  float weight[kMaxTeachers], spread[kMaxTeachers];  // w_t, and p_t of every class that teacher t does not name
  double mass[kMaxTeachers];                         // sum_c p_t
  bool dead[kMaxTeachers];                           // without weight, and NaN: left out
  float outside, total;                              // the mixture where nobody names a class, and its mass
  int64_t others;                                    // how many such classes
  double sums[kWarp];
  EntryKey keys[1];  // [sorted], to the end; then prob [K] and partial [T, threads]

  __device__ float* prob(const Problem& pr) { return reinterpret_cast<float*>(keys + pr.sorted); }
  __device__ float* partial(const Problem& pr) { return prob(pr) + pr.entries(); }
};

template <class Packs, class S>
__device__ __forceinline__ const Packs* row_of(const Rows& rows, int64_t i) {
  return reinterpret_cast<const Packs*>(static_cast<const S*>(rows.data) + i * rows.stride);
}

// The first sweep.
template <class S, class Packs>
__device__ void make_stats(const Problem& pr, int64_t i, Scratch& s, float* stats) {
  const Packs* const row = row_of<Packs, S>(pr.student, i);
  const int64_t count = pr.classes / Packs::kCount;
  Online o{-INFINITY, 0, 0};
  if (pr.has_ce()) {
    each_pack<false, 4>(row, count, [&](const Packs& pack, int64_t) { take<true>(o, pack, pr.unit); });
  } else {
    each_pack<false, 4>(row, count, [&](const Packs& pack, int64_t) { take<false>(o, pack, pr.unit); });
  }
  o = warp_combined(o, pr.unit);
  if (threadIdx.x % kWarp == 0) s.part[threadIdx.x / kWarp] = o;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (unsigned w = 1; w < blockDim.x / kWarp; ++w) o = combined(o, s.part[w], pr.unit);
    if (o.max == -INFINITY) o.sum = o.sum1 = NAN;  // no class has a probability
    s.log_sum1 = static_cast<float>(log(static_cast<double>(o.sum1)));
    stats[i * 3] = o.max;
    stats[i * 3 + 1] = 1 / o.sum;
    stats[i * 3 + 2] = 1 / (pr.has_ce() ? o.sum1 : 1.0f);
  }
}

// In thread 0.
__device__ inline void read_stats(int64_t i, Scratch& s, const float* stats) {
  s.max = stats[i * 3], s.inverse = stats[i * 3 + 1], s.inverse1 = stats[i * 3 + 2];
  const double log_sum = -log(static_cast<double>(s.inverse));
  s.log_sum = static_cast<float>(log_sum);
  s.rest = log_sum - s.log_sum;
}

// The entries' keys and probabilities, a warp for a teacher.
__device__ inline void load_entries(const Problem& pr, int64_t i, Scratch& s) {
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  float* prob = s.prob(pr);
  for (int m = pr.entries() + threadIdx.x; m < pr.sorted; m += blockDim.x) s.keys[m] = kNoEntry;
  for (int t = threadIdx.x / kWarp; t < pr.teachers; t += warps) {
    const int begin = pr.start.of[t], end = pr.start.of[t + 1];
    float top = -INFINITY;
    for (int m = begin + lane; m < end; m += kWarp) {
      const int64_t c = pr.indices[i * pr.entries() + m];
      const bool known = c >= 0 && c < pr.classes;
      AMTML_DEVICE_CHECK(known, "topk_kd_loss: teacher_indices must be in [0, C)");
      s.keys[m] = entry_key(known ? c : 0, m);
      prob[m] = known ? pr.log_probs[i * pr.entries() + m] : NAN;
      top = fmaxf(top, prob[m]);
    }
    top = pr.renormalize ? warp_max(top) : 0.0f;
    double sum = 0;
    for (int m = begin + lane; m < end; m += kWarp) sum += prob[m] = expf(prob[m] - top);
    sum = warp_sum(sum);
    const float w = pr.weight(i, t);
    const bool dead = w == 0 && !(sum < INFINITY);
    const float factor = pr.renormalize ? static_cast<float>(1 / sum) : 1.0f;
    for (int m = begin + lane; m < end; m += kWarp) prob[m] = dead ? 0.0f : prob[m] * factor;
    if (lane == 0)
      s.weight[t] = w, s.dead[t] = dead, s.mass[t] = dead ? 0 : pr.renormalize ? sum / sum : sum;  // 1, or NaN
  }
}

// Calls take(t, p_t) for all teachers, of the class whose entries begin at place m.
template <class F>
__device__ __forceinline__ void each_teacher(const Problem& pr, Scratch& s, int m, const F& take) {
  const float* prob = s.prob(pr);
  const int64_t c = class_of(s.keys[m]);
  for (int t = 0; t < pr.teachers; ++t) {
    bool named = false;
    float p = 0;
    for (; m < pr.entries() && class_of(s.keys[m]) == c && entry_of(s.keys[m]) < pr.start.of[t + 1]; ++m) {
      p += prob[entry_of(s.keys[m])];  // named twice: the sum of both
      named = true;
    }
    take(t, named ? p : s.spread[t]);
  }
}

// How many classes each teacher names, and how many are named at all: only the tail "uniform" asks.
__device__ inline void spread_tails(const Problem& pr, Scratch& s) {
  float* partial = s.partial(pr) + threadIdx.x;
  int classes = 0;
  for (int t = 0; t < pr.teachers; ++t) partial[t * blockDim.x] = 0;
  for (int m = threadIdx.x; m < pr.entries(); m += blockDim.x) {
    classes += begins(s.keys, m);
    int t = 0;
    while (entry_of(s.keys[m]) >= pr.start.of[t + 1]) ++t;
    partial[t * blockDim.x] += begins(s.keys, m) || entry_of(s.keys[m - 1]) < pr.start.of[t];
  }
  int* const counts = reinterpret_cast<int*>(s.sums);
  classes = block_sum(classes, counts);
  __syncthreads();
  for (int t = 0; t < pr.teachers; ++t) {
    const int64_t unnamed = pr.classes - block_sum(static_cast<int>(partial[t * blockDim.x]), counts);
    __syncthreads();
    if (threadIdx.x != 0 || s.dead[t] || unnamed == 0) continue;
    const double rest = s.mass[t] > 1 ? 0 : 1 - s.mass[t];
    s.spread[t] = static_cast<float>(rest / static_cast<double>(unnamed));
    s.mass[t] += rest;
  }
  if (threadIdx.x == 0) s.others = pr.classes - classes;
}

__device__ inline void load_teachers(const Problem& pr, int64_t i, Scratch& s) {
  load_entries(pr, i, s);
  sort_entries(s.keys, pr.sorted);
  for (int t = threadIdx.x; t < pr.teachers; t += blockDim.x) s.spread[t] = 0;
  if (threadIdx.x == 0) s.others = 0;
  __syncthreads();
  if (pr.uniform) spread_tails(pr, s);
  if (threadIdx.x == 0) {
    double total = 0;
    float outside = 0;
    for (int t = 0; t < pr.teachers; ++t) {
      total += s.weight[t] * s.mass[t];
      outside += s.weight[t] * s.spread[t];
    }
    s.total = static_cast<float>(total), s.outside = outside;
  }
  __syncthreads();
}

// Of one row, in every thread.
struct Scales {
  float per_tau, unit, ce, kl;
};

// d loss / d z where the mixture has p.
__device__ __forceinline__ float student_gradient(const Problem& pr, const Scratch& s, const Scales& by, float z,
                                                  float p, bool at_label) {
  const float q = exp2f((z - s.max) * by.unit) * s.inverse;
  // a teacher without weight in the loss may hold NaN
  float g = by.kl == 0 ? 0.0f : kl_gradient(by.kl * by.per_tau, s.total, q, p);
  if (pr.has_ce()) {
    const float q1 = exp2f((z - s.max) * kLog2e) * s.inverse1;
    const float even = pr.label_smoothing / static_cast<float>(pr.classes);
    g += by.ce * (q1 - even - (at_label ? 1 - pr.label_smoothing : 0.0f));
  }
  return z == -INFINITY ? 0.0f : g;
}

struct Below {  // sum of maximum - z over the classes that are not -inf, and how many are
  double sum = 0;
  int masked = 0;

  __device__ void add(float below) {
    if (below == INFINITY) {
      ++masked;
    } else {
      sum += below;
    }
  }
  __device__ double value() const { return masked > 0 ? INFINITY : sum; }
};

// The second sweep: the gradient where nobody names a class, and what is below the maximum. Its numbers are the same
// for the whole row, but at the label.
template <class S, class Packs>
__device__ Below sweep_again(const Problem& pr, const Scratch& s, const Scales& by, int64_t i, bool need_below,
                             S* grad) {
  Below below;
  const float max = s.max, unit = by.unit, even = pr.label_smoothing / static_cast<float>(pr.classes);
  const float of_q = by.kl == 0 ? 0.0f : by.kl * by.per_tau * s.total * s.inverse;
  const float of_q1 = pr.has_ce() ? by.ce * s.inverse1 : 0.0f;
  const float always = (by.kl == 0 ? 0.0f : -by.kl * by.per_tau * s.outside) - (pr.has_ce() ? by.ce * even : 0.0f);
  const int64_t label_pack = pr.has_label(i) ? pr.labels[i] / Packs::kCount : -1;
  Packs* const out = reinterpret_cast<Packs*>(grad);
  auto look = [&](const Packs& pack) {
#pragma unroll
    for (int k = 0; k < Packs::kCount; ++k) below.add(max - pack.at(k));
  };
  auto write = [&](const Packs& pack, int64_t at, auto second) {
    Packs grads;
#pragma unroll
    for (int k = 0; k < Packs::kCount; ++k) {
      const float z = pack.at(k), down = z - max;
      float g = fmaf(of_q, exp2f(down * unit), always);
      if (decltype(second)::value) g = fmaf(of_q1, exp2f(down * kLog2e), g);
      grads.set(k, z == -INFINITY ? 0.0f : g);
    }
    if (at == label_pack) {  // again, with the label
      for (int64_t c = at * Packs::kCount; c < (at + 1) * Packs::kCount; ++c) {
        const float z = static_cast<float>(row_of<S, S>(pr.student, i)[c]);
        grad[c] = static_cast<S>(student_gradient(pr, s, by, z, s.outside, c == pr.labels[i]));
      }
    } else {
      write_through(out + at, grads);
    }
  };
  const Packs* const row = row_of<Packs, S>(pr.student, i);
  const int64_t count = pr.classes / Packs::kCount;
  auto sweep_with = [&](auto second) {
    if (need_below && grad) {
      each_pack<true, 2>(row, count, [&](const Packs& pack, int64_t at) { look(pack), write(pack, at, second); });
    } else if (grad) {
      each_pack<true, 2>(row, count, [&](const Packs& pack, int64_t at) { write(pack, at, second); });
    } else if (need_below) {
      each_pack<true, 2>(row, count, [&](const Packs& pack, int64_t) { look(pack); });
    }
  };
  pr.has_ce() ? sweep_with(std::true_type{}) : sweep_with(std::false_type{});
  return below;
}

template <class S>
__device__ void write_ignored(const Problem& pr, const Wanted& want, int64_t i) {
  for (int64_t c = threadIdx.x; want.grad_student && c < pr.classes; c += blockDim.x) {
    static_cast<S*>(want.grad_student)[i * pr.classes + c] = S(0.0f);
  }
  for (int t = threadIdx.x; want.grad_weights && t < pr.teachers; t += blockDim.x) {
    want.grad_weights[i * pr.teachers + t] = 0;
  }
  if (threadIdx.x != 0) return;
  for (int k = 0; want.stats && k < 3; ++k) want.stats[i * 3 + k] = 0;
  if (want.kl_rows) want.kl_rows[i] = want.ce_rows[i] = 0;
  if (want.loss) want.loss[i] = 0;
}

// Forward makes the statistics; backward has them, and what comes back to the loss: one number, or one each row.
template <class S, class Packs>
__global__ void __launch_bounds__(kMaxThreads, 3)
    topk_kernel(const __grid_constant__ Problem pr, const Wanted want, const float* stats, const float* grad_loss,
                bool each_row) {
  Scratch& s = shared<Scratch>();
  const int64_t i = blockIdx.x;
  if (pr.ignored(i)) return write_ignored<S>(pr, want, i);
  const float per_tau = 1 / pr.temperature;
  Scales by{per_tau, pr.unit, 0, 0};
  gradient_scales(pr, s.sums, &by.ce, &by.kl);
  if (grad_loss) {
    const float g = grad_loss[each_row ? i : 0];
    by.ce *= g, by.kl *= g;
  }
  if (want.stats) make_stats<S, Packs>(pr, i, s, want.stats);
  if (threadIdx.x == 0) read_stats(i, s, want.stats ? want.stats : stats);
  __syncthreads();
  load_teachers(pr, i, s);

  S* const grad = want.grad_student ? static_cast<S*>(want.grad_student) + i * pr.classes : nullptr;
  const bool smooth = pr.has_ce() && pr.label_smoothing != 0 && want.stats;
  Below below = sweep_again<S, Packs>(pr, s, by, i, smooth || s.outside != 0, grad);
  const double everywhere = block_sum(below.sum, s.sums);
  __syncthreads();
  const int masked = block_sum(below.masked, reinterpret_cast<int*>(s.sums));
  __syncthreads();  // and no thread is still writing this row's gradient

  float* const slopes = s.partial(pr) + threadIdx.x;
  for (int t = 0; want.grad_weights && t < pr.teachers; ++t) slopes[t * blockDim.x] = 0;
  const S* const row = static_cast<const S*>(pr.student.data) + i * pr.student.stride;
  Below named;
  double kl = 0;
  for (int m = threadIdx.x; m < pr.entries(); m += blockDim.x) {
    if (!begins(s.keys, m)) continue;
    const int64_t c = class_of(s.keys[m]);
    const float z = static_cast<float>(row[c]);
    float p = 0;
    each_teacher(pr, s, m, [&](int t, float p_t) { p += s.weight[t] * p_t; });
    const float ratio = if_mass(p, logf(p == 0 ? 1.0f : p) - ((z - s.max) * pr.unit * kLog2 - s.log_sum));
    kl += if_mass(p, p * ratio);
    if (want.grad_weights) {
      each_teacher(pr, s, m, [&](int t, float p_t) { slopes[t * blockDim.x] += mixture_gradient(p_t, p, ratio); });
    }
    named.add(s.max - z);
    if (grad) grad[c] = static_cast<S>(student_gradient(pr, s, by, z, p, pr.labels && c == pr.labels[i]));
  }
  kl = block_sum(kl, s.sums);
  __syncthreads();
  named.sum = block_sum(named.sum, s.sums);
  __syncthreads();
  named.masked = block_sum(named.masked, reinterpret_cast<int*>(s.sums));
  __syncthreads();
  double of_others = 0;  // sum of log b - log q
  if (s.outside != 0 && s.others > 0) {
    const Below unnamed{everywhere - named.sum, masked - named.masked};
    of_others = static_cast<double>(s.others) * (log(static_cast<double>(s.outside)) + s.log_sum);
    of_others += unnamed.value() * (static_cast<double>(pr.unit) * 0.6931471805599453);
    kl += s.outside * of_others;
  }
  for (int t = 0; want.grad_weights && t < pr.teachers; ++t) {
    double slope = block_sum(static_cast<double>(slopes[t * blockDim.x]), s.sums);
    __syncthreads();
    if (threadIdx.x != 0) continue;
    slope += s.mass[t];
    if (s.spread[t] != 0) slope += s.spread[t] * (s.outside == 0 ? -static_cast<double>(s.others) : of_others);
    want.grad_weights[i * pr.teachers + t] = by.kl == 0 ? 0.0f : static_cast<float>(by.kl * slope);
  }
  if (threadIdx.x != 0 || !want.stats) return;
  if (s.total != 0) kl += s.total * s.rest;
  kl *= pr.kl_scale;
  AMTML_DEVICE_CHECK(!pr.labels || pr.has_label(i), "topk_kd_loss: labels must be in [0, C) or ignore_index");
  const Below all{everywhere, masked};
  const double ce = pr.has_ce() ? cross_entropy<S>(pr, i, s.max, s.log_sum1, all.value()) : 0;
  if (want.kl_rows) want.kl_rows[i] = kl, want.ce_rows[i] = ce;
  if (want.loss) want.loss[i] = static_cast<float>(weighted(pr, ce, kl));
}

// --- the host's side

// Copies of what the kernel does not read in place, and the problem that points into them.
struct Inputs {
  Tensor student, indices, log_probs;
  KDTensors own;
  Problem pr{};

  Inputs(const Tensor& student_, const Tensor& indices_, const Tensor& log_probs_, const std::vector<int64_t>& sizes,
         const std::optional<Tensor>& weights, const std::optional<Tensor>& labels, const KDSettings& set,
         const OnDevice& on)
      : student(dense_rows(student_)), indices(dense(indices_)), log_probs(dense(log_probs_)) {
    const int64_t teachers = static_cast<int64_t>(sizes.size());
    pr.start = EntryStarts(kOp, sizes);
    own.fill(pr, kOp, student, teachers, weights, labels, set, on);
    check_classes(kOp, pr.classes);
    const int64_t entries = pr.start.of[teachers];
    check_shape(kOp, "indices", indices, {pr.rows, entries});
    check_shape(kOp, "log_probs", log_probs, {pr.rows, entries});
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, kOp, ": indices must be int64");
    STD_TORCH_CHECK(log_probs.scalar_type() == ScalarType::Float, kOp, ": log_probs must be float32");
    pr.indices = static_cast<const int64_t*>(indices.const_data_ptr());
    pr.log_probs = static_cast<const float*>(log_probs.const_data_ptr());
    pr.sorted = sorted_count(static_cast<int>(entries));
    pr.renormalize = set.mode == "renormalize", pr.uniform = set.mode == "uniform";
  }
};

void run_rows(const Inputs& inputs, const Wanted& want, const float* stats, const float* grad_loss, bool each_row,
              const OnDevice& on) {
  const Problem& pr = inputs.pr;
  const int wide = static_cast<int>(16 / inputs.student.element_size());
  const bool packs = fits_packs(inputs.student, wide);
  unsigned threads = kWarp;
  while (threads * (packs ? wide : 1) < pr.classes && threads < kMaxThreads) threads *= 2;
  const size_t bytes = sizeof(Scratch) + pr.sorted * sizeof(EntryKey) +
                       (pr.start.of[pr.teachers] + pr.teachers * threads) * sizeof(float);
  dispatch_gpu(inputs.student.scalar_type(), kOp, [&](auto element) {
    using S = decltype(element);
    launch(packs ? topk_kernel<S, Packed<S>> : topk_kernel<S, Single<S>>, {blocks(pr.rows), threads, 1, bytes}, on, pr,
           want, stats, grad_loss, each_row);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_kd_fwd(const Tensor& student, const Tensor& indices,
                                                       const Tensor& log_probs, std::vector<int64_t> sizes,
                                                       std::optional<Tensor> weights, std::optional<Tensor> labels,
                                                       double temperature, double ce_weight, double kl_weight,
                                                       double kl_scale, Name tail, Name reduction, int64_t ignore_index,
                                                       double label_smoothing, bool need_student_grad,
                                                       bool need_weights_grad) {
  STD_TORCH_CHECK(!need_student_grad || student.scalar_type() == ScalarType::Float, kOp,
                  ": the forward gradient of a 16-bit student is made in backward");
  const OnDevice on(student);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing};
  const Inputs inputs(student, indices, log_probs, sizes, weights, labels, set, on);
  const int64_t n = student.size(0), c = student.size(1), teachers = static_cast<int64_t>(sizes.size());
  const bool none = set.each_row();
  auto make = [&](bool wanted, const Shape& shape) { return empty_or_none(student, wanted, shape, ScalarType::Float); };
  Tensor loss = make(true, none ? Shape{n} : Shape{}), stats = make(true, {n, 3});
  Tensor grad_student = make(need_student_grad, {n, c}), grad_weights = make(need_weights_grad, {n, teachers});
  const Tensor values = empty(student, {2, none ? 0 : n}, ScalarType::Double);
  Wanted want{};
  if (none) {
    want.loss = data(loss);
  } else {
    want.ce_rows = static_cast<double*>(values.mutable_data_ptr());
    want.kl_rows = want.ce_rows + n;
  }
  want.stats = data(stats), want.grad_student = data(grad_student), want.grad_weights = data(grad_weights);
  run_rows(inputs, want, nullptr, nullptr, false, on);
  if (!none) reduce_rows(inputs.pr, values, data(loss), nullptr, nullptr, on);
  return {loss, stats, grad_student, grad_weights};
}

std::tuple<Tensor, Tensor> topk_kd_bwd(const Tensor& grad_loss, const Tensor& student, const Tensor& indices,
                                       const Tensor& log_probs, std::vector<int64_t> sizes,
                                       std::optional<Tensor> weights, std::optional<Tensor> labels, const Tensor& stats,
                                       double temperature, double ce_weight, double kl_weight, double kl_scale,
                                       Name tail, Name reduction, int64_t ignore_index, double label_smoothing,
                                       bool need_student_grad, bool need_weights_grad) {
  const OnDevice on(student);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing};
  const Inputs inputs(student, indices, log_probs, sizes, weights, labels, set, on);
  const int64_t n = student.size(0), c = student.size(1), teachers = static_cast<int64_t>(sizes.size());
  const bool none = set.each_row();
  check_shape(kOp, "grad_loss", grad_loss, none ? Shape{n} : Shape{});
  check_shape(kOp, "stats", stats, {n, 3});
  const Tensor incoming = dense(grad_loss, ScalarType::Float), saved = dense(stats);
  Tensor grad_student = empty_or_none(student, need_student_grad, {n, c}, student.scalar_type());
  Tensor grad_weights = empty_or_none(student, need_weights_grad, {n, teachers}, ScalarType::Float);
  Wanted want{};
  if (need_student_grad) want.grad_student = grad_student.mutable_data_ptr();
  want.grad_weights = data(grad_weights);
  run_rows(inputs, want, static_cast<const float*>(saved.const_data_ptr()),
           static_cast<const float*>(incoming.const_data_ptr()), none, on);
  return {grad_student, grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("topk_kd_fwd", TORCH_BOX(&topk_kd_fwd));
  m.impl("topk_kd_bwd", TORCH_BOX(&topk_kd_bwd));
}

}  // namespace amtml::gpu
