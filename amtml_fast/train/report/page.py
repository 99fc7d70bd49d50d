"""The page of `amtml-fast report`: one HTML file about runs (gather.py reads them), with nothing outside it.

Each section is a function that makes what page.html.j2 shows, or says in a sentence what is missing for it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import numpy as np

from ..compare import results
from ..compare.answers import learns_weights
from ..config.schema import ConfigError
from ..figures import numbers, tables
from ..figures.numbers import ONE_HOT, UNIFORM
from ..files import write_atomic
from ..progress import Display
from ..run.folder import Run
from ..run.metrics import collapsed
from ..run.timing import PARTS
from . import page_images, svg
from .gather import Gathered, command, gather, seed, shown_config
from .svg import COLORS, Line, Mark

TERMS = {"loss": "c0", "kd": "c1", "ce": "c2", "kl": "c3", "angle": "c4", "regularizer": "c5", "hint": "c6"}
NO_TERMS = ("epoch", "lr", "loss", "train_accuracy", "val_accuracy", "seconds", "entropy", "weight_mean", "weight_won")
REST = "rest"  # of a step, beside its parts
COLORED = {**dict(zip(PARTS, COLORS, strict=False)), REST: "c0"}
Metrics = dict[str, list[list[dict[str, Any]]]]  # name -> runs -> epochs


def write(
    sources: Sequence[Path],
    out: Path | None = None,
    images: Sequence[int] | None = None,
    display: Display | None = None,
) -> Path:
    """Writes the page about a comparison's folder or run folders, and returns its place. RunError for other folders."""
    found = gather(sources)
    place = out or (sources[0] if len(sources) == 1 else Path()) / "report.html"
    if place.is_dir():
        raise ConfigError(f"--out must be a file, got the folder {place}")
    html = render(found, images, display or Display(quiet=True))
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(place, html.encode())
    return place


def render(found: Gathered, images: Sequence[int] | None, display: Display) -> str:
    shown = found.shown()
    metrics = {name: [run.read_metrics() for run in runs] for name, runs in shown.items()}
    weighted = {
        name: runs for name, runs in metrics.items() if any("entropy" in epoch for run in runs for epoch in run)
    }
    learners = {name: [run for run in runs if run.finished() and learns_weights(run)] for name, runs in shown.items()}
    learners = {name: runs for name, runs in learners.items() if runs}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        name=found.name,
        lead=found.found.sentence if found.found else "No run here has finished yet.",
        facts=facts(found),
        notes=found.notes,
        others=found.others,
        unfinished=[unfinished(run) for run in found.unfinished],
        main=main_table(found),
        sections=other_tables(found),
        curves=curves(metrics),
        asked=page_images.sections(learners, images, display),
        weights=weights(weighted, shown, set(learners)),
        bounds=(UNIFORM, ONE_HOT),
        time=time(shown),
        again=again(found),
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def facts(found: Gathered) -> list[tuple[str, str]]:
    config, records = found.config, [run.read_record() for run in found.runs]
    sizes = {record["student"]: record["parameters"] for record in records}
    students = [f"{name} ({size:,} parameters)" for name, size in sizes.items() if name]
    lines = [
        ("Data", config.data.name),
        ("Student" if len(students) == 1 else "Students", ", ".join(students)),
        ("Teachers", ", ".join(teacher.name for teacher in config.teachers)),
        ("Epochs", ", ".join(map(str, sorted({record["epochs"] for record in records})))),
        ("Seeds", ", ".join(map(str, sorted({seed(run) for run in found.runs})))),
        ("Accuracy on", f"the {config.compare.split} split"),
    ]
    return [(name, value) for name, value in lines if value]


def unfinished(run: Run) -> dict[str, Any]:
    record, epochs = run.read_record(), run.read_metrics()
    accuracy = epochs[-1].get("val_accuracy") if epochs else None
    return {
        "label": record["label"] if record["student"] else f"teacher {run.folder.name}",
        "seed": record["seed"],
        "done": len(epochs),
        "epochs": record["epochs"],
        "accuracy": "-" if accuracy is None else f"{100 * accuracy:.2f}",
    }


def main_table(found: Gathered) -> dict[str, Any] | None:
    """Cells of the accuracy table, and a strip of dots for each student."""
    if found.found is None:
        return None
    rows, teachers = found.found.main or found.found.rows, found.found.teachers
    table, caption = tables.comparison(rows, teachers)
    values = [100 * value for row in rows for value in row.accuracies if math.isfinite(value)]
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    dots: list[Any] = [None] * len(teachers) + [svg.strip([100 * v for v in row.accuracies], low, high) for row in rows]
    body = [
        {
            "cells": cells,
            "dots": strip,
            "teacher": strip is None,
            "best": isinstance(cells[2], tables.Bold),
            "value": row.mean,
        }
        for cells, strip, row in zip(table.lines, dots, [*teachers, *rows], strict=True)
    ]
    return {"header": table.header, "lines": body, "caption": caption, "low": f"{low:.1f}", "high": f"{high:.1f}"}


def other_tables(found: Gathered) -> list[tuple[str, tables.Blocks]]:
    if found.found is None:
        return []
    sections = results.sections(found.config, found.found)
    return [(title, blocks) for title, blocks in sections.items() if title != "Accuracy"]


# --- by epoch ---------------------------------------------------------------------------------------------------------


def curves(metrics: Metrics) -> dict[str, Any] | None:
    """Validation accuracy of each method before all others, and its loss with the terms."""
    accuracies = {name: 100 * numbers.series(runs, "val_accuracy") for name, runs in metrics.items()}
    accuracies = {name: values for name, values in accuracies.items() if np.isfinite(values).any()}
    if not accuracies:
        return None
    late = numbers.finite({name: values[:, values.shape[1] // 2 :] for name, values in accuracies.items()})
    low, high = svg.around([late])
    limits, alone = (max(low, 0.0), min(high, 100.0)), len(accuracies) == 1
    panels = []
    for name, values in accuracies.items():
        last = numbers.last(values)
        words = f"{name}: validation accuracy by epoch, at the end {last.mean():.1f} % on average of {len(last)} runs"
        clipped = np.where(values < limits[0], np.nan, values)
        look: Any = {"thin": True, "limits": limits, "digits": 1, "behind": "" if alone else "others"}
        line = Line("", clipped, "c1")
        panels.append((name, svg.lines([line], words, size=(svg.WIDE, svg.HIGH) if alone else svg.SMALL, **look)))
    behind = [np.where(values < limits[0], np.nan, values) for values in accuracies.values()]
    return {
        "behind": svg.background(behind, "others", svg.SMALL, limits, 1) if not alone else "",
        "accuracy": panels,
        "cut": any((values < limits[0]).any() for values in accuracies.values()),
        "loss": [(name, *loss_terms(name, runs)) for name, runs in metrics.items() if any(runs)],
    }


def loss_terms(name: str, runs: numbers.Runs) -> tuple[Any, str]:
    """The chart of a method's loss and its terms, and what it leaves out."""
    known = (key for run in runs for epoch in run for key, value in epoch.items() if isinstance(value, (int, float)))
    keys = dict.fromkeys(key for key in known if key not in NO_TERMS)
    series = {key: numbers.series(runs, key) for key in ["loss", *keys]}
    zero = [key for key, values in series.items() if not (np.isfinite(values) & (values != 0)).any()]
    series = {key: values for key, values in series.items() if key not in zero}
    if len(series) == 2 and np.allclose(series["loss"], [*series.values()][1], equal_nan=True):
        series.popitem()  # the one term is the loss
    flat = numbers.finite(series)
    spare = itertools.cycle(("c7", "c8"))
    drawn = [Line(key, values, TERMS.get(key) or next(spare)) for key, values in series.items()]
    said = ", ".join(f"{key} {numbers.last(values).mean():.3g}" for key, values in series.items())
    log = bool(flat.size) and flat.min() > 0 and flat.max() > 8 * flat.min()
    chart = svg.lines(drawn, f"{name}: training loss and its terms by epoch, at the end {said}", log=log, digits=None)
    left_out = [f"{key} is 0" for key in zero]
    return chart, "; ".join([*(["log scale"] if log else []), *left_out])


def weights(weighted: Metrics, shown: Mapping[str, Sequence[Run]], learners: set[str]) -> list[dict[str, Any]]:
    """Entropy, mean weight and share of examples won by epoch, and what the trainer says about the last epoch."""
    out = []
    for name, runs in weighted.items():
        teachers = next(run.read_record()["teachers"] for run in shown[name])
        entropy = numbers.series(runs, "entropy")
        marks = [Mark(UNIFORM, f"above {UNIFORM}: uniform"), Mark(ONE_HOT, f"below {ONE_HOT}: one teacher has all")]
        words = f"{name}: normalized entropy of the weights by epoch, at the end {numbers.last(entropy).mean():.3f}"
        charts = [
            ("Entropy", svg.lines([Line("", entropy, "c1")], words, limits=(0, 1), marks=marks, thin=True, digits=3))
        ]
        for key, title in (("weight_mean", "Mean weight"), ("weight_won", "Share of examples won")):
            values = numbers.of_teachers(runs, key)
            names = [teachers[t] if t < len(teachers) else f"teacher {t + 1}" for t in range(len(values))]
            lines = [Line(numbers.short(each, 14), values[t], COLORS[t % len(COLORS)]) for t, each in enumerate(names)]
            ends = [(each, numbers.last(line.values)) for each, line in zip(names, lines, strict=True)]
            said = ", ".join(f"{each} {last.mean():.2f}" for each, last in ends if last.size)
            equal = [Mark(1 / len(values), "equal")] if key == "weight_mean" else []
            words = f"{name}: {title.lower()} of each teacher by epoch, at the end {said}"
            charts.append((title, svg.lines(lines, words, limits=(0, 1), marks=equal)))
        learned = name in learners
        last = [run[-1] for run in runs if run]
        states = [collapsed(row, teachers) for row in last] if learned else []
        said = next((f"{sum(map(bool, states))} of {len(states)} runs: {state}" for state in states if state), "")
        out.append({"name": name, "charts": charts, "learned": learned, "collapsed": said})
    return sorted(out, key=lambda one: not one["learned"])  # learned weights before those that a rule makes


# --- time, and how to get it again ------------------------------------------------------------------------------------


def time(shown: Mapping[str, Sequence[Run]]) -> dict[str, Any] | None:
    """Milliseconds of a step by part, mean over the finished runs; None before one has finished."""
    steps: dict[str, dict[str, float]] = {}
    for name, runs in shown.items():
        records = [run.read_record() for run in runs if run.finished()]
        records = [record for record in records if record["step_seconds"]]  # of those that had a row of metrics.jsonl
        if records:
            parts = {part: fmean(record["step_seconds"][part] for record in records) for part in PARTS}
            named = sum(parts.values())
            whole = max(fmean(record["seconds_per_step"] for record in records), named)
            steps[name] = {**parts, REST: whole - named}
    if not steps:
        return None
    longest = max(sum(parts.values()) for parts in steps.values())
    lines = [
        {
            "name": name,
            "bar": svg.stacked({COLORED[part]: seconds for part, seconds in parts.items()}, longest),
            "whole": milliseconds(sum(parts.values())),
            "cells": [milliseconds(seconds) for seconds in parts.values()],
        }
        for name, parts in steps.items()
    ]
    return {"colors": COLORED, "lines": lines}


def milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def again(found: Gathered) -> dict[str, Any]:
    words, save = command(found)
    records = [run.read_record() for run in found.runs]
    values: dict[str, list[str]] = {"commit": [str(record["git_commit"] or "unknown") for record in records]}
    values["device"] = [str(record["device"]) for record in records]
    values["processes"] = [str(record["processes"]) for record in records]
    for key in dict.fromkeys(key for record in records for key in record["versions"]):
        values[key.replace("_", "-")] = [record["versions"].get(key, "unknown") for record in records]
    values["backends"] = [", ".join(f"{op}: {name}" for op, name in record["backends"].items()) for record in records]
    lines = [(key, [(value, each.count(value)) for value in dict.fromkeys(each)]) for key, each in values.items()]
    return {
        "command": words,
        "save": save,
        "file": f"{found.config.name}.yaml",
        "versions": lines,
        "config": shown_config(found.config),
    }
