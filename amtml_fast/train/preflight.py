"""What is found wrong before anything is trained: a folder that cannot be written, a network that does not fit the data or
the method."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import data as datasets
from .config import Config, ConfigError
from .features import FeatureExtractor

if TYPE_CHECKING:
    from .jobs import Job

ANY, MAP = "[N, c] or [N, c, h, w]", "[N, c, h, w]"
DIMS = {ANY: (2, 4), MAP: (4,)}


def places(config: Config) -> None:
    """That runs can be written below `out`, and the teachers' outputs where they are to be kept. Leaves nothing there."""
    _writable("out", config.folder)
    if config.cache.folder is not None and config.teachers and config.cache.teachers != "never":
        _writable("cache.folder", config.cache_folder)


def _writable(key: str, folder: Path) -> None:
    there = next((place for place in (folder, *folder.parents) if os.path.lexists(place)), Path())
    if not there.is_dir():
        raise ConfigError(f"config: {key} must be a folder, got {folder} where {there} is none")
    try:
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise ConfigError(
            f"config: {key} must be a folder that can be written, got {folder} ({there}: {error.strerror or error})"
        ) from None


def batches(job: Job, data: datasets.ImageData) -> None:
    """That the training images of the job make a batch."""
    if job.train.batch_size > len(data.train):
        raise ConfigError(
            f"config: batch_size must be at most {len(data.train)} for {job.title}, the training images, "
            f"got {job.train.batch_size}"
        )


def student_maps(model: FeatureExtractor, job: Job, data: datasets.ImageData) -> dict[str, Tensor]:
    """The maps that the job's method catches, of two images. ConfigError for what is no map that it can take."""
    maps = _maps(model, job.title, data, modes=(True, False))
    for name, path in job.paths.items():
        wanted = ANY if path == job.features and job.method.pooled else MAP
        _check(f"{job.student}.{name}", path, maps[name], wanted)
    return maps


def teacher_maps(model: FeatureExtractor, name: str, data: datasets.ImageData) -> dict[str, Tensor]:
    """The same of a teacher's hint map."""
    maps = _maps(model, f"teacher {name!r}", data, modes=(False,))
    for key, path in model.paths.items():
        _check(f"teachers.{name}.{key}", path, maps[key], MAP)
    return maps


def _check(key: str, path: str, caught: Tensor, wanted: str) -> None:
    if caught.ndim not in DIMS[wanted]:
        raise ConfigError(
            f"config: {key} must name a module whose output is {wanted}, got {path!r}, whose output is {[*caught.shape]}"
        )


def _maps(model: FeatureExtractor, what: str, data: datasets.ImageData, modes: tuple[bool, ...]) -> dict[str, Tensor]:
    """What the model catches of two images, run in the modes (training or not) that it will run in. ValueError where it does
    not take them, or does not answer with logits."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = next(iter(datasets.Loader(data.val, data, 2))).images.to(device)
    images = images.repeat(2, 1, 1, 1)[:2]  # a BatchNorm does not train on one
    wanted = [len(images), len(data.classes)]
    with torch.random.fork_rng(devices=[]):
        for training in modes:
            try:
                logits, maps = model.probe(images, training=training)
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0]
                raise ValueError(
                    f"{what}: the network must take images {[*images.shape]} of {data.name}, "
                    f"got {type(error).__name__}: {reason}"
                ) from error
            got = [*logits.shape] if isinstance(logits, Tensor) else type(logits).__name__
            if got != wanted:
                raise ValueError(
                    f"{what}: the network must return logits {wanted}, for {len(images)} images and {wanted[1]} classes of "
                    f"{data.name}, got {got}"
                )
    return maps
