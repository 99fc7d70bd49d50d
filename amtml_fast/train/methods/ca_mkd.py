"""CA-MKD (Zhang et al. 2022): teachers that give the true label a higher probability get more weight.

w_t = (1 - softmax_t(CE_t)) / (T - 1), CE_t teacher t's cross-entropy with the label
loss = (1 - alpha) CE + alpha tau^2 sum_t w_t KL(p_t || q) + hint_weight * sum_t mean_i w_ti mean (u_ti - F_t(v_i))^2

The same weights serve both terms; the paper takes those of the second from the teachers' classifiers on F_t(v).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import MultiGroupHintLoss, hint_loss
from ..config.schema import LossConfig
from .base import KD, Context, KDLoss, Method, Objective, Step, StepLoss


def confidence_weights(teacher_logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """T x [N, C], [N] -> [N, T]; uniform for one teacher."""
    count = len(teacher_logits)
    ce = torch.stack([F.cross_entropy(z.float(), labels, reduction="none") for z in teacher_logits], 1)
    return (1 - ce.softmax(1)) / (count - 1) if count > 1 else torch.ones_like(ce)


def has_hints(loss: LossConfig) -> bool:
    return loss.hint_weight != 0.0


class ConfidenceKD(Objective):
    def __init__(self, context: Context) -> None:
        super().__init__()
        loss, count = context.loss, len(context.teacher_names)
        self.hint_weight = loss.hint_weight
        self.kd = KDLoss(loss, mode="sum")
        self.transforms = None
        if has_hints(loss):
            channels, everyone = {"features": context.feature_channels}, {t: "features" for t in range(count)}
            self.transforms = MultiGroupHintLoss(channels, context.teacher_channels, mapping=everyone).transforms

    def forward(self, step: Step) -> StepLoss:
        weights = confidence_weights(step.teacher_logits, step.labels)
        kd = self.kd(step, weights)
        if self.transforms is None:
            return StepLoss(kd, {"kd": kd.detach()}, weights)
        # F_t and the pooling are linear: maps scaled by sqrt(w) have a mean square weighted by w.
        student, roots = step.features, weights.sqrt().to(step.logits.dtype)[:, :, None, None, None]
        hints = [
            hint_loss(roots[:, t] * student, roots[:, t] * teacher, self.transforms[str(t)])
            for t, teacher in enumerate(step.teacher_maps)
        ]
        hint = torch.stack(hints).sum()
        return StepLoss(kd + self.hint_weight * hint, {"kd": kd.detach(), "hint": hint.detach()}, weights)


METHOD = Method(
    name="ca_mkd",
    label="CA-MKD",
    build=ConfidenceKD,
    features=True,
    hints=has_hints,
    reads=(*KD, "hint_weight"),
    labels=lambda loss: True,
)
