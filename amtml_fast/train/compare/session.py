"""Methods x students x numbers of teachers x seeds at equal epochs: trains what is missing, then says what came out."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

from ..config.schema import Config
from ..data.images import ImageData
from ..progress import Display
from ..run import preflight
from ..run.folder import Diverged, alone
from ..run.job import need_hints, teacher_job
from ..run.prepare import load_data, load_teachers, make_accelerator, say_choices, say_twins
from ..run.stop import how_many, says_when_stopped
from ..run.tasks import say_result
from ..run.trainer import finished, start_over, train
from ..teachers import frozen
from . import results, workers
from .plan import plan

TEACH, DISTILL = "teach", "distill"


class Session:
    """The jobs of a configuration, and what is loaded once for all of them: the data and the teachers."""

    def __init__(self, config: Config, display: Display) -> None:
        self.config, self.display, self.settled = config, display, False
        self.jobs = {
            TEACH: [teacher_job(config, teacher) for teacher in config.teachers if not teacher.model.brings_weights],
            DISTILL: plan(config),
        }

    @cached_property
    def data(self) -> ImageData:
        return load_data(self.config)

    @cached_property
    def teachers(self) -> frozen.Teachers | None:
        """For every job of the comparison, with their outputs cached where that is right."""
        return load_teachers(self.config, self.data, self.jobs[DISTILL], self.display)

    def train(self, phase: str, position: int) -> None:
        """One job. A student that diverges is left out of the tables; a teacher that does is an error."""
        job = self.jobs[phase][position]
        teachers = self.teachers if job.method.needs_teachers else None
        try:
            say_result(job, train(job, self.data, teachers, self.display), self.display)
        except Diverged as error:
            if phase == TEACH:
                raise
            self.display.warn(f"{error} The comparison goes on without {job.method.label}.")
        if not self.settled:  # each training collects garbage twice; modules, data and teachers stay, so it skips them
            gc.collect()
            gc.freeze()
            self.settled = True

    def check(self) -> None:
        """What does not fit is found before hours of training."""
        say_choices(self.config, self.data, self.display)
        preflight.places(self.config)
        preflight.networks(self.config, self.data, [*self.jobs[TEACH], *self.jobs[DISTILL]])

    def waiting(self, phase: str) -> list[workers.Task]:
        """What is not finished yet. RunError, before anything is trained, for a folder that holds something else."""
        jobs = enumerate(self.jobs[phase])
        return [workers.Task(phase, i, job.title) for i, job in jobs if not finished(job, self.data)]

    def run(self, phase: str) -> None:
        """Trains what is missing, side by side where the configuration or the machine has more than one place for it."""
        tasks = self.waiting(phase)
        if not tasks:
            return
        several = min(workers.count(self.config), len(tasks)) > 1
        with self.display.bar(
            f"{len(tasks)} {'teachers' if phase == TEACH else 'students'}", len(tasks), "runs"
        ) as bar:

            def done(task: workers.Task) -> None:
                bar.add(1)
                bar.flush()

            if several:
                _ = self.data  # what has to be downloaded comes once, before the workers look for it
                workers.run(Session, self.config, tasks, self.display, done=done)
            else:
                for task in tasks:
                    self.train(phase, task.position)
                    done(task)


@dataclass(frozen=True)
class Outcome:
    """What `compare` found, the files it wrote, and the pictures that could not be drawn, each with its reason."""

    found: results.Found
    files: list[Path]
    seconds: float
    failed: dict[str, str]


def compare(config: Config, display: Display, *, fresh: Sequence[Config] = ()) -> Outcome:
    """Trains the teachers and every student that is not finished yet, and writes tables and pictures. RunError where
    another comparison is at work in the same folder. fresh: comparisons whose runs are all to be started over."""
    began = time.perf_counter()
    session = Session(config, display)
    session.check()
    say_twins(config, session.jobs[DISTILL], display)
    start_over([job for each in fresh for job in chain(*Session(each, display).jobs.values())], display)
    accelerator = make_accelerator(config.engine, config.folder)
    with ExitStack() as stack:
        stack.enter_context(alone(config.folder, accelerator, display))
        stack.callback(gc.unfreeze)
        with says_when_stopped(lambda: how_many(session.jobs[TEACH], "teachers")):
            session.run(TEACH)
        jobs, data = session.jobs[DISTILL], session.data
        stack.enter_context(says_when_stopped(lambda: how_many(jobs, "students")))
        session.run(DISTILL)
        teachers = frozen.load(config, data, hints=need_hints(jobs)) if config.teachers else None
        found = results.collect(config, jobs, teachers, data)
        files, failed = list[Path](), dict[str, str]()
        if accelerator.is_main_process:
            files = results.write_tables(config, found, time.perf_counter() - began)
            pictures = results.write_figures(config, found, jobs, teachers, data)
            files, failed = files + pictures.files, pictures.failed
        return Outcome(found, files, time.perf_counter() - began, failed)
