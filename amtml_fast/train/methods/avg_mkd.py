"""AvgMKD: the teachers' tempered probabilities with uniform weights (Eq 8 with w = 1/T), and the labels."""

from __future__ import annotations

from torch import Tensor, nn

from ... import MultiTeacherKDLoss
from .base import Context, Method, StepLoss


class AverageKD(nn.Module):
    def __init__(self, context: Context) -> None:
        super().__init__()
        loss = context.loss
        self.kd = MultiTeacherKDLoss(
            temperature=loss.temperature, alpha=loss.alpha, mode=loss.mode, label_smoothing=loss.label_smoothing
        )

    def forward(
        self,
        logits: Tensor,
        maps: dict[str, Tensor],
        labels: Tensor,
        teacher_logits: list[Tensor],
        teacher_maps: list[Tensor],
    ) -> StepLoss:
        loss = self.kd(logits, teacher_logits, None, labels)
        return StepLoss(loss, {"kd": loss.detach()}, None)


METHOD = Method(name="avg_mkd", label="AvgMKD", build=AverageKD)
