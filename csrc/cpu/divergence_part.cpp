// The rows of divergence.cpp where this process has but a part of their classes (a vocabulary split among processes):
//
//   sums      of every softmax the maximum and the sum of exponentials, of these classes
//   forward   with those of all classes given, the shares that these classes have in every sum of the loss
//   backward  with all sums given, the student's gradient
//
// What processes tell one another in between is Python's.
#include "../divergence_part.h"

#include "divergence_rows.h"
#include "ops.h"
#include "shares.h"

namespace amtml::divergences {
namespace {

// Of mixed logits y_t, less the largest, which changes nothing but the rounding: sum p a y_t, sum p y_t, and sum p a.
template <class A>
AMTML_INLINE void logit_sums(const Row<A>& row, double* out) {
  const Problem<A>& pr = row.problem;
  const int64_t n = pr.classes;
  const A* pa = row.pa.data();
  std::fill_n(out, 2 * pr.teachers, 0.0);
  for (int64_t t = 0; t < pr.teachers; ++t) {
    const Softmax<A>& own = row.of[t];
    const A shift = own.shift();
    for (int64_t k = 0, start = 0; start < n; ++k, start += kChunk) {
      const int64_t count = std::min(kChunk, n - start);
      const A *e = row.mixed.e.data() + start, *x = own.x + start, by = row.mixed.by(k);
      const auto beside = [&] AMTML_BODY(int64_t c) {
        const A scaled = (x[c] - shift) * own.per_tau;
        // What is not finite has no weight, or no p.
        return std::abs(scaled) < std::numeric_limits<A>::infinity() ? scaled : -shift * own.per_tau;
      };
      out[t] += block_sum<A>(count, [&] AMTML_BODY(int64_t c) {
        const A y = beside(c);
        return if_mass(y, pa[start + c] * y);
      });
      out[pr.teachers + t] += block_sum<A>(count, [&] AMTML_BODY(int64_t c) {
        const A y = beside(c);
        return if_mass(y, e[c] * by * y);
      });
    }
  }
  out[2 * pr.teachers] = block_sum<A>(n, [&] AMTML_BODY(int64_t c) { return pa[c]; });
}

// Shares of the cross-entropy: log q1 of the label, 0 where it is elsewhere, and that of all classes together.
template <class A>
AMTML_INLINE void write_ce(const Row<A>& row, int64_t label, double* out) {
  const int64_t n = row.problem.classes;
  const A *z = row.q.x, m = row.q.m;
  const double log_sum = row.q1.exact_log_sum();
  out[0] = label >= 0 && label < n ? (static_cast<double>(z[label]) - m) - log_sum : 0;
  const double below = block_sum<A>(n, [&] AMTML_BODY(int64_t c) { return z[c] - m; });
  out[1] = below - static_cast<double>(n) * log_sum;
}

template <class A>
AMTML_INLINE void write_shares(Row<A>& row, int64_t i, const PartLayout& at, double* out) {
  const Problem<A>& pr = row.problem;
  if (pr.ignored(i)) return void(std::fill_n(out, at.size(), 0.0));
  load(row, i);
  if (pr.set.mode == Mode::sum) {  // each teacher's own, for whatever weight
    for (int64_t t = 0; t < pr.teachers; ++t) {
      begin_comparing(row);
      out[t] = compare(row, &row.of[t], A(1));
      if (at.totals) out[at.each + t] = slope(row);
    }
  } else {
    compare_all(row);
    out[0] = row.distance;
    if (at.totals) out[at.each] = slope(row);
  }
  out += at.each + at.totals;
  if (at.weights && pr.set.mode == Mode::logits) {
    logit_sums(row, out);
  } else if (at.weights) {
    std::copy_n(row.dot.data(), pr.teachers, out);
  }
  out += at.weights;
  if (at.ce) write_ce(row, pr.labels[i], out);
  out += at.ce;
  if (!at.statistics) return;
  const Statistics<A> made = statistics(row);
  *out++ = made.of_q, *out++ = made.of_p;
  out = std::copy(made.kl.begin(), made.kl.end(), out);
  for (const Largest<A>& top : {made.q, made.p}) *out++ = top.value, *out++ = static_cast<double>(top.at);
}

template <class A>
AMTML_INLINE void write_sums(Row<A>& row, int64_t i, double* out) {
  const Problem<A>& pr = row.problem;
  if (pr.ignored(i)) {
    for (int64_t s = 0; s < pr.softmaxes(); ++s) *out++ = 0, *out++ = 1;
    return;
  }
  load(row, i);
  const auto write = [&](const Softmax<A>& p, double taken_off = 0) {
    *out++ = p.m + taken_off, *out++ = std::ldexp(p.sum(), -kScale);
  };
  write(row.q);
  if (pr.labeled) *out++ = row.q.m, *out++ = std::ldexp(row.q1.sum(), -kScale);
  for (const Softmax<A>& p : row.of) write(p);
  if (pr.set.mode == Mode::logits) write(row.mixed, row.taken_off);
}

// Calls each(row, i) for all rows.
template <class A, class Each>
void all_rows(const Problem<A>& pr, const Each& each) {
  in_shares(pr.rows, pr.classes * (pr.teachers + 2), [&](Shares& next) {
    Row<A> row(pr);
    vectorized([&] AMTML_BODY() {
      for (Share share; next(share);) {
        for (int64_t i = share.begin; i < share.end; ++i) each(row, i);
      }
    });
  });
}

std::optional<Tensor> labels_of(const std::optional<Tensor>& given, int64_t rows) {
  if (!given) return std::nullopt;
  check_shape(kOp, "labels", *given, {rows});
  STD_TORCH_CHECK(given->scalar_type() == ScalarType::Long, kOp, ": labels must be int64");
  return dense(*given);
}

// Calls run(problem) with the problem in the dtype of sums.
template <class Run>
void with_problem(const Inputs& in, const Settings& set, bool labeled, const Tensor* normal, const Run& run) {
  const ScalarType wide = checked_inputs(in, set);
  const int64_t n = in.student.size(0);
  STD_TORCH_CHECK(in.labels || !labeled, kOp, ": a cross-entropy needs labels");
  const auto labels = labels_of(in.labels, n), temperatures = checked_numbers("temperature", in.temperatures, n, wide);
  dispatch_wide(wide, [&](auto zero) {
    Problem<decltype(zero)> pr = problem_of<decltype(zero)>(in, labels, temperatures, set);
    pr.labeled = labeled;
    if (normal) {
      check_shape(kOp, "normal", *normal, {n, pr.softmaxes(), 2});
      STD_TORCH_CHECK(normal->scalar_type() == ScalarType::Double && normal->is_contiguous(), kOp,
                      ": normal must be float64 and contiguous");
      pr.normal = static_cast<const Normal*>(normal->const_data_ptr());
    }
    run(pr, wide);
  });
}

Tensor divergence_part_sums(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                            std::optional<Tensor> labels, std::optional<Tensor> temperatures, Name mode,
                            std::vector<double> teacher_temperatures, double temperature, bool labeled) {
  const Settings set = part_settings("forward_kl", 0, mode, teacher_temperatures, temperature, 0);
  Tensor out;
  with_problem({student, teachers, weights, labels, temperatures}, set, labeled, nullptr, [&](auto& pr, ScalarType) {
    out = empty(student, {pr.rows, pr.softmaxes(), 2}, ScalarType::Double);
    double* const to = static_cast<double*>(out.mutable_data_ptr());
    all_rows(pr, [&] AMTML_BODY(auto& row, int64_t i) { write_sums(row, i, to + i * pr.softmaxes() * 2); });
  });
  return out;
}

Tensor divergence_part_fwd(const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                           std::optional<Tensor> labels, std::optional<Tensor> temperatures, const Tensor& normal,
                           Name divergence, double beta, Name mode, std::vector<double> teacher_temperatures,
                           double temperature, bool labeled, bool constants, bool need_totals, bool need_weights,
                           bool need_statistics) {
  const Settings set = part_settings(divergence, beta, mode, teacher_temperatures, temperature, 0);
  const PartLayout at(set, static_cast<int64_t>(teachers.size()), labeled, need_totals, need_weights, need_statistics);
  const Tensor out = empty(student, {student.size(0), at.size()}, ScalarType::Double);
  double* const to = static_cast<double*>(out.mutable_data_ptr());
  with_problem({student, teachers, weights, labels, temperatures}, set, labeled, &normal, [&](auto& pr, ScalarType) {
    pr.constants = constants;
    all_rows(pr, [&] AMTML_BODY(auto& row, int64_t i) { write_shares(row, i, at, to + i * at.size()); });
  });
  return out;
}

// of_kl and of_ce: d loss / d of the row's D and cross-entropy; totals: sum q b; even: label_smoothing / all classes.
// Mode "sum" has d loss / d D of each teacher as weights, and 1 in of_kl.
Tensor divergence_part_bwd(const Tensor& of_kl, std::optional<Tensor> of_ce, const Tensor& totals,
                           const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
                           std::optional<Tensor> labels, std::optional<Tensor> temperatures, const Tensor& normal,
                           Name divergence, double beta, Name mode, std::vector<double> teacher_temperatures,
                           double temperature, double label_smoothing, double even) {
  const Settings set = part_settings(divergence, beta, mode, teacher_temperatures, temperature, label_smoothing);
  const Tensor grad = empty(student, {student.size(0), student.size(1)}, student.scalar_type());
  with_problem({student, teachers, weights, labels, temperatures}, set, of_ce.has_value(), &normal,
               [&](auto& pr, ScalarType wide) {
                 using A = std::decay_t<decltype(pr.weight(0, 0))>;
                 const auto numbers = [&](const char* name, const std::optional<Tensor>& given) {
                   return checked_numbers(name, given, pr.rows, wide);
                 };
                 const auto kl = numbers("of_kl", of_kl), ce = numbers("of_ce", of_ce),
                            mean = numbers("totals", totals);
                 const auto at = [](const std::optional<Tensor>& t, int64_t i) {
                   return t ? static_cast<const A*>(t->const_data_ptr())[i] : A(0);
                 };
                 const Target target(grad);
                 all_rows(pr, [&] AMTML_BODY(auto& row, int64_t i) {
                   if (pr.ignored(i)) return target.clear(i * pr.classes, pr.classes);
                   load(row, i);
                   compare_all(row);
                   const A of_row = at(kl, i) / static_cast<A>(pr.temperature(i)), of_label = at(ce, i);
                   write_grad(row, i, of_row, of_label, at(mean, i), of_label * static_cast<A>(even), target);
                 });
               });
  return grad;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("divergence_part_sums", TORCH_BOX(&divergence_part_sums));
  m.impl("divergence_part_fwd", TORCH_BOX(&divergence_part_fwd));
  m.impl("divergence_part_bwd", TORCH_BOX(&divergence_part_bwd));
}

}  // namespace amtml::divergences
