"""The losses in the few lines of PyTorch that one writes without a library: no masks, no ignored rows, no zeros are minded.

``amtml_fast/reference.py``, which "eager" and "compile" run, minds all of them, and takes its time for it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TAU, ALPHA = 4.0, 0.7


def mixture(teachers: list[Tensor], weights: Tensor) -> Tensor:
    return torch.stack(
        [w.unsqueeze(1) * (x.float() / TAU).softmax(1) for w, x in zip(weights.unbind(1), teachers)]
    ).sum(0)


def multi_teacher_kd(student: Tensor, teachers: list[Tensor], weights: Tensor, labels: Tensor) -> Tensor:
    z = student.float()
    kl = F.kl_div((z / TAU).log_softmax(1), mixture(teachers, weights), reduction="batchmean")
    return (1 - ALPHA) * F.cross_entropy(z, labels) + ALPHA * TAU**2 * kl


def divergence(student: Tensor, teachers: list[Tensor], weights: Tensor, labels: Tensor) -> Tensor:
    """Jensen-Shannon."""
    z = student.float()
    p, q = mixture(teachers, weights), (z / TAU).softmax(1)
    log_m = ((p + q) / 2).log()
    jsd = (F.kl_div(log_m, p, reduction="batchmean") + F.kl_div(log_m, q, reduction="batchmean")) / 2
    return (1 - ALPHA) * F.cross_entropy(z, labels) + ALPHA * TAU**2 * jsd


def angle(student: Tensor, teacher: Tensor) -> Tensor:
    def cosines(x: Tensor) -> Tensor:
        edges = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), dim=2)
        return edges @ edges.transpose(1, 2)

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


SHORT: dict[str, Callable[..., Tensor]] = {
    "multi_teacher_kd": multi_teacher_kd,
    "divergence": divergence,
    "angle": angle,
}
