"""The page's sections that ask trained networks: soft targets and weights of test images, and weights by class."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..compare import answers
from ..config.schema import ConfigError
from ..data.images import ImageData
from ..figures import numbers
from ..methods.base import heaviest, mixture
from ..progress import Display
from ..run.folder import Run
from ..run.job import Job, need_hints
from ..run.prepare import load_data
from ..teachers import frozen
from . import page_trust
from .gather import job_of_run

CLASSES = 24  # more do not fit a table that one can read
SHOWN = 5  # classes of an image
# Of data or weights that are not there.
FAILURES = (RuntimeError, ValueError, TypeError, LookupError, OSError, ImportError)
Asked = dict[str, list[tuple[Job, Tensor, Tensor]]]  # method -> a run: its job, weights [N, T], student's logits [N, C]


def missing(error: Exception) -> dict[str, Any]:
    return {"missing": f"What teachers and students say about images cannot be shown here: {str(error).rstrip('.')}."}


def sections(learners: Mapping[str, Sequence[Run]], images: Sequence[int] | None, display: Display) -> dict[str, Any]:
    """`images` and `classes`; or `missing`, the sentence that says why there are none."""
    if not learners:
        return {"missing": "No finished run here has learned weights for its teachers, so there are none to show."}
    try:
        jobs = {name: [job_of_run(run) for run in runs] for name, runs in learners.items()}
        first = next(iter(jobs.values()))[0]
        same = {name: [job for job in each if alike(job, first)] for name, each in jobs.items()}
        data = load_data(first.config)
        teachers = frozen.load(first.config, data, hints=need_hints([job for each in same.values() for job in each]))
        unknown = strangers(first)
    except FAILURES as error:
        return missing(error)
    if unknown:
        return {"missing": f"The weights of {', '.join(unknown)} on disk are not those that the students learned from."}
    if images and max(images) >= len(data.test):
        raise ConfigError(f"--images must be in 0 to {len(data.test) - 1} (the test split), got {max(images)}")
    teachers = teachers.only(first.teachers, hints=bool(teachers.channels))
    asked: Asked = {}
    try:
        with display.bar("test images", sum(map(len, same.values())), "runs") as bar:
            logits = answers.teacher_logits(teachers, data.test, data)
            for name, each in same.items():
                for job in each:
                    said = answers.weights_and_logits(job, teachers, data.test, data)
                    asked.setdefault(name, []).append((job, *said))
                    bar.add(1)
    except FAILURES as error:  # a student's file
        return missing(error)
    left_out = [name for name in learners if name not in asked]
    return {
        "missing": "",
        "images": image_section(asked, logits, data, images),
        "classes": class_section(asked, logits, data),
        "trust": page_trust.section(
            {name: [w for _, w, _ in runs] for name, runs in asked.items()}, logits, data.test.labels
        ),
        "teachers": list(first.teachers),
        "left_out": left_out,
    }


def alike(job: Job, first: Job) -> bool:
    """Whether one table can hold both: the same teachers of the same comparison, and the same images."""
    return job.teachers == first.teachers and job.config.folder == first.config.folder


def strangers(job: Job) -> list[str]:
    """Teachers whose weights have changed since the student learned from them."""
    learned = Run(job.folder).read_record()["recipe"]["teachers"]
    now = frozen.fingerprint(job.config)
    return [name for name, print_ in learned.items() if now.get(name) != print_]


# --- images -----------------------------------------------------------------------------------------------------------


def image_section(asked: Asked, logits: Tensor, data: ImageData, images: Sequence[int] | None) -> dict[str, Any]:
    """Of the first run of the first method."""
    name, ((job, weights, student), *_) = next(iter(asked.items()))
    temperature = job.config.loss.temperature
    probs, out = answers.soft_targets(logits, temperature), answers.soft_targets(student, temperature)
    if images is None:
        choices = answers.choose_images(probs, weights, out, data.test.labels)
    else:
        choices = [answers.Choice(i, "Asked for", None) for i in images]
    shown = [
        one_image(choice, probs, weights, out, data, job.teachers) for choice in choices if choice.index is not None
    ]
    return {
        "method": name,
        "seed": job.seed,
        "temperature": f"{temperature:g}",
        "asked": images is not None,
        "shown": shown,
        "none": [choice.why for choice in choices if choice.index is None],
        "total": len(data.test),
    }


def one_image(
    choice: answers.Choice,
    probs: Tensor,
    weights: Tensor,
    student: Tensor,
    data: ImageData,
    names: Sequence[str],
) -> dict[str, Any]:
    """A table of the image's largest classes: a column a teacher, then the mixture and the student."""
    i = choice.index
    assert i is not None
    columns = torch.cat([probs[i], mixture(probs[i : i + 1], weights[i : i + 1]), student[i : i + 1]])  # [T + 2, C]
    truth, said = int(data.test.labels[i]), columns.argmax(1).tolist()
    heads = [
        {"name": name, "weight": weights[i, t].item() if t < len(names) else None, "right": said[t] == truth}
        for t, name in enumerate([*names, "Mixture", "Student"])
    ]
    order = numbers.top_classes(columns.amax(0).numpy(), min(SHOWN, columns.shape[1]), truth)
    lines = [{"class": data.classes[c], "true": c == truth, "values": columns[:, c].tolist()} for c in order]
    verdicts = [f"{head['name']} says {data.classes[c]}" for head, c in zip(heads, said, strict=True)]
    return {
        "index": i,
        "why": choice.why,
        "count": choice.count,
        "label": data.classes[truth],
        "picture": data_uri(data.test.images[i]),
        "heads": [{**head, "says": verdict} for head, verdict in zip(heads, verdicts, strict=True)],
        "lines": lines,
    }


def data_uri(image: Tensor) -> str:
    """A uint8 image [C, H, W] as PNG; of other than three channels the first."""
    pixels = image.cpu()
    array = pixels.permute(1, 2, 0).numpy() if len(pixels) == 3 else pixels[0].numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- classes ----------------------------------------------------------------------------------------------------------


def class_section(asked: Asked, logits: Tensor, data: ImageData) -> dict[str, Any]:
    """The teachers' accuracy by class, and beside it each method's mean weights by class."""
    labels, count = data.test.labels.cpu(), data.num_classes
    right = logits.argmax(-1) == labels[:, None]  # [N, T]
    accuracy = answers.by_class(right, labels, count)  # [classes, T]
    known = accuracy.isfinite().all(1)
    spread = torch.where(known, accuracy.amax(1) - accuracy.amin(1), -1.0)
    most = min(CLASSES, int(known.sum()))  # a class may have no test image
    shown = sorted(spread.argsort(descending=True, stable=True)[:most].tolist())
    best = accuracy >= accuracy.amax(1, keepdim=True)
    methods = []
    for name, runs in asked.items():
        weights = torch.stack([answers.by_class(w, labels, count) for _, w, _ in runs]).mean(0)
        leads = best.gather(1, weights.argmax(1, keepdim=True))[:, 0] & known
        followed = torch.cat([(right * heaviest(w)).sum(1) for _, w, _ in runs]).mean()
        methods.append(
            {
                "name": name,
                "runs": len(runs),
                "lines": [heat(data.classes[c], weights[c], best[c]) for c in shown],
                "leads": int(leads.sum()),
                "followed": f"{100 * followed:.1f}",
            }
        )
    low = max(float(accuracy[known].min()) - 0.02, 0.0)
    return {
        "accuracy": [heat(data.classes[c], accuracy[c], best[c], low) for c in shown],
        "methods": methods,
        "best": f"{100 * right.float().mean(0).max():.1f}",
        "known": int(known.sum()),
        "classes": count,
        "shown": len(shown),
    }


def heat(name: str, values: Tensor, best: Tensor, low: float = 0.0) -> dict[str, Any]:
    """A line of a heat map: each value, how strong its color is, 0 at `low` and 1 at 1, and whether that teacher is the best one."""
    shades = ((values - low) / (1 - low)).clamp(0, 1).tolist()
    return {"class": name, "cells": list(zip(values.tolist(), shades, best.tolist(), strict=True))}
