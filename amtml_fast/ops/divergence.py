"""``multi_teacher_kd_loss`` with what Eq 8 has not: other divergences, mixed logits, temperatures of the teachers, numbers for
each row, and statistics."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import (
    asked,
    define,
    empty,
    first_order,
    kernels,
    needs_grad,
    operator,
    save,
    save_grads,
    saved,
    scaled_rows,
)
from amtml_fast.terms import DEFAULT_BETA, Divergence, KDOptions, wide_dtype

ALL_MODES = ("mixture", "sum", "logits")
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd")
_NAME = "multi_teacher_kd_loss"

operator("divergence")


def check_options(
    function: str,
    temperature: float | Tensor,
    alpha: float | Tensor,
    mode: str,
    label_smoothing: float,
    divergence: str,
    beta: float | None,
    teacher_temperature: float | Sequence[float] | None,
    num_teachers: int,
) -> None:
    """The keywords of ``multi_teacher_kd_loss``, but for the tensors."""
    shared = [1.0 if isinstance(x, Tensor) else x for x in (temperature, alpha)]
    _kd.check_numbers(function, shared[0], shared[1], label_smoothing)
    checks.one_of(function, "mode", mode, ALL_MODES)
    check_divergence(function, divergence, beta)
    if teacher_temperature is None:
        return
    if isinstance(teacher_temperature, (list, tuple)):
        if len(teacher_temperature) != num_teachers:
            wanted = f"a number or {num_teachers} numbers, one for each teacher"
            raise ValueError(f"{function}: teacher_temperature must be {wanted}, got {len(teacher_temperature)}")
        for t, tau in enumerate(teacher_temperature):
            checks.number(function, f"teacher_temperature[{t}]", tau, *checks.POSITIVE)
    else:
        checks.number(function, "teacher_temperature", teacher_temperature, *checks.POSITIVE)


def check_divergence(function: str, divergence: str, beta: float | None) -> None:
    checks.one_of(function, "divergence", divergence, DIVERGENCES)
    if beta is None:
        return
    if divergence not in DEFAULT_BETA:
        raise ValueError(f'{function}: beta must be None with divergence "{divergence}", got {beta!r}')
    wanted = f'a number between 0 and 1, both excluded, with divergence "{divergence}"'
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise TypeError(f"{function}: beta must be {wanted}, got {beta!r}")
    if not 0 < beta < 1:
        raise ValueError(f"{function}: beta must be {wanted}, got {beta}")


def row_numbers(
    function: str,
    student: Tensor,
    temperature: float | Tensor,
    alpha: float | Tensor,
    labels: Tensor | None,
    student_name: str = "student_logits",
) -> tuple[float | Tensor, float | Tensor]:
    """``temperature`` and ``alpha``; where they are tensors, one number a row, also of one for all rows."""
    leading = student.shape[:-1]
    rows, found = math.prod(leading), []
    for name, value in (("temperature", temperature), ("alpha", alpha)):
        if isinstance(value, Tensor):
            checks.tensor(function, name, value)
            if not checks.is_any(value.shape, ((), leading, (rows,))):
                raise ValueError(f"{function}: {name} must be a number or {list(leading)}, got {checks.shape(value)}")
            checks.same_device(function, name, value, student_name, student)
            value = value.expand(rows) if value.dim() == 0 else value
        found.append(value)
    if isinstance(temperature, Tensor) and temperature.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{function}: temperature must be detached (it gets no gradient), got one that requires grad")
    if isinstance(alpha, Tensor) and labels is None:
        raise ValueError(
            f"{function}: alpha must be a number without labels (it has no cross-entropy to weigh), got a tensor"
        )
    return found[0], found[1]


def divergence_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    options: KDOptions,
    divergence: Divergence,
    *,
    need_stats: bool,
) -> tuple[Tensor, Any]:
    """The loss of checked rows [N, C], and with ``need_stats`` their statistics."""
    wide = wide_dtype(student, *teachers, weights)
    divergence = divergence.in_dtype(wide)
    chosen = backend.choose("divergence", student, weights, divergence.alpha, *teachers, teachers=len(teachers))
    values = _NAME, labels, options.ignore_index, divergence, student.shape[1], weights
    if chosen != "cpp":  # the C++ kernel checks values itself
        check_values(*values)
    if chosen == "reference":
        return reference.divergence_loss(
            student, list(teachers), weights, labels, options, divergence, need_stats=need_stats
        )
    if weights is not None:
        weights = weights.to(wide).expand(student.shape[0], -1)
    alpha, temperatures = divergence.alpha, divergence.temperature
    ce_weight, kl_weight = _kd.term_weights(options.alpha, labels is not None)
    settings = (
        divergence.name, divergence.beta, options.mode, list(divergence.teacher_temperatures), float(options.temperature),
        options.t2_scale, ce_weight, kl_weight, options.reduction, options.ignore_index, float(options.label_smoothing),
    )  # fmt: skip
    needs = needs_grad(student), needs_grad(weights), needs_grad(alpha)
    out = _kd.run(
        values, DivergenceKD, any(needs), student, weights, alpha,
        (chosen, labels, temperatures, settings, needs, wide, need_stats, teachers), check=check_values,
    )  # fmt: skip
    if not need_stats:
        return out, None
    loss, stats = out
    return loss, _kd.named_stats(stats)


def check_values(
    function: str,
    labels: Tensor | None,
    ignore_index: int,
    divergence: Divergence,
    classes: int,
    weights: Tensor | None,
) -> None:
    """Only where looking costs no sync. A row that is ignored may hold anything."""
    _kd.check_values(function, labels, classes, ignore_index, weights)
    temperature, alpha = divergence.temperature, divergence.alpha
    if temperature is not None:
        fits = (temperature > 0) & temperature.isfinite()
        _check_rows(function, "temperature", "positive and finite", temperature, fits, labels, ignore_index)
    if alpha is not None:
        _check_rows(function, "alpha", "in [0, 1]", alpha, (alpha >= 0) & (alpha <= 1), labels, ignore_index)


def _check_rows(
    function: str, name: str, wanted: str, value: Tensor, fits: Tensor, labels: Tensor | None, ignore_index: int
) -> None:
    if not checks.values_are_free(value):
        return
    bad = ~fits if labels is None else ~fits & (labels != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"{function}: {name} must be {wanted}, got {value[row].item():g} in row {row}")


class DivergenceKD(torch.autograd.Function):
    """The loss, or with ``need_stats`` the loss and the statistics [N, 4 + T], which are not differentiable.

    ``needs``: a gradient to the student, to the weights and to alpha; ``wide``: the dtype of sums.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, weights: Tensor | None, alpha: Tensor | None, rest: tuple) -> Any:
        backend, labels, temperatures, settings, needs, wide, need_stats, teachers = rest
        ctx.in_forward, ctx.backend, ctx.settings, ctx.needs = student.dtype == wide, backend, settings, needs
        now = needs if ctx.in_forward else (False, False, False)
        loss, *grads, stats = kernels(backend).divergence_fwd.default(
            student, teachers, weights, labels, alpha, temperatures, *settings, *now, need_stats
        )
        ctx.set_materialize_grads(False)
        if ctx.in_forward:
            save_grads(ctx, grads, (student, weights, alpha), needs)
        else:
            save(ctx, student, weights, labels, alpha, temperatures, *teachers)
        if not need_stats:
            return loss
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @first_order("multi_teacher_kd_loss")
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple:
        if grad_loss is None:
            return None, None, None, None
        if ctx.in_forward:
            return *scaled_rows(ctx, grad_loss, len(ctx.needs)), None
        student, weights, labels, alpha, temperatures, *teachers = saved(ctx)
        grads = kernels(ctx.backend).divergence_bwd.default(
            grad_loss, student, teachers, weights, labels, alpha, temperatures, *ctx.settings, *ctx.needs
        )
        return *map(asked, grads, ctx.needs), None


_INPUTS = (
    "Tensor student, Tensor[] teachers, Tensor? weights, Tensor? labels, Tensor? alphas, Tensor? temperatures, "
    "str divergence, float beta, str mode, float[] teacher_temperatures, float temperature, bool t2_scale, "
    "float ce_weight, float kl_weight, str reduction, int ignore_index, float label_smoothing, "
    "bool need_student_grad, bool need_weights_grad, bool need_alpha_grad"
)


# loss (scalar, or [N] for "none"), grad_student, grad_weights, grad_alpha, statistics [N, 4 + T]
@define(
    "divergence_fwd",
    f"({_INPUTS}, bool need_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _(student, teachers, weights, labels, alphas, temperatures, *settings):
    reduction, needs, need_stats = settings[8], settings[-4:-1], settings[-1]
    wide, n = wide_dtype(student, *teachers, weights), student.shape[0]
    return (
        student.new_empty((n,) if reduction == "none" else (), dtype=wide),
        *_kd.fake_grads(student, len(teachers), wide, wide, needs),
        empty(student, need_stats, (n, 4 + len(teachers)), wide),
    )


@define(
    "divergence_bwd",
    f"(Tensor grad_loss, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
)
def _(grad_loss, student, teachers, weights, labels, alphas, temperatures, *settings):
    wide = wide_dtype(student, *teachers, weights)
    return _kd.fake_grads(student, len(teachers), student.dtype, wide, settings[-3:])
