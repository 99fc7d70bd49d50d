"""Losses under the names and signatures that other people's training code imports, with the fast kernels inside.

Change the import and nothing else::

    from metric.loss import RkdDistance, RKdAngle      ->  from amtml_fast.dropin import RkdDistance, RKdAngle
    from distiller_zoo import DistillKL, RKDLoss       ->  from amtml_fast.dropin import DistillKL, RKDLoss

Values and gradients are theirs to float32 rounding on ordinary inputs. Where theirs has a defect, the docstring says what
happens here. Four things hold throughout. Teachers' logits are frozen: logits that require grad are an error, not a silently
missing gradient. 16-bit inputs are computed in float32, under autocast, too, and the loss is float32. A class with a logit of
-inf in the teacher, or in both, counts 0 (both: theirs is NaN); in the student alone it makes the KL +inf, as in theirs. A
batch of 0 gives 0, and so does a batch of 1 where there is nothing to compare (theirs are NaN).
docs/dropin.md sets the conventions side by side.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amtml_fast import checks, dropin_amtml, dropin_language, dropin_liger
from amtml_fast.dropin_amtml import *  # noqa: F403
from amtml_fast.dropin_language import *  # noqa: F403
from amtml_fast.dropin_liger import *  # noqa: F403
from amtml_fast.functional import angle_loss, multi_teacher_kd_loss, rkd_distance_loss, topk_kd_loss
from amtml_fast.ops.hint import hint_mse
from amtml_fast.terms import spread, times, weighed, wide_dtype

__all__ = [
    "AngleWiseRKD",
    "DKDLoss",
    "DistanceWiseRKD",
    "DistillKL",
    "HintLoss",
    "KLDivergence",
    "MatchLogits",
    "RKDLoss",
    "RKdAngle",
    "RkdDistance",
    "dkd_loss",
    "kd_loss",
    "rkd_loss",
    *dropin_amtml.__all__,
    *dropin_language.__all__,
    *dropin_liger.__all__,
]


def _rows(features: Tensor) -> Tensor:
    return features.reshape(features.shape[0], math.prod(features.shape[1:]))  # not -1: a batch may be empty


def _class_rows(function: str, student_name: str, student: Tensor, teacher_name: str, teacher: Tensor) -> list[Tensor]:
    """Both as [rows, C]. The originals take their softmax over dimension 1: logits may be [N, C, ...]."""
    checks.tensor(function, student_name, student)
    checks.tensor(function, teacher_name, teacher)
    if student.dim() < 2:
        raise ValueError(
            f"{function}: {student_name} must be [N, C] or [N, C, ...], the classes in dimension 1, "
            f"got {checks.shape(student)}"
        )
    checks.same_shape(function, teacher_name, teacher, student_name, student)
    return [z.movedim(1, -1).flatten(0, -2) for z in (student, teacher)]


class RKdAngle(nn.Module):
    """The RKD authors' angle loss: mean over all N^3 triplets, teacher side constant.

    Theirs needs N^3 memory, gives gradients of 1e9 where two rows are nearly equal in float32 and NaN in float16. Here a
    pair closer than 1e-12 has angle 0 and gradient 0. ``amtml_fast.angle_loss`` has a gradient to the teacher, too.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return angle_loss(student, teacher.detach())


class RkdDistance(nn.Module):
    """The RKD authors' distance loss: mean over all N^2 pairs, teacher side constant.

    Theirs takes distances from a Gram matrix: two equal rows are 1e-6 apart and count in the mean distance, and near rows
    lose their digits. Here distances come from differences, and a pair closer than 1e-6 is left out of the mean.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_distance_loss(student, teacher.detach(), eps=1e-6)


class DistillKL(nn.Module):
    """RepDistiller's ``T^2 KL(p_t || p_s)``, summed over classes, divided by the number of examples.

    Logits are [N, C] or [N, C, ...] with the classes in dimension 1: the sum over all positions is divided by N, as theirs is.
    ``is_ca=True`` (CA-MKD, MMKD) or ``unreduce=True`` (MTKD-RL) gives one value a row, for [N, C] only: with more dimensions
    theirs sums over the last one, which does not hold the classes.

    A class that the teacher gives probability 0 (a logit of -inf) counts 0, here as in theirs. Where the student has -inf as
    well, theirs is NaN; here it counts 0, too. Where the student alone has -inf, both are +inf.
    """

    def __init__(self, T: float):
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor, is_ca: bool = False, unreduce: bool = False) -> Tensor:
        if is_ca or unreduce:
            checks.two_dimensional("DistillKL", "y_s", y_s, " with is_ca or unreduce")
        student, teacher = _class_rows("DistillKL", "y_s", y_s, "y_t", y_t)
        reduction = "none" if is_ca or unreduce else "batchmean"
        loss = multi_teacher_kd_loss(student, [teacher], None, temperature=self.T, reduction=reduction)
        return _over_examples(loss, y_s)


def _over_examples(loss: Tensor, logits: Tensor) -> Tensor:
    """The mean over examples, from that over rows, of logits [N, C, ...]."""
    positions = math.prod(logits.shape[2:])
    return loss if positions == 1 else times(loss, positions)


class RKDLoss(nn.Module):
    """RepDistiller's ``w_d * distance + w_a * angle`` on flattened features; see ``RkdDistance`` and ``RKdAngle``."""

    def __init__(self, w_d: float = 25, w_a: float = 50):
        super().__init__()
        self.w_d, self.w_a = w_d, w_a

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        return rkd_loss(f_s, f_t, distance_weight=self.w_d, angle_weight=self.w_a)


class HintLoss(nn.Module):
    """RepDistiller's hint loss: mean squared error of two feature maps of the same shape.

    Shapes that differ are an error; theirs broadcasts them with a warning.
    """

    def forward(self, f_s: Tensor, f_t: Tensor) -> Tensor:
        checks.tensor("HintLoss", "f_s", f_s)
        checks.tensor("HintLoss", "f_t", f_t)
        checks.same_shape("HintLoss", "f_t", f_t, "f_s", f_s)
        checks.same_device("HintLoss", "f_t", f_t, "f_s", f_s)
        return hint_mse(f_s, f_t)


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, logit_stand: bool = False) -> Tensor:
    """mdistiller's ``T^2 KL``, summed over classes, mean over rows.

    Logits are [N, C] or [N, C, ...] with the classes in dimension 1; every position is a row.

    ``logit_stand`` takes the logits to mean 0 and standard deviation 1 first, along the **last** dimension, as
    logit-standardization-KD does: with more than two dimensions these are positions, not classes. Mean and standard deviation
    are those of the finite logits, so that a class masked by -inf counts 0 (theirs is NaN).
    """
    if logit_stand:
        logits_student = _standardized("kd_loss", "logits_student", logits_student)
        logits_teacher = _standardized("kd_loss", "logits_teacher", logits_teacher)
    student, teacher = _class_rows("kd_loss", "logits_student", logits_student, "logits_teacher", logits_teacher)
    return multi_teacher_kd_loss(student, [teacher], None, temperature=temperature)


def _standardized(function: str, name: str, logits: Tensor) -> Tensor:
    """``(z - mean) / (1e-7 + std)`` of the logits that are not -inf, which stay so."""
    checks.tensor(function, name, logits)
    z = logits.to(wide_dtype(logits))
    masked = z == -math.inf  # NaN is not: it stays NaN
    count = (~masked).sum(-1, keepdim=True)
    mean = z.masked_fill(masked, 0).sum(-1, keepdim=True) / count.clamp(min=1)
    centered = (z - mean).masked_fill(masked, 0)
    variance = centered.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    constant = variance == 0  # where the root has no gradient
    std = variance.masked_fill(constant, 1).sqrt().masked_fill(constant, 0)
    return (centered / (1e-7 + std)).masked_fill(masked, -math.inf)


def rkd_loss(
    f_s: Tensor,
    f_t: Tensor,
    squared: bool = False,
    eps: float = 1e-12,
    distance_weight: float = 25,
    angle_weight: float = 50,
) -> Tensor:
    """mdistiller's relational loss on flattened features, teacher side constant; see ``RkdDistance`` and ``RKdAngle``.

    ``eps`` is the squared distance below which a pair is degenerate. ``squared=True`` compares squared distances; that
    part is plain PyTorch.
    """
    student, teacher = _rows(f_s), _rows(f_t).detach()
    angle = angle_loss(student, teacher)
    if squared:
        wide = wide_dtype(student, teacher)
        d_s, d_t = (_squared_over_mean(x.to(wide), eps) for x in (student, teacher))
        distance = F.smooth_l1_loss(d_s, d_t, reduction="sum") / max(d_s.numel(), 1)
    else:
        distance = rkd_distance_loss(student, teacher, eps=eps**0.5)
    return times(distance, distance_weight) + times(angle, angle_weight)


def _squared_over_mean(x: Tensor, eps: float) -> Tensor:
    """[N, N] squared distances over the mean of those above ``eps``; the others are 0, with gradient 0."""
    squared = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
    degenerate = squared <= eps  # NaN is not: it stays NaN
    squared = squared.masked_fill(degenerate, 0)
    mean = squared.sum() / (~degenerate).sum().clamp(min=1)
    return squared / mean.masked_fill(degenerate.all(), 1)


class DistanceWiseRKD(nn.Module):
    """MMRazor's distance loss: rows optionally of length 1 first, times ``loss_weight``; gradients to both sides."""

    def __init__(self, loss_weight: float = 25.0, with_l2_norm: bool = True):
        super().__init__()
        self.loss_weight, self.with_l2_norm = loss_weight, with_l2_norm

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        loss = rkd_distance_loss(*_normalized(preds_S, preds_T, self.with_l2_norm), eps=1e-6)
        return times(loss, self.loss_weight)


class AngleWiseRKD(nn.Module):
    """MMRazor's angle loss: rows optionally of length 1 first, times ``loss_weight``; gradients to both sides."""

    def __init__(self, loss_weight: float = 50.0, with_l2_norm: bool = True):
        super().__init__()
        self.loss_weight, self.with_l2_norm = loss_weight, with_l2_norm

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        return times(angle_loss(*_normalized(preds_S, preds_T, self.with_l2_norm)), self.loss_weight)


def _normalized(student: Tensor, teacher: Tensor, with_l2_norm: bool) -> tuple[Tensor, Tensor]:
    student, teacher = _rows(student), _rows(teacher)
    if not with_l2_norm:
        return student, teacher
    return F.normalize(student.to(wide_dtype(student))), F.normalize(teacher.to(wide_dtype(teacher)))


class KLDivergence(nn.Module):
    """MMRazor's ``T^2 KL(p_t || p_s)`` times ``loss_weight``, the classes in dimension 1, teacher side constant.

    Args:
        tau: temperature.
        reduction: ``"batchmean"``: the sum over everything by the length of the batch, as ``DistillKL``; ``"sum"``; ``"mean"``: by
            the number of logits. Theirs also has ``"none"``, one number a class.
        loss_weight: a factor.
        teacher_detach: True, with which theirs has no gradient to the teacher either.
    """

    def __init__(
        self, tau: float = 1.0, reduction: str = "batchmean", loss_weight: float = 1.0, teacher_detach: bool = True
    ):
        super().__init__()
        checks.one_of("KLDivergence", "reduction", reduction, ("batchmean", "sum", "mean"))
        if not teacher_detach:
            raise ValueError(
                f"KLDivergence: teacher_detach must be True (teachers are frozen here), got {teacher_detach}"
            )
        self.tau, self.reduction, self.loss_weight, self.teacher_detach = tau, reduction, loss_weight, teacher_detach

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        student, teacher = _class_rows("KLDivergence", "preds_S", preds_S, "preds_T", preds_T)
        loss = multi_teacher_kd_loss(student, [teacher.detach()], None, temperature=self.tau, reduction=self.reduction)
        loss = _over_examples(loss, preds_S) if self.reduction == "batchmean" else loss
        return times(loss, self.loss_weight)


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """mdistiller's decoupled loss (Zhao et al. 2022): ``T^2 (alpha TCKD + beta NCKD)``, mean over the rows of logits [N, C].

    TCKD is the KL between (target, all others together), NCKD that between the others alone. Theirs takes the logarithm of the
    student's share of the others after the softmax, where it may have underflowed to 0: the loss is infinite then, its gradient NaN. Here
    no digits are lost. A part without weight counts nothing, even if it is infinite. ``logit_stand``: as in ``kd_loss``.
    """
    if logit_stand:
        logits_student = _standardized("dkd_loss", "logits_student", logits_student)
        logits_teacher = _standardized("dkd_loss", "logits_teacher", logits_teacher)
    names = "logits_student", "logits_teacher", "target"
    return _decoupled("dkd_loss", names, logits_student, logits_teacher, target, alpha, beta, temperature, "batchmean")


class DKDLoss(nn.Module):
    """MMRazor's decoupled loss: ``dkd_loss`` times ``loss_weight``.

    ``reduction``: ``"batchmean"`` or ``"sum"``. Theirs gives the sum for ``"mean"`` and ``"none"``, too.
    """

    def __init__(
        self,
        tau: float = 1.0,
        alpha: float = 1.0,
        beta: float = 1.0,
        reduction: str = "batchmean",
        loss_weight: float = 1.0,
    ):
        super().__init__()
        checks.one_of("DKDLoss", "reduction", reduction, ("batchmean", "sum"))
        self.tau, self.alpha, self.beta, self.reduction, self.loss_weight = tau, alpha, beta, reduction, loss_weight

    def forward(self, preds_S: Tensor, preds_T: Tensor, gt_labels: Tensor) -> Tensor:
        names = "preds_S", "preds_T", "gt_labels"
        loss = _decoupled(
            "DKDLoss", names, preds_S, preds_T, gt_labels, self.alpha, self.beta, self.tau, self.reduction
        )
        return times(loss, self.loss_weight)


def _decoupled(
    function: str,
    names: tuple[str, str, str],
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    reduction: str,
) -> Tensor:
    checks.two_dimensional(function, names[0], student)
    checks.tensor(function, names[1], teacher)
    checks.same_shape(function, names[1], teacher, names[0], student)
    checks.integers(function, names[2], target)
    if target.numel() != len(student):
        raise ValueError(f"{function}: {names[2]} must be {[len(student)]}, got {checks.shape(target)}")
    if checks.values_are_free(target):
        wrong = target[(target < 0) | (target >= student.shape[1])]
        if len(wrong):
            raise ValueError(f"{function}: {names[2]} must be in [0, {student.shape[1]}), got {int(wrong[0])}")
    wide = wide_dtype(student, teacher)
    student, teacher, target = student.to(wide), teacher.to(wide), target.reshape(-1, 1).long()
    others = [z.scatter(1, target, -math.inf) for z in (student, teacher)]
    # A row without another class: both sides are alike there, with a KL of 0.
    alone = torch.stack(others).amax(0).amax(1, keepdim=True) == -math.inf
    others = [z.masked_fill(alone, 0) for z in others]
    nckd = multi_teacher_kd_loss(others[0], others[1:], None, temperature=temperature, reduction=reduction)
    log_p = (teacher / temperature).log_softmax(1).gather(1, target)
    tckd = topk_kd_loss(student, [target], [log_p], None, temperature=temperature, tail="bucket", reduction=reduction)
    return weighed(tckd, alpha) + weighed(nckd, beta)


class MatchLogits(nn.Module):
    """MMKD's weighted sum of per-teacher KLs: ``mean_i sum_t w_it T^2 KL(p_t || p_s)``, our mode ``"sum"``.

    Logits are [N, C]. ``logits_weight`` is [N, T] or what broadcasts to it, as in theirs: [T] and [1, T] hold for all rows,
    [N, 1] and a scalar tensor for all teachers. Weights are finite and not negative; nothing makes them sum to 1.

    Args:
        opt: anything with ``kd_T``, as theirs takes it, or the temperature itself.
    """

    def __init__(self, opt: Any):
        super().__init__()
        self.T = getattr(opt, "kd_T", opt)

    def forward(self, logit_s: Tensor, logit_t_list: Sequence[Tensor], logits_weight: Tensor) -> Tensor:
        checks.two_dimensional("MatchLogits", "logit_s", logit_s)
        weights = spread("MatchLogits", "logits_weight", logits_weight, (len(logit_s), len(logit_t_list)))
        return multi_teacher_kd_loss(logit_s, logit_t_list, weights, temperature=self.T, mode="sum")
