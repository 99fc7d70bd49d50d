"""EB-KD (Kwon et al. 2020): teachers with lower entropy on an example get more weight.

w_t = (1 - H_t / sum_s H_s) / (T - 1), H_t the entropy of teacher t's probabilities at temperature 1; KL of the mixture
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss


def entropy_weights(teacher_logits: Sequence[Tensor]) -> Tensor:
    """T x [N, C] -> [N, T]; uniform where it would be 0/0: one teacher, or all of them certain."""
    entropies = torch.stack([torch.special.entr(z.float().softmax(-1)).sum(-1) for z in teacher_logits], 1)
    total, count = entropies.sum(1, keepdim=True), len(teacher_logits)
    weights = (1 - entropies / total) / max(1, count - 1)
    return torch.where((total > 0) & (count > 1), weights, 1 / count)


class EntropyKD(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.kd = KDLoss(context.loss)

    def forward(self, step: Step) -> StepLoss:
        weights = entropy_weights(step.teacher_logits)
        loss = self.kd(step, weights)
        return StepLoss(loss, {"kd": loss.detach()}, weights)


METHOD = Method(name="eb_kd", label="EB-KD", build=EntropyKD, reads=KD)
