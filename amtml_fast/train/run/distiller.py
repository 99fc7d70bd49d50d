"""What trains: the student and its objective in one module, made from a job."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from ..config.schema import LossConfig
from ..data import parts
from ..data.images import ImageData
from ..methods.base import BEST, Context, Objective, Step, StepLoss
from ..models.features import FeatureExtractor
from ..models.networks import build
from ..teachers.frozen import Teachers
from . import preflight
from .job import FEATURES, GROUP, Job
from .timing import StepTimer


class Distiller(nn.Module):
    """Everything that trains in one module, so that DDP, FSDP, checkpoints and the optimizer see all of it."""

    def __init__(self, student: FeatureExtractor, objective: Objective, *, hidden_labels: bool = False) -> None:
        super().__init__()
        self.student, self.objective, self.hidden_labels = student, objective, hidden_labels
        self.progress: Tensor  # in one place, where a graph reads it
        self.register_buffer("progress", torch.zeros((), dtype=torch.float32, device="cpu"), persistent=False)
        self.timer: StepTimer | None = None

    def forward(
        self, images: Tensor, labels: Tensor, teacher_logits: list[Tensor], teacher_maps: list[Tensor]
    ) -> tuple[StepLoss, Tensor]:
        """The objective's StepLoss and the student's logits [N, C]."""
        logits, maps = self.student(images)
        if self.timer is not None:
            # Views, whose gradients are from the losses alone: a map's own is whole only after the layers behind it.
            logits, maps = logits.view_as(logits), {name: x.view_as(x) for name, x in maps.items()}
        self._mark("student")
        step = Step(logits, by_group(maps), labels, teacher_logits, teacher_maps, images)
        step = step._replace(progress=self.progress, student=self.student.model)
        if FEATURES in maps:
            step = step._replace(features=maps[FEATURES])
        if self.hidden_labels:
            step = step._replace(labels=parts.known(labels), hidden=True, truth=parts.truth(labels))
        out = self.objective(step)
        self._mark("losses")
        caught = [x for x in (logits, *maps.values()) if x.requires_grad]
        if self.timer is not None and caught and out.loss.requires_grad:
            # Backward has come through the losses when the student's outputs have their gradients.
            register_multi_grad_hook(caught, lambda gradients: self._mark("losses"))
        return out, logits.detach()

    def _mark(self, part: str) -> None:
        if self.timer is not None:
            self.timer.mark(part)


def make_distiller(job: Job, data: ImageData, teachers: Teachers | None, processes: int = 1) -> Distiller:
    """The freshly initialized module of a job, a pure function of its seed, on the CPU."""
    torch.manual_seed(job.seed)
    classes, channels = data.num_classes, data.in_channels

    def new(weights: str | None = None) -> nn.Module:
        return build(job.factory, job.args, num_classes=classes, in_channels=channels, weights=weights)

    # Without teachers a student sees no example whose label is hidden.
    hidden = bool(job.student) and job.method.needs_teachers and job.config.data.labeled_share is not None
    student = FeatureExtractor(new(job.weights), job.paths)
    maps = preflight.student_maps(student, job, data)
    context = Context(
        loss=cast(LossConfig, SimpleNamespace(**job.method.loss(job.config))),
        classes=classes,
        image_shape=data.train.images.shape[1:],
        feature_channels=int(maps[FEATURES].shape[1]) if FEATURES in maps else 0,
        student_channels={name: int(x.shape[1]) for name, x in by_group(maps).items()},
        teacher_channels=teachers.channels if teachers else (),
        teacher_names=teachers.names if teachers else (),
        teacher_scores=teachers.scores if teachers else (),
        processes=processes,
        hidden_labels=hidden,
        peers=len(job.teachers),
        new_student=new,
    )
    return Distiller(student, job.method.build(context), hidden_labels=hidden)


def by_group(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a student's maps those of its layer groups, by their own names."""
    return {name.removeprefix(GROUP): x for name, x in maps.items() if name.startswith(GROUP)}


def teachers_of(job: Job, everyone: Teachers | None) -> Teachers | None:
    """Those of the loaded teachers that this job's method learns from, without hint maps that it does not ask for."""
    if not job.method.needs_teachers:
        return None
    if everyone is None:
        raise ValueError(f"{job.title} must have teachers for {job.method.name}, got none")
    names = list(job.teachers)
    if job.method.teachers == BEST:
        names = [max(names, key=lambda name: everyone.scores[everyone.names.index(name)])]
    return everyone.only(names, hints=job.method.hints(job.config.loss))
