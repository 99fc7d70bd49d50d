"""Distance loss of Relational Knowledge Distillation (Park et al. 2019, Eq 4-6)."""

from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops._base import define, first_order, kernels, needs_grad, operator, run, save
from amtml_fast.ops._pairs import check_sides, fake_grads, scaled_sides
from amtml_fast.terms import wide_dtype

REDUCTIONS = ("mean", "distinct", "sum")

operator("distance")


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12
) -> Tensor:
    """Distance loss of Relational Knowledge Distillation (Park et al. 2019, Eq 4-6)::

        psi(i, j) = |x_i - x_j| / mean of |x_a - x_b| over all pairs a != b
        loss = sum_ij huber_delta(psi_student - psi_teacher)

    Args:
        student, teacher: [N, C] rows; widths may differ.
        delta: > 0, where the Huber loss turns linear.
        reduction: ``"mean"`` over N^2, ``"distinct"`` over N (N-1), or ``"sum"``.
        eps: a pair closer than this is degenerate: its psi is 0, with gradient 0, and it is left out of the mean.

    Returns:
        Scalar; float32 (float64 if an input is). 0 where there is no pair. Gradients flow to both sides.

    Raises:
        ValueError, TypeError: an argument that does not fit; nothing is computed then.
    """
    name = "rkd_distance_loss"
    check_sides(name, student, teacher)
    checks.number(name, "delta", delta, *checks.POSITIVE)
    checks.number(name, "eps", eps, *checks.NOT_NEGATIVE)
    checks.one_of(name, "reduction", reduction, REDUCTIONS)
    chosen = backend.choose("distance", student, teacher)
    if chosen == "reference":
        return reference.rkd_distance_loss(student, teacher, delta=delta, reduction=reduction, eps=eps)
    needs = needs_grad(student), needs_grad(teacher)
    return run(Distance, any(needs), chosen, student, teacher, float(delta), float(eps), reduction, *needs)


class Distance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student: Tensor,
        teacher: Tensor,
        delta: float,
        eps: float,
        reduction: str,
        need_student: bool,
        need_teacher: bool,
    ) -> Tensor:
        ctx.needs, ctx.dtypes = (need_student, need_teacher), (student.dtype, teacher.dtype)
        loss, *grads = kernels(backend).distance_fwd.default(student, teacher, delta, eps, reduction, *ctx.needs)
        save(ctx, *grads, student, teacher)
        return loss

    @staticmethod
    @first_order("rkd_distance_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        return None, *scaled_sides(ctx, grad_loss), None, None, None, None, None


# loss and its gradients
@define(
    "distance_fwd",
    "(Tensor student, Tensor teacher, float delta, float eps, str reduction, "
    "bool need_student_grad, bool need_teacher_grad) -> (Tensor, Tensor, Tensor)",
)
def _(student, teacher, delta, eps, reduction, *needs):
    loss = student.new_empty((), dtype=wide_dtype(student, teacher))
    return loss, *fake_grads(student, teacher, *needs)
