"""Losses under the names and signatures that other people's training code imports, with the fast kernels inside.

Change the import and nothing else::

    from metric.loss import RkdDistance, RKdAngle      ->  from amtml_fast.dropin import RkdDistance, RKdAngle
    from distiller_zoo import DistillKL, RKDLoss       ->  from amtml_fast.dropin import DistillKL, RKDLoss

Values and gradients are theirs to float32 rounding on ordinary inputs. Where theirs has a defect, the docstring says what
happens here. Two things hold throughout: teachers' logits are frozen, so logits that require grad are an error, not a
silently missing gradient; and 16-bit inputs are computed in float32. docs/dropin.md sets the conventions side by side.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amtml_fast.functional import (
    angle_loss,
    hint_loss,
    hint_mse,
    multi_teacher_kd_loss,
    rkd_distance_loss,
    teacher_weights,
)

__all__ = [
    "Adapter",
    "AngleWiseRKD",
    "DistanceWiseRKD",
    "DistillKL",
    "FitNet",
    "HintLoss",
    "MatchLogits",
    "RKDLoss",
    "RKdAngle",
    "RkdDistance",
    "kd_loss",
    "rkd_loss",
]


def _rows(features: Tensor) -> Tensor:
    return features.reshape(features.shape[0], -1)


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
    """RepDistiller's ``T^2 KL(p_t || p_s)``, summed over classes, mean over rows.

    ``is_ca=True`` gives one value a row, as CA-MKD's and MMKD's copies of it do. A class that the teacher or both give
    probability 0 (a logit of -inf) counts 0 here; theirs is NaN.
    """

    def __init__(self, T: float):
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor, is_ca: bool = False) -> Tensor:
        reduction = "none" if is_ca else "batchmean"
        return multi_teacher_kd_loss(y_s, [y_t], None, temperature=self.T, reduction=reduction)


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
        if f_s.shape != f_t.shape:
            raise ValueError(f"HintLoss: f_t must be {list(f_s.shape)} like f_s, got {list(f_t.shape)}")
        return hint_mse(f_s, f_t)


def kd_loss(logits_student: Tensor, logits_teacher: Tensor, temperature: float, logit_stand: bool = False) -> Tensor:
    """mdistiller's ``T^2 KL``, summed over classes, mean over rows.

    ``logit_stand`` takes each row's logits to mean 0 and standard deviation 1 first (its logit standardisation).
    """
    if logit_stand:
        logits_student, logits_teacher = (
            (z - z.mean(-1, keepdim=True)) / (1e-7 + z.std(-1, keepdim=True)) for z in (logits_student, logits_teacher)
        )
    return multi_teacher_kd_loss(logits_student, [logits_teacher], None, temperature=temperature)


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
    if squared:
        distance = F.smooth_l1_loss(_squared_over_mean(student, eps), _squared_over_mean(teacher, eps))
    else:
        distance = rkd_distance_loss(student, teacher, eps=eps**0.5)
    return distance_weight * distance + angle_weight * angle_loss(student, teacher)


def _squared_over_mean(x: Tensor, eps: float) -> Tensor:
    d = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
    regular = d > eps
    return d.masked_fill(~regular, 0) / (d[regular].mean() if regular.any() else 1)


class DistanceWiseRKD(nn.Module):
    """MMRazor's distance loss: rows optionally of length 1 first, times ``loss_weight``; gradients to both sides."""

    def __init__(self, loss_weight: float = 25.0, with_l2_norm: bool = True):
        super().__init__()
        self.loss_weight, self.with_l2_norm = loss_weight, with_l2_norm

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        return self.loss_weight * rkd_distance_loss(*_normalized(preds_S, preds_T, self.with_l2_norm), eps=1e-6)


class AngleWiseRKD(nn.Module):
    """MMRazor's angle loss: rows optionally of length 1 first, times ``loss_weight``; gradients to both sides."""

    def __init__(self, loss_weight: float = 50.0, with_l2_norm: bool = True):
        super().__init__()
        self.loss_weight, self.with_l2_norm = loss_weight, with_l2_norm

    def forward(self, preds_S: Tensor, preds_T: Tensor) -> Tensor:
        return self.loss_weight * angle_loss(*_normalized(preds_S, preds_T, self.with_l2_norm))


def _normalized(student: Tensor, teacher: Tensor, with_l2_norm: bool) -> tuple[Tensor, Tensor]:
    student, teacher = _rows(student), _rows(teacher)
    return (F.normalize(student), F.normalize(teacher)) if with_l2_norm else (student, teacher)


class MatchLogits(nn.Module):
    """MMKD's weighted sum of per-teacher KLs: ``mean_i sum_t w_it T^2 KL(p_t || p_s)``, our mode ``"sum"``.

    Args:
        opt: anything with ``kd_T``, as theirs takes it, or the temperature itself.
    """

    def __init__(self, opt: Any):
        super().__init__()
        self.T = getattr(opt, "kd_T", opt)

    def forward(self, logit_s: Tensor, logit_t_list: Sequence[Tensor], logits_weight: Tensor) -> Tensor:
        return multi_teacher_kd_loss(logit_s, logit_t_list, logits_weight, temperature=self.T, mode="sum")


class FitNet(nn.Module):
    """The AMTML authors' hint: channel-normalised maps, a 1x1 convolution without bias on the student's, mean square.

    A teacher map of one pixel is compared with every pixel of the student's, as theirs does by broadcasting. Their
    script forgets to give ``transform`` to an optimiser; it is an ordinary parameter here as there.
    """

    def __init__(self, in_feature: int, out_feature: int):
        super().__init__()
        self.in_feature, self.out_feature = in_feature, out_feature
        self.transform = nn.Conv2d(in_feature, out_feature, 1, bias=False)
        nn.init.uniform_(self.transform.weight, -0.005, 0.005)

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

    Args:
        teacher_models: as many as there are teachers.
        pool_size: shape [N, d, H, W] of the student's last map.

    ``theta`` [T, d] and ``W`` [d, 1] start as N(0, 1), with which the weights are nearly one-hot from the first step
    (``amtml_fast.TeacherAdapter`` starts smaller). ``forward`` runs on the fused kernel. ``loss`` takes soft targets that
    are mixed already, so it is plain PyTorch: ``amtml_fast.AMTMLLoss`` is the fused form of the whole.
    """

    def __init__(self, teacher_models: Sequence[Any], pool_size: Sequence[int]):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.theta = nn.Parameter(torch.randn(len(teacher_models), pool_size[1], generator=generator))
        self.W = nn.Parameter(torch.randn(pool_size[1], 1, generator=generator))
        self.val = False

    def forward(self, conv_map: Tensor, te_logits_list: Any = None) -> Tensor:
        """Weights [N, T]. ``te_logits_list`` plays no part, in theirs neither."""
        return teacher_weights(conv_map, self.theta, self.W.squeeze(1))

    def loss(self, y: Tensor, labels: Tensor, weighted_logits: Tensor, T: float = 10.0, alpha: float = 0.7) -> Tensor:
        """``2 alpha T^2 * mean over N C of the KL terms + (1 - alpha) CE``, and 0.1 (|W|^2 + |theta|^2) before ``eval()``.

        ``weighted_logits`` [N, C] are, in spite of their name, mixed probabilities. Note the mean over N * C: the
        effective weight of the KL falls with the number of classes.
        """
        kl = F.kl_div(F.log_softmax(y / T, dim=1), weighted_logits, reduction="sum") / y.numel()
        value = kl * (T * T * 2.0 * alpha) + F.cross_entropy(y, labels) * (1.0 - alpha)
        if not self.val:
            value = value + 0.1 * (self.W.square().sum() + self.theta.square().sum())
        return value

    def train(self, mode: bool = True) -> "Adapter":
        self.val = not mode
        return super().train(mode)
