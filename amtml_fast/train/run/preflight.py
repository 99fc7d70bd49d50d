"""What is found wrong before anything is trained: a folder that cannot be written, a network that does not fit the data or
the method."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from torch import Tensor

from ..config.schema import Config, ConfigError
from ..data.images import ImageData
from ..models.features import FeatureExtractor
from ..models.networks import build
from ..models.probe import ANY, MAP, check_map, maps
from ..teachers import frozen
from .job import FEATURES, Job, need_hints
from .prepare import data_of


def places(config: Config) -> None:
    """That runs can be written below `out`, and the teachers' outputs where they are to be kept. Leaves nothing there."""
    _writable("out", config.folder)
    if config.teachers_folder is not None and config.teachers:
        _writable("teachers_folder", Path(config.teachers_folder))
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


def batches(job: Job, data: ImageData) -> None:
    """That the training images of the job make a batch, and that it can be divided as the engine does."""
    size, rounds = job.train.batch_size, job.config.engine.gradient_accumulation_steps
    processes = PartialState().num_processes
    if size > len(data.train):
        raise ConfigError(
            f"config: batch_size must be at most {len(data.train)} for {job.title}, the training images, got {size}"
        )
    if size % rounds:
        raise ConfigError(
            f"config: batch_size must be a multiple of engine.gradient_accumulation_steps={rounds} for {job.title}, got {size}"
        )
    if size // rounds % processes:
        raise ConfigError(
            f"config: batch_size must be a multiple of {rounds * processes} for {job.title}, the {processes} processes"
            f"{f' times engine.gradient_accumulation_steps={rounds}' if rounds > 1 else ''}, got {size}"
        )


def student_maps(model: FeatureExtractor, job: Job, data: ImageData) -> dict[str, Tensor]:
    """The maps that the job's method catches, of two images. ConfigError for what is no map that it can take, and for batches of
    one image where the network does not train on one."""
    caught = maps(model, job.title, data, modes=(True, False))
    single = job.config.engine.gradient_accumulation_steps * PartialState().num_processes
    if job.train.batch_size == single:  # the network is shown one image at a time
        try:
            maps(model, job.title, data, modes=(True,), count=1)
        except ValueError as error:
            raise ConfigError(
                f"config: batch_size must be at least {2 * single}, two images for each process and round of accumulation, "
                f"got {single}: {error}"
            ) from None
    for name, path in job.paths.items():
        wanted = ANY if name == FEATURES and job.method.pooled else MAP
        check_map(f"{job.student}.{name}", path, caught[name], wanted)
    return caught


def networks(config: Config, data: ImageData, jobs: Sequence[Job]) -> None:
    """Makes each kind of network that these jobs train or learn from once, and shows it two images."""
    seen, counted = set(), set()
    for job in jobs:
        # Students of all seeds have equally many images; only teachers have their own.
        own = (job.teacher.name if job.teacher else job.method.needs_teachers, job.train.batch_size)
        if own not in counted:
            counted.add(own)
            batches(job, data_of(job, data))
        kind = (job.factory, str(job.args), job.weights, str(job.paths), job.method.name)
        if kind not in seen:
            seen.add(kind)
            model = build(
                job.factory,
                job.args,
                num_classes=data.num_classes,
                in_channels=data.in_channels,
                weights=job.weights,
            )
            student_maps(FeatureExtractor(model, job.paths), job, data)
    if any(job.method.needs_teachers for job in jobs):
        frozen.check(config, data, hints=need_hints(jobs))
