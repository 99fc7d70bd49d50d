"""A reference, no method: each example is taught by the teacher that gives its true label the highest probability.

It knows every label, also those that are hidden from students (data.labeled_share), but uses the others for the weights alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss


class Oracle(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.kd = KDLoss(context.loss)

    def forward(self, step: Step) -> StepLoss:
        weights = best_teacher(step.teacher_logits, step.labels if step.truth is None else step.truth)
        loss = self.kd(step, weights)
        return StepLoss(loss, {"kd": loss.detach()}, weights)


def best_teacher(teacher_logits: list[Tensor], labels: Tensor) -> Tensor:
    """[N, T]: 1 for the teacher that is most certain of the label, the first of several."""
    right = [z.float().log_softmax(-1).gather(1, labels[:, None]) for z in teacher_logits]
    best = torch.cat(right, 1).argmax(1, keepdim=True)
    each = torch.arange(len(right), dtype=torch.int64, device=labels.device)
    return (each == best).float()


METHOD = Method(name="oracle", label="oracle", build=Oracle, reads=KD, labels=lambda loss: True)
