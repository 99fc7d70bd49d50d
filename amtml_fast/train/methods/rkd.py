"""RKD (Park et al. 2019): distances and angles between examples, in the pooled last maps of student and best teacher.

loss = CE + rkd_distance_weight * L_distance + rkd_angle_weight * L_angle (Eq 10 on features)
"""

from __future__ import annotations

from ... import AngleLoss, RKDDistanceLoss
from .base import BEST, Context, Method, Objective, Step, StepLoss, all_rows, cross_entropy


class RelationalKD(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        self.settings, self.processes = context.loss, context.processes
        self.distance, self.angle = RKDDistanceLoss(), AngleLoss()

    def forward(self, step: Step) -> StepLoss:
        ce = cross_entropy(step, self.settings)
        both = (maps.mean((2, 3)) for maps in (step.features, step.teacher_maps[0]))
        student, teacher = (all_rows(rows, self.processes) for rows in both)  # [N, d], [N, d_t]
        distance, angle = self.distance(student, teacher), self.angle(student, teacher)
        loss = ce + self.settings.rkd_distance_weight * distance + self.settings.rkd_angle_weight * angle
        return StepLoss(loss, {"ce": ce.detach(), "distance": distance.detach(), "angle": angle.detach()})


METHOD = Method(
    name="rkd",
    label="RKD",
    build=RelationalKD,
    teachers=BEST,
    features=True,
    hints=lambda loss: True,
    reads=("rkd_distance_weight", "rkd_angle_weight"),
)
