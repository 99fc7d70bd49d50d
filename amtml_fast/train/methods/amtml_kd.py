"""AMTML-KD (Eq 3): teacher weights per example from the student's features, angle loss, hints from every teacher."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ... import AMTMLLoss, MultiGroupHintLoss, TeacherAdapter
from ..config import LossConfig
from .base import Context, Method, StepLoss

TERMS = ("kd", "ce", "kl", "angle", "hint", "regularizer")


class AdaptiveKD(nn.Module):
    """AMTMLLoss with the trainer's calling convention; `.adapter` is what the two-stage preset freezes."""

    def __init__(self, context: Context) -> None:
        super().__init__()
        loss = context.loss
        teachers = len(context.teacher_names)
        adapter = TeacherAdapter(context.feature_channels, teachers, pool=loss.pool, init_scale=loss.init_scale)
        self.groups = list(context.student_channels) if needs_hints(loss) else []
        self.amtml = AMTMLLoss(
            adapter,
            hint_module(context) if self.groups else None,
            temperature=loss.temperature,
            alpha=loss.alpha,
            mode=loss.mode,
            angle_weight=loss.angle_weight,
            hint_weight=loss.hint_weight,
            regularizer_weight=loss.regularizer_weight,
            delta=loss.delta,
            angle_trains_weights=loss.angle_trains_weights,
            label_smoothing=loss.label_smoothing,
            gather_angle=context.processes > 1,
        )

    @property
    def adapter(self) -> nn.Module:
        return self.amtml.adapter

    def forward(
        self,
        logits: Tensor,
        maps: dict[str, Tensor],
        labels: Tensor,
        teacher_logits: list[Tensor],
        teacher_maps: list[Tensor],
    ) -> StepLoss:
        student_maps = {group: maps[group] for group in self.groups} if self.groups else None
        out = self.amtml(
            logits,
            teacher_logits,
            labels,
            maps["features"],
            student_maps=student_maps,
            teacher_maps=teacher_maps if self.groups else None,
        )
        terms = {name: getattr(out, name) for name in TERMS if getattr(out, name) is not None}
        return StepLoss(out.loss, terms, out.weights)


def hint_module(context: Context) -> MultiGroupHintLoss:
    """The F_t and the mapping of teachers to groups; an explicit mapping may name teachers or give their positions."""
    mapping = context.loss.mapping
    if isinstance(mapping, Mapping):
        mapping = {teacher_index(key, context.teacher_names): group for key, group in mapping.items()}
    return MultiGroupHintLoss(
        dict(context.student_channels),
        list(context.teacher_channels),
        mapping=mapping,
        teacher_scores=list(context.teacher_scores),
        normalize=context.loss.normalize_hints,
    )


def teacher_index(key: str | int, names: object) -> int:
    """Position of a teacher given by name or by position."""
    known = list(names)  # type: ignore[call-overload]
    if key in known:
        return known.index(key)
    if str(key).isdigit() and int(key) < len(known):
        return int(key)
    raise ValueError(f"loss.mapping: {key!r} is no teacher; the teachers are {', '.join(known)}")


def needs_hints(loss: LossConfig) -> bool:
    return loss.hint_weight != 0.0


METHOD = Method(name="amtml_kd", label="AMTML-KD", build=AdaptiveKD, needs_features=True, needs_hints=needs_hints)
