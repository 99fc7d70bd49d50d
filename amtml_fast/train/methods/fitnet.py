"""FitNet (Romero et al. 2015): the best teacher's hint map guides the student's last map through a 1x1 convolution.

loss = CE + fitnet_weight * mean (u - F(v))^2
"""

from __future__ import annotations

from ... import MultiGroupHintLoss
from .base import BEST, Context, Method, Objective, Step, StepLoss, cross_entropy


class FitNet(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.settings = context.loss
        channels = {"features": context.feature_channels}
        self.hint = MultiGroupHintLoss(channels, context.teacher_channels, mapping={0: "features"})

    def forward(self, step: Step) -> StepLoss:
        ce = cross_entropy(step, self.settings)
        hint = self.hint({"features": step.features}, step.teacher_maps)
        return StepLoss(ce + self.settings.fitnet_weight * hint, {"ce": ce.detach(), "hint": hint.detach()})


METHOD = Method(
    name="fitnet",
    label="FitNet",
    build=FitNet,
    teachers=BEST,
    features=True,
    hints=lambda loss: True,
    reads=("fitnet_weight",),
)
