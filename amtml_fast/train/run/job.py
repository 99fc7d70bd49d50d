"""What to train: jobs made from the configuration, and what identifies them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import environment
from ..config.checks import teacher_train
from ..config.reading import changed, load
from ..config.schema import Config, ConfigError, StudentConfig, TeacherConfig, TrainConfig
from ..files import sha256
from ..methods import registry
from ..methods.base import Method
from ..methods.registry import METHODS
from ..teachers import frozen

# How the student's modules to catch are named: a group by GROUP and its own name.
FEATURES, GROUP = "features", "groups."
# Of `data`; what counts of the last two is in Job.fixed_views.
NOT_IN_RECIPE = ("root", "download", "views", "augment_seed")
# Of `data`, where they are given: the first two decide about all, the others about students.
SHARES, STUDENT_SHARES = ("share", "domains"), ("student_share", "labeled_share")
NETWORKS = "networks"  # of a recipe: the teachers' factories and arguments
LATER = ("alpha_end",)  # keys of `loss` that are younger than runs, in a recipe only where they are set


@dataclass(frozen=True)
class Job:
    """What to train, and where it goes. `features` and `groups`: the student's modules whose maps the method asks for."""

    asked: Config  # without the method's own values: what config.yaml holds
    config: Config  # with them
    folder: Path
    title: str
    method: Method
    seed: int
    factory: str
    args: dict[str, Any]
    weights: str | None
    train: TrainConfig
    features: str | None = None
    groups: dict[str, str] = field(default_factory=dict)
    teachers: tuple[str, ...] = ()  # those it may learn from; of these the method takes all, the best one or none
    teacher: TeacherConfig | None = None  # what this trains, where it is a teacher
    student: str = ""  # the student's name; empty for a teacher
    file: str = "student.safetensors"

    @property
    def paths(self) -> dict[str, str]:
        """The student's modules to catch, by names that the settings have too."""
        last = {} if self.features is None else {FEATURES: self.features}
        return last | {f"{GROUP}{name}": path for name, path in self.groups.items()}

    def fixed_views(self) -> dict[str, int]:
        """The Loader's `views` and `augment_seed`; empty for teachers, which train on fresh augmentation."""
        config = self.config
        if config.data.views is None or not self.student:
            return {}
        return {"views": config.data.views, "augment_seed": config.augment_seed}

    def recipe(self) -> dict[str, Any]:
        """Everything that decides the result: a folder made by another recipe is neither skipped nor resumed."""
        config, method = self.config, self.method
        engine = asdict(config.engine)
        recipe: dict[str, Any] = {
            "data": self.data_recipe(),
            "split_seed": config.seed,
            "classes": self.teacher.classes if self.teacher else None,
            "model": {"factory": self.factory, "args": self.args},
            "start": sha256(Path(self.weights)) if self.weights else None,
            "train": asdict(self.train),
            "loss": {k: v for k, v in method.loss(config).items() if k not in LATER or v is not None},
            "engine": {k: engine[k] for k in ("mixed_precision", "gradient_accumulation_steps")},
            "method": method.base or method.name,
            "seed": self.seed,
            "features": self.features,
            "groups": list(self.groups.items()),  # their order decides who guides which
        }
        if method.needs_teachers:
            recipe["teachers"] = frozen.fingerprint(of_teachers(config, self.teachers))
            recipe["order"] = list(self.teachers)
            recipe[NETWORKS] = networks(config, self.teachers)
            # From the disk and live a student is taught the same; only what is rounded is told apart.
            kept = {"logits": config.cache.logits}
            kept |= {"hints": config.cache.hints} if method.hints(config.loss) else {}
            if rounded := {key: kind for key, kind in kept.items() if kind not in ("float32", "never")}:
                recipe["cache"] = rounded
            if method.hints(config.loss):
                recipe["hints"] = {t.name: t.hint for t in config.teachers if t.name in self.teachers}
            if "adapter" in method.reads:
                recipe["stages"] = asdict(config.stages)
        if (teacher := self.teacher) is not None and (teacher.domain is not None or teacher.shuffled_labels):
            recipe |= {"domain": teacher.domain, "shuffled_labels": teacher.shuffled_labels}
        if precision := environment.precision():
            recipe["environment"] = precision
        if method.peers:
            recipe["peers"] = len(self.teachers)
        return json.loads(json.dumps(recipe))  # as it comes back from run.json

    def data_recipe(self) -> dict[str, Any]:
        data, shares = asdict(self.config.data), (*SHARES, *STUDENT_SHARES)
        asked = shares if self.student else SHARES
        kept = {k: v for k, v in data.items() if k not in (*NOT_IN_RECIPE, *shares)}
        return kept | {k: data[k] for k in asked if data[k] not in (None, [])} | self.fixed_views()


def networks(config: Config, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What these teachers' weights are weights of."""
    models = {teacher.name: teacher.model for teacher in config.teachers}
    found = {name: {"factory": models[name].factory, "args": models[name].args} for name in names}
    return json.loads(json.dumps(found))  # as a file has it


def with_networks(there: dict[str, Any], here: dict[str, Any], asked: Path) -> dict[str, Any]:
    """The recipe of a run. One of an earlier version gets its teachers' networks from the run's own config.yaml (`asked`); without
    that file they count as those of the recipe here."""
    if NETWORKS in there or NETWORKS not in here:
        return there
    try:
        found = networks(load(asked), here[NETWORKS])
    except (ConfigError, KeyError):
        found = here[NETWORKS]
    return there | {NETWORKS: found}


def teacher_job(config: Config, teacher: TeacherConfig) -> Job:
    """Training one teacher with cross-entropy. Each has its own seed, so that equal architectures differ too."""
    model = teacher.model
    return Job(
        asked=config,
        config=config,
        folder=config.teacher_folder(teacher.name),
        title=f"teacher {teacher.name}",
        method=METHODS["student"],
        seed=config.seed + config.teachers.index(teacher),
        factory=model.factory,
        args=model.args,
        weights=None,
        train=teacher_train(config, teacher),
        teacher=teacher,
        file="model.safetensors",
    )


def student_job(
    config: Config, method: str, seed: int, *, student: StudentConfig | None = None, teachers: int | None = None
) -> Job:
    """Training a student by a method, from the first `teachers` teachers (None: all of them)."""
    student = student or config.student
    chosen = one_method(config, method)
    return job_of(config, applied(config, chosen, student), chosen, seed, student, teachers)


def one_job(config: Config, method: str, seed: int, student: str | None = None, teachers: int | None = None) -> Job:
    """The job that these names mean."""
    students = {each.name: each for each in (config.student, *config.compare.students)}
    if student is not None and student not in students:
        raise ConfigError(f"--student must be one of {', '.join(students)}, got {student!r}")
    if teachers is not None and not 1 <= teachers <= len(config.teachers):
        raise ConfigError(f"--teachers must be in 1 to {len(config.teachers)}, got {teachers}")
    return student_job(config, method, seed, student=students.get(student or config.student.name), teachers=teachers)


def one_method(config: Config, name: str) -> Method:
    found = registry.chosen(config, [name])
    if len(found) != 1:
        names = ", ".join(method.name for method in found) or "none, for there are no teachers"
        raise ConfigError(f"config: method must name one method, got {name!r}, which stands for {names}")
    return found[0]


def job_of(
    asked: Config, config: Config, chosen: Method, seed: int, student: StudentConfig, teachers: int | None
) -> Job:
    """Training a student by a method. asked: the configuration as it is written; config: `applied`, with the method's values."""
    names = [teacher.name for teacher in config.teachers[:teachers]] if chosen.teacher is None else [chosen.teacher]
    parts = name_parts(config, chosen, student.name, teachers)
    features, groups = asked_maps(student, chosen, config)
    config = with_mapping(config, chosen, student, names)
    return Job(
        asked=asked,
        config=config,
        folder=config.folder / run_name(parts, seed),
        title=", ".join([chosen.label, *parts[1:], f"seed {seed}"]),
        method=chosen,
        seed=seed,
        factory=student.factory,
        args=student.args,
        weights=student.weights,
        train=config.distill,
        features=features,
        groups=groups,
        teachers=tuple(names),
        student=student.name,
    )


def name_parts(config: Config, method: Method, student: str, teachers: int | None) -> list[str]:
    """The method, and what differs from the plain case: in a folder's name, so that a comparison can grow and keep what it has."""
    parts = [method.name]
    parts += [student] if student != config.student.name else []
    if method.teacher is None and (method.needs_teachers or method.peers):
        number = len(config.teachers[:teachers])
        parts += [f"{number}teachers"] if number < len(config.teachers) else []
    return parts


def run_name(parts: Sequence[str], seed: int) -> str:
    return "-".join([*parts, f"seed{seed}"])


def teacher_count(record: Mapping[str, Any]) -> int | None:
    """How many teachers, or peers in their place, the run of this record learned from; None: from none."""
    recipe = record["recipe"]
    return len(recipe["teachers"]) if recipe.get("teachers") else recipe.get("peers") or None


def applied(config: Config, method: Method, student: StudentConfig) -> Config:
    """The configuration with the method's own values for this student in it."""
    return changed(config, method.settings(replace(config, student=student)), f"the method {method.name}")


def asked_maps(student: StudentConfig, method: Method, config: Config) -> tuple[str | None, dict[str, str]]:
    """The paths of the student's last map and of its layer groups, as far as the method asks for them. ConfigError for
    what the student does not offer."""
    if method.features and student.features is None:
        raise ConfigError(
            f"config: {student.name}.features must be the path of the last convolutional map for {method.name}, got null"
        )
    groups = dict(student.groups) if method.groups(config.loss) else {}
    if method.groups(config.loss) and not groups:
        raise ConfigError(
            f"config: {student.name}.groups must be layer groups for {method.name}'s hints (or loss.hint_weight=0), got none"
        )
    return student.features if method.features else None, groups


def with_mapping(config: Config, method: Method, student: StudentConfig, teachers: Sequence[str]) -> Config:
    """The configuration with the part of an explicit hint mapping that is about these teachers; its mistakes are found
    before anything is trained."""
    if method.hints(config.loss):
        for teacher in config.teachers:
            if teacher.name in teachers and teacher.hint is None:
                raise ConfigError(
                    f"config: teachers.{teacher.name}.hint must be the dotted path of the module whose output is the hint "
                    f"for {method.name}, got null; or set loss.hint_weight=0"
                )
    if not method.groups(config.loss):
        return config
    mapping, groups = config.loss.mapping, list(student.groups)
    if not isinstance(mapping, Mapping):
        if len(groups) < len(teachers):
            raise ConfigError(
                f"config: {student.name}.groups must be at least {len(teachers)} for {len(teachers)} teachers, got "
                f"{', '.join(groups)}; an explicit loss.mapping may share groups"
            )
        return config
    everyone = [teacher.name for teacher in config.teachers]
    kept: dict[str, str] = {}
    for key, group in mapping.items():
        name = str(key) if str(key) in everyone else None
        name = everyone[int(key)] if name is None and str(key).isdigit() and int(key) < len(everyone) else name
        if name is None:
            raise ConfigError(f"config: loss.mapping must name teachers ({', '.join(everyone)}), got {key!r}")
        if group not in groups:
            raise ConfigError(
                f"config: loss.mapping must name a layer group of {student.name} ({', '.join(groups)}), got {group!r}"
            )
        if name in teachers:
            kept[name] = group
    if not kept:
        raise ConfigError(f"config: loss.mapping must name at least one of {', '.join(teachers)}, got {dict(mapping)}")
    return replace(config, loss=replace(config.loss, mapping=kept))


def of_teachers(config: Config, names: Sequence[str]) -> Config:
    """The configuration as if it had these of its teachers alone."""
    return replace(config, teachers=[teacher for teacher in config.teachers if teacher.name in names])


def need_hints(jobs: Sequence[Job]) -> bool:
    return any(job.method.hints(job.config.loss) for job in jobs)
