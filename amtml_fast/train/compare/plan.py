"""The runs of a comparison, and whether it can be made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.checks import check_names
from ..config.schema import Config, ConfigError
from ..files import differences
from ..methods import registry
from ..run.job import Job, applied, job_of, teacher_job


def checked(config: Config) -> Config:
    """The configuration itself. ConfigError for methods, variants or a comparison that cannot be made of it."""
    asked = config.compare
    compared = registry.chosen(config, asked.methods)
    for method in registry.chosen(config, dict.fromkeys([*asked.methods, *config.variants])):
        epochs = applied(config, method, config.student).distill.epochs
        if method in compared and epochs != config.distill.epochs:
            raise ConfigError(
                f"config: {method.name} must train the same {config.distill.epochs} epochs as all, got {epochs}"
            )
    check_names("variants", list(config.variants))
    for count in asked.teachers:
        if not 1 <= count <= len(config.teachers):
            raise ConfigError(
                f"config: compare.teachers must be in 1 to {len(config.teachers)} (the teachers), got {count}"
            )
    check_names("compare.students.name", [config.student.name, *(student.name for student in asked.students)])
    return config


def check_shared(configs: Sequence[Config]) -> None:
    """ConfigError where two comparisons have different teachers in one folder."""
    seen: dict[Path, tuple[Config, dict[str, Any]]] = {}
    for config in configs:
        for teacher in config.teachers:
            if teacher.model.brings_weights:
                continue
            job = teacher_job(config, teacher)
            other, recipe = seen.setdefault(job.folder, (config, job.recipe()))
            if different := differences(recipe, job.recipe()):
                key, there, here = different[0]
                place = ", which is the teacher's place in the list" if key == "seed" else ""
                raise ConfigError(
                    f"config: {other.name} and {config.name} must have the same teacher {teacher.name} in {job.folder}, got "
                    f"{key} {there!r} and {here!r}{place}: rename one"
                )


def plan(config: Config) -> list[Job]:
    """Every student to train, each once: those of one seed before those of the next."""
    asked = config.compare
    if not asked.methods or not asked.seeds:
        raise ConfigError(
            f"config: compare must have at least one method and one seed, got {asked.methods} and {asked.seeds}"
        )
    chosen = registry.chosen(config, asked.methods)
    numbers = asked.teachers or [len(config.teachers)]
    students = (config.student, *asked.students)
    settings = {(s.name, m.name): applied(config, m, s) for s in students for m in chosen}
    jobs: dict[Path, Job] = {}
    for seed in asked.seeds:
        for student in students:
            for number in numbers:
                for method in chosen:
                    job = job_of(config, settings[student.name, method.name], method, seed, student, number)
                    other = jobs.setdefault(job.folder, job)
                    if (other.method.name, other.student) != (method.name, student.name):
                        raise ConfigError(
                            f"config: {method.name} for {student.name} and {other.method.name} for {other.student} "
                            f"must have folders of their own, got {job.folder} for both: rename one"
                        )
    labels = [method.label for method in chosen]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"config: variants must have labels of their own, got {label!r} twice")
    return list(jobs.values())
