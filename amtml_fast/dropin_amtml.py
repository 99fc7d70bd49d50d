"""The adapters and hints of the AMTML-KD authors' six notebooks, under their names. ``amtml_fast.dropin`` passes them on."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amtml_fast import checks
from amtml_fast.functional import angle_loss, hint_loss, rkd_distance_loss, teacher_weights
from amtml_fast.losses import parameter
from amtml_fast.terms import spread, wide_dtype

__all__ = ["Adapter", "FitNet", "LearningAdapter", "MixtureAdapter"]


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
        checks.two_dimensional(name, "y", y)
        if not isinstance(labels, Tensor) or labels.is_floating_point():  # of probabilities the mean would be another
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"{name}: labels must be integer classes, got {got}")
        if labels.shape != y.shape[:1]:
            raise ValueError(f"{name}: labels must be {[len(y)]} like y, got {checks.shape(labels)}")
        targets = spread(name, "weighted_logits", weighted_logits, y.shape)
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
