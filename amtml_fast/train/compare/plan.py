"""The runs of a comparison, and whether it can be made."""

from __future__ import annotations

from pathlib import Path

from ..config.checks import check_names
from ..config.reading import changed
from ..config.schema import Config, ConfigError
from ..methods import registry
from ..run.job import Job, applied, job_of


def checked(config: Config) -> Config:
    """The configuration itself. ConfigError for methods, variants or a comparison that cannot be made of it."""
    asked = config.compare
    compared = registry.chosen(config, asked.methods)
    for method in registry.chosen(config, dict.fromkeys([*asked.methods, *config.variants])):
        epochs = changed(config, method.settings(config), f"the method {method.name}").distill.epochs
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
                    job = job_of(settings[student.name, method.name], method, seed, student, number)
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
