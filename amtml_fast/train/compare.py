"""Methods x seeds at equal epochs: trains what is missing, then table, pictures and one sentence of what came out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from . import data as datasets
from . import report
from . import teachers as frozen
from .config import Config, ConfigError, to_dict
from .features import FeatureExtractor
from .jobs import FEATURES, Job, make_distiller, student_job, teacher_job
from .loop import make_accelerator, train
from .methods import METHODS
from .models import build
from .progress import Display
from .run import Run, read_json, versions, write_atomic

GALLERY = 6  # images in the picture of the paper's Figure 4


@dataclass(frozen=True)
class Outcome:
    """What `compare` found: rows for the table, and the files it wrote."""

    rows: list[report.Row]
    teachers: list[report.Row]
    finding: str
    files: list[Path]
    seconds: float


def load_data(config: Config) -> datasets.ImageData:
    """The configured data set on the device that training uses."""
    device = make_accelerator(config.engine, config.folder).device
    root = config.data.root
    data = datasets.load(config.data.name, root, val_fraction=config.data.val_fraction, seed=config.seed)
    return data.to(device)


def teach(
    config: Config, data: datasets.ImageData, display: Display, *, resume: bool = True, fresh: bool = False
) -> list[Run]:
    """Trains every teacher that has no weights of its own; finished ones are skipped."""
    runs = []
    for teacher in config.teachers:
        if teacher.model.weights is not None:
            display.say(f"teacher {teacher.name}: weights from {teacher.model.weights}")
            continue
        run = train(teacher_job(config, teacher), data, None, display, resume=resume, fresh=fresh)
        result = read_json(run.result)
        display.say(
            f"teacher {teacher.name}: validation {100 * result['val_accuracy']:.2f} %, "
            f"test {100 * result['test_accuracy']:.2f} %"
        )
        runs.append(run)
    return runs


def load_teachers(
    config: Config, data: datasets.ImageData, methods: list[str], display: Display
) -> frozen.Teachers | None:
    """The teachers that these methods need, with their outputs cached where that is right; None if none need any."""
    needed = [METHODS[name] for name in methods if METHODS[name].needs_teachers]
    if not needed:
        return None
    hints = any(method.needs_hints(config.loss) for method in needed)
    teachers = frozen.load(config, data, hints=hints, channels_last=config.engine.channels_last)
    if frozen.wants_cache(config, teachers, data, display):
        teachers.fill_cache(data, display)
    return teachers


def distill(
    config: Config, data: datasets.ImageData, method: str, seed: int, display: Display, *, resume: bool, fresh: bool
) -> Run:
    """Trains one student; the teachers must be there."""
    job = student_job(config, method, seed)
    teachers = load_teachers(config, data, [method], display)
    return train(job, data, teachers, display, resume=resume, fresh=fresh)


def compare(config: Config, display: Display, *, fresh: bool = False) -> Outcome:
    """Trains the teachers and every method x seed that is not finished yet, and writes table and pictures."""
    began = time.perf_counter()
    methods, seeds = config.compare.methods, config.compare.seeds
    if not methods or not seeds:
        raise ConfigError(f"config: compare: at least one method and one seed wanted, got {methods} and {seeds}")
    data = load_data(config)
    teach(config, data, display, fresh=fresh)
    jobs = [student_job(config, method, seed) for seed in seeds for method in methods]
    teachers = load_teachers(config, data, methods, display)
    with display.bar(f"{len(jobs)} students", len(jobs), unit="runs") as bar:
        for job in jobs:
            run = train(job, data, teachers, display, fresh=fresh)
            display.say(f"{job.title}: test {100 * read_json(run.result)['test_accuracy']:.2f} %")
            bar.add(1)
            bar.flush()
    folders = {method: [Run(job.folder) for job in jobs if job.method == method] for method in methods}
    rows = [row(method, METHODS[method].label, runs) for method, runs in folders.items()]
    teacher_rows = [teacher_row(config, i, teachers, data) for i in range(len(config.teachers))]
    found = finding(rows)
    files: list[Path] = []
    if make_accelerator(config.engine, config.folder).is_main_process:
        seconds = time.perf_counter() - began
        files += write_tables(config, rows, teacher_rows, found, seconds)
        files += write_figures(config, jobs, folders, teachers, data)
    return Outcome(rows, teacher_rows, found, files, time.perf_counter() - began)


def row(method: str, label: str, runs: list[Run]) -> report.Row:
    """A line of the table from finished runs, in the order of the seeds."""
    epochs = [epoch["seconds"] for run in runs for epoch in run.read_metrics()]
    return report.Row(
        method=method,
        label=label,
        parameters=runs[0].read_record()["parameters"],
        accuracies=[read_json(run.result)["test_accuracy"] for run in runs],
        seconds_per_epoch=fmean(epochs),
    )


def teacher_row(config: Config, i: int, teachers: frozen.Teachers | None, data: datasets.ImageData) -> report.Row:
    """A teacher's line: from its run, or measured now where its weights came from elsewhere."""
    teacher = config.teachers[i]
    if teacher.model.weights is None:
        return row(teacher.name, teacher.name, [Run(config.folder / "teachers" / teacher.name)])
    if teachers is None:
        teachers = frozen.load(config, data, hints=False)
    accuracy = frozen.accuracy(teachers.models[i], data.test, data)
    return report.Row(teacher.name, teacher.name, teachers.parameters[i], [accuracy])


def finding(rows: list[report.Row]) -> str:
    """One plain sentence: AMTML-KD (or else the last method) against each other method, seed by seed."""
    if len(rows) == 1:
        return f"{rows[0].label} reaches {100 * rows[0].mean:.2f} % on the test set."
    main = next((row for row in rows if row.method == "amtml_kd"), rows[-1])
    others = sorted((row for row in rows if row is not main), key=lambda row: row.method == "student")
    parts = [against(main, other) for other in others]
    return f"{main.label} ({100 * main.mean:.2f} %) {'; it '.join(parts)}."


def against(main: report.Row, other: report.Row) -> str:
    """How `main` compares with `other`, measured by the spread of the differences over the seeds."""
    difference = report.paired_difference(main, other)
    points, label = 100 * difference.mean, f"{other.label} ({100 * other.mean:.2f} %)"
    if difference.std is None:
        where = f"is {abs(points):.2f} points {'above' if points >= 0 else 'below'} {label}"
        return f"{where}, but one seed cannot tell that from chance"
    spread = 100 * difference.std
    measured = f"{points:+.2f} ± {spread:.2f} points over {difference.n} seeds"
    if abs(points) <= spread:
        return f"cannot be told from {label}: {measured}, which is within the seeds' spread"
    verb = "beats" if points > 0 else "falls behind"
    return f"{verb} {label}: {measured}, which is more than the seeds' spread"


def write_tables(
    config: Config, rows: list[report.Row], teachers: list[report.Row], found: str, seconds: float
) -> list[Path]:
    """results.csv, results.md and results.json in the comparison's folder."""
    whole: dict[str, Any] = {
        "name": config.name,
        "finding": found,
        "rows": report.records(rows, teachers),
        "epochs": config.distill.epochs,
        "seeds": config.compare.seeds,
        "seconds": seconds,
        "versions": versions(),
        "config": to_dict(config),
    }
    title = f"# {config.name}: {config.distill.epochs} epochs, seeds {', '.join(map(str, config.compare.seeds))}\n\n"
    contents = {
        "results.csv": report.csv(rows, teachers),
        "results.md": title + report.markdown(rows, teachers) + f"\n{found}\n",
        "results.json": json.dumps(whole, indent=2) + "\n",
    }
    for name, text in contents.items():
        write_atomic(config.folder / name, text.encode())
    return [config.folder / name for name in contents]


def write_figures(
    config: Config,
    jobs: list[Job],
    folders: dict[str, list[Run]],
    teachers: frozen.Teachers | None,
    data: datasets.ImageData,
) -> list[Path]:
    """The pictures; those of the teacher weights come from the first seed of the first method that has weights."""
    place = config.folder / "figures"
    place.mkdir(parents=True, exist_ok=True)
    histories = {METHODS[method].label: [run.read_metrics() for run in runs] for method, runs in folders.items()}
    files = [place / "curves.png"]
    report.curves(histories, files[0])
    weighted = {k: v for k, v in histories.items() if all("entropy" in epoch for run in v for epoch in run)}
    job = next((job for job in jobs if METHODS[job.method].label in weighted), None)
    if job is None or teachers is None:
        return files
    report.entropy(weighted, place / "entropy.png", teachers.names)
    chosen, probs, weights = examples(job, teachers, data)
    pictures, labels = data.val.images[chosen].cpu().numpy(), data.val.labels[chosen].tolist()
    names = list(data.classes)
    report.soft_targets(
        pictures[0],
        names,
        probs[0].numpy(),
        weights[0].numpy(),
        labels[0],
        place / "soft_targets.png",
        teachers.names,
    )
    gallery = place / "weights_gallery.png"
    report.weights_gallery(pictures, names, probs.numpy(), weights.numpy(), labels, gallery, teachers.names)
    return [*files, place / "entropy.png", place / "soft_targets.png", gallery]


@torch.no_grad()
def examples(job: Job, teachers: frozen.Teachers, data: datasets.ImageData) -> tuple[Tensor, Tensor, Tensor]:
    """Validation images for the pictures: positions [n], tempered soft targets [n, T, C], weights [n, T], on the CPU.

    The images on which the teachers disagree most (entropy of the equal mixture less the teachers' mean entropy), at
    most one a class. The choice does not look at the weights, so the pictures flatter no adapter.
    """
    distiller = make_distiller(job, data, teachers)
    distiller.student.model.load_state_dict(load_file(job.folder / job.file))
    distiller.objective.load_state_dict(load_file(job.folder / "objective.safetensors"))
    device = data.val.images.device
    distiller.to(device).eval()
    adapter = cast(nn.Module, distiller.objective.adapter)
    probs, weights = [], []
    for batch in datasets.Loader(data.val, data, frozen.EVAL_BATCH):
        logits = torch.stack(teachers.live(batch.images).logits, 1)  # [n, T, C]
        probs.append((logits / job.config.loss.temperature).softmax(-1))
        weights.append(adapter(distiller.student(batch.images)[1][FEATURES]))
    p, w = torch.cat(probs).cpu(), torch.cat(weights).cpu()
    disagreement = torch.special.entr(p.mean(1)).sum(-1) - torch.special.entr(p).sum(-1).mean(-1)
    chosen: dict[int, int] = {}
    for i in disagreement.argsort(descending=True, stable=True).tolist():
        chosen.setdefault(int(data.val.labels[i]), i)
    keep = torch.tensor(list(chosen.values())[:GALLERY])
    return keep, p[keep], w[keep]


def evaluate(config: Config, data: datasets.ImageData, folder: Path, split: str) -> tuple[Path, float]:
    """(weights file, accuracy on a split) of the run in `folder`, from its weights and its recipe's model alone."""
    run = Run(folder)
    if not run.exists():
        raise FileNotFoundError(f"eval: looked for {run.record}: no such run; train it first with teach or distill")
    files = [path for path in (folder / "student.safetensors", folder / "model.safetensors") if path.is_file()]
    if not files:
        raise FileNotFoundError(f"eval: looked for student.safetensors in {folder}: this run has not finished yet")
    made = run.read_record()["recipe"]["model"]
    model = build(
        made["factory"],
        made["args"],
        num_classes=len(data.classes),
        in_channels=data.train.images.shape[1],
        weights=files[0],
    )
    extractor = FeatureExtractor(model, {}).to(data.train.images.device)
    return files[0], frozen.accuracy(extractor, getattr(data, split), data)
