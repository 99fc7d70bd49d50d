// Statistics of rows whose teachers give their largest classes only, from what topk_bucket.cu finds in the student's
// rows. csrc/cpu/topk_bucket_stats.cpp has the formulas.
//
// Traffic: 28 bytes an entry in, a few times.
#include "topk_named.cuh"

namespace amtml::gpu {
namespace {

constexpr char kOp[] = "topk_kd_loss";
constexpr int kStats = 4;        // numbers a row, but for the teachers' KLs
constexpr double kFar = 1e-280;  // of the largest exponential: below it a sum has a maximum of its own

struct Problem {
  Named of;
  const float* weights;  // [N, T], or null: uniform
  int64_t weights_row, weights_column;
  const int64_t* labels;
  int64_t ignore_index;
  double tau;
  bool bucket, renormalize, uniform;

  __device__ bool ignored(int64_t i) const { return labels && labels[i] == ignore_index; }
  __device__ double weight(int64_t i, int t) const {
    return weights ? weights[i * weights_row + t * weights_column] : 1.0 / static_cast<double>(of.teachers);
  }
};

// What a teacher makes of its entries: p = exp(log_prob - shift).
struct Teacher {
  double weight, shift;
  double mass;          // of what it gives, in the classes that count
  double rest, spread;  // of all that it does not name: together, and of each
  int64_t named;
  bool dead;  // with tail "bucket" without weight, and NaN: 0 * NaN is 0
};

__device__ __forceinline__ double entropy_of(double p) { return p == 0 ? 0 : -p * log(p); }
__device__ __forceinline__ double kl_of(double p, double log_q) { return p == 0 ? 0 : p * (log(p) - log_q); }
__device__ __forceinline__ double weighted(double w, double x) { return w == 0 && !(fabs(x) < INFINITY) ? 0 : w * x; }

// `to` is in shared memory.
__device__ __forceinline__ void find_teacher(const Problem& pr, const Row& row, int t, Teacher& to) {
  double kept = 0, left_out = 0, named = 0;
#pragma unroll 1
  for (int m = pr.of.start.of[t] + threadIdx.x; m < pr.of.start.of[t + 1]; m += blockDim.x) {
    (pr.of.indices[row.first() + m] == kNobody ? left_out : kept) += row.given(m);
  }
  row.each_head([&](int m) { named += row.names(t, m); });
  kept = row.sum(kept), left_out = row.sum(left_out), named = row.sum(named);
  const double log_mass = row.log_mass(t);
  if (threadIdx.x == 0) {
    to.weight = pr.weight(row.i, t), to.mass = kept, to.named = static_cast<int64_t>(named);
    to.dead = pr.bucket && to.weight == 0 && !(exp(log_mass) < INFINITY);
    to.shift = pr.renormalize ? log_mass : 0;
    const int64_t unnamed = pr.of.classes - to.named;
    const double rest = unnamed == 0 ? 0 : to.dead ? 1 : unnamed_mass(log_mass);
    to.rest = pr.bucket ? rest + (to.dead || unnamed == 0 ? 0 : left_out) : 0;
    to.spread = pr.uniform && unnamed != 0 ? rest / static_cast<double>(unnamed) : 0;
  }
  __syncthreads();
}

// What teacher t gives the class at m, which it names or not.
__device__ __forceinline__ bool gives(const Row& row, const Teacher& teacher, int t, int m, double* p) {
  bool named = false;
  double sum = 0;
  row.each_of(t, m, [&](int entry) { named = true, sum += exp(row.log_prob(entry) - teacher.shift); });
  *p = teacher.dead ? 0 : sum;
  return named;
}

// The student's log-probability of all that teacher t does not name.
__device__ __forceinline__ double log_rest(const Problem& pr, const Row& row, int t, const LogSum& all,
                                           const LogSum& outside) {
  double top = all.top, sum = 0;
  row.each_head([&](int m) {
    if (!row.names(t, m)) sum += exp(row.logit(m) / pr.tau - top);
  });
  sum = row.sum(sum) + exp(outside.above(top));
  if (sum < kFar) {
    top = outside.top;
    row.each_head([&](int m) {
      if (!row.names(t, m)) top = fmax(top, row.logit(m) / pr.tau);
    });
    top = row.max(top);
    if (top == -INFINITY) return top;
    sum = 0;
    row.each_head([&](int m) {
      if (!row.names(t, m)) sum += exp(row.logit(m) / pr.tau - top);
    });
    sum = row.sum(sum) + exp(outside.above(top));
  }
  return all.of(top) + log(sum);
}

// The first class that nobody names; C or more if there is none.
__device__ __forceinline__ int64_t first_unnamed(const Row& row) {
  double first = row.s.keys[0] == kNoEntry || class_of(row.s.keys[0]) != 0 ? 0 : INFINITY;
  row.each_head([&](int m) {
    const int64_t next = class_of(row.s.keys[m]) + 1;
    int other = m + 1;
    while (other < row.of.entries() && row.s.keys[other] != kNoEntry && class_of(row.s.keys[other]) < next) ++other;
    const bool named = other < row.of.entries() && row.s.keys[other] != kNoEntry && class_of(row.s.keys[other]) == next;
    if (!named) first = fmin(first, static_cast<double>(next));
  });
  return static_cast<int64_t>(-row.max(-first));
}

__global__ void __launch_bounds__(kNamedThreads, 2) stats_kernel(const __grid_constant__ Problem pr, float* all_stats) {
  const Row row{pr.of, shared<NamedScratch>(), blockIdx.x};
  const int teachers = pr.of.teachers;
  float* const stats = all_stats + row.i * (kStats + teachers);
  if (pr.ignored(row.i)) {
    for (int k = threadIdx.x; k < kStats + teachers; k += blockDim.x) stats[k] = 0;
    return;
  }
  row.load_keys();
  const double* const found = row.found();
  const LogSum outside = row.outside(found[1], pr.tau), all = row.all(outside, pr.tau);
  double student = 0, heads = 0;
  row.each_head([&](int m) {
    const double log_q = all.of(row.logit(m) / pr.tau), q = exp(log_q);
    student -= q == 0 ? 0 : q * log_q;
    ++heads;
  });
  student = row.sum(student), heads = row.sum(heads);
  const double log_others = outside.log_share_in(all), others = static_cast<double>(pr.of.classes) - heads;
  if (log_others != -INFINITY) student -= exp(log_others) * (log_others + found[5]);
  const double below = found[6] / pr.tau - others * (all.top + all.log);  // sum of log q where nobody names a class

  Teacher* const known = reinterpret_cast<Teacher*>(row.s.keys + pr.of.sorted);  // for the target, class by class
  double target_outside = 0, target_rest = 0, retained = 0, total = 0;
#pragma unroll 1
  for (int t = 0; t < teachers; ++t) {
    const Teacher& teacher = known[t];
    find_teacher(pr, row, t, known[t]);
    double kl = 0, log_q = 0;
    row.each_head([&](int m) {
      const double mine = all.of(row.logit(m) / pr.tau);
      double p;
      if (gives(row, teacher, t, m, &p)) {
        kl += kl_of(p, mine);
      } else {
        log_q += mine;
      }
    });
    kl = row.sum(kl), log_q = row.sum(log_q) + below;
    if (pr.bucket) kl += kl_of(teacher.rest, log_rest(pr, row, t, all, outside));
    if (teacher.spread != 0) {
      const double unnamed = static_cast<double>(pr.of.classes - teacher.named);
      kl += teacher.spread * (unnamed * log(teacher.spread) - log_q);
    }
    if (threadIdx.x == 0) stats[kStats + t] = static_cast<float>(kl);
    target_outside += weighted(teacher.weight, teacher.spread), target_rest += weighted(teacher.weight, teacher.rest);
    retained += weighted(teacher.weight, teacher.mass), total += teacher.weight;
  }
  __syncthreads();

  const auto target_at = [&](int m) {
    double out = 0;
#pragma unroll 1
    for (int t = 0; t < teachers; ++t) {
      double p;
      out += weighted(known[t].weight, gives(row, known[t], t, m, &p) ? p : known[t].spread);
    }
    return out;
  };
  // Of the largest the first class; NaN is larger than all others.
  const int64_t first = first_unnamed(row);
  double entropy = 0, broken = 0, most = first < pr.of.classes ? target_outside : -INFINITY;
  const double at_first = most;
  row.each_head([&](int m) {
    const double x = target_at(m);
    entropy += entropy_of(x), broken += x != x, most = fmax(most, x);
  });
  entropy = row.sum(entropy), broken = row.sum(broken), most = row.max(most);
  broken += at_first != at_first;
  const auto is_largest = [&](double x) { return broken != 0 ? x != x : x == most; };
  double at = is_largest(at_first) ? static_cast<double>(first) : INFINITY;
  row.each_head([&](int m) {
    if (is_largest(target_at(m))) at = fmin(at, static_cast<double>(class_of(row.s.keys[m])));
  });
  at = -row.max(-at);
  if (threadIdx.x != 0) return;
  entropy += pr.bucket ? entropy_of(target_rest) : others * entropy_of(target_outside);
  stats[0] = static_cast<float>(student), stats[1] = static_cast<float>(entropy);
  stats[2] = static_cast<float>(retained / (total == 0 ? 1 : total));
  stats[3] = at == found[7] ? 1.0f : 0.0f;
}

// --- the host's side

Tensor topk_bucket_stats(const Tensor& found, const Tensor& named, const Tensor& indices, const Tensor& log_probs,
                         std::vector<int64_t> sizes, std::optional<Tensor> weights, std::optional<Tensor> labels_,
                         int64_t classes, double temperature, int64_t ignore_index, Name tail, bool) {
  const OnDevice on(found);
  const NamedTensors entries_of(kOp, found, named, indices, log_probs, sizes, classes);
  const int64_t n = found.size(0), teachers = static_cast<int64_t>(sizes.size());
  Problem pr{};
  pr.of = entries_of.of;
  if (weights) {
    check_shape(kOp, "weights", *weights, {n, teachers});
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float, kOp, ": weights must be float32");
    pr.weights = static_cast<const float*>(weights->const_data_ptr());
    pr.weights_row = weights->stride(0), pr.weights_column = weights->stride(1);
  }
  std::optional<Tensor> labels;
  if (labels_) {
    check_shape(kOp, "labels", *labels_, {n});
    STD_TORCH_CHECK(labels_->scalar_type() == ScalarType::Long, kOp, ": labels must be int64");
    labels = dense(*labels_);
    pr.labels = static_cast<const int64_t*>(labels->const_data_ptr());
  }
  pr.ignore_index = ignore_index, pr.tau = temperature;
  pr.bucket = tail == "bucket", pr.renormalize = tail == "renormalize", pr.uniform = tail == "uniform";
  const Tensor stats = empty(found, {n, kStats + teachers}, ScalarType::Float);
  launch(stats_kernel, entries_of.spread(sizeof(Teacher) * teachers), on, pr, data(stats));
  return stats;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, AMTML_CUDA_KEY, m) { m.impl("topk_bucket_stats", TORCH_BOX(&topk_bucket_stats)); }

}  // namespace amtml::gpu
