"""What to train: jobs made from the configuration, what identifies them, and the module each one trains."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import data as datasets
from . import teachers as frozen
from .config import Config, ConfigError, TeacherConfig, TrainConfig, teacher_train, to_dict
from .features import FeatureExtractor
from .methods import METHODS, Context, StepLoss
from .models import build

FEATURES = "features"


@dataclass(frozen=True)
class Job:
    """What to train, and where it goes. `paths`: student modules to catch, by the name the method knows them under."""

    config: Config
    folder: Path
    title: str
    method: str
    seed: int
    factory: str
    args: dict[str, Any]
    weights: str | None
    train: TrainConfig
    paths: dict[str, str] = field(default_factory=dict)
    file: str = "student.safetensors"

    def recipe(self) -> dict[str, Any]:
        """Everything that decides the result: a folder made by another recipe is neither skipped nor resumed."""
        config, method = self.config, METHODS[self.method]
        engine = to_dict(config.engine)
        recipe: dict[str, Any] = {
            "data": {k: v for k, v in to_dict(config.data).items() if k != "root"},
            "model": {"factory": self.factory, "args": self.args},
            "start": frozen.sha256(Path(self.weights)) if self.weights else None,
            "train": to_dict(self.train),
            "label_smoothing": config.loss.label_smoothing,
            "engine": {k: engine[k] for k in ("mixed_precision", "gradient_accumulation_steps")},
            "method": self.method,
            "seed": self.seed,
        }
        if method.needs_teachers:
            recipe |= {"loss": to_dict(config.loss), "teachers": frozen.fingerprint(config), "paths": self.paths}
            recipe |= {"hints": [t.hint for t in config.teachers], "stages": to_dict(config.stages)}
        return json.loads(json.dumps(recipe))  # as it comes back from run.json


def teacher_job(config: Config, teacher: TeacherConfig) -> Job:
    """Training one teacher with cross-entropy. Each has its own seed, so that equal architectures differ too."""
    model = teacher.model
    return Job(
        config=config,
        folder=config.folder / "teachers" / teacher.name,
        title=f"teacher {teacher.name}",
        method="student",
        seed=config.seed + config.teachers.index(teacher),
        factory=model.factory,
        args=model.args,
        weights=None,
        train=teacher_train(config, teacher),
        file="model.safetensors",
    )


def student_job(config: Config, method: str, seed: int) -> Job:
    """Training the student by a method of METHODS."""
    if method not in METHODS:
        raise ConfigError(f"method: one of {', '.join(METHODS)} wanted, got {method!r}")
    student, chosen = config.student, METHODS[method]
    paths = {}
    if chosen.needs_features:
        if student.features is None:
            raise ConfigError(
                f"config: student.features: the last convolutional map's path wanted by {method}, got null"
            )
        paths[FEATURES] = student.features
    if chosen.needs_hints(config.loss):
        if not student.groups:
            raise ConfigError(
                f"config: student.groups: layer groups wanted by {method}'s hints (or loss.hint_weight=0)"
            )
        paths |= student.groups
    return Job(
        config=config,
        folder=config.folder / f"{method}-seed{seed}",
        title=f"{chosen.label}, seed {seed}",
        method=method,
        seed=seed,
        factory=student.factory,
        args=student.args,
        weights=student.weights,
        train=config.distill,
        paths=paths,
    )


class Distiller(nn.Module):
    """Everything that trains in one module, so that DDP, checkpoints and the optimiser see all of it."""

    def __init__(self, student: FeatureExtractor, objective: nn.Module) -> None:
        super().__init__()
        self.student, self.objective = student, objective

    def forward(
        self, images: Tensor, labels: Tensor, teacher_logits: list[Tensor], teacher_maps: list[Tensor]
    ) -> tuple[StepLoss, Tensor]:
        """The objective's StepLoss and the student's logits [N, C]."""
        logits, maps = self.student(images)
        return self.objective(logits, maps, labels, teacher_logits, teacher_maps), logits.detach()


def make_distiller(
    job: Job, data: datasets.ImageData, teachers: frozen.Teachers | None, processes: int = 1
) -> Distiller:
    """The freshly initialised module of a job, a pure function of its seed, on the CPU."""
    torch.manual_seed(job.seed)
    classes, channels = len(data.classes), data.train.images.shape[1]
    model = build(job.factory, dict(job.args), num_classes=classes, in_channels=channels, weights=job.weights)
    student = FeatureExtractor(model, job.paths)
    probe = next(iter(datasets.Loader(data.val, data, 2))).images.cpu()
    student.eval()
    with torch.no_grad():
        logits, maps = student(probe)
    if logits.ndim != 2 or logits.shape[1] != classes:
        raise ValueError(
            f"{job.title}: logits [N, {classes}] wanted (the classes of {data.name}), got {[*logits.shape]}"
        )
    student.train()
    context = Context(
        loss=job.config.loss,
        classes=classes,
        feature_channels=int(maps[FEATURES].shape[1]) if FEATURES in maps else 0,
        student_channels={name: int(x.shape[1]) for name, x in maps.items() if name != FEATURES},
        teacher_channels=teachers.channels if teachers else (),
        teacher_names=teachers.names if teachers else (),
        teacher_scores=teachers.scores if teachers else (),
        processes=processes,
    )
    return Distiller(student, METHODS[job.method].build(context))
