"""The student alone: cross-entropy with the labels. Teachers are trained by it too."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .base import Context, Method, StepLoss


class CrossEntropy(nn.Module):
    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(
        self,
        logits: Tensor,
        maps: dict[str, Tensor],
        labels: Tensor,
        teacher_logits: list[Tensor],
        teacher_maps: list[Tensor],
    ) -> StepLoss:
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepLoss(loss, {"ce": loss.detach()}, None)


def build(context: Context) -> nn.Module:
    return CrossEntropy(context.loss.label_smoothing)


METHOD = Method(name="student", label="student alone", build=build, needs_teachers=False)
