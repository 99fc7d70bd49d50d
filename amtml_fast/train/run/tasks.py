"""The work of the commands that train or measure one thing at a time: teach, distill, eval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..config.schema import Config
from ..data.images import ImageData
from ..models.evaluate import accuracy
from ..models.features import FeatureExtractor
from ..models.networks import build
from ..progress import Display
from ..teachers import frozen
from . import preflight
from .folder import Run
from .job import Job, of_teachers, one_job, teacher_job
from .prepare import load_teachers, same_data, say_choices, say_twins
from .stop import how_many, says_when_stopped
from .timing import shares
from .trainer import start_over, train


def teach(config: Config, data: ImageData, display: Display, *, resume: bool = True, fresh: bool = False) -> list[Run]:
    """Trains every teacher that brings no weights of its own; finished ones are skipped."""
    say_choices(config, data, display)
    preflight.places(config)
    trained = [teacher for teacher in config.teachers if not teacher.model.brings_weights]
    jobs = [teacher_job(config, teacher) for teacher in trained]
    preflight.networks(config, data, jobs)
    for teacher in config.teachers:
        if teacher not in trained:
            display.say(f"teacher {teacher.name}: brings its weights")
    if fresh:
        start_over(jobs, display)
    runs = []
    with says_when_stopped(lambda: how_many(jobs, "teachers")):
        for job in jobs:
            runs.append(train(job, data, None, display, resume=resume))
            say_result(job, runs[-1], display)
    return runs


def distill(
    config: Config,
    data: ImageData,
    method: str,
    seed: int,
    display: Display,
    *,
    student: str | None = None,
    teachers: int | None = None,
    resume: bool,
    fresh: bool,
) -> Run:
    """Trains one student; the teachers must be there."""
    say_choices(config, data, display)
    preflight.places(config)
    job = one_job(config, method, seed, student, teachers)
    say_twins(config, [job], display)
    loaded = load_teachers(of_teachers(config, job.teachers), data, [job], display)
    return train(job, data, loaded, display, resume=resume, fresh=fresh)


def evaluate(
    config: Config, data: ImageData, folder: Path, split: str, teacher: str | None = None
) -> tuple[Path | str, float]:
    """(weights file, accuracy on a split) of the run in `folder`, from its weights and its recipe's model alone; of a teacher
    that brings its weights, from those. RunError for another split than test of other data than the run's: what it was trained
    on may be in there."""
    given = next((one for one in config.teachers if one.name == teacher and one.model.brings_weights), None)
    if given is not None:
        net = frozen.extractor(config, given, data, hints=False).to(data.train.images.device)
        measured = accuracy(net, getattr(data, split), data, f"teacher {given.name!r}")
        return given.model.weights or given.model.factory, measured
    run = Run(folder)
    if not run.exists():
        raise FileNotFoundError(f"eval: looked for {run.record}: no such run; train it first with teach or distill")
    record = run.read_record()
    files = [path for path in (folder / "student.safetensors", folder / "model.safetensors") if path.is_file()]
    if not files:
        why = "its weights were removed" if record.get("finished") else "this run has not finished yet"
        raise FileNotFoundError(
            f"eval: looked for {'student' if record['student'] else 'model'}.safetensors in {folder}: {why}"
        )
    if split != "test":
        same_data(run, data, of_teachers=files[0].name == "model.safetensors")
    if "mean" in record:  # what the run's images were normalized by
        data = replace(data, mean=tuple(record["mean"]), std=tuple(record["std"]))
    made = record["recipe"]["model"]
    model = build(
        made["factory"],
        made["args"],
        num_classes=data.num_classes,
        in_channels=data.in_channels,
        weights=files[0],
    )
    extractor = FeatureExtractor(model, {}).to(data.train.images.device)
    return files[0], accuracy(extractor, getattr(data, split), data, str(files[0]))


def say_result(job: Job, run: Run, display: Display) -> None:
    result = run.read_result()
    validation = "" if job.student else f"validation {100 * result['val_accuracy']:.2f} %, "
    time = shares(run.read_record()["step_seconds"])
    display.say(f"{job.title}: {validation}test {100 * result['test_accuracy']:.2f} %; {time}")
