"""What finished runs say: the rows of a comparison from their folders, its tables, and its pictures."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..config.schema import Config
from ..data.images import ImageData
from ..figures import charts, curves, regimes, significance, tables
from ..figures.markdown import escaped, paragraph, render
from ..figures.tables import ORACLE, Blocks, Network, Row
from ..files import RunError, write_atomic
from ..methods.registry import OKD
from ..models.evaluate import accuracy
from ..progress import Display
from ..run.folder import Run
from ..run.job import Job
from ..run.versions import versions
from ..teachers.frozen import Teachers
from .answers import GALLERY, learns_weights, most_disputed, soft_targets, teacher_logits, weights_and_logits

RESULTS = {"test": "test_accuracy", "validation": "val_accuracy"}  # keys of result.json
OURS = ("gated_kd", "amtml_kd")  # the first that is compared is what the others are compared with
SHOWN = 5  # methods in the picture of the teacher weights


@dataclass(frozen=True)
class Group:
    """The runs of one method, student network and number of teachers: one a seed, in the order of the seeds."""

    method: str
    label: str
    student: str
    teachers: int | None  # how many it learns from; None: from none
    single: bool  # learns from one teacher that its name says
    runs: list[Run]


@dataclass(frozen=True)
class Found:
    """A comparison's numbers: `rows` of every method x student x number of teachers, `main` of the plain case."""

    rows: list[Row]
    main: list[Row]  # the configuration's student, learning from the most teachers compared
    teachers: list[Row]
    missing: list[str]  # titles of runs that diverged; their methods are in no table
    sentence: str
    runs: dict[str, list[Run]]  # by the labels of `main`, a run a seed
    paired: bool = True  # all rows are over the same seeds


def collect(config: Config, jobs: Sequence[Job], teachers: Teachers | None, data: ImageData) -> Found:
    """Reads every finished run of the comparison."""
    groups: dict[tuple[str, int | None, str], Group] = {}
    for job in jobs:
        number, method = len(job.teachers) if job.method.needs_teachers or job.method.peers else None, job.method
        new = Group(method.name, method.label, job.student, number, method.teacher is not None, [])
        groups.setdefault((job.student, number, method.name), new).runs.append(Run(job.folder))
    missing = [job.title for job in jobs if not Run(job.folder).finished()]
    whole = [group for group in groups.values() if all(run.finished() for run in group.runs)]
    if not whole:
        raise RunError(f"{config.name}: no method finished on every seed; diverged: {', '.join(missing)}")
    rows = [teacher_row(config, i, teachers, data) for i in range(len(config.teachers))]
    found = summary(config, whole, rows)
    if not missing:
        return found
    left_out = f" Left out, for their loss became no number: {', '.join(missing)}."
    return replace(found, missing=missing, sentence=found.sentence + left_out)


def summary(config: Config, groups: Sequence[Group], teachers: list[Row], *, paired: bool = True) -> Found:
    """What these groups of finished runs and these teachers say. paired: all are over the same seeds."""
    rows, main, runs = [], [], dict[str, list[Run]]()
    for group in groups:
        line = row(group.method, group.label, group.runs, config.compare.split, group.student, group.teachers)
        rows.append(line)
        if is_plain(config, group):
            main.append(line)
            runs[line.label] = group.runs
    sentence = finding(main or rows) if paired else untested(main or rows)
    return Found(rows, main, teachers, [], sentence, runs, paired)


def is_plain(config: Config, group: Group) -> bool:
    """Whether the group is of the configuration's student, learning from the most teachers compared or from one by name."""
    return group.student == config.student.name and (group.teachers in (most(config), None) or group.single)


def most(config: Config) -> int:
    """The largest number of teachers in the comparison."""
    return max(config.compare.teachers or [len(config.teachers)])


def row(method: str, label: str, runs: list[Run], split: str, student: str = "", teachers: int | None = None) -> Row:
    """A line of the table from finished runs, in the order of the seeds."""
    records = [run.read_record() for run in runs]
    peaks = [record["peak_memory"] for record in records if record["peak_memory"]]
    seconds = [epoch["seconds"] for run in runs for epoch in run.read_metrics() if "seconds" in epoch]
    return Row(
        method=method,
        label=label,
        parameters=records[0]["parameters"],
        accuracies=[run.read_result()[RESULTS[split]] for run in runs],
        seconds_per_epoch=fmean(seconds) if seconds else None,  # of runs whose metrics.jsonl was removed
        peak_memory=min(peaks, default=None),
        student=student,
        teachers=teachers,
        split=split,
    )


def teacher_row(config: Config, i: int, teachers: Teachers | None, data: ImageData) -> Row:
    """A teacher's line: from its run, or measured now where it brought its weights."""
    teacher = config.teachers[i]
    if not teacher.model.brings_weights:
        run = Run(config.teacher_folder(teacher.name))
        return row(teacher.name, teacher.name, [run], config.compare.split)
    assert teachers is not None
    split = config.compare.split
    named = f"teacher {teacher.name!r}"
    score = accuracy(teachers.models[i], data.test, data, named) if split == "test" else teachers.scores[i]
    return Row(teacher.name, teacher.name, teachers.parameters[i], [score], split=split)


def finding(rows: Sequence[Row]) -> str:
    """One plain sentence: ours (or else the last method) against AvgMKD, AMTML-KD with uniform weights, the best other one and
    the student alone."""
    main, rest = ours_and_others(rows)
    if not rest:
        return f"{main.label} reaches {100 * main.mean:.2f} % on the {main.split} set."
    others = {row.method: row for row in rest}
    best = tables.highest(rest)
    wanted = [others.get(name, best) for name in ("avg_mkd", "amtml_no_adapter")]
    wanted += [best, others.get("student", best)]
    parts = [significance.verdict(main, other) for other in {row.method: row for row in wanted}.values()]
    return f"{main.label} ({100 * main.mean:.2f} %) {'; it '.join(parts)}."


def untested(rows: Sequence[Row]) -> str:
    """The same for rows over different seeds, which no paired test can compare."""
    main, rest = ours_and_others(rows)
    best = tables.highest([main, *rest])
    where = f"{100 * best.mean:.2f} % on the {best.split} set"
    return f"{best.label} has the highest mean of {1 + len(rest)} ({where}); their seeds differ, so nothing is tested."


def ours_and_others(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """The row that the others are compared with: Gated KD's, AMTML-KD's, or else the last one that is no oracle."""
    rows = [row for row in rows if row.method != ORACLE] or list(rows)
    found = {row.method: row for row in rows}
    main = next((found[name] for name in OURS if name in found), rows[-1])
    return main, [row for row in rows if row is not main]


def markdown(config: Config, found: Found) -> str:
    """All tables as Markdown."""
    return "\n".join(f"## {title}\n\n{render(blocks)}" for title, blocks in sections(config, found).items())


def sections(config: Config, found: Found) -> dict[str, Blocks]:
    """The tables by their titles; those left out that would have nothing to compare."""
    networks = [Network(row.label, "teacher", row.parameters, row.mean) for row in found.teachers]
    sizes = {row.student: row.parameters for row in found.rows}
    alone = {row.student: row.mean for row in found.rows if row.method == "student"}
    networks += [Network(name, "student", size, alone.get(name)) for name, size in sizes.items()]
    named = config.loss.mapping == "best_high" and config.loss.hint_weight != 0  # what the names of by_mapping say
    found_tables: dict[str, Blocks] = {
        "Accuracy": tables.comparison(found.main, found.teachers),
        "Paired tests": significance.paired_tests(*ours_and_others(found.main)) if found.main and found.paired else [],
        "Networks": tables.networks(networks, config.compare.split),
        "Number of teachers": tables.by_teachers([*by_number(config, found), *okd_means(config, found)]),
        "Students": tables.by_student([row for row in found.rows if row.teachers in (most(config), None)]),
        "Mapping of teachers to layer groups": tables.by_mapping(found.main) if named else [],
    }
    return {title: blocks for title, blocks in found_tables.items() if blocks}


def by_number(config: Config, found: Found) -> list[Row]:
    """The rows of the configuration's student; not OKD's, whose teachers differ at the same number."""
    return [row for row in found.rows if row.student == config.student.name and not is_okd(row)]


def is_okd(row: Row) -> bool:
    return row.method.startswith(f"{OKD}-")


def okd_means(config: Config, found: Found) -> list[Row]:
    """For each number n of teachers, OKD's mean over the first n of them, seed by seed."""
    names = [f"{OKD}-{teacher.name}" for teacher in config.teachers]
    single = {row.method: row for row in found.main if is_okd(row) and row.student == config.student.name}
    rows = []
    for number in tables.unique(config.compare.teachers) or [len(names)]:
        if number and set(names[:number]) <= set(single):
            accuracies = [fmean(column) for column in zip(*(single[n].accuracies for n in names[:number]), strict=True)]
            size, student, split = single[names[0]].parameters, config.student.name, config.compare.split
            rows.append(Row(OKD, "OKD (mean)", size, accuracies, student=student, teachers=number, split=split))
    return rows


def paired_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For JSON: ours less each other method of the plain case, fractions."""
    if not rows:
        return []
    main, others = ours_and_others(rows)
    tests = {other.method: significance.paired_difference(main, other)._asdict() for other in others}
    for test in tests.values():
        del test["t"]  # it follows from the others
    return [{"method": main.method, "less": less, **test} for less, test in tests.items()]


def write_tables(config: Config, found: Found, seconds: float) -> list[Path]:
    """results.json, results.csv and results.md in the comparison's folder, each written before the next is made."""
    whole: dict[str, Any] = {
        "name": config.name,
        "finding": found.sentence,
        "rows": tables.records(found.rows, found.teachers),
        "paired_tests": paired_records(found.main),
        "epochs": config.distill.epochs,
        "seeds": config.compare.seeds,
        "seconds": seconds,
        "versions": versions(),
        "config": asdict(config),
    }
    title = f"# {escaped(config.name)}: {config.distill.epochs} epochs, seeds {', '.join(map(str, config.compare.seeds))}\n\n"
    contents = {
        "results.json": lambda: json.dumps(whole, indent=2) + "\n",
        "results.csv": lambda: tables.csv(found.rows, found.teachers),
        "results.md": lambda: f"{title}{paragraph(found.sentence)}\n\n{markdown(config, found)}",
    }
    for name, text in contents.items():
        write_atomic(config.folder / name, text().encode())
    return [config.folder / name for name in contents]


def show_digest(folder: Path, founds: Mapping[str, Found], display: Display) -> None:
    """The regimes of one file side by side: results.md and regimes.png in the folder that holds theirs."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    rows = {name.replace("_", " "): found.main for name, found in founds.items()}
    ours, _ = ours_and_others([row for own in rows.values() for row in regimes.with_best_teacher(own)])
    blocks = [*regimes.accuracy_table(rows), *regimes.gain_table(rows, ours.method)]
    write_atomic(folder / "results.md", f"# {escaped(folder.name)}\n\n{render(blocks)}".encode())
    pictures = Pictures(folder)
    pictures.draw("regimes", lambda path: regimes.chart(rows, ours.method, path))
    display.say(f"Side by side: {', '.join(map(str, [folder / 'results.md', *pictures.files]))}")
    for name, reason in pictures.failed.items():
        display.warn(f"{folder}/{name}.png is not drawn: {reason}")


class Pictures:
    """PNG files drawn into a folder. One that cannot be drawn is left out and said, for what was trained is worth more."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files, self.failed = folder, list[Path](), dict[str, str]()

    def draw(self, name: str, draw: Callable[[Path], None]) -> None:
        path = self.folder / f"{name}.png"
        try:
            path.unlink(missing_ok=True)  # one of an earlier comparison would pass for this one's
            draw(path)
        except Exception as error:
            if os.environ.get("AMTML_DEBUG"):
                raise
            reason = (str(error).splitlines() or [""])[0]
            self.failed[name] = f"{type(error).__name__}: {reason}"
        else:
            self.files.append(path)


def write_figures(
    config: Config, found: Found, jobs: Sequence[Job], teachers: Teachers | None, data: ImageData
) -> Pictures:
    """The pictures; those of single images come from the first seed of the first method that has an adapter."""
    out = Pictures(config.folder / "figures")
    histories = {label: [run.read_metrics() for run in runs] for label, runs in found.runs.items()}
    out.draw("curves", lambda path: curves.curves(histories, path))
    if len(found.main) > 1:
        out.draw("accuracies", lambda path: charts.accuracies(found.main, path))
    numbers = by_number(config, found)
    if any(len({row.teachers for row in numbers if row.method == name}) > 1 for name in {r.method for r in numbers}):
        several = [*numbers, *okd_means(config, found)]
        out.draw("number_of_teachers", lambda path: charts.number_of_teachers(several, path))
    weighted = {k: v for k, v in histories.items() if any("entropy" in epoch for run in v for epoch in run)}
    if teachers is None or not weighted:
        return out
    ours, _ = ours_and_others(found.main)
    learners = [label for label in weighted if learns_weights(found.runs[label][0])]
    learners.sort(key=lambda label: label != ours.label)
    asked = teachers.only(teachers.names[: most(config)], hints=bool(teachers.channels))
    first = sorted(weighted, key=lambda label: label not in learners)[:SHOWN]  # learned weights before others
    out.draw("entropy", lambda path: curves.entropy({label: weighted[label] for label in first}, path, asked.names))
    if not learners:
        return out
    learner = next(job for job in jobs if job.folder == found.runs[learners[0]][0].folder)

    @functools.cache
    def examples() -> tuple[Any, ...]:
        """Images on which the teachers disagree, the class names, the soft targets, the weights and the labels."""
        probs = soft_targets(teacher_logits(asked, data.val, data), learner.config.loss.temperature)
        chosen = most_disputed(probs, data.val.labels)[:GALLERY]
        weights = weights_and_logits(learner, asked, data.val, data)[0][chosen]
        images, labels = data.val.images[chosen].cpu().numpy(), data.val.labels[chosen].tolist()
        return images, list(data.classes), probs[chosen].numpy(), weights.numpy(), labels

    def one_image(path: Path) -> None:
        images, names, probs, weights, labels = examples()
        curves.soft_targets(images[0], names, probs[0], weights[0], labels[0], path, asked.names)

    def several_images(path: Path) -> None:
        images, names, probs, weights, labels = examples()
        curves.weights_gallery(images, names, probs, weights, labels, path, asked.names)

    out.draw("soft_targets", one_image)
    out.draw("weights_gallery", several_images)
    return out
