"""AvgMKD: the teachers' tempered probabilities with uniform weights (Eq 8 with w = 1/T), and the labels.

With one teacher it is Hinton's distillation, OKD.
"""

from __future__ import annotations

from dataclasses import replace

from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss


class AverageKD(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.kd = KDLoss(context.loss)

    def forward(self, step: Step) -> StepLoss:
        loss = self.kd(step, None)
        return StepLoss(loss, {"kd": loss.detach()})


METHOD = Method(name="avg_mkd", label="AvgMKD", build=AverageKD, reads=KD)
# KL(mean p_t || q) and mean KL(p_t || q) differ by a number that the student does not change: the same gradient.
SUM = replace(
    METHOD,
    base=METHOD.name,
    name="avg_mkd_sum",
    label="AvgMKD, sum of KLs",
    settings=lambda config: {"loss": {"mode": "sum"}},
)


OKD = "okd"  # stands for one method a teacher, okd-<teacher>


def of_one_teacher(teacher: str) -> Method:
    return replace(METHOD, base=METHOD.name, name=f"{OKD}-{teacher}", label=f"OKD from {teacher}", teacher=teacher)
