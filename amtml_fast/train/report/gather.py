"""What is on disk about some runs, read as it is: nothing is trained, and no configuration has to equal today's."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..compare import results
from ..compare.plan import checked, plan
from ..compare.results import Found, Group
from ..config.reading import load, packaged, parse
from ..config.schema import TEACHERS, Config, ConfigError
from ..figures.tables import Row
from ..files import RunError, differences, read_json
from ..methods.registry import OKD, known
from ..run.folder import Run, some
from ..run.job import Job, one_job, teacher_count, with_networks

WHERE = ("out", "name", "teachers_folder")  # keys of a configuration that say where a run is, not what


@dataclass
class Gathered:
    """Runs of one comparison, or single ones. `groups` are all of them, `complete` what tables can be made of."""

    name: str
    config: Config
    comparison: bool
    groups: list[Group]
    complete: list[Group] = field(default_factory=list)
    found: Found | None = None  # None: no run has finished
    unfinished: list[Run] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # runs in the comparison's folder that are not part of it
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    def shown(self) -> dict[str, list[Run]]:
        """The runs of the curves by a name of their own: of the plain case if there is one, unfinished ones too."""
        plain = [group for group in self.groups if results.is_plain(self.config, group)]
        groups = plain if self.comparison and plain else self.groups
        several = {group.label for group in groups if [each.label for each in groups].count(group.label) > 1}
        names: dict[str, list[Run]] = {}
        for group in groups:
            parts = [group.label]
            if group.label in several:
                parts += [group.student] if group.student else []
                parts += [f"{group.teachers} teachers"] if group.teachers else []
            names[", ".join(parts)] = group.runs
        return names


def gather(sources: Sequence[Path]) -> Gathered:
    """A comparison's folder, or run folders. RunError for a folder that is neither."""
    for source in sources:
        if not Run(source).exists() and (
            len(sources) > 1 or not (runs_in(source) or (source / "results.json").is_file())
        ):
            several = " (several at once must each be a run)" if len(sources) > 1 else ""
            raise RunError(
                f"report: {source}: no run here; looked for run.json, as a run has it, "
                f"and for folders with one, as a comparison has them{several}"
            )
    if len(sources) == 1 and not Run(sources[0]).exists():
        return comparison(sources[0])
    runs = [Run(source.resolve()) for source in dict.fromkeys(sources)]
    config = config_of(runs[0])
    groups = grouped(runs, config)
    places = told_apart({group.runs[0].folder.parent for group in groups})
    if len(places) > 1:
        groups = [replace(group, label=f"{group.label} ({places[group.runs[0].folder.parent]})") for group in groups]
    name = runs[0].folder.name if len(runs) == 1 else " and ".join(sorted(places.values()))
    return completed(Gathered(name, config, False, groups), ended=False)


def told_apart(folders: Collection[Path]) -> dict[Path, str]:
    """Each folder's name, with as many of those above it as tell them apart: a label stands for one comparison."""
    names, parts = dict[Path, str](), 0
    while len({*names.values()}) < len(folders):
        parts += 1
        names = {folder: "/".join(folder.parts[-parts:]) for folder in folders}
    return names


def comparison(folder: Path) -> Gathered:
    """The runs that results.json says belong to the comparison; until it is there, those that are planned."""
    folder = folder.resolve()
    file = folder / "results.json"
    ended = file.is_file()
    runs, notes = runs_in(folder), list[str]()
    if ended:
        config = checked(parse(read_json(file)["config"], str(file)))
        config = rebased(replace(config, out=str(folder.parent), name=folder.name), folder)
    else:
        config = config_of(runs[0])
    planned = runs
    try:
        planned = [Run(job.folder) for job in plan(config)]
    except ConfigError as error:
        notes.append(f"No comparison is planned here ({error}); every run in the folder is shown.")
    there = [run for run in planned if run.exists()]
    others = [run.folder.name for run in runs if run.folder not in {run.folder for run in planned}]
    if not there:
        there, others = runs, []
    waiting = [run.folder.name for run in planned if not run.exists()]
    if waiting:
        notes.append(f"Planned, but not there: {', '.join(waiting)}.")
    return completed(Gathered(folder.name, config, True, grouped(there, config), others=others, notes=notes), ended)


def runs_in(folder: Path) -> list[Run]:
    return [Run(path.parent.resolve()) for path in sorted(folder.glob("*/run.json"))]


def config_of(run: Run) -> Config:
    """config.yaml with the place where the run is now. ConfigError where there is none."""
    if not run.config.is_file():
        raise ConfigError(f"config: there is no {run.config.name} in {run.folder.name}")
    config = checked(load(run.config))
    base = run.folder.parent if run.read_record()["student"] else run.folder.parent.parent
    if not run.read_record()["student"] or (base / TEACHERS).is_dir() or not config.folder.is_dir():
        config = replace(config, out=str(base.parent), name=base.name)
    return rebased(config, base)


def rebased(config: Config, base: Path) -> Config:
    """The same with the shared teachers where they are now: beside the comparison."""
    shared = base.parent / TEACHERS
    moved = config.teachers_folder is not None and not Path(config.teachers_folder).is_dir() and shared.is_dir()
    return replace(config, teachers_folder=str(shared)) if moved else config


def job_of_run(run: Run) -> Job:
    """What the run trained. ConfigError where its configuration cannot be read."""
    record = run.read_record()
    number = None if record["method"].startswith(f"{OKD}-") else teacher_count(record)
    job = one_job(config_of(run), record["method"], record["seed"], record["student"], number)
    return replace(job, folder=run.folder)


def grouped(runs: Sequence[Run], config: Config) -> list[Group]:
    """The runs by comparison, student, number of teachers and method, each group in the order of its seeds."""
    single = {name for name, method in known(config).items() if method.teacher is not None}
    groups: dict[tuple[Any, ...], Group] = {}
    for run in sorted(runs, key=seed):
        record = run.read_record()
        method, student, number = record["method"], record["student"], teacher_count(record)
        label = record["label"] if student else f"teacher {run.folder.name}"
        alone = method in single or method.startswith(f"{OKD}-")
        key = (run.folder.parent, student, number, method if student else label)
        groups.setdefault(key, Group(method, label, student, number, alone, [])).runs.append(run)
    for group in groups.values():
        for one, other in pairwise(group.runs):
            if seed(one) == seed(other):
                names = f"{one.folder.name} and {other.folder.name}"
                raise RunError(
                    f"report: {one.folder.parent}: {names} are runs of {group.label} with the same seed, {seed(one)}, which counts "
                    "once; name one of them"
                )
    first = {run.folder: i for i, run in enumerate(runs)}  # methods in the order in which they were given
    return sorted(groups.values(), key=lambda group: min(first[run.folder] for run in group.runs))


def completed(gathered: Gathered, ended: bool) -> Gathered:
    """Adds what tables can be made of. A comparison that has ended leaves out what did not finish on every seed; of one
    under way, and of single runs, the seeds count that all have finished, or else each its own, without paired tests."""
    groups = gathered.groups
    gathered.notes += mixed(groups)
    lost = {run.folder.name: run.lost_epochs() for run in gathered.runs}
    gathered.notes += [
        f"{name}/metrics.jsonl has no row that can be read of epoch {some(epochs)}: curves and times are of the others."
        for name, epochs in lost.items()
        if epochs
    ]
    gathered.unfinished = [run for run in gathered.runs if not run.finished()]
    done = [replace(group, runs=[run for run in group.runs if run.finished()]) for group in groups]
    if ended:
        complete = [group for group, whole in zip(done, groups, strict=True) if len(group.runs) == len(whole.runs)]
    else:
        common = set.intersection(*(seeds(group) for group in done)) if done else set()
        complete = [replace(g, runs=[r for r in g.runs if seed(r) in common]) for g in done] if common else done
        left_out = sorted({seed(run) for group in done for run in group.runs} - common)
        if common and left_out:
            gathered.notes.append(
                f"Tables are over the seeds that all methods have finished; seed {', '.join(map(str, left_out))} is left out."
            )
    gathered.complete = [group for group in complete if group.runs]
    paired = len({frozenset(seeds(group)) for group in gathered.complete}) <= 1
    if gathered.complete:
        rows = teacher_rows(gathered.config) if gathered.comparison else []
        found = results.summary(gathered.config, gathered.complete, rows, paired=paired)
        # Single runs are all there is to compare: none of them is aside from a plain case.
        gathered.found = found if gathered.comparison else replace(found, main=found.rows)
    return gathered


def mixed(groups: Sequence[Group]) -> list[str]:
    """A note for each group whose runs differ in more than their seed: `distill` puts runs of other settings into one folder."""
    notes = []
    for group in groups:
        keys = dict.fromkeys(key for run in group.runs[1:] for key in other_than_seed(group.runs[0], run))
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            notes.append(
                f"The runs of {group.label} are not alike ({', '.join([*keys][:3])}{more}): their mean and spread are not those of "
                "seeds alone."
            )
    return notes


def other_than_seed(one: Run, other: Run) -> list[str]:
    """What differs between two runs of a method: keys of their recipes, and their data."""
    records = one.read_record(), other.read_record()
    first, second = (record["recipe"] for record in records)
    there, here = with_networks(first, second, one.config), with_networks(second, first, other.config)
    found = [key for key, _, _ in differences(there, here) if key != "seed"]
    data = {record["data"] for record in records if "data" in record}  # runs of earlier versions do not say
    return found + (["the images"] if len(data) > 1 else [])


def seed(run: Run) -> int:
    return int(run.read_record()["seed"])


def seeds(group: Group) -> set[int]:
    return {seed(run) for run in group.runs}


def teacher_rows(config: Config) -> list[Row]:
    """The teachers' lines: from results.json, which also has those that brought their weights, or else from their runs."""
    file = config.folder / "results.json"
    if file.is_file():
        names = {one.name for one in fields(Row)}
        records = [record for record in read_json(file).get("rows", []) if record.get("role") == "teacher"]
        return [Row(**{key: value for key, value in record.items() if key in names}) for record in records]
    runs = {teacher.name: Run(config.teacher_folder(teacher.name)) for teacher in config.teachers}
    return [results.row(name, name, [run], config.compare.split) for name, run in runs.items() if run.finished()]


def shown_config(config: Config) -> str:
    """The configuration as YAML, without the place on the machine that ran it."""
    return OmegaConf.to_yaml(
        OmegaConf.create({k: v for k, v in asdict(config).items() if k not in ("out", "teachers_folder")})
    )


def command(gathered: Gathered) -> tuple[str, bool]:
    """What to type to get it again, and whether it needs the configuration saved as a file first."""
    config = gathered.config
    words = overrides_of(config)
    source = words or [f"{config.name}.yaml"]
    if gathered.comparison:
        return shlex.join(["amtml-fast", "compare", *source]), not words
    record = gathered.runs[0].read_record()
    if not record["student"]:
        return shlex.join(["amtml-fast", "teach", *source]), not words
    options = ["--method", record["method"], "--seed", str(record["seed"])]
    options += ["--student", record["student"]] if record["student"] != config.student.name else []
    number = teacher_count(record)
    if number and number < len(config.teachers) and not gathered.groups[0].single:
        options += ["--teachers", str(number)]
    return shlex.join(["amtml-fast", "distill", *source, *options]), not words


def overrides_of(config: Config) -> list[str]:
    """A packaged configuration's name and the overrides that make it this one; [] where six do not."""
    regime = config.teachers_folder is not None  # of a file of several: folder x/few is x:few
    name = f"{Path(config.out).name}:{config.name}" if regime else config.name
    try:
        plain = load(name)
    except ConfigError:
        return []
    if name.partition(":")[0] not in packaged():
        return []

    def what(one: Config) -> dict[str, Any]:
        return {key: value for key, value in asdict(one).items() if key not in WHERE}

    changes = differences(what(plain), what(config))
    words = [f"{key}={here if isinstance(here, str) else json.dumps(here)}" for key, _, here in changes]
    if len(changes) > 6:
        return []
    try:
        return [name, *words] if what(load(name, words)) == what(config) else []
    except ConfigError:
        return []
