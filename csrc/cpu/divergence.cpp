// Any divergence between the student and what the teachers say, one row at a time, or of few classes 16;
// divergence_rows.h has the formulas.
#include "divergence.h"

#include "divergence_few.h"
#include "ops.h"
#include "shares.h"

namespace amtml::divergences {
namespace {

// Those of rows that count.
template <class A>
void check_row_numbers(const Problem<A>& pr, const A* alphas) {
  for (int64_t i = 0; i < pr.rows; ++i) {
    if (pr.ignored(i)) continue;
    const double tau = pr.temperature(i), alpha = alphas ? alphas[i] : 0;
    STD_TORCH_CHECK(tau > 0 && std::isfinite(tau), kOp, ": temperature must be positive and finite, got ", tau,
                    " in row ", i);
    STD_TORCH_CHECK(alpha >= 0 && alpha <= 1, kOp, ": alpha must be in [0, 1], got ", alpha, " in row ", i);
  }
}

template <class A>
AMTML_INLINE void write_statistics(Row<A>& row, A* out) {
  const Statistics<A> made = statistics(row);
  out[0] = static_cast<A>(made.of_q), out[1] = static_cast<A>(made.of_p);
  out[2] = A(row.total > 0), out[3] = A(made.p.at == made.q.at);
  for (size_t t = 0; t < made.kl.size(); ++t) out[4 + t] = static_cast<A>(made.kl[t]);
}

template <class A>
AMTML_INLINE void run_row(Row<A>& row, int64_t i, const Pass<A>& pass) {
  const Problem<A>& pr = row.problem;
  const int64_t c = pr.classes;
  const double smoothing = pr.set.kd.label_smoothing;
  if (pr.ignored(i)) {
    if (pass.grad_student) pass.grad_student.clear(i * c, c);
    return write_ignored_row(pr, pass, i);
  }
  load(row, i);
  compare_all(row);
  const double ce = pr.labels ? cross_entropy(row, c, pr.labels[i], smoothing) : 0;
  const RowGradients g = write_row(pr, pass, i, row.distance, ce, [&] AMTML_BODY(int64_t t) { return row.dot[t]; });
  if (pass.grad_student) {
    const A ce_grad = static_cast<A>(g.ce), flat = ce_grad * static_cast<A>(smoothing) / c;
    write_grad(row, i, static_cast<A>(g.kl), ce_grad, static_cast<A>(slope(row)), flat, pass.grad_student);
  }
  if (pass.statistics) write_statistics(row, pass.statistics + i * statistics_size(pr.teachers));
}

// Rows begin to end: few classes in groups, but for the rows that these leave out.
template <class A>
AMTML_INLINE void run_rows(const Problem<A>& pr, const Share& share, FewRows* few, std::optional<Row<A>>& row,
                           const Pass<A>& pass) {
  for (int64_t first = share.begin; first < share.end; first += kRows) {
    const int count = static_cast<int>(std::min<int64_t>(kRows, share.end - first));
    if constexpr (sizeof(A) == 4) {
      if (few) run_group(*few, {first, count}, pass);
    }
    for (int l = 0; l < count; ++l) {
      if (few && !few->rare[l]) continue;
      if (!row) row.emplace(pr);
      run_row(*row, first + l, pass);
    }
  }
}

struct Made {
  Tensor loss, grad_student, grad_weights, grad_alpha, statistics;
};

// Forward, or with the gradient of the loss backward, which makes all of it again.
Made run(const Inputs& in, const std::optional<Tensor>& given_alphas, const Settings& set,
         const std::optional<Tensor>& grad_loss, bool need_student_grad, bool need_weights_grad, bool need_alpha_grad,
         bool need_statistics) {
  const Tensor& student = in.student;
  const ScalarType wide = checked_inputs(in, set);
  const int64_t n = student.size(0), c = student.size(1), count = static_cast<int64_t>(in.teachers.size());
  STD_TORCH_CHECK(grad_loss || !need_student_grad || student.scalar_type() == wide, kOp,
                  ": the gradient of a 16-bit student is made in backward");
  const std::optional<Tensor> labels = checked_labels(kOp, in.labels, n, c, set.kd.ignore_index);
  if (in.weights) check_weights(kOp, *in.weights, labels, set.kd.ignore_index);
  const std::optional<Tensor> alphas = checked_numbers("alpha", given_alphas, n, wide);
  const std::optional<Tensor> temperatures = checked_numbers("temperature", in.temperatures, n, wide);
  const bool forward = !grad_loss;
  if (!forward) check_shape(kOp, "grad_loss", *grad_loss, set.kd.each_row() ? Shape{n} : Shape{});
  Made made{empty_or_none(student, forward, set.kd.each_row() ? Shape{n} : Shape{}, wide),
            empty_or_none(student, need_student_grad, {n, c}, forward ? wide : student.scalar_type()),
            empty_or_none(student, need_weights_grad, {n, count}, wide),
            empty_or_none(student, need_alpha_grad, {n}, wide),
            empty_or_none(student, need_statistics, {n, statistics_size(count)}, wide)};
  dispatch_wide(wide, [&](auto zero) {
    using A = decltype(zero);
    const Problem<A> pr = problem_of<A>(in, labels, temperatures, set);
    Pass<A> pass{};
    if (alphas) pass.alphas = static_cast<const A*>(alphas->const_data_ptr());
    check_row_numbers(pr, pass.alphas);
    std::vector<double> ce_rows(n), kl_rows(n);
    const Tensor incoming = forward ? student : dense(*grad_loss, wide);
    pass.ce = ce_rows.data(), pass.kl = kl_rows.data();
    if (!forward) pass.saved = pass.grad_loss = static_cast<const A*>(incoming.const_data_ptr());
    pass.each_row = set.kd.each_row();
    pass.scale = reduction_scale(pr.labels, n, c, set.kd);
    if (need_student_grad) pass.grad_student = Target(made.grad_student);
    pass.grad_weights = data<A>(made.grad_weights), pass.grad_alpha = data<A>(made.grad_alpha);
    pass.statistics = data<A>(made.statistics);
    in_shares(n, c * (count + 2), [&](Shares& next) {
      std::optional<FewRows> few;
      std::optional<Row<A>> row;
      if constexpr (sizeof(A) == 4) {
        if (c <= kFew && !pass.statistics) few.emplace(pr);
      }
      vectorized([&] AMTML_BODY() {
        for (Share share; next(share);) run_rows(pr, share, few ? &*few : nullptr, row, pass);
      });
    });
    if (!forward) return;
    KDSettings weighed = set.kd;  // the rows are
    weighed.ce_weight = weighed.kl_weight = 1;
    reduce_rows<A>(weighed, pass.scale, ce_rows, kl_rows, data<A>(made.loss), nullptr, nullptr);
  });
  return made;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> divergence_fwd(
    const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights, std::optional<Tensor> labels,
    std::optional<Tensor> alphas, std::optional<Tensor> temperatures, Name divergence, double beta, Name mode,
    std::vector<double> teacher_temperatures, double temperature, bool t2_scale, double ce_weight, double kl_weight,
    Name reduction, int64_t ignore_index, double label_smoothing, bool need_student_grad, bool need_weights_grad,
    bool need_alpha_grad, bool need_statistics) {
  const Settings set(divergence, beta, mode, teacher_temperatures, temperature, t2_scale, ce_weight, kl_weight,
                     reduction, ignore_index, label_smoothing);
  Made made = run({student, teachers, weights, labels, temperatures}, alphas, set, std::nullopt, need_student_grad,
                  need_weights_grad, need_alpha_grad, need_statistics);
  return {made.loss, made.grad_student, made.grad_weights, made.grad_alpha, made.statistics};
}

std::tuple<Tensor, Tensor, Tensor> divergence_bwd(
    const Tensor& grad_loss, const Tensor& student, std::vector<Tensor> teachers, std::optional<Tensor> weights,
    std::optional<Tensor> labels, std::optional<Tensor> alphas, std::optional<Tensor> temperatures, Name divergence,
    double beta, Name mode, std::vector<double> teacher_temperatures, double temperature, bool t2_scale,
    double ce_weight, double kl_weight, Name reduction, int64_t ignore_index, double label_smoothing,
    bool need_student_grad, bool need_weights_grad, bool need_alpha_grad) {
  const Settings set(divergence, beta, mode, teacher_temperatures, temperature, t2_scale, ce_weight, kl_weight,
                     reduction, ignore_index, label_smoothing);
  Made made = run({student, teachers, weights, labels, temperatures}, alphas, set, grad_loss, need_student_grad,
                  need_weights_grad, need_alpha_grad, false);
  return {made.grad_student, made.grad_weights, made.grad_alpha};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("divergence_fwd", TORCH_BOX(&divergence_fwd));
  m.impl("divergence_bwd", TORCH_BOX(&divergence_bwd));
}

}  // namespace amtml::divergences
