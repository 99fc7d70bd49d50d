"""AMTML-KD (Eq 3): teacher weights per example from the student's features, angle loss, hints from every teacher.

Its ablations and the authors' own settings are the same objective with other values in `loss` and `stages`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ... import AMTMLLoss, MultiGroupHintLoss, TeacherAdapter, angle_loss, rkd_distance_loss
from ..config.presets import paper_code
from ..config.schema import LossConfig
from ..data.parts import IGNORED
from .base import EQ8, Context, Method, Objective, Step, StepLoss, all_rows, cross_entropy, mean_of_known, mixture

TERMS = ("kd", "ce", "kl", "angle", "hint", "regularizer")


class UniformAdapter(nn.Module):
    """The same weight for every teacher: what the adapter is compared with."""

    def __init__(self, num_teachers: int) -> None:
        super().__init__()
        self.num_teachers = num_teachers
        self.nothing: Tensor
        self.register_buffer("nothing", torch.zeros((), dtype=torch.float32, device="cpu"), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        return features.new_full((features.shape[0], self.num_teachers), 1 / self.num_teachers, dtype=torch.float32)

    def regularizer(self) -> Tensor:
        return self.nothing


class DetachedAdapter(nn.Module):
    """An adapter whose weights are detached, so the loss that uses them does not train it."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, features: Tensor) -> Tensor:
        return self.adapter(features).detach()

    def regularizer(self) -> Tensor:
        return cast(UniformAdapter | TeacherAdapter, self.adapter).regularizer()


class AdaptiveKD(Objective):
    """AMTMLLoss with the trainer's calling convention, and what only the trainer's options ask for around it.

    The two-stage presets freeze its adapter.
    """

    adapter: nn.Module

    def __init__(self, context: Context) -> None:
        super().__init__()
        loss = self.settings = context.loss
        self.processes = context.processes
        self.groups = list(context.student_channels) if needs_hints(loss) else []
        # alpha and this factor make (1 - alpha) CE + kl_scale * alpha * tau^2 KL of Eq 8's (1 - a) CE + a * tau^2 KL.
        self.factor = 1.0 if loss.kl_scale == 1.0 else 1 - loss.alpha + loss.kl_scale * loss.alpha
        # Where labels are hidden AMTMLLoss gets none: it has the KL of every image, and beside it is the CE of those with a label.
        if context.hidden_labels:
            self.factor = loss.kl_scale * loss.alpha
        adapter = make_adapter(context)
        # Past nn.Module: the module belongs to `amtml`, and under a second name it would be in the state dict twice.
        object.__setattr__(self, "adapter", adapter)
        self.amtml = AMTMLLoss(
            adapter if loss.kl_trains_weights else DetachedAdapter(adapter),
            hint_module(context) if self.groups else None,
            temperature=loss.temperature,
            alpha=loss.kl_scale * loss.alpha / self.factor,
            mode=loss.mode,
            angle_weight=loss.angle_weight / self.factor if loss.angle_on == "probabilities" else 0.0,
            hint_weight=loss.hint_weight / self.factor,
            regularizer_weight=loss.regularizer_weight / self.factor,
            delta=loss.delta,
            angle_trains_weights=loss.angle_trains_weights,
            reduction=loss.reduction,
            label_smoothing=loss.label_smoothing,
            gather_angle="even" if context.processes > 1 else False,  # as the loader makes them
        )

    def forward(self, step: Step) -> StepLoss:
        out = self.amtml(
            step.logits,
            step.teacher_logits,
            None if step.hidden else step.labels,
            step.features,
            student_maps={group: step.maps[group] for group in self.groups} if self.groups else None,
            teacher_maps=self.teacher_maps(step) if self.groups else None,
        )
        loss, settings = self.factor * out.loss, self.settings
        terms = {name: getattr(out, name) for name in TERMS}
        terms["kd"] = self.factor * out.kd
        if step.hidden:
            ce = cross_entropy(step, settings)
            share = (1 - settings.alpha) * ce
            loss, terms["ce"], terms["kd"] = loss + share, ce.detach(), terms["kd"] + share.detach()
        on_logits = settings.angle_on == "logits"
        has_angle, has_distance = on_logits and settings.angle_weight != 0, settings.distance_weight != 0
        if has_angle or has_distance:
            weights = self.adapter(step.features) if settings.angle_trains_weights else out.weights
            mixed = mixed_targets(step.teacher_logits, weights, settings.temperature)
            student = step.logits if on_logits else (step.logits / settings.temperature).softmax(-1)
            student, mixed = (all_rows(rows, self.processes) for rows in (student, mixed))
            if has_angle:
                angle = angle_loss(student, mixed, delta=settings.delta)
                loss, terms["angle"] = loss + settings.angle_weight * angle, angle.detach()
            if has_distance:
                distance = rkd_distance_loss(student, mixed)
                loss, terms["distance"] = loss + settings.distance_weight * distance, distance.detach()
        if settings.adapter_label_weight != 0:
            label_loss = self.label_loss(step)
            loss, terms["surprise"] = loss + settings.adapter_label_weight * label_loss, label_loss.detach()
        return StepLoss(loss, terms, out.weights if settings.adapter == "learned" else None)

    def teacher_maps(self, step: Step) -> list[Tensor]:
        """The teachers' maps; with pool_teacher_hints each map's spatial mean, repeated over the student's positions."""
        maps = list(step.teacher_maps)
        if self.settings.pool_teacher_hints:
            for t, group in self.amtml.hints.mapping.items():
                maps[t] = maps[t].mean((2, 3), keepdim=True).expand(-1, -1, *step.maps[group].shape[2:])
        return maps

    def label_loss(self, step: Step) -> Tensor:
        """-log of the true class's probability in the mixture, mean over the labels there are: tells the adapter who is right.

        Its gradient goes on into the student's features, as that of every use of the weights does.
        """
        tau, known = self.settings.temperature, step.labels != IGNORED
        rows = torch.arange(len(step.labels), dtype=torch.int64, device=step.labels.device)
        labels = step.labels.where(known, 0)
        right = torch.stack([(z.float() / tau).softmax(-1)[rows, labels] for z in step.teacher_logits], 1)
        weights = self.adapter(step.features)
        each = -(weights.float() * right).sum(1).clamp_min(torch.finfo(torch.float32).tiny).log()
        return mean_of_known(each, step.labels, self.processes) if step.hidden else each.mean()


def mixed_targets(teacher_logits: list[Tensor], weights: Tensor, temperature: float) -> Tensor:
    """The mixture of the teachers' tempered probabilities, [N, C]."""
    return mixture(torch.stack([(z.float() / temperature).softmax(-1) for z in teacher_logits], 1), weights.float())


def make_adapter(context: Context) -> nn.Module:
    loss, teachers = context.loss, len(context.teacher_names)
    if loss.adapter == "uniform":
        return UniformAdapter(teachers)
    with torch.random.fork_rng(devices=[], enabled=loss.adapter_seed is not None):
        if loss.adapter_seed is not None:
            torch.manual_seed(loss.adapter_seed)
        return TeacherAdapter(context.feature_channels, teachers, pool=loss.pool, init_scale=loss.init_scale)


def hint_module(context: Context) -> MultiGroupHintLoss:
    """The F_t and the mapping of teachers to groups; an explicit mapping names teachers."""
    loss, mapping = context.loss, context.loss.mapping
    if isinstance(mapping, Mapping):
        mapping = {list(context.teacher_names).index(name): group for name, group in mapping.items()}
    module = MultiGroupHintLoss(
        dict(context.student_channels),
        list(context.teacher_channels),
        mapping=mapping,
        teacher_scores=list(context.teacher_scores),
        normalize=loss.normalize_hints,
    )
    for transform in module.parameters():
        if loss.hint_bound is not None:
            nn.init.uniform_(transform, -loss.hint_bound, loss.hint_bound)
        transform.requires_grad_(loss.train_hints)
    return module


def needs_hints(loss: LossConfig) -> bool:
    return loss.hint_weight != 0.0


ADAPTER = (
    "adapter",
    "init_scale",
    "adapter_seed",
    "pool",
    "regularizer_weight",
    "kl_trains_weights",
    "adapter_label_weight",
)
ANGLE = ("angle_weight", "delta", "angle_trains_weights", "angle_on", "distance_weight")
HINTS = ("hint_weight", "mapping", "normalize_hints", "pool_teacher_hints", "hint_bound", "train_hints")
METHOD = Method(
    name="amtml_kd",
    label="AMTML-KD",
    build=AdaptiveKD,
    features=True,
    pooled=True,
    hints=needs_hints,
    groups=needs_hints,
    reads=(*EQ8, "reduction", "kl_scale", *ADAPTER, *ANGLE, *HINTS),
    labels=lambda loss: loss.adapter_label_weight != 0.0,
)


def ablation(name: str, label: str, **loss: Any) -> Method:
    label = f"AMTML-KD, {label}"
    return replace(METHOD, base=METHOD.name, name=f"amtml_{name}", label=label, settings=lambda config: {"loss": loss})


ABLATIONS = (
    ablation("no_angle", "no angle", angle_weight=0.0, distance_weight=0.0),
    ablation("no_hint", "no hints", hint_weight=0.0),
    ablation("no_adapter", "uniform weights", adapter="uniform"),
    ablation("best_low", "best teacher low", mapping="best_low"),
    ablation("random", "random mapping", mapping="random"),
    ablation("angle_trains_weights", "angle trains weights", angle_trains_weights=True),
    ablation("label_weights", "weights from labels", kl_trains_weights=False, adapter_label_weight=1.0),
)
PAPER_CODE = replace(
    METHOD, base=METHOD.name, name="amtml_paper_code", label="AMTML-KD, authors' code", settings=paper_code
)
