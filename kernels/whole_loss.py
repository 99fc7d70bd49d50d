"""AMTMLLoss without hints, in one call each way: weights, distillation, angle loss, and the sums of all terms.

    loss = kd + angle_weight * angle + regularizer_weight * (|theta|^2 + |v|^2),  kd = ce_weight * CE + kl_weight * KL

Launches at N = 128: forward 6 (weights, rows of the distillation, 3 of the angle loss, terms), backward 3 (rows, weights 2), and a
multiplication by torch for what the angle loss sends back to the probabilities. It is sent back times angle_weight already. The
rows that count for the angle loss are those that the distillation has marked in what it leaves for the terms.
_terms_kernel: one program; reads 12 bytes a row (of at most SPAN rows, or of as many parts) and 4 a number of theta and v.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import angle as angles
from . import multi_teacher_kd as kd
from ._common import OPTIONS
from ._kd_rows import SPAN, few_rows, weighted
from ._launch import Launch, kept
from .teacher_weights import backward as weights_backward
from .teacher_weights import teacher_weights_fwd


@triton.jit
def _squares(x, count, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float64)
        sums += value * value
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["n"])
def _terms_kernel(
    values,  # [3, n]: CE, KL and how many rows count
    angle,  # or None
    divisor,  # of the kd term; or None
    theta, v,  # what the regularizer is made of; or None
    loss,
    terms,  # [6]: kd, CE, KL, angle, 0 for the hint, regularizer
    n, theta_count, v_count,
    classes,  # divide the KL; 0 stands for sums instead of means
    ce_weight, kl_weight, angle_weight, regularizer_weight,
    SPAN: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, SPAN)
    ce = tl.sum(tl.load(values + rows, mask=rows < n, other=0.0).to(tl.float64), axis=0)
    kl = tl.sum(tl.load(values + n + rows, mask=rows < n, other=0.0).to(tl.float64), axis=0)
    count = tl.sum(tl.load(values + n + n + rows, mask=rows < n, other=0.0).to(tl.float64), axis=0)
    by = tl.where(classes == 0, 1.0, tl.maximum(count, 1.0))
    if divisor is not None:
        by *= tl.load(divisor).to(tl.float64)
    ce = ce / by
    kl = kl / (by * tl.where(classes == 0, 1.0, classes))
    total = weighted(ce, kl, ce_weight, kl_weight)
    tl.store(terms, total.to(tl.float32))
    tl.store(terms + 1, ce.to(tl.float32))
    tl.store(terms + 2, kl.to(tl.float32))
    tl.store(terms + 4, 0.0)
    if angle is not None:
        value = tl.load(angle)
        tl.store(terms + 3, value)
        total += angle_weight * value.to(tl.float64)
    else:
        tl.store(terms + 3, 0.0)
    if theta is not None:
        squares = _squares(theta, theta_count, 1024) + _squares(v, v_count, 1024)
        tl.store(terms + 5, squares.to(tl.float32))
        total += regularizer_weight * squares
    else:
        tl.store(terms + 5, 0.0)
    tl.store(loss, total.to(tl.float32))


@kept
def _terms_launch(
    n: int,
    theta_count: int,
    v_count: int,
    classes: float,
    settings: kd.Settings,
    angle_weight: float,
    regularizer: float,
) -> Launch:
    return Launch(
        _terms_kernel,
        (1,),
        n=n,
        theta_count=theta_count,
        v_count=v_count,
        classes=classes,
        ce_weight=float(settings.ce_weight),
        kl_weight=float(settings.kl_weight),
        angle_weight=float(angle_weight),
        regularizer_weight=float(regularizer),
        SPAN=SPAN,
        num_warps=8,
        **OPTIONS,
    )


def _float(t: Any) -> Tensor:
    return t if t.dtype == torch.float32 else t.to(torch.float32)


def whole_loss_fwd(
    features: Any,
    theta: Any,
    v: Any,
    weights: Tensor | None,
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    divisor: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    kl_scale: float,
    mode: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    max_pool: bool,
    angle_weight: float,
    delta: float,
    eps: float,
    regularizer_weight: float,
    need_student_grad: bool,
    need_targets_grad: bool,
) -> tuple[Tensor, ...]:
    """loss, terms [6], weights (empty if given), pooled, index, stats, and what the angle loss sends back to probabilities and soft
    targets."""
    n, c = student.shape
    loss = student.new_empty((), dtype=torch.float32)
    terms = loss.new_empty(6)
    factors: tuple = (None, None)
    if weights is None:
        theta, v = _float(theta), _float(v)
        used, pooled, index = teacher_weights_fwd(features, theta, v, max_pool)
        made = used
        if regularizer_weight != 0:
            factors = theta.contiguous(), v.contiguous()
    else:
        used = _float(weights)
        made, pooled, index = loss.new_empty(0), loss.new_empty(0), loss.new_empty(0)
    settings = kd.Settings(temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing)
    with_angle, angle = angle_weight != 0, None
    values = loss.new_empty(3, n)
    rows = values.unbind()
    probs, targets, stats, _, _ = kd.forward_rows(
        student, teachers, used, labels, settings, rows, False, False, with_angle
    )
    if with_angle and n:
        angle = loss.new_empty(())
        mask = None if labels is None else rows[2]
        needs = need_student_grad, need_targets_grad
        back = angles.run(probs, targets, mask, None, delta, eps, "mean", angle, *needs, gain=angle_weight)
    else:
        shapes = [(n, c) if needed and with_angle else (0,) for needed in (need_student_grad, need_targets_grad)]
        back = loss.new_empty(shapes[0]), loss.new_empty(shapes[1])
    values = few_rows(values)
    launch = _terms_launch(
        values.shape[1],
        *(0 if t is None else t.numel() for t in factors),
        settings.kl_divisor(c),
        settings,
        angle_weight,
        regularizer_weight,
    )
    launch(values, angle, divisor, *factors, loss, terms)
    return loss, terms, made, pooled, index, stats, *back


def whole_loss_bwd(
    grad: Tensor,
    features: Any,
    theta: Any,
    v: Any,
    weights: Tensor,
    pooled: Tensor,
    index: Tensor,
    student: Tensor,
    teachers: list[Tensor],
    labels: Tensor | None,
    stats: Tensor,
    grad_probs: Tensor,
    grad_targets: Tensor,
    divisor: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    kl_scale: float,
    mode: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    max_pool: bool,
    angle_weight: float,
    regularizer_weight: float,
    need_student: bool,
    need_weights: bool,
    need_features: bool,
    need_parameters: bool,
) -> tuple[Tensor, ...]:
    """Gradients to student, given weights, features, theta and v."""
    settings = kd.Settings(temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing)
    back_q = grad_probs * grad if need_student and grad_probs.numel() else None
    back_p = grad_targets * grad if need_weights and grad_targets.numel() else None
    grad_kd = grad if divisor is None else (grad / divisor).to(torch.float32)
    grad_student = student.new_empty(student.shape if need_student else 0)
    slopes = stats.new_empty((student.shape[0], len(teachers)) if need_weights else 0)
    kd.backward(
        grad_student, slopes, grad_kd, back_q, back_p, student, teachers, _float(weights), labels, stats, settings,
        rescale=False,
    )  # fmt: skip
    nothing = [stats.new_empty(0) for _ in range(4 if features is None or not need_weights else 1)]
    if features is None:
        return grad_student, slopes.to(weights.dtype), *nothing[1:]
    if not need_weights:
        return grad_student, *nothing
    grad_features, grad_theta, grad_v = weights_backward(
        slopes, features, _float(theta), _float(v), pooled, index, max_pool, need_features, need_parameters,
        grad, 2 * regularizer_weight,
    )  # fmt: skip
    if need_parameters:
        grad_theta, grad_v = grad_theta.to(theta.dtype), grad_v.to(v.dtype)
    return grad_student, *nothing, grad_features, grad_theta, grad_v
