"""AT (Zagoruyko, Komodakis 2017): the student's last attention map follows the best teacher's.

loss = CE + at_weight * mean (a(v) - a(u))^2, where a(m) is the mean over channels of m^2, flattened, of length 1
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .base import BEST, Context, Method, Objective, Step, StepLoss, cross_entropy


def attention(features: Tensor, size: tuple[int, int]) -> Tensor:
    """[N, c, H, W] -> [N, h * w]."""
    energy = F.adaptive_avg_pool2d(features.square().mean(1, keepdim=True), size)
    return F.normalize(energy.flatten(1))


class AttentionTransfer(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.settings = context.loss

    def forward(self, step: Step) -> StepLoss:
        ce = cross_entropy(step, self.settings)
        student, teacher = step.features, step.teacher_maps[0]
        size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
        at = F.mse_loss(attention(student, size), attention(teacher, size))
        return StepLoss(ce + self.settings.at_weight * at, {"ce": ce.detach(), "attention": at.detach()})


METHOD = Method(
    name="at",
    label="AT",
    build=AttentionTransfer,
    teachers=BEST,
    features=True,
    hints=lambda loss: True,
    reads=("at_weight",),
)
