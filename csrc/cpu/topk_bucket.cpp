// The student's rows of a distillation that compares the classes which teachers name, and one class for all others:
// what amtml_fast/ops/topk_bucket.py needs of all C classes.
//
//   m = max z_c, s = log sum exp((z_c - m) / tau) over the classes c that nobody names, and the logits of the others
//   dL/dz_c = a exp(z_c / tau - m / tau - s) / tau + b exp(z_c - m - s_1) + d outside, given + d at a class that is
//   named, where a, b and d are what comes back to the log-sums and, over C, to the mean of the row
//
// A row is copied, so that what is named can be taken out: the others may be far below it, and what is left of a sum
// over all would not be theirs.
#include <algorithm>

#include "kd_rows.h"
#include "shares.h"

namespace amtml {
namespace {

constexpr char kOp[] = "topk_kd_loss";

struct Problem {
  int64_t rows, classes, entries;
  Matrix student;
  const int64_t *indices, *labels;
  int64_t ignore_index;
  double temperature;
  bool second, total, statistics;

  bool ignored(int64_t i) const { return labels && labels[i] == ignore_index; }
};

// Owns what Problem points to.
struct Inputs {
  Tensor indices;
  std::optional<Tensor> labels;
  Problem pr;

  Inputs(const Tensor& student, const Tensor& given_indices, const std::optional<Tensor>& given_labels,
         double temperature, int64_t ignore_index, bool second, bool total, bool statistics)
      : indices(dense(given_indices)) {
    STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, kOp, ": student must be [N, C] with C >= 1");
    STD_TORCH_CHECK(indices.dim() == 2 && indices.size(0) == student.size(0), kOp, ": indices must be [N, K]");
    STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Long, kOp, ": indices must be int64");
    const int64_t n = student.size(0), c = student.size(1), k = indices.size(1);
    labels = checked_labels(kOp, given_labels, n, c, ignore_index);
    const int64_t* y = labels ? static_cast<const int64_t*>(labels->const_data_ptr()) : nullptr;
    const int64_t* index = static_cast<const int64_t*>(indices.const_data_ptr());
    pr = {n, c, k, Matrix(student), index, y, ignore_index, temperature, second, total, statistics};
    check_indices(kOp, indices, labels, c, ignore_index, kNobody);
  }
};

// Doubles gain nothing from wide vectors: their exponential is the library's.
template <class A, class Body>
void in_vectors(const Body& body) {
  if constexpr (std::is_same_v<A, float>) {
    vectorized(body);
  } else {
    body();
  }
}

// Scratch of one thread.
template <class A>
struct Row {
  Buffer<A> y;       // without what is named
  Softmax<A> r, r1;  // of y at tau, and where it is asked for at 1

  explicit Row(const Problem& pr) : y(pr.classes), r(pr.classes), r1(pr.second ? pr.classes : 0) {}
};

template <class A>
AMTML_INLINE double log_sum(const Softmax<A>& of, const A* y, int64_t n) {
  if (of.m != -std::numeric_limits<A>::infinity()) return of.exact_log_sum();
  const bool broken = std::any_of(y, y + n, [](A x) { return x != x; });
  return broken ? std::numeric_limits<double>::quiet_NaN() : -std::numeric_limits<double>::infinity();
}

// The first class with the largest logit; NaN is larger than all others.
template <class A>
int64_t largest_class(const Row<A>& row, int64_t n, const int64_t* index, const double* named, int64_t entries) {
  const A* y = row.y.data();
  const bool broken = !(std::abs(row.r.inverse) < std::numeric_limits<A>::infinity());
  int64_t at = 0;
  double most = y[0];
  if (broken) {
    for (int64_t c = 1; c < n && most == most; ++c) {
      if (y[c] > most || y[c] != y[c]) most = y[c], at = c;
    }
  } else {
    const int64_t first = row.r.chunk_of_maximum() * kChunk;
    at = std::find(y + first, y + std::min(first + kChunk, n), row.r.m) - y, most = row.r.m;
  }
  for (int64_t j = 0; j < entries; ++j) {
    if (index[j] == kNobody) continue;
    const bool same = named[j] == most || (named[j] != named[j] && most != most);
    const bool more = named[j] > most || (named[j] != named[j] && most == most);
    if (more || (same && index[j] < at)) most = named[j], at = index[j];
  }
  return at;
}

template <class A>
AMTML_INLINE void sweep(const Problem& pr, int64_t i, Row<A>& row, double* found, double* named) {
  constexpr A none = -std::numeric_limits<A>::infinity();
  const int64_t n = pr.classes, *index = pr.indices + i * pr.entries;
  A* y = row.y.data();
  std::fill_n(found, kFound, 0.0);
  if (pr.ignored(i)) {
    std::fill_n(named, pr.entries, 0.0);
    return;
  }
  const A* z = load_row(pr.student, i, n, y);
  if (z != y) std::copy_n(z, n, y);
  if (pr.labels) found[3] = static_cast<double>(y[pr.labels[i]]);
  if (pr.total) {
    const A top = maximum(y, n), near = top - top == 0 ? top : A(0);  // beside it the differences keep their digits
    found[4] = static_cast<double>(n) * near +
               block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) { return y[c] - near; });
  }
  for (int64_t j = 0; j < pr.entries; ++j) named[j] = index[j] == kNobody ? none : y[index[j]];
  for (int64_t j = 0; j < pr.entries; ++j) {
    if (index[j] != kNobody) y[index[j]] = none;
  }
  row.r.begin(static_cast<A>(1 / pr.temperature));
  row.r1.begin(1);
  const Ahead next = pr.student.ahead(i + 1, pr.rows);
  for (int64_t k = 0, first = 0; first < n; ++k, first += kChunk) {
    const int64_t count = std::min(kChunk, n - first);
    row.r.add(k, y + first, count, next.from(first));
    if (pr.second) row.r1.add(k, y + first, count, row.r);
  }
  row.r.end(true);
  if (pr.second) row.r1.end(true);
  const A m = row.r.m == none ? A(0) : row.r.m;
  found[0] = m, found[1] = log_sum(row.r, y, n);
  if (pr.second) found[2] = log_sum(row.r1, y, n);
  if (!pr.statistics) return;
  found[7] = static_cast<double>(largest_class(row, n, index, named, pr.entries));
  const A per_tau = row.r.per_tau, log_all = static_cast<A>(found[1]);
  for (int64_t k = 0, first = 0; first < n; ++k, first += kChunk) {
    const A *e = row.r.e.data() + first, *x = y + first, by = row.r.by(k);
    const auto term = [&](int64_t c) __attribute__((always_inline)) {
      const A log_r = (x[c] - m) * per_tau - log_all;  // -inf for a finite mask, too
      return if_mass(e[c], by * e[c] * log_r);
    };
    found[5] += block_sum<A>(std::min(kChunk, n - first), term);
  }
  int64_t others = n;
  for (int64_t j = 0; j < pr.entries; ++j) {
    if (index[j] == kNobody) continue;
    others -= y[index[j]] == none;  // once, if it is named twice
    y[index[j]] = m;
  }
  found[6] = static_cast<double>(others) * m +
             block_sum<A>(n, [&](int64_t c) __attribute__((always_inline)) { return y[c] - m; });
}

std::tuple<Tensor, Tensor> topk_bucket_fwd(const Tensor& student, const Tensor& indices, std::optional<Tensor> weights,
                                           std::optional<Tensor> labels, double temperature, int64_t ignore_index,
                                           bool need_second, bool need_total, bool in_float64, bool need_statistics) {
  const Inputs inputs(student, indices, labels, temperature, ignore_index, need_second, need_total, need_statistics);
  if (weights) check_weights(kOp, *weights, inputs.labels, ignore_index);
  const Problem& pr = inputs.pr;
  const Tensor found = empty(student, {pr.rows, kFound}, ScalarType::Double);
  const Tensor named = empty(student, {pr.rows, pr.entries}, ScalarType::Double);
  double *to_found = data<double>(found), *to_named = data<double>(named);
  dispatch_wide(in_float64 ? ScalarType::Double : ScalarType::Float, [&](auto zero) {
    using A = decltype(zero);
    in_shares(pr.rows, pr.classes, [&](Shares& next) {
      Row<A> row(pr);
      in_vectors<A>([&] AMTML_BODY() {
        for (Share share; next(share);) {
          for (int64_t i = share.begin; i < share.end; ++i) {
            sweep(pr, i, row, to_found + i * kFound, to_named + i * pr.entries);
          }
        }
      });
    });
  });
  return {found, named};
}

// of_sums: what comes back to the log-sums at tau and at 1, the label's logit and the mean; of_named: to the logits.
template <class A>
AMTML_INLINE void gradient(const Problem& pr, int64_t i, const double* of_sums, const double* of_named,
                           const double* found, A* scratch, A* out_chunk, const Target& grad) {
  constexpr A masked = -std::numeric_limits<A>::infinity();
  const int64_t n = pr.classes, first = i * n, *index = pr.indices + i * pr.entries;
  if (pr.ignored(i)) return grad.clear(first, n);
  const A* z = load_row(pr.student, i, n, scratch);
  const A m = static_cast<A>(found[0]), per_tau = static_cast<A>(1 / pr.temperature);
  // Without a class there is nothing to multiply, whatever comes back.
  auto factor = [](double g, double log_sum) {
    const bool empty = log_sum == -std::numeric_limits<double>::infinity();
    return empty ? A(0) : static_cast<A>(g * std::exp(-log_sum - kLogScale));
  };
  const A a = factor(of_sums[0] / pr.temperature, found[1]), b = pr.second ? factor(of_sums[1], found[2]) : A(0);
  const A d = static_cast<A>(of_sums[3] / static_cast<double>(n));
  auto below = [](A x) __attribute__((always_inline)) { return x > 0 ? A(0) : x; };  // what is named may be above m
  auto at = [&](A x, bool second) __attribute__((always_inline)) {
    const A g = a * exp_nonpositive<kScale>(below((x - m) * per_tau)) + d;
    return second ? g + b * exp_nonpositive<kScale>(below(x - m)) : g;
  };
  const int64_t label = pr.labels ? pr.labels[i] : -1;
  const double at_label = pr.labels ? of_sums[2] : 0;
  double unnamed = 0;  // at the label, if nobody names it
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t end = std::min(start + kChunk, n);
    A* made = grad.place(first + start, out_chunk);
    A* out = made - start;
    if (pr.second) {
#pragma omp simd
      for (int64_t c = start; c < end; ++c) {
        const A g = at(z[c], true);
        out[c] = z[c] == masked ? A(0) : g;
      }
    } else {
#pragma omp simd
      for (int64_t c = start; c < end; ++c) {
        const A g = at(z[c], false);
        out[c] = z[c] == masked ? A(0) : g;
      }
    }
    if (start <= label && label < end) unnamed = out[label];
    grad.write(first + start, end - start, made);
  }
  auto write = [&](int64_t c, double g) {
    const A rounded = z[c] == masked ? A(0) : static_cast<A>(g);
    grad.scatter(first, &c, 1, &rounded);
  };
  if (at_label != 0) write(label, unnamed + at_label);
  for (int64_t j = 0; j < pr.entries; ++j) {
    if (index[j] != kNobody) write(index[j], of_named[j] + d + (index[j] == label ? at_label : 0));
  }
}

Tensor topk_bucket_bwd(const Tensor& grad_sums, const Tensor& grad_z, const Tensor& student, const Tensor& indices,
                       std::optional<Tensor> labels, const Tensor& found, double temperature, int64_t ignore_index,
                       bool need_second, bool need_total, bool in_float64) {
  const Inputs inputs(student, indices, labels, temperature, ignore_index, need_second, need_total, false);
  const Problem& pr = inputs.pr;
  check_shape(kOp, "grad_sums", grad_sums, {pr.rows, 4});
  check_shape(kOp, "grad_z", grad_z, {pr.rows, pr.entries});
  check_shape(kOp, "found", found, {pr.rows, kFound});
  const Tensor sums = dense(grad_sums, ScalarType::Double), named = dense(grad_z, ScalarType::Double);
  const Tensor made = dense(found), grad = empty(student, {pr.rows, pr.classes}, student.scalar_type());
  const Target target(grad);
  const double *of_sums = data<double>(sums), *of_named = data<double>(named), *of_found = data<double>(made);
  dispatch_wide(in_float64 ? ScalarType::Double : ScalarType::Float, [&](auto zero) {
    using A = decltype(zero);
    in_shares(pr.rows, pr.classes, [&](Shares& next) {
      Buffer<A> row(pr.student.in_place<A>() ? 0 : pr.classes), chunk(std::min(pr.classes, kChunk));
      in_vectors<A>([&] AMTML_BODY() {
        for (Share share; next(share);) {
          for (int64_t i = share.begin; i < share.end; ++i) {
            gradient(pr, i, of_sums + i * 4, of_named + i * pr.entries, of_found + i * kFound, row.data(), chunk.data(),
                     target);
          }
        }
      });
    });
  });
  return grad;
}

Tensor topk_bucket_last(const Tensor& student, const Tensor& bounds, const Tensor& equal) {
  const int64_t n = student.size(0), c = student.size(1), teachers = bounds.size(1);
  check_shape(kOp, "bounds", bounds, {n, teachers});
  check_shape(kOp, "equal", equal, {n, teachers});
  const Tensor last = empty(student, {n, teachers}, ScalarType::Long);
  const Matrix rows(student), of_bounds(bounds);
  const Tensor counts = dense(equal);
  const int64_t* count = data<int64_t>(counts);
  int64_t* out = data<int64_t>(last);
  in_shares(n, c, [&](Shares& next) {
    Buffer<double> row(c), bound(teachers);
    for (Share share; next(share);) {
      for (int64_t i = share.begin; i < share.end; ++i) {
        const double *z = load_row(rows, i, c, row.data()), *least = load_row(of_bounds, i, teachers, bound.data());
        for (int64_t t = 0; t < teachers; ++t) {
          int64_t left = count[i * teachers + t], at = -1;
          while (left > 0 && ++at < c - 1) left -= z[at] == least[t];
          out[i * teachers + t] = std::max<int64_t>(at, 0);
        }
      }
    }
  });
  return last;
}

STABLE_TORCH_LIBRARY_IMPL(amtml, CPU, m) {
  m.impl("topk_bucket_fwd", TORCH_BOX(&topk_bucket_fwd));
  m.impl("topk_bucket_bwd", TORCH_BOX(&topk_bucket_bwd));
  m.impl("topk_bucket_last", TORCH_BOX(&topk_bucket_last));
}

}  // namespace
}  // namespace amtml
