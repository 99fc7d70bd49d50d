// What the two ways to compute weighted multi-teacher distillation share: its inputs, and what a pass reads and writes.
#pragma once

#include <algorithm>

#include "../arithmetic.h"
#include "kd_rows.h"

namespace amtml::multi_teacher {

constexpr char kOp[] = "multi_teacher_kd_loss";

template <class A>
struct Problem {
  int64_t rows, classes, teachers;
  Matrix student, weights;
  std::vector<Matrix> teacher;
  const int64_t* labels;
  KDSettings set;
  bool mixture;

  bool in_place() const {  // whether no teacher needs to be converted
    bool all = true;
    for (const Matrix& m : teacher) all &= m.template in_place<A>();
    return all;
  }
  bool ignored(int64_t i) const { return labels && labels[i] == set.ignore_index; }
  A weight(int64_t i, int64_t t) const {
    if (!weights) return A(1) / A(teachers);
    return static_cast<const A*>(weights.data)[i * weights.row_stride + t * weights.column_stride];
  }
};

// Row statistics, kept for backward: the student's three; maximum and inverse sum per teacher. Of few classes, zeros:
// there backward makes its own.
inline int64_t stats_size(int64_t teachers) { return 3 + 2 * teachers; }

// With what this operator reads and writes besides.
template <class A>
struct Pass : KDPass<A> {
  A *student_probs, *soft_targets;
  Matrix grad_q, grad_p;
  bool rescale;  // forward has made the gradients, for an incoming gradient of 1
};

}  // namespace amtml::multi_teacher
