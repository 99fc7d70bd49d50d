"""DML (Zhang et al. 2018): students of one kind learn together, each from the labels and from all the others.

loss = sum_k [CE_k + mean_{j != k} KL(q_j || q_k)] at temperature 1, over the student and as many peers as there are
teachers; the first one is the student that is kept.
"""

from __future__ import annotations

import torch
from torch import nn

from ... import MultiTeacherKDLoss
from .base import NONE, Context, Method, Objective, Step, StepLoss


class MutualLearning(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.peers = nn.ModuleList(context.new_student() for _ in range(max(1, context.peers)))
        # Half of each, so twice the loss below is CE + KL.
        self.kd = MultiTeacherKDLoss(
            temperature=1.0, alpha=0.5, mode="sum", label_smoothing=context.loss.label_smoothing
        )

    def forward(self, step: Step) -> StepLoss:
        logits = [step.logits, *(peer(step.images) for peer in self.peers)]
        fixed = [z.detach() for z in logits]
        losses = [
            2 * self.kd(z, [other for j, other in enumerate(fixed) if j != k], None, step.labels)
            for k, z in enumerate(logits)
        ]
        return StepLoss(torch.stack(losses).sum(), {"kd": losses[0].detach()})


METHOD = Method(name="dml", label="DML", build=MutualLearning, teachers=NONE, peers=True)
