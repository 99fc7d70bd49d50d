// Distillation from teachers that give their largest classes only, with one class for all that a teacher does not name:
// value and gradients in one pass over the student's row.
//
//   outcomes of teacher t: its named classes U_t, with p_c, and the rest, with 1 - sum_c p_c
//   q_c = exp(x_c - L), x = z / tau, L = log sum_c exp x_c;   q_rest = exp(R_t - L), R_t = log sum over c not in U_t
//   D_t = sum_o f(p_o, q_o),   D = sum_t w_t D_t,   dD/dw_t = D_t
//   dD_t/dx_c = B_o exp(x_c - log-sum of o) - q_c sum_o B_o,   B_o = q_o df/dq_o, where o is the outcome of class c
//
// Classes that nobody names are swept in the student's precision: but for their share of their own sum they have one
// gradient. What is named, |U| <= K, is computed in double, by sums and never by differences: the others may be far
// below.
#include <algorithm>
#include <numeric>

#include "kd_rows.h"
#include "shares.h"

namespace amtml {
namespace {

constexpr char kOp[] = "topk_kd_loss";
constexpr int kNowhere = -1;

template <class A>
struct Problem {
  int64_t rows, classes, entries;
  std::vector<int64_t> sizes;  // of the teachers' supports
  Matrix student, log_probs, weights;
  const int64_t *indices, *labels;
  const bool* kept;  // whether the support has an entry a class of its own; null: all
  KDSettings set;
  Divergence kind;
  MixtureShares<double> share;

  int64_t teachers() const { return static_cast<int64_t>(sizes.size()); }
  bool ignored(int64_t i) const { return labels && labels[i] == set.ignore_index; }
  bool has_ce() const { return labels && set.ce_weight != 0; }
  bool keeps(int64_t i, int64_t j) const { return !kept || kept[i * entries + j]; }
  double weight(int64_t i, int64_t t) const {
    if (!weights) return 1.0 / static_cast<double>(teachers());
    return static_cast<const A*>(weights.data)[i * weights.row_stride + t * weights.column_stride];
  }
};

// A class that is named, whoever does.
struct Head {
  int64_t index;
  double z, x, e, grad;  // logit; z / tau; exp(x - top) with the top of all; d D / d x
  double share;          // q
  int64_t last;          // the last teacher that names it
  int64_t at;            // its entry there
  bool lost;             // makes reverse KL infinite, and gets no gradient
};

struct Entry {  // a named class of one teacher
  int64_t head;
  double p, b;  // b: q df/dq
};

// Scratch of one thread.
template <class A>
struct Row {
  const Problem<A>& problem;
  Softmax<A> r, r1;             // of the classes that nobody names, at tau, and at 1 where there is a cross-entropy
  Buffer<A> converted, y, out;  // a row; it without what is named; a chunk of the gradient
  Buffer<int> place;            // [C], of a class in `heads`; kNowhere outside
  std::vector<Head> heads;
  std::vector<Entry> entries;
  std::vector<double> log_probs;
  LogSum all, outside;             // of x, over all classes, and over those that nobody names
  double e_outside, grad_outside;  // of these together, like Head's e and grad
  bool outside_lost;
  double total_b;  // sum_t w_t sum_o B_t,o

  explicit Row(const Problem<A>& pr)
      : problem(pr),
        r(pr.classes),
        r1(pr.has_ce() ? pr.classes : 0),
        converted(pr.student.template in_place<A>() ? 0 : pr.classes),
        y(pr.classes),
        out(std::min(pr.classes, kChunk)),
        place(pr.classes),
        log_probs(pr.entries) {
    std::fill_n(place.data(), pr.classes, kNowhere);
    heads.reserve(pr.entries);
    entries.reserve(pr.entries);
  }
};

// The classes of a row that somebody names, and the row without them.
template <class A>
void take_named(Row<A>& row, const A* z, int64_t i) {
  const Problem<A>& pr = row.problem;
  const int64_t* index = pr.indices + i * pr.entries;
  row.heads.clear();
  for (int64_t j = 0; j < pr.entries; ++j) {
    if (!pr.keeps(i, j)) continue;
    int& at = row.place[index[j]];
    if (at != kNowhere) continue;
    at = static_cast<int>(row.heads.size());
    const double logit = z[index[j]];
    row.heads.push_back({index[j], logit, logit / pr.set.temperature, 0, 0, 0, -1, 0, false});
    row.y[index[j]] = -std::numeric_limits<A>::infinity();
  }
}

template <class A>
void forget_named(Row<A>& row) {
  for (const Head& head : row.heads) row.place[head.index] = kNowhere;
}

// Over the classes that nobody names.
template <class A>
LogSum log_sum(const Softmax<A>& of, const A* y, int64_t n, double tau) {
  if (of.m != -std::numeric_limits<A>::infinity()) return {of.m / tau, of.exact_log_sum()};
  const bool broken = std::any_of(y, y + n, [](A x) { return x != x; });
  return {-kInfinity, broken ? std::numeric_limits<double>::quiet_NaN() : 0};
}

// The student's probabilities.
template <class A>
void take_shares(Row<A>& row) {
  double top = row.outside.top, sum = 0;
  for (const Head& head : row.heads) top = head.x > top ? head.x : top;
  row.e_outside = sum = std::exp(row.outside.above(top));
  for (Head& head : row.heads) sum += head.e = std::exp(head.x - top);
  row.all = {top, std::log(sum)};
  for (Head& head : row.heads) head.share = head.e / sum;
}

// The outcomes of a teacher: fills `entries`; returns what is left for the class of all others, or NaN.
template <class A>
double take_entries(Row<A>& row, int64_t i, int64_t t, int64_t first, double weight) {
  const Problem<A>& pr = row.problem;
  const int64_t* index = pr.indices + i * pr.entries + first;
  const double* log_prob = row.log_probs.data() + first;
  const double log_mass = log_of_sum(log_prob, pr.sizes[t]);
  const bool dead = weight == 0 && !(std::exp(log_mass) < kInfinity);  // 0 * NaN is 0
  double left_out = 0;
  row.entries.clear();
  for (int64_t j = 0; j < pr.sizes[t]; ++j) {
    const double p = dead ? 0 : std::exp(log_prob[j]);
    if (!pr.keeps(i, first + j)) {
      left_out += p;
      continue;
    }
    const int64_t at = row.place[index[j]];
    Head& head = row.heads[at];
    if (head.last == t) {  // named twice: the sum of both
      row.entries[head.at].p += p;
      continue;
    }
    head.last = t, head.at = static_cast<int64_t>(row.entries.size());
    row.entries.push_back({at, p, 0});
  }
  if (static_cast<int64_t>(row.entries.size()) == pr.classes) return 0;
  const double rest = dead ? 1 : -std::expm1(log_mass);
  return (rest < 0 ? 0 : rest) + left_out;
}

// D_t, and w_t times its gradients, added to those of the row.
template <Divergence kind, class A>
__attribute__((noinline)) double compare(Row<A>& row, int64_t t, double rest, double weight) {
  const MixtureShares<double> share = row.problem.share;
  const auto log = [](double x) { return std::log(x); };
  const auto log_of = [](double p) { return p == 0 ? -kInfinity : std::log(p); };
  double value = 0, total = 0, mass = 0, lost_mass = 0;
  const auto add = [&](double p, double q, double log_q) {
    mass += p;
    if (kind == Divergence::reverse_kl && p == 0 && q != 0) {
      value += kInfinity, lost_mass += q;  // NaN stays NaN
      return 0.0;
    }
    const auto term = divergence_term<kind>(p, q, log_of(p), log_q, share, log);
    value += term.value, total += term.qb;
    return term.qb;
  };
  for (Entry& entry : row.entries) {
    const double log_q = row.all.of(row.heads[entry.head].x);
    entry.b = add(entry.p, std::exp(log_q), log_q);
  }
  // What the teacher does not name. Where all of it is far below the rest of the row it has a maximum of its own.
  double top = row.all.top, sum = row.e_outside;
  for (const Head& head : row.heads) sum += head.last == t ? 0 : head.e;
  const bool far = sum < 1e-280;
  if (far) {
    top = row.outside.top;
    for (const Head& head : row.heads) top = head.last != t && head.x > top ? head.x : top;
    sum = top == -kInfinity ? 0 : std::exp(row.outside.above(top));
    for (const Head& head : row.heads) sum += head.last == t || top == -kInfinity ? 0 : std::exp(head.x - top);
  }
  const bool none = sum == 0 && row.all.top != -kInfinity;  // the student has none of these classes: a constant
  const double log_rest = none ? -kInfinity : row.all.of(top) + std::log(sum), of_named = total;
  const double b_rest = add(rest, std::exp(log_rest), log_rest);
  if (none) total = of_named;
  value += divergence_constant(kind, mass, share);
  if (kind == Divergence::skew_kl && mass == 0) value = total = 0;  // whatever q is
  if (weight == 0) return value;

  const bool gone = kind == Divergence::reverse_kl && rest == 0;
  row.outside_lost |= gone;
  row.total_b += weight * (total - lost_mass);
  const double by = none ? 0 : weight * b_rest / sum;
  row.grad_outside += by * (none ? 0 : far ? std::exp(row.outside.above(top)) : row.e_outside);
  for (Head& head : row.heads) {
    if (head.last == t) continue;
    head.lost |= gone;
    if (!none) head.grad += by * (far ? std::exp(head.x - top) : head.e);
  }
  for (const Entry& entry : row.entries) {
    Head& head = row.heads[entry.head];
    head.lost |= kind == Divergence::reverse_kl && entry.p == 0;
    head.grad += weight * entry.b;
  }
  return value;
}

template <class A>
double compare(Row<A>& row, int64_t t, double rest, double weight) {
  switch (row.problem.kind) {
    case Divergence::forward_kl:
      return compare<Divergence::forward_kl>(row, t, rest, weight);
    case Divergence::reverse_kl:
      return compare<Divergence::reverse_kl>(row, t, rest, weight);
    case Divergence::jsd:
      return compare<Divergence::jsd>(row, t, rest, weight);
    case Divergence::skew_kl:
      return compare<Divergence::skew_kl>(row, t, rest, weight);
    case Divergence::skew_reverse_kl:
      return compare<Divergence::skew_reverse_kl>(row, t, rest, weight);
    default:
      return compare<Divergence::tvd>(row, t, rest, weight);
  }
}

// D of a row whose classes are taken, and its gradients: to x in the heads and grad_outside, to the weights times
// kl_grad.
template <class A>
double compare_all(Row<A>& row, int64_t i, double kl_grad, A* grad_weights) {
  const Problem<A>& pr = row.problem;
  const double* given = load_row(pr.log_probs, i, pr.entries, row.log_probs.data());
  if (given != row.log_probs.data()) std::copy_n(given, pr.entries, row.log_probs.data());
  row.grad_outside = row.total_b = 0;
  row.outside_lost = false;
  double distance = 0;
  for (int64_t t = 0, first = 0; t < pr.teachers(); first += pr.sizes[t++]) {
    const double weight = pr.weight(i, t), rest = take_entries(row, i, t, first, weight);
    const double own = compare(row, t, rest, weight);
    const bool broken = weight == 0 && !std::isfinite(own);
    if (weight != 0) distance += weight * own;
    if (grad_weights) grad_weights[t] = broken || kl_grad == 0 ? A(0) : static_cast<A>(kl_grad * own);
  }
  for (Head& head : row.heads) head.grad = head.lost ? 0 : head.grad - row.total_b * head.share;
  row.grad_outside =
      row.outside_lost ? 0 : row.grad_outside - row.total_b * std::exp(row.all.of(row.outside.top) + row.outside.log);
  return distance;
}

struct CrossEntropy {
  double value;
  LogSum all, outside;  // at temperature 1, as those of Row
};

// -(1 - s) log q1_y - s / C sum_c log q1_c. mean: of the row's logits, if there is an s.
template <class A>
CrossEntropy cross_entropy(const Row<A>& row, const A* z, int64_t label, double mean) {
  const LogSum outside = log_sum(row.r1, row.y.data(), row.problem.classes, 1);
  const double smoothing = row.problem.set.label_smoothing;
  double top = outside.top;
  for (const Head& head : row.heads) top = head.z > top ? head.z : top;
  double sum = std::exp(outside.above(top));
  for (const Head& head : row.heads) sum += std::exp(head.z - top);
  CrossEntropy ce{0, {top, std::log(sum)}, outside};
  ce.value = ce.all.above(z[label]);
  if (smoothing != 0) ce.value = (1 - smoothing) * ce.value + smoothing * ce.all.above(mean);  // not 0 * infinity
  return ce;
}

// d loss / d z of row i: of the classes that nobody names, then of the label and of those that are named.
template <class A>
AMTML_INLINE void student_gradient(Row<A>& row, const A* z, int64_t i, const CrossEntropy& ce, double ce_grad,
                                   double kl_grad, const Target& grad) {
  const Problem<A>& pr = row.problem;
  constexpr A masked = -std::numeric_limits<A>::infinity();
  const bool has_ce = pr.has_ce();
  const int64_t n = pr.classes, first = i * n, label = has_ce ? pr.labels[i] : -1;
  const double smoothing = pr.set.label_smoothing, flat = ce_grad * smoothing / static_cast<double>(n);
  const double x_grad = kl_grad / pr.set.temperature, of_label = ce_grad * (1 - smoothing);
  const double of_outside = x_grad == 0 ? 0 : x_grad * row.grad_outside;  // teachers without weight may hold NaN
  const double of_outside1 = has_ce ? ce_grad * std::exp(ce.all.of(ce.outside.top) + ce.outside.log) : 0;
  for (int64_t k = 0, start = 0; start < n; ++k, start += kChunk) {
    const int64_t count = std::min(kChunk, n - start);
    const A *e = row.r.e.data() + start, *e1 = row.r1.e.data() + start, *y = row.y.data() + start;
    const A a = static_cast<A>(of_outside) * row.r.by(k), less = static_cast<A>(flat);
    const A b = has_ce ? static_cast<A>(of_outside1) * row.r1.by(k) : A(0);
    A* out = grad.place(first + start, row.out.data());
    if (has_ce) {
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) {
        const A g = a * e[c] + (b * e1[c] - less);
        out[c] = y[c] == masked ? A(0) : g;
      }
      const bool here = label >= start && label < start + count && y[label - start] != masked;
      if (here) out[label - start] -= static_cast<A>(of_label);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < count; ++c) {
        const A g = a * e[c];
        out[c] = y[c] == masked ? A(0) : g;
      }
    }
    grad.write(first + start, count, out);
  }
  for (const Head& head : row.heads) {
    double g = x_grad == 0 ? 0 : x_grad * head.grad;
    if (has_ce) g += ce_grad * std::exp(ce.all.of(head.z)) - flat - (head.index == label ? of_label : 0);
    const A made = z[head.index] == masked ? A(0) : static_cast<A>(g);
    grad.scatter(first, &head.index, 1, &made);
  }
}

template <class A>
AMTML_INLINE void run_row(Row<A>& row, int64_t i, const KDPass<A>& pass) {
  const Problem<A>& pr = row.problem;
  const KDSettings& set = pr.set;
  const int64_t n = pr.classes;
  A* grad_weights = pass.grad_weights ? pass.grad_weights + i * pr.teachers() : nullptr;
  if (pr.ignored(i)) {
    if (pass.grad_student) pass.grad_student.clear(i * n, n);
    if (grad_weights) std::fill_n(grad_weights, pr.teachers(), A(0));
    return;
  }
  const A* z = load_row(pr.student, i, n, row.converted.data());
  std::copy_n(z, n, row.y.data());
  take_named(row, z, i);
  row.r.begin(static_cast<A>(1 / set.temperature));
  row.r1.begin(1);
  const Ahead next = pr.student.ahead(i + 1, pr.rows);
  for (int64_t k = 0, first = 0; first < n; ++k, first += kChunk) {
    const int64_t count = std::min(kChunk, n - first);
    row.r.add(k, row.y.data() + first, count, next.from(first));
    if (pr.has_ce()) row.r1.add(k, row.y.data() + first, count, row.r);
  }
  row.r.end(true);
  if (pr.has_ce()) row.r1.end(true);
  row.outside = log_sum(row.r, row.y.data(), n, set.temperature);
  take_shares(row);
  const double g = pass.grad_loss ? pass.grad_loss[pass.each_row ? i : 0] : 1;
  const double ce_grad = g * set.ce_weight * pass.scale.ce, kl_grad = g * set.kl_weight * set.kl_scale * pass.scale.kl;
  pass.kl[i] = set.kl_scale * compare_all(row, i, kl_grad, grad_weights);
  CrossEntropy ce{};
  if (pr.has_ce()) {
    double mean = 0;
    if (set.label_smoothing != 0) {
      const A top = maximum(z, n), near = top - top == 0 ? top : A(0);  // beside it the differences keep their digits
      mean = near + block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) { return z[c] - near; }) / n;
    }
    ce = cross_entropy(row, z, pr.labels[i], mean);
    pass.ce[i] = ce.value;
  }
  if (pass.grad_student) student_gradient(row, z, i, ce, ce_grad, kl_grad, pass.grad_student);
  forget_named(row);
}

struct Inputs {  // owns what Problem points to
  Tensor indices;
  std::optional<Tensor> kept, labels;
  ScalarType wide;

  Inputs(const Tensor& student, const Tensor& given_indices, const std::optional<Tensor>& given_kept,
         const Tensor& log_probs, const std::vector<int64_t>& sizes, const std::optional<Tensor>& weights,
         const std::optional<Tensor>& given_labels, int64_t ignore_index)
      : indices(dense(given_indices)), wide(wide_dtype(student.scalar_type())) {
    STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, kOp, ": student must be [N, C] with C >= 1");
    const int64_t n = student.size(0), c = student.size(1);
    const int64_t entries = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    check_shape(kOp, "indices", indices, {n, entries});
    if (given_kept) {
      check_shape(kOp, "kept", *given_kept, {n, entries});
      STD_TORCH_CHECK(given_kept->scalar_type() == ScalarType::Bool, kOp, ": kept must be bool");
      kept = dense(*given_kept);
    }
    check_shape(kOp, "log_probs", log_probs, {n, entries});
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, kOp, ": indices must be int64");
    if (log_probs.scalar_type() == ScalarType::Double) wide = ScalarType::Double;
    if (weights) {
      check_shape(kOp, "weights", *weights, {n, static_cast<int64_t>(sizes.size())});
      if (weights->scalar_type() == ScalarType::Double) wide = ScalarType::Double;
      STD_TORCH_CHECK(weights->scalar_type() == wide, kOp, ": weights must be float32, or float64 if an input is");
    }
    labels = checked_labels(kOp, given_labels, n, c, ignore_index);
    if (weights) check_weights(kOp, *weights, labels, ignore_index);
    check_indices(kOp, indices, labels, c, ignore_index);
  }
};

std::tuple<Tensor, Tensor, Tensor> topk_bucket_loss(std::optional<Tensor> grad_loss, const Tensor& student,
                                                    const Tensor& indices, std::optional<Tensor> kept,
                                                    const Tensor& log_probs, std::vector<int64_t> sizes,
                                                    std::optional<Tensor> weights, std::optional<Tensor> labels,
                                                    double temperature, double ce_weight, double kl_weight,
                                                    double kl_scale, Name tail, Name reduction, int64_t ignore_index,
                                                    double label_smoothing, Name divergence, double beta,
                                                    bool need_student_grad, bool need_weights_grad) {
  const DivergenceSettings settings(divergence, beta, tail, {}, temperature, false, ce_weight, kl_weight, reduction,
                                    ignore_index, label_smoothing);
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing};
  const Inputs inputs(student, indices, kept, log_probs, sizes, weights, labels, ignore_index);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(!need_student_grad || grad_loss || student.scalar_type() == inputs.wide, kOp,
                  ": the gradient of a 16-bit student, or beside float64, is made in backward");
  const Shape value = set.each_row() ? Shape{n} : Shape{};
  if (grad_loss) check_shape(kOp, "grad_loss", *grad_loss, value);
  const Tensor loss = empty(student, value, inputs.wide);
  const Tensor grad_student = empty_or_none(student, need_student_grad, {n, c}, student.scalar_type());
  const Tensor grad_weights = empty_or_none(student, need_weights_grad, {n, count}, inputs.wide);
  dispatch_wide(inputs.wide, [&](auto zero) {
    using A = decltype(zero);
    const Tensor incoming = grad_loss ? dense(*grad_loss, inputs.wide) : loss;
    const Problem<A> pr{n,
                        c,
                        log_probs.size(1),
                        sizes,
                        Matrix(student),
                        Matrix(log_probs),
                        Matrix(weights),
                        static_cast<const int64_t*>(inputs.indices.const_data_ptr()),
                        inputs.labels ? static_cast<const int64_t*>(inputs.labels->const_data_ptr()) : nullptr,
                        inputs.kept ? static_cast<const bool*>(inputs.kept->const_data_ptr()) : nullptr,
                        set,
                        settings.kind,
                        shares_of<double>(settings.kind, beta)};
    std::vector<double> ce_rows(n), kl_rows(n);
    KDPass<A> pass{};
    pass.ce = ce_rows.data(), pass.kl = kl_rows.data();
    pass.grad_loss = grad_loss ? static_cast<const A*>(incoming.const_data_ptr()) : nullptr;
    pass.each_row = set.each_row();
    pass.scale = reduction_scale(pr.labels, n, c, set);
    if (need_student_grad) pass.grad_student = Target(grad_student);
    pass.grad_weights = data<A>(grad_weights);
    in_shares(n, 2 * c, [&](Shares& next) {
      Row<A> row(pr);
      vectorized([&] AMTML_BODY() {
        for (Share share; next(share);) {
          for (int64_t i = share.begin; i < share.end; ++i) run_row(row, i, pass);
        }
      });
    });
    reduce_rows<A>(set, pass.scale, ce_rows, kl_rows, data<A>(loss), nullptr, nullptr);
  });
  return {loss, grad_student, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) { m.impl("topk_bucket_loss", TORCH_BOX(&topk_bucket_loss)); }

}  // namespace
}  // namespace amtml
