"""``AMTMLLoss`` without hints as one node of the graph: teacher weights, distillation, angle loss and regularizer (Eq 3)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast import backend, checks
from amtml_fast.ops import _kd
from amtml_fast.ops._base import asked, define, empty, first_order, kernels, needs_grad, operator, save, saved
from amtml_fast.ops.angle import EPS
from amtml_fast.ops.multi_teacher_kd import MODES
from amtml_fast.terms import KDOptions, item_count, wide_dtype

operator("whole_loss")  # where it cannot run, AMTMLLoss is composed of the others


def fused_by(student: Tensor, teachers: Sequence[Tensor], *others: Tensor | None) -> str | None:
    """The backend that runs the whole loss as one node on these tensors, if any."""
    return backend.runs("whole_loss", student, *teachers, *others, teachers=len(teachers))


def whole_loss(
    chosen: str,
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    sources: tuple[Tensor | None, ...],
    divisor: int | Tensor | None,
    options: KDOptions,
    *,
    max_pool: bool,
    angle_weight: float,
    delta: float,
    angle_trains_weights: bool,
    regularizer_weight: float,
) -> tuple[Tensor, ...]:
    """On checked rows, by the backend that ``fused_by`` gave. sources of the weights: (features, theta, v, None), or
    (None, None, None, weights). divisor: of the kd term. Returns loss, terms and weights like ``WholeLoss``."""
    name = "AMTMLLoss"
    _kd.check_numbers(name, options.temperature, options.alpha, options.label_smoothing)
    checks.one_of(name, "mode", options.mode, MODES)
    checks.number(name, "delta", delta, *checks.POSITIVE)
    needs = needs_grad(student), needs_grad(*sources)
    settings = Settings(
        chosen,
        _kd.settings(options, labels is not None),
        max_pool,
        float(angle_weight),
        float(delta),
        angle_trains_weights,
        float(regularizer_weight),
        needs,
    )
    count = None
    if divisor is not None:
        given = item_count(divisor, torch.float64)
        on_device = isinstance(given, Tensor) and given.device == student.device
        count = given if on_device else student.new_full((), float(given), dtype=torch.float64)  # no sync
    values = name, labels, student.shape[1], options.ignore_index, None
    if chosen == "triton":  # the others check values themselves
        _kd.check_values(*values)
    return _kd.run(values, WholeLoss, any(needs), *sources, student, labels, count, settings, *teachers)


class Settings(NamedTuple):
    """What ``WholeLoss`` adds up; ``kd`` are the values of ``_kd.SETTINGS``."""

    backend: str
    kd: tuple
    max_pool: bool
    angle_weight: float
    delta: float
    angle_trains_weights: bool
    regularizer_weight: float
    needs: tuple[bool, bool]  # a gradient to the student, and to whatever makes the weights


class WholeLoss(torch.autograd.Function):
    """Teacher weights, distillation, angle loss and regularizer as one node of the graph.

    The weights come from ``features``, ``theta`` and ``v``, or are given (then those three are None, and so is the
    regularizer). ``divisor`` divides the kd term. Returns loss, terms [6] (kd, ce, kl, angle, 0 for the hint,
    regularizer) and weights (empty if they were given): the loss alone is differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor | None,
        theta: Tensor | None,
        v: Tensor | None,
        weights: Tensor | None,
        student: Tensor,
        labels: Tensor | None,
        divisor: Tensor | None,
        settings: Settings,
        *teachers: Tensor,
    ) -> tuple[Tensor, ...]:
        chosen, kd, max_pool, angle_weight, delta, trains, regularizer_weight, (need_student, need_weights) = settings
        loss, terms, made, *saved = kernels(chosen).whole_loss_fwd.default(
            features, theta, v, weights, student, teachers, labels, divisor, *kd, max_pool, angle_weight, delta, EPS,
            regularizer_weight, need_student, need_weights and trains,
        )  # fmt: skip
        ctx.settings = settings
        ctx.mark_non_differentiable(terms, made)
        ctx.set_materialize_grads(False)
        save(ctx, features, theta, v, made if weights is None else weights, student, labels, divisor, *saved, *teachers)
        return loss, terms, made

    @staticmethod
    @first_order("AMTMLLoss")
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
        fixed = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad is None:
            return None, None, None, None, None, *fixed
        features, theta, v, weights, student, labels, divisor, *rest = saved(ctx)
        pooled, index, stats, grad_probs, grad_targets, *teachers = rest
        chosen, kd, max_pool, angle_weight, _, _, regularizer_weight, (need_student, need_weights) = ctx.settings
        need_features, need_theta, need_v = ctx.needs_input_grad[:3]
        grads = kernels(chosen).whole_loss_bwd.default(
            grad, features, theta, v, weights, pooled, index, student, teachers, labels, stats, grad_probs,
            grad_targets, divisor, *kd, max_pool, angle_weight, regularizer_weight, need_student, need_weights,
            need_features, need_theta or need_v,
        )  # fmt: skip
        grad_student, grad_weights, grad_features, grad_theta, grad_v = grads
        out = (grad_features, grad_theta, grad_v, grad_weights, grad_student)
        return *map(asked, out, ctx.needs_input_grad), *fixed


# loss; terms [6]: kd, ce, kl, angle, 0 for the hint, regularizer; weights (unless given), pooled and index as in
# teacher_weights; stats; what the angle loss sends back
@define(
    "whole_loss_fwd",
    "(Tensor? features, Tensor? theta, Tensor? v, Tensor? weights, Tensor student, Tensor[] teachers, Tensor? labels, "
    f"Tensor? divisor, {_kd.SETTINGS}, bool max_pool, float angle_weight, float delta, float eps, "
    "float regularizer_weight, bool need_student_grad, bool need_targets_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _(features, theta, v, weights, student, teachers, labels, divisor, *settings):
    max_pool, angle_weight, *_, need_student_grad, need_targets_grad = settings[8:]
    n, c = student.shape
    made = [student.new_empty(0, dtype=torch.float32) for _ in range(3)]
    if features is not None:
        wide, d = wide_dtype(features, theta, v), features.shape[1]
        weights = features.new_empty(n, theta.shape[0], dtype=wide)
        index = empty(features, max_pool, (n, d), torch.int32)
        made = [weights, features.new_empty(n, d, dtype=wide), index]
    wide = wide_dtype(student, *teachers, weights)
    back = [
        student.new_empty((n, c) if needed else (0,), dtype=wide if angle_weight != 0 else torch.float32)
        for needed in (need_student_grad and angle_weight != 0, need_targets_grad and angle_weight != 0)
    ]
    stats = student.new_empty(n, 3 + 2 * len(teachers), dtype=wide)
    return student.new_empty((), dtype=wide), student.new_empty(6, dtype=wide), *made, stats, *back


# gradients to student, given weights, features, theta, v
@define(
    "whole_loss_bwd",
    "(Tensor grad, Tensor? features, Tensor? theta, Tensor? v, Tensor weights, Tensor pooled, Tensor index, "
    "Tensor student, Tensor[] teachers, Tensor? labels, Tensor stats, Tensor grad_probs, Tensor grad_targets, "
    f"Tensor? divisor, {_kd.SETTINGS}, bool max_pool, float angle_weight, float regularizer_weight, "
    "bool need_student, bool need_weights, bool need_features, bool need_parameters) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _(grad, features, theta, v, weights, pooled, index, student, teachers, *settings):
    need_student, need_weights, need_features, need_parameters = settings[-4:]
    given = features is None
    grad_student = empty(student, need_student, student.shape, student.dtype)
    grads = [student.new_empty(0, dtype=torch.float32) for _ in range(4)]
    if given:
        grads[0] = empty(weights, need_weights, weights.shape, weights.dtype)
    elif need_weights:
        grads[1] = torch.empty_like(features) if need_features else features.new_empty(0)
        for i, t in ((2, theta), (3, v)):
            grads[i] = t.new_empty(t.shape) if need_parameters else t.new_empty(0, dtype=pooled.dtype)
    return grad_student, *grads
