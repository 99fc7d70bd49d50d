"""The student alone: cross-entropy with the labels. Teachers are trained by it too."""

from __future__ import annotations

from .base import NONE, Context, Method, Objective, Step, StepLoss, cross_entropy


class CrossEntropy(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.settings = context.loss

    def forward(self, step: Step) -> StepLoss:
        loss = cross_entropy(step, self.settings)
        return StepLoss(loss, {"ce": loss.detach()})


METHOD = Method(name="student", label="student alone", build=CrossEntropy, teachers=NONE)
