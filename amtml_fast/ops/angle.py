"""Triplet angle loss (Eq 9-10)."""

from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops._base import define, first_order, in_dtypes, kernels, needs_grad, operator, run, save, saved
from amtml_fast.ops._pairs import check_sides, fake_grads, scaled_sides
from amtml_fast.terms import wide_dtype

REDUCTIONS = ("mean", "distinct", "sum", "none")
EPS = 1e-12  # a closer pair is degenerate

operator("angle")


def angle_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, reduction: str = "mean", eps: float = EPS
) -> Tensor:
    """Triplet angle loss (Eq 9-10) in O(N^2) memory::

        psi(i, j, k) = cosine of the angle at vertex j between x_i - x_j and x_k - x_j
        loss = sum_ijk huber_delta(psi_student - psi_teacher)

    Args:
        student, teacher: [N, C] rows, such as soft targets; widths may differ.
        delta: > 0, where the Huber loss turns linear.
        reduction: ``"mean"`` over N^3, ``"distinct"`` (the same sum over N (N-1) (N-2)), ``"sum"``, or ``"none"``: [N],
            per vertex j, its sum over N^2.
        eps: a pair closer than this is degenerate: its psi is 0, with gradient 0.

    Returns:
        Scalar or [N]; float32 (float64 if an input is). 0 where there is no triplet. Gradients flow to both sides.

    Raises:
        ValueError, TypeError: an argument that does not fit; nothing is computed then.
    """
    check_sides("angle_loss", student, teacher)
    return angle(student, teacher, None, delta=delta, reduction=reduction, eps=eps)


def angle(
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,
    *,
    delta: float,
    reduction: str = "mean",
    eps: float = EPS,
) -> Tensor:
    """``angle_loss`` of the rows where ``row_mask`` [N] bool is true; the others take no part. For ``AMTMLLoss``."""
    name = "angle_loss"
    checks.number(name, "delta", delta, *checks.POSITIVE)
    checks.number(name, "eps", eps, *checks.NOT_NEGATIVE)
    checks.one_of(name, "reduction", reduction, REDUCTIONS)
    chosen = backend.choose("angle", student, teacher)
    if chosen == "reference":
        return reference.angle(student, teacher, row_mask, delta=delta, reduction=reduction, eps=eps)
    needs = needs_grad(student), needs_grad(teacher)
    return run(Angle, any(needs), chosen, student, teacher, row_mask, float(delta), float(eps), reduction, *needs)


class Angle(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student: Tensor,
        teacher: Tensor,
        row_mask: Tensor | None,
        delta: float,
        eps: float,
        reduction: str,
        need_student: bool,
        need_teacher: bool,
    ) -> Tensor:
        ctx.needs, ctx.dtypes = (need_student, need_teacher), (student.dtype, teacher.dtype)
        ctx.backend, ctx.reduction, ctx.delta, ctx.eps = backend, reduction, delta, eps
        loss, *grads = kernels(backend).angle_fwd.default(student, teacher, row_mask, delta, eps, reduction, *ctx.needs)
        if reduction == "none":  # the gradient depends on each vertex' incoming gradient
            save(ctx, student, teacher, row_mask)
        else:
            save(ctx, *grads, student, teacher)
        return loss

    @staticmethod
    @first_order("angle_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        if ctx.reduction == "none":
            bwd = kernels(ctx.backend).angle_bwd.default
            grads = in_dtypes(ctx, bwd(grad_loss, *saved(ctx), ctx.delta, ctx.eps, *ctx.needs))
        else:
            grads = scaled_sides(ctx, grad_loss)
        return None, *grads, None, None, None, None, None, None


# loss, and unless the reduction is "none" its gradients
@define(
    "angle_fwd",
    "(Tensor student, Tensor teacher, Tensor? row_mask, float delta, float eps, str reduction, "
    "bool need_student_grad, bool need_teacher_grad) -> (Tensor, Tensor, Tensor)",
)
def _(student, teacher, row_mask, delta, eps, reduction, need_student_grad, need_teacher_grad):
    none = reduction == "none"
    loss = student.new_empty(student.shape[:1] if none else (), dtype=wide_dtype(student, teacher))
    return loss, *fake_grads(student, teacher, need_student_grad and not none, need_teacher_grad and not none)


@define(
    "angle_bwd",
    "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? row_mask, float delta, float eps, "
    "bool need_student_grad, bool need_teacher_grad) -> (Tensor, Tensor)",
)
def _(grad_loss, student, teacher, row_mask, delta, eps, *needs):
    return fake_grads(student, teacher, *needs)
