// Weighted multi-teacher distillation: cross-entropy, weighted KL and their gradients, a row for each cluster of
// blocks.
//
//   q = softmax(z / tau), p_t = softmax(z_t / tau), p = sum_t w_t p_t; csrc/cpu/multi_teacher_kd.cpp has the formulas.
//
// student [N, C] and T teachers [N, C], read in place. Two sweeps over a row: the first makes maxima and sums of all
// T + 1 softmaxes online, the second everything else. multi_teacher_kd.cuh has the kernel that most calls take, and
// multi_teacher_kd_few.cuh that of few classes; this one takes all others: the sum of KLs, any alignment and number of
// teachers, teachers of another dtype than the student, and probabilities that are given out or send something back.
#include "multi_teacher_kd_few.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "multi_teacher_kd_loss";
constexpr int kMaxThreads = 256, kMaxWarps = kMaxThreads / kWarp;
// Tensors whose loads are under way at a time.
constexpr int together(int pack) { return pack == 8 ? 2 : 4; }

struct Scratch {
  Online part[kMaxTeachers + 1][kMaxWarps], whole[kMaxTeachers + 1];  // of this block
  float max[kMaxTeachers + 1], inverse[kMaxTeachers + 1], weight[kMaxTeachers];
  float log_sum[kMaxTeachers + 1], inverse1, log_sum1, total;
  double rest[kMaxTeachers + 1];
  double sums[kWarp], totals[4];  // totals: kl, -sum z, inner product, of this block
  float teacher_totals[2][kMaxTeachers];
  float partial[1];  // [2 or 1][T][threads], to the end
};

// Calls use(t, x) for all teachers, in order, with their logits from class c on.
template <int kPack, class E, class Use>
__device__ __forceinline__ void each_teacher(const Problem& pr, int64_t i, int64_t c, const Use& use) {
  constexpr int kTogether = together(kPack);
  for (int first = 0; first < pr.teachers; first += kTogether) {
    float x[kTogether][kPack];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (first + u < pr.teachers) load_row<kPack, E>(pr.teacher[first + u], i, c, x[u]);
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (first + u < pr.teachers) use(first + u, x[u]);
    }
  }
}

// Softmax statistics of the row: of the slice, then of the block, then of the cluster.
template <class S, class E, int kPack>
__device__ void make_stats(const Problem& pr, int64_t i, int64_t begin, int64_t end, Scratch& s, float* stats) {
  const float unit = pr.unit;
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  constexpr int kTogether = together(kPack);
  for (int first = 0; first <= pr.teachers; first += kTogether) {  // tensor 0 is the student
    const int count = min(kTogether, pr.teachers + 1 - first);
    Online o[kTogether];
#pragma unroll
    for (int u = 0; u < kTogether; ++u) o[u] = {-INFINITY, 0, 0};
    for (int64_t c = begin + threadIdx.x * kPack; c < end; c += blockDim.x * kPack) {
      float x[kTogether][kPack];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (first + u == 0) {
          load_row<kPack, S>(pr.student, i, c, x[u]);
        } else if (u < count) {
          load_row<kPack, E>(pr.teacher[first + u - 1], i, c, x[u]);
        }
      }
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        if (first + u == 0 && pr.labels) {
          take<true>(o[u], x[u], unit);
        } else if (u < count) {
          take<false>(o[u], x[u], unit);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kTogether; ++u) {
      if (u >= count) break;
      o[u] = warp_combined(o[u], unit);
      if (lane == 0) s.part[first + u][warp] = o[u];
    }
  }
  wait_for_previous();
  __syncthreads();
  for (int t = threadIdx.x; t <= pr.teachers; t += blockDim.x) {
    Online o = s.part[t][0];
    for (unsigned w = 1; w < warps; ++w) o = combined(o, s.part[t][w], unit);
    s.whole[t] = o;
  }
  cluster_sync();
  for (int t = threadIdx.x; t <= pr.teachers; t += blockDim.x) {
    Online o = *in_block(&s.whole[t], 0);
    for (unsigned rank = 1; rank < cluster_size(); ++rank) o = combined(o, *in_block(&s.whole[t], rank), unit);
    if (o.max == -INFINITY) o.sum = o.sum1 = NAN;  // no class has a probability
    s.max[t] = o.max;
    s.inverse[t] = 1 / o.sum;
    if (t == 0) {
      s.inverse1 = 1 / (pr.labels ? o.sum1 : 1.0f);
      s.log_sum1 = static_cast<float>(log(static_cast<double>(o.sum1)));
    }
    if (cluster_rank() != 0) continue;
    float* out = stats + i * (3 + 2 * pr.teachers) + (t == 0 ? 0 : 1 + 2 * t);  // before others change s.inverse
    out[0] = s.max[t];
    out[1] = s.inverse[t];
    if (t == 0) out[2] = s.inverse1;
  }
  __syncthreads();
}

__device__ inline void read_stats(const Problem& pr, int64_t i, Scratch& s, const float* stats) {
  for (int t = threadIdx.x; t <= pr.teachers; t += blockDim.x) {
    const float* in = stats + i * (3 + 2 * pr.teachers) + (t == 0 ? 0 : 1 + 2 * t);
    s.max[t] = in[0];
    s.inverse[t] = in[1];
    if (t == 0) s.inverse1 = in[2];
  }
  __syncthreads();
}

// Weights, their sum, and the log-sums with what rounding them to float32 cuts off, which would bias every KL near 0.
// A teacher without weight may hold NaN: its inverse sum becomes 0, and it is left out.
__device__ inline void make_factors(const Problem& pr, int64_t i, Scratch& s) {
  for (int t = threadIdx.x; t < pr.teachers; t += blockDim.x) {
    const float w = pr.weight(i, t);
    s.weight[t] = w;
    if (w == 0 && !(fabsf(s.inverse[t + 1]) < INFINITY)) s.inverse[t + 1] = 0;
  }
  __syncthreads();
  for (int t = threadIdx.x; t <= pr.teachers; t += blockDim.x) {
    const double log_sum = -log(static_cast<double>(s.inverse[t]));
    s.log_sum[t] = static_cast<float>(log_sum);
    s.rest[t] = log_sum - s.log_sum[t];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int t = 0; t < pr.teachers; ++t) total += s.weight[t];
    s.total = total;
  }
  __syncthreads();
}

// The sum over the cluster, in its first block (elsewhere the block's own).
__device__ inline void sum_totals(Scratch& s, int count, int teacher_sums, int teachers) {
  for (int k = 0; k < teacher_sums * teachers; ++k) {
    const float sum = block_sum(s.partial[k * blockDim.x + threadIdx.x], reinterpret_cast<float*>(s.sums));
    if (threadIdx.x == 0) s.teacher_totals[k / teachers][k % teachers] = sum;
    __syncthreads();
  }
  if (cluster_size() == 1) return;
  cluster_sync();
  if (cluster_rank() == 0) {
    for (unsigned rank = 1; rank < cluster_size(); ++rank) {
      for (int k = threadIdx.x; k < count; k += blockDim.x) s.totals[k] += in_block(s.totals, rank)[k];
      for (int k = threadIdx.x; k < teacher_sums * teachers; k += blockDim.x) {
        s.teacher_totals[k / teachers][k % teachers] +=
            in_block(&s.teacher_totals[0][0], rank)[k / teachers * kMaxTeachers + k % teachers];
      }
    }
    __syncthreads();
  }
  cluster_sync();  // nobody leaves while others read
}

// The second sweep: whatever is wanted of the row, in this block's slice.
template <class S, class E, int kPack>
__device__ void finish(const Problem& pr, const Wanted& want, const Incoming& in, int64_t i, int64_t begin, int64_t end,
                       float ce_grad, float kl_grad, Scratch& s) {
  const int64_t label = pr.labels ? pr.labels[i] : -1;
  const float per_tau = 1 / pr.temperature, unit = pr.unit, m = s.max[0];
  const float even = pr.label_smoothing / static_cast<float>(pr.classes);
  const bool value = want.kl_rows || want.kl, need_q = want.grad_student || want.student_probs;
  const bool need_ratio = pr.mixture && (value || (want.grad_weights && kl_grad != 0));
  const float *back_q = in.grad_probs ? in.grad_probs + i * pr.classes : nullptr,
              *back_p = in.grad_targets ? in.grad_targets + i * pr.classes : nullptr;
  float* const through_kl = s.partial + threadIdx.x;  // [T] apart by the number of threads
  float* const through_p = through_kl + pr.teachers * blockDim.x;
  for (int t = 0; want.grad_weights && t < pr.teachers; ++t) {
    through_kl[t * blockDim.x] = 0;
    if (back_p) through_p[t * blockDim.x] = 0;
  }
  double kl = 0, below = 0;
  const float inner = static_cast<float>(s.totals[2]), by = back_q || back_p ? in.of_probs() : 1.0f;
  for (int64_t c = begin + threadIdx.x * kPack; c < end; c += blockDim.x * kPack) {
    float z[kPack], p[kPack], log_q[kPack], ratio[kPack] = {};
    load_row<kPack, S>(pr.student, i, c, z);
    float part = 0;
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      p[k] = 0;
      log_q[k] = (z[k] - m) * unit * kLog2 - s.log_sum[0];
    }
    each_teacher<kPack, E>(pr, i, c, [&](int t, const float (&x)[kPack]) {
      const float inverse = s.inverse[t + 1], factor = s.weight[t] * inverse, top = s.max[t + 1];
      if (inverse == 0) return;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const float e = exp2f((x[k] - top) * unit);
        p[k] += factor * e;
        const float log_ratio = ((x[k] - top) * unit * kLog2 - s.log_sum[t + 1]) - log_q[k];
        if (!pr.mixture) sum += if_mass(e * inverse, e * inverse * log_ratio);
      }
      if (pr.mixture) return;
      if (s.weight[t] != 0) part += s.weight[t] * sum;
      if (want.grad_weights) through_kl[t * blockDim.x] += sum;
    });
    if (need_ratio) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        ratio[k] = if_mass(p[k], logf(p[k] == 0 ? 1.0f : p[k]) - log_q[k]);
        part += if_mass(p[k], p[k] * ratio[k]);
      }
    }
    kl += part;
    if (want.grad_weights && (need_ratio || back_p)) {
      float back[kPack];
      if (back_p) load(back_p + c, back);
      each_teacher<kPack, E>(pr, i, c, [&](int t, const float (&x)[kPack]) {
        const float inverse = s.inverse[t + 1], top = s.max[t + 1];
        if (inverse == 0) return;
        float of_kl = 0, of_p = 0;
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          const float e = exp2f((x[k] - top) * unit);
          if (need_ratio) of_kl += inverse * mixture_gradient(e, p[k], ratio[k]);
          if (back_p) of_p += by * back[k] * (e * inverse);
        }
        if (need_ratio) through_kl[t * blockDim.x] += of_kl;
        if (back_p) through_p[t * blockDim.x] += of_p;
      });
    }
    if (want.targets) store(want.targets + i * pr.classes + c, p);
    if (pr.label_smoothing != 0 && value) {
#pragma unroll
      for (int k = 0; k < kPack; ++k) below += m - z[k];
    }
    if (!need_q) continue;
    float q[kPack];
#pragma unroll
    for (int k = 0; k < kPack; ++k) q[k] = exp2f((z[k] - m) * unit) * s.inverse[0];
    if (want.student_probs) store(want.student_probs + i * pr.classes + c, q);
    if (!want.grad_student) continue;
    float back[kPack], grad[kPack];
    if (back_q) load(back_q + c, back);
#pragma unroll
    for (int k = 0; k < kPack; ++k) {
      // a teacher without weight in the loss may hold NaN
      float g = kl_grad == 0 ? 0.0f : kl_gradient(kl_grad * per_tau, s.total, q[k], p[k]);
      if (pr.labels) {
        const float q1 = exp2f((z[k] - m) * kLog2e) * s.inverse1;
        g += ce_grad * (q1 - even - (c + k == label ? 1 - pr.label_smoothing : 0.0f));
      }
      if (back_q) g += per_tau * softmax_gradient(q[k], by * back[k], inner);
      grad[k] = z[k] == -INFINITY ? 0.0f : g;
    }
    store(static_cast<S*>(want.grad_student) + i * pr.classes + c, grad);
  }
  kl = block_sum(kl, s.sums);
  __syncthreads();
  below = block_sum(below, s.sums);
  __syncthreads();
  if (threadIdx.x == 0) s.totals[0] = kl, s.totals[1] = below;
  __syncthreads();
  sum_totals(s, 2, want.grad_weights ? (back_p ? 2 : 1) : 0, pr.teachers);
}

// inner product of what comes back through the student's probabilities with them
template <class S, int kPack>
__device__ void make_inner(const Problem& pr, const Incoming& in, int64_t i, int64_t begin, int64_t end, Scratch& s) {
  const float unit = kLog2e / pr.temperature;
  double inner = 0;
  for (int64_t c = begin + threadIdx.x * kPack; c < end; c += blockDim.x * kPack) {
    float z[kPack], back[kPack], part = 0;
    load_row<kPack, S>(pr.student, i, c, z);
    load(in.grad_probs + i * pr.classes + c, back);
#pragma unroll
    for (int k = 0; k < kPack; ++k) part += back[k] * (exp2f((z[k] - s.max[0]) * unit) * s.inverse[0]);
    inner += part;
  }
  inner = in.of_probs() * block_sum(inner, s.sums);
  __syncthreads();
  if (threadIdx.x == 0) s.totals[3] = inner;
  cluster_sync();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += in_block(s.totals, rank)[3];
    s.totals[2] = sum;
  }
  __syncthreads();
}

// The row's scalars and the gradient of its weights, from sums over all classes: in the first block of the cluster.
template <class S>
__device__ void write_row(const Problem& pr, const Wanted& want, int64_t i, float kl_grad, bool through_targets,
                          Scratch& s) {
  for (int t = threadIdx.x; want.grad_weights && t < pr.teachers; t += blockDim.x) {
    float through = s.teacher_totals[0][t];
    if (s.inverse[t + 1] != 0) through += pr.mixture ? 1.0f : static_cast<float>(s.rest[0] - s.rest[t + 1]);
    if (!pr.mixture && s.weight[t] == 0 && !(fabsf(through) < INFINITY)) through = 0;
    float grad = kl_grad == 0 ? 0 : kl_grad * through;
    if (through_targets) grad += s.teacher_totals[1][t];
    want.grad_weights[i * pr.teachers + t] = grad;
  }
  if (threadIdx.x != 0 || !(want.kl_rows || want.kl)) return;
  double kl = s.totals[0];
  for (int t = 0; t < pr.teachers; ++t) {
    if (s.weight[t] != 0) kl += s.weight[t] * (pr.mixture ? s.rest[0] : s.rest[0] - s.rest[t + 1]);
  }
  write_values<S>(pr, want, i, kl, s.totals[1], s.max[0], s.log_sum1);
}

// again: the statistics are there already (backward), else they are made.
template <class S, class E, int kPack, bool kAgain>
__global__ void __launch_bounds__(kMaxThreads, kPack == 1 ? 3 : 2)
    rows_kernel(const __grid_constant__ Problem pr, const Wanted want, const Incoming in, const float* stats,
                Pass pass) {
  Scratch& s = shared<Scratch>();
  const int64_t i = blockIdx.x / cluster_size();
  const int64_t packs = (pr.classes + kPack - 1) / kPack, slice = (packs + cluster_size() - 1) / cluster_size() * kPack;
  const int64_t begin = least(cluster_rank() * slice, pr.classes), end = least(begin + slice, pr.classes);
  let_next_start();
  if (kAgain || pr.ignored(i)) wait_for_previous();
  if (pr.ignored(i)) {
    if (pass != Pass::kRescale) write_ignored<S>(pr, want, i, begin, end, kAgain, threadIdx.x, blockDim.x);
    return;
  }
  if (pass == Pass::kRescale && rescaled<S, kPack>(pr, want, i, begin, end, in.of_loss(i), threadIdx.x, blockDim.x))
    return;
  if (kAgain) {
    read_stats(pr, i, s, stats);
    if (in.grad_probs) make_inner<S, kPack>(pr, in, i, begin, end, s);
  } else {
    make_stats<S, E, kPack>(pr, i, begin, end, s, want.stats);
  }
  float ce_grad, kl_grad;
  gradient_scales(pr, s.sums, &ce_grad, &kl_grad);
  if (kAgain) {
    const float g = in.of_loss(i);
    ce_grad *= g;
    kl_grad *= g;
  }
  make_factors(pr, i, s);
  finish<S, E, kPack>(pr, want, in, i, begin, end, ce_grad, kl_grad, s);
  if (cluster_rank() == 0) write_row<S>(pr, want, i, kl_grad, in.grad_targets != nullptr, s);
}

// --- the host's side

// Copies of what the kernels do not read in place, and the problem that points into them.
struct Inputs {
  Tensor student;
  std::vector<Tensor> teachers;
  KDTensors own;
  Problem pr{};
  bool same = true;      // the teachers' dtypes and the student's
  bool in_place = true;  // nothing of the logits had to be copied
  int pack;

  Inputs(const Tensor& student_, const std::vector<Tensor>& teachers_, const std::optional<Tensor>& weights_,
         const std::optional<Tensor>& labels_, const KDSettings& set, const OnDevice& on)
      : student(dense_rows(student_)) {
    STD_TORCH_CHECK(!teachers_.empty(), kOp, ": teachers must hold at least one teacher");
    STD_TORCH_CHECK(teachers_.size() <= kMaxTeachers, kOp, ": the CUDA kernels take at most ", kMaxTeachers,
                    " teachers, got ", teachers_.size());
    const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(teachers_.size());
    for (const Tensor& t : teachers_) {
      check_shape(kOp, "teacher", t, {n, c});
      same &= t.scalar_type() == student.scalar_type();
      teachers.push_back(dense_rows(t));
      in_place &= teachers.back().const_data_ptr() == t.const_data_ptr();
    }
    in_place &= student.const_data_ptr() == student_.const_data_ptr();
    pr.mixture = set.mode == "mixture";
    own.fill(pr, kOp, student, count, weights_, labels_, set, on);
    for (int64_t t = 0; t < count; ++t) pr.teacher[t] = Rows(teachers[t]);
    pack = common_pack();
  }

  // One class at a time where rows that come back do not start at such addresses as the packs need.
  void must_fit(const std::optional<Tensor>& rows) {
    if (rows && reinterpret_cast<uintptr_t>(rows->const_data_ptr()) % (pack * rows->element_size()) != 0) pack = 1;
  }

  // Classes at a time: as many as fit 16 bytes, if every row starts at such an address.
  int common_pack() const {
    const int wide = same ? static_cast<int>(16 / student.element_size()) : 4;
    bool all = fits_packs(student, wide);
    for (const Tensor& t : teachers) all &= fits_packs(t, wide);
    return all ? wide : 1;
  }

  // Few rows under way at a time: what they hold should fit the second-level cache, for the second sweep.
  unsigned cluster(const OnDevice& on) const {
#ifdef AMTML_EMULATED_CUDA  // so that small rows are spread, too
    constexpr int64_t kCache = 1 << 16, kBlocksUnderWay = 264, kLeast = 64;
#else
    constexpr int64_t kCache = 24 << 20, kBlocksUnderWay = 264, kLeast = 4096;
#endif
    int64_t bytes = static_cast<int64_t>(student.element_size());
    for (const Tensor& t : teachers) bytes += static_cast<int64_t>(t.element_size());
    bytes *= pr.classes;
    unsigned size = 1;
    while (size < kMaxCluster && bytes * kBlocksUnderWay / size > kCache && pr.classes / size >= kLeast) size *= 2;
    return size == 1 ? 1 : on.largest_cluster(size);
  }
};

// Whether the kernels of the headers can do it.
bool is_plain(const Inputs& inputs, const Wanted& want, const Incoming& in) {
  const bool probs = want.student_probs || want.targets || in.grad_probs || in.grad_targets;
  return inputs.same && inputs.pr.mixture && !probs;
}
bool takes_sweeps(const Inputs& inputs) {
  const bool packs = inputs.pack * inputs.student.element_size() == 16;
  return packs && inputs.pr.teachers <= kSweepTeachers && inputs.pr.classes < 1LL << 31;
}

// A number from the environment, for trials: read once, where there is a GPU.
template <const char* kName>
int64_t setting(int64_t otherwise, int64_t most) {
  auto given = [&] {
    const char* text = std::getenv(kName);
    return std::clamp<int64_t>(text ? std::atoll(text) : otherwise, 0, most);
  };
#ifdef AMTML_EMULATED_CUDA
  return given();
#else
  static const int64_t once = given();
  return once;
#endif
}

// Bytes of shared memory in which a block keeps what it has of a row between the sweeps. None by default, for no GPU
// has timed it yet (kernels/README.md).
constexpr char kKeepBytes[] = "AMTML_KEEP_BYTES";
int64_t kept_bytes() { return setting<kKeepBytes>(0, 200 << 10); }

// Rows of at most so many classes go to the kernel of few classes.
constexpr char kFewClasses[] = "AMTML_FEW_CLASSES";
bool takes_few(const Inputs& inputs) {
  constexpr int64_t most = kOwn * kFewLanes;
  return inputs.pr.classes <= setting<kFewClasses>(most, most) && inputs.pr.teachers <= kFewTeachers;
}

template <class S, int T = 1>
void run_sweeps(const Problem& pr, const Wanted& want, const Incoming& in, const float* stats, Pass pass,
                const OnDevice& on, bool early) {
  if constexpr (T < kSweepTeachers) {
    if (pr.teachers > T) return run_sweeps<S, T + 1>(pr, want, in, stats, pass, on, early);
  }
  auto* const kernel = sweeps_kernel<S, T>;
  const int64_t packs = pr.classes / Packed<S>::kCount;
  // Long rows by several blocks, so that fewer are under way at a time, and few rows, so that all multiprocessors work.
  unsigned cluster = 1, threads = kWarp;
  while (cluster < kMaxCluster && packs / cluster > kSweepThreads * kSweepSteps) cluster *= 2;
  while (cluster < kMaxCluster && pr.rows * cluster < kSweepBlocks && packs / cluster > kSweepThreads) cluster *= 2;
  const int64_t keep = pass == Pass::kForward ? kept_bytes() : 0, row_bytes = packs * (T + 1) * sizeof(Packed<S>);
  while (keep > 0 && cluster < kMaxCluster && row_bytes > keep * cluster) cluster *= 2;
  if (cluster > 1) cluster = on.largest_cluster(cluster);
  while (threads < packs / cluster && threads < kSweepThreads) threads *= 2;
  const int64_t place_bytes = threads * (T + 1) * sizeof(Packed<S>);  // of one pack a thread
  Problem kept = pr;
  kept.keep = static_cast<int>(std::min<int64_t>(keep / place_bytes, blocks_for(blocks_for(packs, cluster), threads)));
  const Spread spread{blocks(pr.rows * cluster), threads, cluster, sizeof(SweepScratch<T>) + kept.keep * place_bytes,
                      early};
  launch(kernel, spread, on, kept, want, in, stats, pass);
}

template <class S, int T = 1>
void run_few(const Problem& pr, const Wanted& want, const Incoming& in, Pass pass, const OnDevice& on, bool early) {
  if constexpr (T < kFewTeachers) {
    if (pr.teachers > T) return run_few<S, T + 1>(pr, want, in, pass, on, early);
  }
  int shift = 0;
  while (kOwn << shift < pr.classes) ++shift;
  const int64_t lanes = pr.rows << shift;
  unsigned threads = kWarp;  // small blocks for few rows, so that all multiprocessors work
  while (threads < kFewThreads && lanes > int64_t{threads} * kFewBlocks) threads *= 2;
  const Spread spread{blocks_for(lanes, threads), threads, 1, kWarp * sizeof(double), early};
  launch(few_kernel<S, T>, spread, on, pr, want, in, pass, shift);
}

void run_rows(const Inputs& inputs, const Wanted& want, const Incoming& in, const float* stats, Pass pass,
              const OnDevice& on, bool early) {
  const Problem& pr = inputs.pr;
  early |= pr.counted != nullptr;  // in front is the kernel that counts
  const bool plain = is_plain(inputs, want, in);
  if (plain && takes_few(inputs)) {
    return dispatch_gpu(inputs.student.scalar_type(), kOp,
                        [&](auto element) { run_few<decltype(element)>(pr, want, in, pass, on, early); });
  }
  if (plain && takes_sweeps(inputs)) {
    return dispatch_gpu(inputs.student.scalar_type(), kOp,
                        [&](auto element) { run_sweeps<decltype(element)>(pr, want, in, stats, pass, on, early); });
  }
  const unsigned cluster = inputs.cluster(on);
  const int64_t packs = (pr.classes / cluster + inputs.pack - 1) / inputs.pack;
  unsigned threads = kWarp;
  while (threads < packs && threads < kMaxThreads) threads *= 2;
  const size_t sums = want.grad_weights ? pr.teachers * (in.grad_targets ? 2 : 1) : 0;
  const Spread spread{blocks(pr.rows * cluster), threads, cluster, sizeof(Scratch) + sums * threads * sizeof(float),
                      early};
  dispatch_gpu(inputs.student.scalar_type(), kOp, [&](auto element) {
    using S = decltype(element);
    constexpr int wide = 16 / sizeof(S);
    auto run = [&](auto again) {
      constexpr bool kAgain = decltype(again)::value;
      auto* const kernel =
          inputs.same ? (inputs.pack == 1 ? rows_kernel<S, S, 1, kAgain> : rows_kernel<S, S, wide, kAgain>)
                      : (inputs.pack == 1 ? rows_kernel<S, AnyType, 1, kAgain> : rows_kernel<S, AnyType, 4, kAgain>);
      launch(kernel, spread, on, pr, want, in, stats, pass);
    };
    pass == Pass::kForward ? run(std::false_type{}) : run(std::true_type{});
  });
}

}  // namespace

void multi_teacher_kd_forward(const Tensor& student, const std::vector<Tensor>& teachers,
                              const std::optional<Tensor>& weights, const std::optional<Tensor>& labels,
                              const KDSettings& set, const Wanted& want, const OnDevice& on, bool early) {
  const Inputs inputs(student, teachers, weights, labels, set, on);
  // Copies of the logits would be in front, and they are read before the kernel waits.
  run_rows(inputs, want, {}, nullptr, Pass::kForward, on, early && inputs.in_place);
}

namespace {

Tensor8 multi_teacher_kd_fwd(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                             std::optional<Tensor> labels, double temperature, double ce_weight, double kl_weight,
                             double kl_scale, Name mode, Name reduction, int64_t ignore_index, double label_smoothing,
                             bool need_student_grad, bool need_weights_grad, bool need_probs) {
  const OnDevice on(student);
  STD_TORCH_CHECK(!need_student_grad || student.scalar_type() != ScalarType::Half, kOp,
                  ": the gradient of a float16 student is made in backward");
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  const Inputs inputs(student, teachers, weights, labels, set, on);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(teachers.size());
  const bool none = set.each_row();
  auto make = [&](bool wanted, const Shape& shape) { return empty_or_none(student, wanted, shape, ScalarType::Float); };
  const Shape value = none ? Shape{n} : Shape{};
  const ScalarType made = need_student_grad ? student.scalar_type() : ScalarType::Float;  // not float16
  const Tensor loss = make(true, value), ce = make(true, value), kl = make(true, value);
  const Tensor student_probs = make(need_probs, {n, c}), soft_targets = make(need_probs, {n, c});
  const Tensor stats = make(true, {n, 3 + 2 * count});
  const Tensor grad_student = empty_or_none(student, need_student_grad, {n, c}, made);
  const Tensor grad_weights = make(need_weights_grad, {n, count});
  std::optional<Tensor> rows;  // [2, N]: each row's cross-entropy and KL before the reduction
  Wanted want{};
  if (none) {
    want.loss = data(loss), want.ce = data(ce), want.kl = data(kl);
  } else {
    rows = empty(student, {2, n}, ScalarType::Double);
    want.ce_rows = static_cast<double*>(rows->mutable_data_ptr()), want.kl_rows = want.ce_rows + n;
  }
  want.student_probs = data(student_probs), want.targets = data(soft_targets), want.stats = data(stats);
  if (need_student_grad) want.grad_student = grad_student.mutable_data_ptr();
  want.grad_weights = data(grad_weights);
  run_rows(inputs, want, {}, nullptr, Pass::kForward, on, false);
  if (!none) reduce_rows(inputs.pr, *rows, data(loss), data(ce), data(kl), on);
  return {loss, ce, kl, student_probs, soft_targets, stats, grad_student, grad_weights};
}

}  // namespace

void multi_teacher_kd_backward(const KDIncoming& incoming, const Tensor& student, const std::vector<Tensor>& teachers,
                               const std::optional<Tensor>& weights, const std::optional<Tensor>& labels,
                               const Tensor& stats, const KDSettings& set, const Wanted& want, const OnDevice& on) {
  Inputs inputs(student, teachers, weights, labels, set, on);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(teachers.size());
  const bool none = set.each_row();
  check_shape(kOp, "grad_loss", incoming.grad_loss, none ? Shape{n} : Shape{});
  check_shape(kOp, "stats", stats, {n, 3 + 2 * count});
  if (incoming.grad_probs) check_shape(kOp, "grad_probs", *incoming.grad_probs, {n, c});
  if (incoming.grad_targets) check_shape(kOp, "grad_targets", *incoming.grad_targets, {n, c});
  const auto grad_loss = as_float(incoming.grad_loss), divisor = as_float(incoming.divisor);
  const auto back_q = want.grad_student ? as_float(incoming.grad_probs) : std::nullopt;
  const auto back_p = want.grad_weights ? as_float(incoming.grad_targets) : std::nullopt;
  inputs.must_fit(back_q);
  inputs.must_fit(back_p);
  const Tensor saved = dense(stats);
  const Incoming in{values(grad_loss), none,           values(divisor),
                    values(back_q),    values(back_p), static_cast<float>(incoming.probs_factor.value_or(NAN))};
  run_rows(inputs, want, in, static_cast<const float*>(saved.const_data_ptr()), Pass::kBackward, on, false);
}

namespace {

std::tuple<Tensor, Tensor> multi_teacher_kd_bwd(const Tensor& grad_loss, std::optional<Tensor> grad_probs,
                                                std::optional<Tensor> grad_targets, const Tensor& student,
                                                std::vector<Tensor> teachers, std::optional<Tensor> weights,
                                                std::optional<Tensor> labels, const Tensor& stats, double temperature,
                                                double ce_weight, double kl_weight, double kl_scale, Name mode,
                                                Name reduction, int64_t ignore_index, double label_smoothing,
                                                bool need_student_grad, bool need_weights_grad) {
  const OnDevice on(student);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  const KDIncoming incoming{grad_loss, grad_probs, grad_targets, std::nullopt, std::nullopt};
  const int64_t n = student.size(0), count = static_cast<int64_t>(teachers.size());
  Tensor grad_student = empty_or_none(student, need_student_grad, {n, student.size(1)}, student.scalar_type());
  Tensor grad_weights = empty_or_none(student, need_weights_grad, {n, count}, ScalarType::Float);
  Wanted want{};
  if (grad_student.numel()) want.grad_student = grad_student.mutable_data_ptr();
  want.grad_weights = data(grad_weights);
  multi_teacher_kd_backward(incoming, student, teachers, weights, labels, stats, set, want, on);
  return {grad_student, grad_weights};
}

// The gradients that forward has made for an incoming gradient of 1, for this one.
void multi_teacher_kd_rescale_(const Tensor& grad_student, const Tensor& grad_weights, const Tensor& grad_loss,
                               const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                               std::optional<Tensor> labels, const Tensor& stats, double temperature, double ce_weight,
                               double kl_weight, double kl_scale, Name mode, Name reduction, int64_t ignore_index,
                               double label_smoothing) {
  const OnDevice on(student);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing};
  Inputs inputs(student, teachers, weights, labels, set, on);
  inputs.must_fit(grad_student);
  const int64_t n = student.size(0), count = static_cast<int64_t>(teachers.size());
  const bool none = set.each_row();
  check_shape(kOp, "grad_loss", grad_loss, none ? Shape{n} : Shape{});
  check_shape(kOp, "stats", stats, {n, 3 + 2 * count});
  const Tensor incoming = dense(grad_loss, ScalarType::Float), saved = dense(stats);
  Wanted want{};
  if (grad_student.numel()) want.grad_student = grad_student.mutable_data_ptr();
  want.grad_weights = data(grad_weights);
  const Incoming in{static_cast<const float*>(incoming.const_data_ptr()), none, nullptr, nullptr, nullptr, NAN};
  run_rows(inputs, want, in, static_cast<const float*>(saved.const_data_ptr()), Pass::kRescale, on, false);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) {
  m.impl("multi_teacher_kd_fwd", TORCH_BOX(&multi_teacher_kd_fwd));
  m.impl("multi_teacher_kd_bwd", TORCH_BOX(&multi_teacher_kd_bwd));
  m.impl("multi_teacher_kd_rescale_", TORCH_BOX(&multi_teacher_kd_rescale_));
}

}  // namespace amtml::gpu
