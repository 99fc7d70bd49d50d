"""What a method is: what it needs, and how it builds its objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from ..config import LossConfig


class StepLoss(NamedTuple):
    """What an objective returns for one batch."""

    loss: Tensor  # scalar, with gradient
    terms: dict[str, Tensor]  # detached scalars by their metrics.jsonl name: kd, ce, kl, angle, hint, regularizer
    weights: Tensor | None  # [N, T] detached teacher weights, for methods that have them


@dataclass(frozen=True)
class Context:
    """What a method may need to build its objective."""

    loss: LossConfig
    classes: int
    feature_channels: int = 0  # d of the student's last map
    student_channels: Mapping[str, int] = field(default_factory=dict)  # layer groups, low to high
    teacher_channels: Sequence[int] = ()
    teacher_names: Sequence[str] = ()
    teacher_scores: Sequence[float] = ()  # validation accuracies
    processes: int = 1


@dataclass(frozen=True)
class Method:
    """Objectives are called as `objective(logits, maps, labels, teacher_logits, teacher_maps) -> StepLoss`:
    logits [N, C], maps {"features" and group names: [N, c, h, w]}, labels [N] int64, teacher_logits a list of T [N, C],
    teacher_maps a list of T [N, c_t, h_t, w_t]; the last two are empty for methods that do not ask for them."""

    name: str
    label: str  # as printed in tables and figures
    build: Callable[[Context], nn.Module]
    needs_teachers: bool = True
    needs_features: bool = False
    needs_hints: Callable[[LossConfig], bool] = lambda loss: False
