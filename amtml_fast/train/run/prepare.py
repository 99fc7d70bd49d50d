"""What a training needs beside its job: accelerate's engine, the data and the teachers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration

from ..config import environment
from ..config.schema import Config, ConfigError, EngineConfig, TeacherConfig
from ..data import images, parts
from ..files import RunError, differences
from ..models.layout import channels_last
from ..progress import Display
from ..teachers import fill, frozen
from .folder import Run
from .job import Job, need_hints, networks, teacher_job
from .stop import Stop

ENOUGH = 30  # validation images, to tell a teacher that knows nothing from bad luck


def make_accelerator(engine: EngineConfig, folder: Path) -> Accelerator:
    """Accelerate's engine: device, processes (accelerate launch, torchrun), mixed precision, TensorBoard."""
    environment.check(engine)
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    # Without cpu=True, a launch of several processes on a machine without GPU trains each one by itself.
    cpu = engine.device == "cpu" or not torch.accelerator.is_available()
    # Accelerate keeps one precision a process; here each training has its own, of several comparisons one after another.
    if AcceleratorState._shared_state.get("_mixed_precision", engine.mixed_precision) != engine.mixed_precision:
        AcceleratorState._reset_state()  # not PartialState, which has the processes and the device
    return Accelerator(
        cpu=cpu,
        mixed_precision=engine.mixed_precision,
        gradient_accumulation_steps=engine.gradient_accumulation_steps,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(folder)),
    )


def load_data(config: Config) -> images.ImageData:
    """The configured data set on the device that training uses."""
    accelerator, data = make_accelerator(config.engine, config.folder), config.data
    try:
        with accelerator.main_process_first():  # of several processes one downloads
            loaded = images.load(
                data.name, data.root, val_fraction=data.val_fraction, seed=config.seed, download=data.download
            )
    except OSError as error:
        if error.errno is None:  # a reader's own words
            raise
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise ConfigError(
            f"config: data.root must be a folder whose files can be read, got {data.root} ({reason})"
        ) from error
    return parts.divided(loaded.to(accelerator.device), data, config.seed)


def data_of(job: Job, data: images.ImageData) -> images.ImageData:
    """The data as this job trains on it."""
    if job.teacher is not None:
        return parts.of_teacher(data, job.teacher, job.config.data.domains, job.seed)
    alone = not job.method.needs_teachers
    return parts.of_student(data, job.config.data.labeled_share, job.seed, alone=alone)


def same_data(run: Run, data: images.ImageData, *, of_teachers: bool) -> None:
    """RunError where the run was trained on other images, labels or classes; runs of earlier versions do not say."""
    known = run.read_record().get("data")
    if known is not None and known != data.fingerprint(of_teachers=of_teachers):
        raise RunError(
            f"{run.folder}: holds a run on other data: images, labels or classes of {data.name} are not those that it was trained "
            "on. Set data.root to those, start the run over with --fresh, or give this one a place of its own with name=... or out=..."
        )


def same_network(run: Run, config: Config, teacher: TeacherConfig) -> None:
    """RunError where the weights that the run left are of another network than the configuration's: they may still fit."""
    here = networks(config, [teacher.name])[teacher.name]
    for key, there, wanted in differences(run.read_record().get("recipe", {}).get("model", here), here):
        raise RunError(
            f"{run.folder}: holds another teacher {teacher.name} ({key}: {there!r} there, {wanted!r} here). Train it over with "
            "`amtml-fast teach --fresh`, or give these teachers a place of their own with name=... or out=..."
        )


def say_choices(config: Config, data: images.ImageData, display: Display) -> None:
    """What engine.precision=auto stands for here, in one line."""
    if config.engine.precision == "auto":
        shown = data.train.images
        where = torch.cuda.get_device_name(shown.device) if shown.is_cuda else "the CPU"
        last = str(channels_last(config.engine.channels_last, shown.shape)).lower()
        precision = config.engine.mixed_precision
        display.say(f"engine.precision=auto on {where}: mixed_precision={precision}, channels_last={last}")


def say_twins(config: Config, jobs: Sequence[Job], display: Display) -> None:
    """In one line which students start as a teacher did: trained alone by its recipe, such a student is that teacher."""
    same: dict[tuple[str, str], list[int]] = {}
    for teacher in config.teachers if jobs else []:
        first = teacher_job(config, teacher)
        for job in jobs:
            alike = (job.factory, job.args, job.seed, job.weights) == (first.factory, first.args, first.seed, None)
            seeds = same.setdefault((job.student, teacher.name), [])
            if alike and not teacher.model.brings_weights and job.seed not in seeds:
                seeds.append(job.seed)
    said = [
        f"{student} with seed {', '.join(map(str, seeds))} and teacher {teacher}"
        for (student, teacher), seeds in same.items()
        if seeds
    ]
    if said:
        display.say(f"the same network from the same first weights: {'; '.join(said)}; another seed starts elsewhere")


def by_chance(data: images.ImageData) -> float:
    """What guessing gets on the validation images, and a standard deviation."""
    share = 1 / data.num_classes
    return share + math.sqrt(share * (1 - share) / len(data.val))


def load_teachers(
    config: Config, data: images.ImageData, jobs: Sequence[Job], display: Display
) -> frozen.Teachers | None:
    """The teachers that these jobs need, with their outputs cached where that is right; None if none need any."""
    jobs = [job for job in jobs if job.method.needs_teachers]
    if not jobs:
        return None
    for teacher in config.teachers:
        run = Run(config.teacher_folder(teacher.name))
        if not teacher.model.brings_weights and run.exists():
            same_data(run, data, of_teachers=True)
            same_network(run, config, teacher)
    accelerator = make_accelerator(config.engine, config.folder)
    with accelerator.main_process_first():  # of several processes one downloads
        teachers = frozen.load(config, data, hints=need_hints(jobs))
    for teacher, score in zip(config.teachers, teachers.scores, strict=True):
        if teacher.model.brings_weights and len(data.val) >= ENOUGH and score <= by_chance(data) < 1:
            display.warn(
                f"teacher {teacher.name} is right on {100 * score:.1f} % of the validation images, no better than guessing. Are its "
                f"classes in this order ({', '.join(data.classes[:3])}, ...), and are its images normalized by its own mean and std?"
            )
    if config.cache.hints != "never" or not all(job.method.hints(job.config.loss) for job in jobs):
        with Stop(accelerator.num_processes) as stop:
            fill.use_cache(config, teachers, data, display, stop.check)
            stop.check()
    return teachers
