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

from amtml_fast import checks, dropin_language, dropin_liger
from amtml_fast.dropin_language import *  # noqa: F403
from amtml_fast.dropin_liger import *  # noqa: F403
from amtml_fast.functional import angle_loss, hint_loss, multi_teacher_kd_loss, rkd_distance_loss, teacher_weights
from amtml_fast.losses import parameter
from amtml_fast.ops.hint import hint_mse
from amtml_fast.terms import times, wide_dtype

__all__ = [
    "Adapter",
    "AngleWiseRKD",
    "DistanceWiseRKD",
    "DistillKL",
    "FitNet",
    "HintLoss",
    "LearningAdapter",
    "MatchLogits",
    "MixtureAdapter",
    "RKDLoss",
    "RKdAngle",
    "RkdDistance",
    "kd_loss",
    "rkd_loss",
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


def _two_dimensional(function: str, name: str, logits: Tensor, where: str = "") -> None:
    checks.tensor(function, name, logits)
    if logits.dim() != 2:
        raise ValueError(f"{function}: {name} must be [N, C]{where}, got {checks.shape(logits)}")


def _spread(function: str, name: str, value: Tensor, size: Sequence[int]) -> Tensor:
    """``value`` broadcast to ``size``, made wide first: the gradients of what it stands for are summed before they are rounded."""
    checks.tensor(function, name, value)
    if value.dim() > len(size) or any(v not in (1, s) for v, s in zip(reversed(value.shape), reversed(size))):
        raise ValueError(f"{function}: {name} must be {list(size)} or broadcast to it, got {checks.shape(value)}")
    return value.to(wide_dtype(value)).expand(*size)


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
            _two_dimensional("DistillKL", "y_s", y_s, " with is_ca or unreduce")
        student, teacher = _class_rows("DistillKL", "y_s", y_s, "y_t", y_t)
        reduction = "none" if is_ca or unreduce else "batchmean"
        loss = multi_teacher_kd_loss(student, [teacher], None, temperature=self.T, reduction=reduction)
        positions = math.prod(y_s.shape[2:])
        return loss if positions == 1 else times(loss, positions)  # from the mean over rows to the mean over examples


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
        logits_student, logits_teacher = (_standardized(z) for z in (logits_student, logits_teacher))
    student, teacher = _class_rows("kd_loss", "logits_student", logits_student, "logits_teacher", logits_teacher)
    return multi_teacher_kd_loss(student, [teacher], None, temperature=temperature)


def _standardized(logits: Tensor) -> Tensor:
    """``(z - mean) / (1e-7 + std)`` of the logits that are not -inf, which stay so."""
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
        _two_dimensional("MatchLogits", "logit_s", logit_s)
        weights = _spread("MatchLogits", "logits_weight", logits_weight, (len(logit_s), len(logit_t_list)))
        return multi_teacher_kd_loss(logit_s, logit_t_list, weights, temperature=self.T, mode="sum")


class _Transform(nn.Conv2d):
    """FitNet's convolution. Whoever calls ``reset_parameters`` of all modules, as after ``to_empty()``, gets its numbers, not torch's."""

    def reset_parameters(self) -> None:
        super().reset_parameters()  # theirs draws these, too
        nn.init.uniform_(self.weight, -0.005, 0.005)


class FitNet(nn.Module):
    """The AMTML authors' hint: channel-normalized maps, a 1x1 convolution without bias on the student's, mean square.

    A teacher map of one pixel is compared with every pixel of the student's, as theirs does by broadcasting. Their
    script forgets to give ``transform`` to an optimizer; it is an ordinary parameter here as there.
    """

    def __init__(self, in_feature: int, out_feature: int):
        super().__init__()
        self.in_feature, self.out_feature = in_feature, out_feature
        self.transform = _Transform(in_feature, out_feature, 1, bias=False, dtype=torch.float32)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.dim() == 2:
            student, teacher = student[:, :, None, None], teacher[:, :, None, None]
        if teacher.shape[2:] == (1, 1):
            teacher = teacher.expand(-1, -1, *student.shape[2:])
        if student.shape[2:] != teacher.shape[2:]:
            raise ValueError(
                f"FitNet: teacher must have the height and width of student {list(student.shape)} or 1 x 1, "
                f"got {list(teacher.shape)}"
            )
        return hint_loss(student, teacher, self.transform.weight.flatten(1), normalize=True)


class Adapter(nn.Module):
    """The AMTML authors' adapter: weights of the teachers from the student's last map, and the loss of stage one.

    Their six notebooks have three adapters under this one name:

    - ``Adapter``, whose ``forward`` gives the weights: LR_adaptive_Hint and adaptive_FitNet_teacher-level.
    - ``MixtureAdapter``, whose ``forward`` gives the mixed soft targets: LR_adaptive_KD, LR_adaptive_AT, LR_adaptive_triplets.
    - ``LearningAdapter``, with another ``loss``: LR_adaptive_learning.

    Args:
        teacher_models: as many as there are teachers.
        pool_size: shape [N, d, H, W] of the student's last map.

    ``theta`` [T, d] and ``W`` [d, 1] start as N(0, 1), with which the weights are nearly one-hot from the first step
    (``amtml_fast.TeacherAdapter`` starts smaller). ``forward`` runs on the fused kernel. ``loss`` takes soft targets that
    are mixed already, so it is plain PyTorch: ``amtml_fast.AMTMLLoss`` is the fused form of the whole.
    """

    def __init__(self, teacher_models: Sequence[Any], pool_size: Sequence[int]):
        super().__init__()
        self.theta, self.W = map(parameter, self._drawn(len(teacher_models), pool_size[1]))
        self.val = False

    @staticmethod
    def _drawn(teachers: int, channels: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)  # the CPU's, as theirs: the same numbers on every device
        sizes = (teachers, channels), (channels, 1)
        return [torch.randn(size, generator=generator, dtype=torch.float32, device="cpu") for size in sizes]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The numbers of the start, where they are: after ``to_empty()`` their memory holds anything."""
        p: Any
        for p, start in zip((self.theta, self.W), self._drawn(*self.theta.shape)):
            if hasattr(p, "device_mesh"):  # FSDP2 has sharded it
                from torch.distributed.tensor import distribute_tensor  # imported late: it takes a second

                start = distribute_tensor(start, p.device_mesh, p.placements)
            p.copy_(start)

    def forward(self, conv_map: Tensor, te_logits_list: Any = None) -> Tensor:
        """Weights [N, T]. ``te_logits_list`` plays no part, in theirs neither."""
        return teacher_weights(conv_map, self.theta, self.W.squeeze(1))

    def loss(self, y: Tensor, labels: Tensor, weighted_logits: Tensor, T: float = 10.0, alpha: float = 0.7) -> Tensor:
        """``2 alpha T^2 * mean over N C of the KL terms + (1 - alpha) CE``, and 0.1 (|W|^2 + |theta|^2) before ``eval()``.

        ``weighted_logits`` [N, C], or what broadcasts to it, are, in spite of their name, mixed probabilities. Note the mean
        over N * C: the effective weight of the KL falls with the number of classes. A class that all teachers give
        probability 0 counts 0, with gradient 0 (theirs is NaN for ``theta``).

        Three of their notebooks call ``eval()`` before stage one, so that theta and W are never regularized: LR_adaptive_KD,
        LR_adaptive_Hint and adaptive_FitNet_teacher-level.
        """
        y, targets = self._logits_and_targets(y, labels, weighted_logits)
        return self._regularized(_kd_of_mixture((y / T).log_softmax(1), y, labels, targets, T, alpha))

    def _logits_and_targets(self, y: Tensor, labels: Tensor, weighted_logits: Tensor) -> tuple[Tensor, Tensor]:
        name = f"{type(self).__name__}.loss"
        _two_dimensional(name, "y", y)
        if not isinstance(labels, Tensor) or labels.is_floating_point():  # of probabilities the mean would be another
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"{name}: labels must be integer classes, got {got}")
        if labels.shape != y.shape[:1]:
            raise ValueError(f"{name}: labels must be {[len(y)]} like y, got {checks.shape(labels)}")
        targets = _spread(name, "weighted_logits", weighted_logits, y.shape)
        y = y.to(wide_dtype(y, targets))
        return y.masked_fill(y == -math.inf, -math.inf), targets.to(y.dtype)  # no gradient flows into a masked class

    def _regularized(self, value: Tensor) -> Tensor:
        if self.val:
            return value
        return value + 0.1 * sum(p.to(value.dtype).square().sum() for p in (self.W, self.theta))

    def train(self, mode: bool = True) -> "Adapter":
        self.val = not mode
        return super().train(mode)


def _kd_of_mixture(log_q: Tensor, logits: Tensor, labels: Tensor, targets: Tensor, T: float, alpha: float) -> Tensor:
    """``2 alpha T^2 * mean over N C of targets (log targets - log_q) + (1 - alpha) CE(logits, labels)``."""
    value = log_q.new_zeros(())
    if alpha != 0:  # not 0 * kl: that is NaN where kl is infinite
        empty = targets == 0
        kl = (targets * (targets.masked_fill(empty, 1).log() - log_q.masked_fill(empty, 0))).sum()
        value = value + kl * (2.0 * alpha * T * T / max(log_q.numel(), 1))
    if alpha != 1:
        labels = labels.long()  # which is what torch's cross-entropy takes
        used = (labels != -100).sum().clamp(min=1)
        value = value + F.cross_entropy(logits, labels, reduction="sum") / used * (1.0 - alpha)
    return value


class MixtureAdapter(Adapter):
    """The adapter of the authors' LR_adaptive_KD, LR_adaptive_AT and LR_adaptive_triplets notebooks; see ``Adapter``."""

    def forward(self, conv_map: Tensor, te_logits_list: Any = None) -> Tensor:
        """The mixture [N, C] of ``te_logits_list`` [N, T, C], which are, in spite of their name, soft targets."""
        name = "MixtureAdapter"
        checks.tensor(name, "te_logits_list", te_logits_list)
        if te_logits_list.dim() != 3 or te_logits_list.shape[:2] != (len(conv_map), len(self.theta)):
            raise ValueError(
                f"{name}: te_logits_list must be [{len(conv_map)}, {len(self.theta)}, C], got {checks.shape(te_logits_list)}"
            )
        return (super().forward(conv_map).unsqueeze(2) * te_logits_list).sum(1)


class LearningAdapter(Adapter):
    """The adapter of the authors' LR_adaptive_learning notebook; see ``Adapter``. ``forward`` gives the weights."""

    def loss(self, y: Tensor, labels: Tensor, weighted_logits: Tensor, T: float = 10.0, alpha: float = 0.7) -> Tensor:
        """``Adapter.loss`` with the cross-entropy at temperature T, and the angle and the distance loss (weight 1 each).

        Both take log_softmax(y / T) for the student and the probabilities ``weighted_logits``, as a constant, for the
        teacher. Coordinates of masked classes are 0 there.
        """
        y, targets = self._logits_and_targets(y, labels, weighted_logits)
        log_q = (y / T).log_softmax(1)
        rows = log_q.masked_fill(y == -math.inf, 0)
        relations = angle_loss(rows, targets.detach()) + rkd_distance_loss(rows, targets.detach(), eps=1e-6)
        return self._regularized(_kd_of_mixture(log_q, log_q, labels, targets, T, alpha) + relations)
