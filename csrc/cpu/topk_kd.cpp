// Distillation from teachers that give their largest classes only: cross-entropy, KL and their gradients, a row at a
// time.
//
//   q = softmax(z / tau), p = sum_t w_t p_t, KL = sum_c p (log p - log q)
//   dKL/dz = (P q - p) / tau with P = sum_c p,   dKL/dw_t = sum_c p_t (log p - log q + 1)
//
// Outside the union U of what the teachers name, p is one number b (0 but for the tail "uniform"). So the student's row
// is swept as for a constant p = b, and what is different on U is set right afterwards: |U| <= K, the sum of all k_t.
#include <algorithm>

#include "../arithmetic.h"
#include "kd_rows.h"
#include "shares.h"

namespace amtml {
namespace {

constexpr char kOp[] = "topk_kd_loss";

enum class Tail { renormalize, ignore, uniform };

Tail tail_of(const std::string& name) {
  return name == "renormalize" ? Tail::renormalize : name == "ignore" ? Tail::ignore : Tail::uniform;
}

template <class A>
struct Problem {
  int64_t rows, classes;
  std::vector<int64_t> sizes;  // of the teachers' supports
  int64_t entries;             // their sum
  Matrix student, log_probs, weights;
  const int64_t *indices, *labels;
  KDSettings set;
  Tail tail;

  int64_t teachers() const { return static_cast<int64_t>(sizes.size()); }
  bool ignored(int64_t i) const { return labels && labels[i] == set.ignore_index; }
  bool has_ce() const { return labels && set.ce_weight != 0; }
  A weight(int64_t i, int64_t t) const {
    if (!weights) return A(1) / A(teachers());
    return static_cast<const A*>(weights.data)[i * weights.row_stride + t * weights.column_stride];
  }
};

constexpr int kNowhere = -1;

template <class A>
struct Row : StudentRow<A> {  // scratch of one thread
  const Problem<A>& problem;
  Buffer<int> place;              // [C], of a class in the union; kNowhere outside it
  Buffer<int64_t> classes;        // the union
  int64_t named = 0;              // its size
  Buffer<A> entry;                // [K] log-probabilities, then probabilities before they are divided by their sum
  Buffer<A> probs;                // [T, K]: p_t of the union
  Buffer<A> p, ratio;             // [K]: of the union the mixture, and log p - log q (0 where p is 0)
  Buffer<A> out;                  // of one chunk
  std::vector<A> weight, spread;  // w_t, and p_t of every class that teacher t does not name
  std::vector<double> mass;       // sum_c p_t
  A outside = 0, total = 0;       // the mixture outside the union, and its mass

  explicit Row(const Problem<A>& pr)
      : StudentRow<A>(pr.student, pr.classes, pr.has_ce()),
        problem(pr),
        place(pr.classes),
        classes(pr.entries),
        entry(pr.entries),
        probs(pr.entries * pr.teachers()),
        p(pr.entries),
        ratio(pr.entries),
        out(std::min(pr.classes, kChunk)),
        weight(pr.teachers()),
        spread(pr.teachers()),
        mass(pr.teachers()) {
    std::fill_n(place.data(), pr.classes, kNowhere);
  }

  A* of_teacher(int64_t t) { return probs.data() + t * problem.entries; }
  const A* of_teacher(int64_t t) const { return probs.data() + t * problem.entries; }
  int64_t others() const { return problem.classes - named; }
};

// Probabilities of one teacher: fills its row of `probs`, where -1 stands for a class that it does not name.
template <class A>
AMTML_INLINE void load_teacher(Row<A>& row, int64_t t, const int64_t* index, const A* log_prob, A* entry) {
  const Problem<A>& pr = row.problem;
  const int64_t k = pr.sizes[t];
  const bool renormalize = pr.tail == Tail::renormalize;
  const A top = renormalize ? maximum(log_prob, k) : A(0);
  double sum = 0;
  for (int64_t j = 0; j < k; ++j) sum += entry[j] = std::exp(log_prob[j] - top);
  const bool dead = row.weight[t] == 0 && !(sum < std::numeric_limits<double>::infinity());  // 0 * NaN is 0
  const A factor = dead ? A(0) : renormalize ? static_cast<A>(1 / sum) : A(1);
  A* p = row.of_teacher(t);
  std::fill_n(p, pr.entries, A(-1));
  int64_t different = 0;
  for (int64_t j = 0; j < k; ++j) {
    int& at = row.place[index[j]];
    if (at == kNowhere) {
      at = static_cast<int>(row.named);
      row.classes[row.named++] = index[j];
    }
    const A value = dead ? A(0) : entry[j] * factor;
    const bool first = p[at] == -1;
    p[at] = first ? value : p[at] + value;  // named twice: the sum of both
    different += first;
  }
  const int64_t unnamed = pr.classes - different;
  const double rest = pr.tail == Tail::uniform && unnamed > 0 && !dead && !(sum > 1) ? 1 - sum : 0;
  row.spread[t] = unnamed > 0 ? static_cast<A>(rest / static_cast<double>(unnamed)) : A(0);
  row.mass[t] = dead ? 0 : renormalize ? sum / sum : sum + rest;  // 1, or NaN
}

template <class A>
AMTML_INLINE void load_teachers(Row<A>& row, int64_t i) {
  const Problem<A>& pr = row.problem;
  const int64_t* index = pr.indices + i * pr.entries;
  const A* log_prob = load_row(pr.log_probs, i, pr.entries, row.entry.data());
  for (int64_t t = 0, start = 0; t < pr.teachers(); start += pr.sizes[t++]) {
    row.weight[t] = pr.weight(i, t);
    load_teacher(row, t, index + start, log_prob + start, row.entry.data() + start);
  }
  A* p = row.p.data();
  std::fill_n(p, row.named, A(0));
  row.outside = 0;
  double total = 0;
  for (int64_t t = 0; t < pr.teachers(); ++t) {
    const A w = row.weight[t], spread = row.spread[t];
    A* of_t = row.of_teacher(t);
#pragma omp simd
    for (int64_t u = 0; u < row.named; ++u) {
      of_t[u] = of_t[u] == -1 ? spread : of_t[u];
      p[u] += w * of_t[u];
    }
    row.outside += w * spread;
    total += w * row.mass[t];
  }
  row.total = static_cast<A>(total);
}

template <class A>
AMTML_INLINE void forget_union(Row<A>& row) {
  for (int64_t u = 0; u < row.named; ++u) row.place[row.classes[u]] = kNowhere;
  row.named = 0;
}

// The KL, and if grad_weights is not null its gradient there times kl_grad.
template <class A>
AMTML_INLINE double divergence(Row<A>& row, A kl_grad, A* grad_weights) {
  const Problem<A>& pr = row.problem;
  const A *z = row.q.x, *p = row.p.data();
  A* ratio = row.ratio.data();
  double kl = block_sum<A>(row.named, [&](int64_t u) __attribute__((always_inline)) {
    ratio[u] = if_mass(p[u], log_positive(p[u] == 0 ? A(1) : p[u]) - row.q.log(row.classes[u]));
    return if_mass(p[u], p[u] * ratio[u]);
  });
  double outside = 0;  // sum over the others of log b - log q
  if (row.outside != 0 && row.others() > 0) {
    const int* place = row.place.data();
    const A m = row.q.m;
    const double below = block_sum<A>(
        pr.classes, [&](int64_t c) __attribute__((always_inline)) { return place[c] == kNowhere ? m - z[c] : A(0); });
    outside = row.others() * (std::log(static_cast<double>(row.outside)) + row.q.log_sum) + below * row.q.per_tau;
    kl += row.outside * outside;
  }
  for (int64_t t = 0; grad_weights && t < pr.teachers(); ++t) {
    const A *of_t = row.of_teacher(t), spread = row.spread[t];
    double sum = row.mass[t];
    sum += block_sum<A>(
        row.named, [&](int64_t u) __attribute__((always_inline)) { return mixture_gradient(of_t[u], p[u], ratio[u]); });
    if (spread != 0) sum += spread * (row.outside == 0 ? -static_cast<double>(row.others()) : outside);
    grad_weights[t] = kl_grad == 0 ? A(0) : static_cast<A>(kl_grad * sum);
  }
  return row.total == 0 ? kl : kl + row.total * row.q.rest;
}

// d loss / d z of row i: of all classes as if p were `outside` everywhere, then of the label and of the union.
template <class A>
AMTML_INLINE void student_gradient(Row<A>& row, int64_t i, int64_t label, A ce_grad, A kl_grad, const Target& grad) {
  const Problem<A>& pr = row.problem;
  constexpr A masked = -std::numeric_limits<A>::infinity();
  const bool has_ce = pr.has_ce();
  const A scale = kl_grad * row.q.per_tau;
  const A smoothing = static_cast<A>(pr.set.label_smoothing), flat = ce_grad * (smoothing / pr.classes);
  const A *z = row.q.x, *e = row.q.e.data(), *e1 = row.q1.e.data();
  const int64_t first = i * pr.classes;
  // A teacher without weight in the loss may hold NaN.
  const A a = scale == 0 ? A(0) : row.total, b = scale == 0 ? A(0) : row.outside;
  for (int64_t k = 0, start = 0; start < pr.classes; ++k, start += kChunk) {
    const int64_t end = std::min(start + kChunk, pr.classes);
    const A by = row.q.by(k), ce_q = has_ce ? ce_grad * row.q1.by(k) : A(0);
    A* made = grad.place(first + start, row.out.data());
    A* out = made - start;
    if (has_ce) {
#pragma omp simd
      for (int64_t c = start; c < end; ++c) {
        const A g = kl_gradient(scale, a, e[c] * by, b) + (ce_q * e1[c] - flat);
        out[c] = z[c] == masked ? A(0) : g;
      }
    } else {
#pragma omp simd
      for (int64_t c = start; c < end; ++c) {
        const A g = kl_gradient(scale, a, e[c] * by, b);
        out[c] = z[c] == masked ? A(0) : g;
      }
    }
    grad.write(first + start, end - start, made);
  }
  auto at = [&](int64_t c, A p) __attribute__((always_inline)) {
    const int64_t k = c / kChunk;
    A g = kl_gradient(scale, a, e[c] * row.q.by(k), p);
    if (has_ce) g += ce_grad * row.q1.by(k) * e1[c] - flat - (c == label ? ce_grad * (1 - smoothing) : A(0));
    return z[c] == masked ? A(0) : g;
  };
  if (has_ce) {
    const A of_label = at(label, b);
    grad.scatter(first, &label, 1, &of_label);
  }
  A* of_union = row.ratio.data();  // not read any more
  for (int64_t u = 0; u < row.named; ++u) of_union[u] = at(row.classes[u], scale == 0 ? A(0) : row.p[u]);
  grad.scatter(first, row.classes.data(), row.named, of_union);
}

struct Inputs {  // owns what Problem points to
  Tensor indices;
  std::optional<Tensor> labels;
  ScalarType wide;

  Inputs(const Tensor& student, const Tensor& given_indices, const Tensor& log_probs, const std::vector<int64_t>& sizes,
         const std::optional<Tensor>& weights, const std::optional<Tensor>& given_labels, int64_t ignore_index)
      : indices(dense(given_indices)), wide(wide_dtype(student.scalar_type())) {
    STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, kOp, ": student must be [N, C] with C >= 1");
    STD_TORCH_CHECK(!sizes.empty(), kOp, ": sizes must hold at least one teacher");
    const int64_t n = student.size(0), c = student.size(1);
    int64_t entries = 0;
    for (int64_t k : sizes) {
      STD_TORCH_CHECK(k >= 1 && k <= c, kOp, ": sizes must be in [1, ", c, "], got ", k);
      entries += k;
    }
    check_shape(kOp, "indices", indices, {n, entries});
    check_shape(kOp, "log_probs", log_probs, {n, entries});
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, kOp, ": indices must be int64");
    if (log_probs.scalar_type() == ScalarType::Double) wide = ScalarType::Double;
    if (weights) {
      check_shape(kOp, "weights", *weights, {n, static_cast<int64_t>(sizes.size())});
      if (weights->scalar_type() == ScalarType::Double) wide = ScalarType::Double;
      STD_TORCH_CHECK(weights->scalar_type() == wide, kOp, ": weights must be float32, or float64 if an input is");
    }
    labels = checked_labels(kOp, given_labels, n, c, ignore_index);
    check_indices(kOp, indices, labels, c, ignore_index);
  }

  template <class A>
  Problem<A> problem(const Tensor& student, const Tensor& log_probs, const std::vector<int64_t>& sizes,
                     const std::optional<Tensor>& weights, const KDSettings& set) const {
    return {student.size(0),
            student.size(1),
            sizes,
            log_probs.size(1),
            Matrix(student),
            Matrix(log_probs),
            Matrix(weights),
            static_cast<const int64_t*>(indices.const_data_ptr()),
            labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr,
            set,
            tail_of(set.mode)};
  }
};

template <class A>
AMTML_INLINE void run_row(Row<A>& row, int64_t i, const KDPass<A>& pass) {
  const Problem<A>& pr = row.problem;
  const KDSettings& set = pr.set;
  const int64_t c = pr.classes, label = pr.labels ? pr.labels[i] : 0;
  A* grad_weights = pass.grad_weights ? pass.grad_weights + i * pr.teachers() : nullptr;
  if (pr.ignored(i)) {
    if (pass.forward()) std::fill_n(pass.stats + i * 3, 3, A(0));
    if (pass.grad_student) pass.grad_student.clear(i * c, c);
    if (grad_weights) std::fill_n(grad_weights, pr.teachers(), A(0));
    return;
  }
  const double g = pass.incoming(i);
  const A ce_grad = static_cast<A>(g * set.ce_weight * pass.scale.ce);
  const A kl_grad = static_cast<A>(g * set.kl_weight * set.kl_scale * pass.scale.kl);
  const A per_tau = static_cast<A>(1 / set.temperature);
  A s[3];
  if (!pass.forward()) std::copy_n(pass.saved + i * 3, 3, s);
  row.load(pr.student, i, c, per_tau, s, !pass.forward(), pr.student.ahead(i + 1, pr.rows));
  load_teachers(row, i);
  if (pass.forward() || grad_weights) {
    const double kl = divergence(row, kl_grad, grad_weights);
    if (pass.forward()) pass.kl[i] = set.kl_scale * kl;
  }
  if (pass.forward()) {
    std::copy_n(s, 3, pass.stats + i * 3);
    if (pr.has_ce()) pass.ce[i] = cross_entropy(row, c, label, set.label_smoothing);
  }
  if (pass.grad_student) student_gradient(row, i, label, ce_grad, kl_grad, pass.grad_student);
  forget_union(row);
}

template <class A>
void run_rows(const Problem<A>& pr, const KDPass<A>& pass) {
  in_shares(pr.rows, 2 * pr.classes, [&](Shares& next) {
    Row<A> row(pr);
    vectorized([&] AMTML_BODY() {
      for (Share share; next(share);) {
        for (int64_t i = share.begin; i < share.end; ++i) run_row(row, i, pass);
      }
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> topk_kd_fwd(const Tensor& student, const Tensor& indices,
                                                       const Tensor& log_probs, std::vector<int64_t> sizes,
                                                       std::optional<Tensor> weights, std::optional<Tensor> labels,
                                                       double temperature, double ce_weight, double kl_weight,
                                                       double kl_scale, Name tail, Name reduction, int64_t ignore_index,
                                                       double label_smoothing, bool need_student_grad,
                                                       bool need_weights_grad) {
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing};
  const Inputs inputs(student, indices, log_probs, sizes, weights, labels, ignore_index);
  if (weights) check_weights(kOp, *weights, inputs.labels, ignore_index);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(sizes.size());
  STD_TORCH_CHECK(!need_student_grad || student.scalar_type() == inputs.wide, kOp,
                  ": the forward gradient of a 16-bit student is made in backward");
  auto make = [&](bool wanted, const Shape& shape) { return empty_or_none(student, wanted, shape, inputs.wide); };
  const Tensor loss = make(true, set.each_row() ? Shape{n} : Shape{}), stats = make(true, {n, 3});
  const Tensor grad_student = make(need_student_grad, {n, c}), grad_weights = make(need_weights_grad, {n, count});
  dispatch_wide(inputs.wide, [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> pr = inputs.problem<A>(student, log_probs, sizes, weights, set);
    std::vector<double> ce_rows(n), kl_rows(n);
    KDPass<A> pass{};
    pass.stats = data<A>(stats), pass.ce = ce_rows.data(), pass.kl = kl_rows.data();
    pass.scale = reduction_scale(pr.labels, n, c, set);
    if (need_student_grad) pass.grad_student = Target(grad_student);
    pass.grad_weights = data<A>(grad_weights);
    run_rows(pr, pass);
    reduce_rows<A>(set, pass.scale, ce_rows, kl_rows, data<A>(loss), nullptr, nullptr);
  });
  return {loss, stats, grad_student, grad_weights};
}

std::tuple<Tensor, Tensor> topk_kd_bwd(const Tensor& grad_loss, const Tensor& student, const Tensor& indices,
                                       const Tensor& log_probs, std::vector<int64_t> sizes,
                                       std::optional<Tensor> weights, std::optional<Tensor> labels, const Tensor& stats,
                                       double temperature, double ce_weight, double kl_weight, double kl_scale,
                                       Name tail, Name reduction, int64_t ignore_index, double label_smoothing,
                                       bool need_student_grad, bool need_weights_grad) {
  const KDSettings set{temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing};
  const Inputs inputs(student, indices, log_probs, sizes, weights, labels, ignore_index);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(sizes.size());
  check_shape(kOp, "grad_loss", grad_loss, set.each_row() ? Shape{n} : Shape{});
  check_shape(kOp, "stats", stats, {n, 3});
  const Tensor grad_student = empty_or_none(student, need_student_grad, {n, c}, student.scalar_type());
  const Tensor grad_weights = empty_or_none(student, need_weights_grad, {n, count}, inputs.wide);
  dispatch_wide(inputs.wide, [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> pr = inputs.problem<A>(student, log_probs, sizes, weights, set);
    const Tensor incoming = dense(grad_loss, inputs.wide), saved = dense(stats);
    KDPass<A> pass{};
    pass.saved = static_cast<const A*>(saved.const_data_ptr());
    pass.grad_loss = static_cast<const A*>(incoming.const_data_ptr()), pass.each_row = set.each_row();
    pass.scale = reduction_scale(pr.labels, n, c, set);
    if (need_student_grad) pass.grad_student = Target(grad_student);
    pass.grad_weights = data<A>(grad_weights);
    run_rows(pr, pass);
  });
  return {grad_student, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("topk_kd_fwd", TORCH_BOX(&topk_kd_fwd));
  m.impl("topk_kd_bwd", TORCH_BOX(&topk_kd_bwd));
}

}  // namespace
}  // namespace amtml
