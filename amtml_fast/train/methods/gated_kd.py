"""Gated KD: each example is taught by the teachers whose answers to it look like their right ones.

Before the training `TeacherGate` learns from the labels there are which teacher to trust where, g [N, T]. Then Eq 8 with the mixture

    w = g where the label is not known,    w_t = g_t p_t(y) / sum_s g_s p_s(y) where it is: who said so

and, where it is, with an alpha that falls to 0 over the training (loss.alpha_end): the teachers early, the labels late.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ...gate import TeacherGate, log_probabilities
from ..data.parts import IGNORED
from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss, of_label


class GatedKD(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.gate = TeacherGate(len(context.teacher_names), context.classes)
        self.kd = KDLoss(context.loss, end=0.0)

    def fit(self, teacher_logits: list[Tensor], labels: Tensor) -> None:
        self.gate.fit(teacher_logits, labels, ignore_index=IGNORED)

    def weigh(self, features: Tensor | None, teacher_logits: list[Tensor]) -> Tensor:
        return cast(Tensor, self.gate(teacher_logits))

    def forward(self, step: Step) -> StepLoss:
        log_p = log_probabilities(step.teacher_logits)  # [N, T, C]
        weights = responsibilities(self.gate.log_weights(log_p), log_p, step.labels)
        loss = self.kd(step, weights)
        return StepLoss(loss, {"kd": loss.detach()}, weights)


def responsibilities(log_gate: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:
    """[N, T]: of log g [N, T] where the label is not known, else how probable it is that teacher t said it."""
    known = labels != IGNORED
    right = of_label(log_p, labels.where(known, 0))
    return torch.softmax(log_gate + right.where(known[:, None], 0), -1)


METHOD = Method(
    name="gated_kd",
    label="Gated KD",
    build=GatedKD,
    reads=KD,
    labels=lambda loss: True,
    fits=True,
)
