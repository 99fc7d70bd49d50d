// Statistics of rows whose teachers give their largest classes only, from what topk_bucket.cpp finds in the student's
// row: entropies, the teachers' KLs, what they retain, and whether target and student are largest at one class.
//
//   q = softmax(z / tau), p_t of teacher t: its named classes, and what the tail makes of the others
//   KL_t = sum_c p_t (log p_t - log q), with tail "bucket" over its named classes and one class for all others
//
// All in double, over the K entries of a row and T K pairs of a teacher and a class that another names.
#include <algorithm>
#include <numeric>

#include "kd_rows.h"
#include "shares.h"

namespace amtml {
namespace {

constexpr char kOp[] = "topk_kd_loss";
constexpr int64_t kStats = 4;  // numbers a row, but for the teachers' KLs; _topk_bucket_kernels.py has their order

struct Problem {
  int64_t rows, classes, entries;
  std::vector<int64_t> sizes;  // of the teachers' supports
  Matrix log_probs, weights;
  const double *found, *named;  // what the sweep has of rows and of entries
  const int64_t *indices, *labels;
  int64_t ignore_index;
  double temperature;
  bool bucket, renormalize, uniform;

  int64_t teachers() const { return static_cast<int64_t>(sizes.size()); }
  bool ignored(int64_t i) const { return labels && labels[i] == ignore_index; }
};

// A class that is named, whoever does.
struct Head {
  int64_t index;
  double x, e, log_q;  // z / tau; exp(x - top) with the top of all
  double target;
  double p;      // of the teacher at hand
  int64_t last;  // the last teacher that names it
};

struct Row {  // scratch of one thread
  const Problem& problem;
  std::vector<int64_t> order;  // of entries, by class
  std::vector<int64_t> head_of;
  std::vector<Head> heads;
  std::vector<double> log_probs, weights;

  explicit Row(const Problem& pr)
      : problem(pr), order(pr.entries), head_of(pr.entries), log_probs(pr.entries), weights(pr.teachers()) {
    heads.reserve(pr.entries);
  }
};

double entropy_of(double p) { return p == 0 ? 0 : -p * std::log(p); }
double kl_of(double p, double log_q) { return p == 0 ? 0 : p * (std::log(p) - log_q); }
double weighted(double w, double x) { return w == 0 && !std::isfinite(x) ? 0 : w * x; }

// The classes that somebody names, in their order, and where each entry belongs.
void take_heads(Row& row, int64_t i) {
  const Problem& pr = row.problem;
  const int64_t* index = pr.indices + i * pr.entries;
  const double* z = pr.named + i * pr.entries;
  std::iota(row.order.begin(), row.order.end(), int64_t{0});
  std::sort(row.order.begin(), row.order.end(), [&](int64_t a, int64_t b) { return index[a] < index[b]; });
  row.heads.clear();
  for (int64_t j : row.order) {
    if (index[j] == kNobody) {
      row.head_of[j] = -1;
      continue;
    }
    if (row.heads.empty() || row.heads.back().index != index[j]) {
      row.heads.push_back({index[j], z[j] / pr.temperature, 0, 0, 0, 0, -1});
    }
    row.head_of[j] = static_cast<int64_t>(row.heads.size()) - 1;
  }
}

struct Teacher {
  double mass = 0;              // of what it gives, in the classes that count
  double rest = 0, spread = 0;  // of all that it does not name: together, and of each
  int64_t named = 0;            // classes
};

// What teacher t gives: fills `p` of the heads that it names.
Teacher take_teacher(Row& row, int64_t t, int64_t first) {
  const Problem& pr = row.problem;
  const double* log_prob = row.log_probs.data() + first;
  const double log_mass = log_of_sum(log_prob, pr.sizes[t]), all = std::exp(log_mass);
  const bool dead = pr.bucket && row.weights[t] == 0 && !(all < kInfinity);  // 0 * NaN is 0
  Teacher out;
  double left_out = 0;
  for (int64_t j = 0; j < pr.sizes[t]; ++j) {
    const double given = dead ? 0 : std::exp(log_prob[j]);
    if (row.head_of[first + j] < 0) {
      left_out += given;
      continue;
    }
    const double p = pr.renormalize ? std::exp(log_prob[j] - log_mass) : given;
    Head& head = row.heads[row.head_of[first + j]];
    head.p = head.last == t ? head.p + p : p;  // named twice: the sum of both
    out.named += head.last != t;
    head.last = t;
    out.mass += given;
  }
  const double rest = dead ? 1 : -std::expm1(log_mass);
  const int64_t unnamed = pr.classes - out.named;
  if (unnamed == 0) return out;
  if (pr.bucket) out.rest = (rest < 0 ? 0 : rest) + left_out;
  if (pr.uniform) out.spread = (rest < 0 ? 0 : rest) / static_cast<double>(unnamed);
  return out;
}

// The student's log-probability of all that teacher t does not name. Where all of it is far below the rest of the row
// it has a maximum of its own.
double log_rest(const Row& row, int64_t t, const LogSum& all, const LogSum& outside) {
  double top = all.top, sum = std::exp(outside.above(top));
  for (const Head& head : row.heads) sum += head.last == t ? 0 : head.e;
  if (sum < 1e-280) {
    top = outside.top;
    for (const Head& head : row.heads) top = head.last != t && head.x > top ? head.x : top;
    if (top == -kInfinity) return -kInfinity;
    sum = std::exp(outside.above(top));
    for (const Head& head : row.heads) sum += head.last == t ? 0 : std::exp(head.x - top);
  }
  return all.of(top) + std::log(sum);
}

// Whether the target is largest at class `best`, of several largest ones at the first. `outside`: at the first class
// that nobody names, unless all are named. NaN is larger than all others.
bool largest_at(const Row& row, double outside, int64_t best) {
  int64_t first = 0;
  for (const Head& head : row.heads) first += head.index == first;
  int64_t at = first;
  double most = first == row.problem.classes ? -1 : outside;
  for (const Head& head : row.heads) {
    const double x = head.target;
    const bool same = x == most || (x != x && most != most), more = x > most || (x != x && most == most);
    if (more || (same && head.index < at)) most = x, at = head.index;
  }
  return at == best;
}

template <class A>
void run_row(Row& row, int64_t i, A* stats) {
  const Problem& pr = row.problem;
  const double* found = pr.found + i * kFound;
  if (pr.ignored(i)) {
    std::fill_n(stats, kStats + pr.teachers(), A(0));
    return;
  }
  if (pr.weights) {
    const double* w = load_row(pr.weights, i, pr.teachers(), row.weights.data());
    if (w != row.weights.data()) std::copy_n(w, pr.teachers(), row.weights.data());
  } else {
    std::fill(row.weights.begin(), row.weights.end(), 1.0 / static_cast<double>(pr.teachers()));
  }
  const double* given = load_row(pr.log_probs, i, pr.entries, row.log_probs.data());
  if (given != row.log_probs.data()) std::copy_n(given, pr.entries, row.log_probs.data());
  take_heads(row, i);

  const bool none = found[1] == -kInfinity;  // each class with a probability is named
  const LogSum outside = none ? LogSum{-kInfinity, 0} : LogSum{found[0] / pr.temperature, found[1]};
  LogSum all{outside.top, 0};
  for (const Head& head : row.heads) all.top = head.x > all.top ? head.x : all.top;
  double sum = std::exp(outside.above(all.top));
  for (Head& head : row.heads) sum += head.e = std::exp(head.x - all.top);
  all.log = std::log(sum);
  double student = 0, below = 0;  // entropy; sum of log q where nobody names a class
  for (Head& head : row.heads) {
    head.log_q = all.of(head.x);
    const double q = head.e / sum;
    student -= q == 0 ? 0 : q * head.log_q;
  }
  const double log_others = all.of(outside.top) + outside.log;
  if (log_others != -kInfinity) student -= std::exp(log_others) * (log_others + found[5]);
  const int64_t others = pr.classes - static_cast<int64_t>(row.heads.size());
  if (pr.uniform) below = found[6] / pr.temperature - others * (all.top + all.log);

  double target_outside = 0, target_rest = 0, retained = 0, total = 0;
  for (int64_t t = 0, first = 0; t < pr.teachers(); first += pr.sizes[t++]) {
    const Teacher teacher = take_teacher(row, t, first);
    const double w = row.weights[t];
    double kl = 0, log_q = below;  // log_q: summed over what t does not name
    for (Head& head : row.heads) {
      const bool names = head.last == t;
      if (names) {
        kl += kl_of(head.p, head.log_q);
      } else {
        log_q += head.log_q;
      }
      head.target += weighted(w, names ? head.p : teacher.spread);
    }
    if (pr.bucket) kl += kl_of(teacher.rest, log_rest(row, t, all, outside));
    if (teacher.spread != 0) {
      const double unnamed = static_cast<double>(pr.classes - teacher.named);
      kl += teacher.spread * (unnamed * std::log(teacher.spread) - log_q);
    }
    stats[kStats + t] = static_cast<A>(kl);
    target_outside += weighted(w, teacher.spread), target_rest += weighted(w, teacher.rest);
    retained += weighted(w, teacher.mass), total += w;
  }
  double target = pr.bucket ? entropy_of(target_rest) : static_cast<double>(others) * entropy_of(target_outside);
  for (const Head& head : row.heads) target += entropy_of(head.target);
  stats[0] = static_cast<A>(student), stats[1] = static_cast<A>(target);
  stats[2] = static_cast<A>(retained / (total == 0 ? 1 : total));
  stats[3] = largest_at(row, target_outside, static_cast<int64_t>(found[7])) ? A(1) : A(0);
}

Tensor topk_bucket_stats(const Tensor& found_, const Tensor& named_, const Tensor& indices_, const Tensor& log_probs,
                         std::vector<int64_t> sizes, std::optional<Tensor> weights, std::optional<Tensor> labels_,
                         int64_t classes, double temperature, int64_t ignore_index, Name tail, bool in_float64) {
  const Tensor found = dense(found_), named = dense(named_), indices = dense(indices_);
  const int64_t n = found.size(0), teachers = static_cast<int64_t>(sizes.size());
  const int64_t entries = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  check_shape(kOp, "found", found, {n, kFound});
  for (const auto& [name, t] : {std::pair("z", &named), std::pair("indices", &indices)}) {
    check_shape(kOp, name, *t, {n, entries});
  }
  check_shape(kOp, "log_probs", log_probs, {n, entries});
  STD_TORCH_CHECK(found.scalar_type() == ScalarType::Double && named.scalar_type() == ScalarType::Double, kOp,
                  ": found and z must be float64");
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, kOp, ": indices must be int64");
  STD_TORCH_CHECK(!labels_ || labels_->scalar_type() == ScalarType::Long, kOp, ": labels must be int64");
  if (weights) check_shape(kOp, "weights", *weights, {n, teachers});
  if (labels_) check_shape(kOp, "labels", *labels_, {n});
  std::optional<Tensor> labels;
  if (labels_) labels = dense(*labels_);
  const Problem pr{n,
                   classes,
                   entries,
                   sizes,
                   Matrix(log_probs),
                   Matrix(weights),
                   static_cast<const double*>(found.const_data_ptr()),
                   static_cast<const double*>(named.const_data_ptr()),
                   static_cast<const int64_t*>(indices.const_data_ptr()),
                   labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr,
                   ignore_index,
                   temperature,
                   tail == "bucket",
                   tail == "renormalize",
                   tail == "uniform"};
  const ScalarType wide = in_float64 ? ScalarType::Double : ScalarType::Float;
  const Tensor stats = empty(found, {n, kStats + teachers}, wide);
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    in_shares(n, 32 * (entries + teachers), [&](Shares& next) {
      Row row(pr);
      for (Share share; next(share);) {
        for (int64_t i = share.begin; i < share.end; ++i) run_row(row, i, data<A>(stats) + i * (kStats + teachers));
      }
    });
  });
  return stats;
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) { m.impl("topk_bucket_stats", TORCH_BOX(&topk_bucket_stats)); }

}  // namespace
}  // namespace amtml
