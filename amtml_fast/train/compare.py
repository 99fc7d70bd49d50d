"""Methods x students x numbers of teachers x seeds at equal epochs: trains what is missing, then says what came out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import data as datasets
from . import methods as registry
from . import preflight, results, workers
from . import teachers as frozen
from .config import Config, ConfigError
from .features import FeatureExtractor
from .jobs import Job, applied, job_of, student_job, teacher_job
from .lock import alone
from .loop import finished, make_accelerator, of_classes, train
from .models import build
from .progress import Display
from .run import Diverged, Run, read_json
from .stop import Stop
from .timing import shares
from .zoo import brings_weights

TEACH, DISTILL = "teach", "distill"


def load_data(config: Config) -> datasets.ImageData:
    """The configured data set on the device that training uses."""
    accelerator, data = make_accelerator(config.engine, config.folder), config.data
    try:
        with accelerator.main_process_first():  # of several processes one downloads
            loaded = datasets.load(
                data.name, data.root, val_fraction=data.val_fraction, seed=config.seed, download=data.download
            )
    except OSError as error:
        if error.errno is None:  # a reader's own words
            raise
        reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        raise ConfigError(
            f"config: data.root must be a folder whose files can be read, got {data.root} ({reason})"
        ) from error
    return loaded.to(accelerator.device)


def plan(config: Config) -> list[Job]:
    """Every student to train, each once: those of one seed before those of the next."""
    asked = config.compare
    if not asked.methods or not asked.seeds:
        raise ConfigError(
            f"config: compare: at least one method and one seed wanted, got {asked.methods} and {asked.seeds}"
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
                            f"would share the folder {job.folder}; another name for one of them wanted"
                        )
    labels = [method.label for method in chosen]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"config: variants: labels of their own wanted, got {label!r} twice")
    return list(jobs.values())


class Session:
    """The jobs of a configuration, and what is loaded once for all of them: the data and the teachers."""

    def __init__(self, config: Config, display: Display, *, fresh: bool = False) -> None:
        self.config, self.display, self.fresh = config, display, fresh
        self.jobs = {
            TEACH: [teacher_job(config, teacher) for teacher in config.teachers if not brings_weights(teacher.model)],
            DISTILL: plan(config),
        }

    @cached_property
    def data(self) -> datasets.ImageData:
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
            say_result(job, train(job, self.data, teachers, self.display, fresh=self.fresh), self.display)
        except Diverged as error:
            if phase == TEACH:
                raise
            self.display.warn(f"{error} The comparison goes on without {job.method.label}.")

    def check(self) -> None:
        """What does not fit is found before hours of training."""
        preflight.places(self.config)
        check(self.config, self.data, [*self.jobs[TEACH], *self.jobs[DISTILL]])

    def waiting(self, phase: str) -> list[workers.Task]:
        """What is not finished yet. RunError, before anything is trained, for a folder that holds something else."""
        jobs = enumerate(self.jobs[phase])
        return [workers.Task(phase, i, job.title) for i, job in jobs if self.fresh or not finished(job)]

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
                workers.run(self.config, tasks, self.display, fresh=self.fresh, done=done)
            else:
                for task in tasks:
                    self.train(phase, task.position)
                    done(task)


def check(config: Config, data: datasets.ImageData, jobs: Sequence[Job]) -> None:
    """Makes each kind of network that these jobs train or learn from once, and shows it two images."""
    seen = set()
    for job in jobs:
        preflight.batches(job, of_classes(data, job.classes))
        kind = (job.factory, str(job.args), job.weights, str(job.paths), job.method.name)
        if kind not in seen:
            seen.add(kind)
            model = build(
                job.factory,
                job.args,
                num_classes=data.num_classes,
                in_channels=data.in_channels,
                weights=job.weights,
            )
            preflight.student_maps(FeatureExtractor(model, job.paths), job, data)
    if any(job.method.needs_teachers for job in jobs):
        frozen.check(config, data, hints=need_hints(jobs))


def say_result(job: Job, run: Run, display: Display) -> None:
    result = read_json(run.result)
    validation = "" if job.student else f"validation {100 * result['val_accuracy']:.2f} %, "
    time = shares(run.read_record().get("step_seconds", {}))
    display.say(f"{job.title}: {validation}test {100 * result['test_accuracy']:.2f} %; {time}")


def teach(
    config: Config, data: datasets.ImageData, display: Display, *, resume: bool = True, fresh: bool = False
) -> list[Run]:
    """Trains every teacher that brings no weights of its own; finished ones are skipped."""
    preflight.places(config)
    trained = [teacher for teacher in config.teachers if not brings_weights(teacher.model)]
    jobs = [teacher_job(config, teacher) for teacher in trained]
    check(config, data, jobs)
    for teacher in config.teachers:
        if teacher not in trained:
            display.say(f"teacher {teacher.name}: brings its weights")
    runs = []
    for job in jobs:
        runs.append(train(job, data, None, display, resume=resume, fresh=fresh))
        say_result(job, runs[-1], display)
    return runs


def load_teachers(
    config: Config, data: datasets.ImageData, jobs: Sequence[Job], display: Display
) -> frozen.Teachers | None:
    """The teachers that these jobs need, with their outputs cached where that is right; None if none need any."""
    jobs = [job for job in jobs if job.method.needs_teachers]
    if not jobs:
        return None
    accelerator = make_accelerator(config.engine, config.folder)
    with accelerator.main_process_first():  # of several processes one downloads
        teachers = frozen.load(config, data, hints=need_hints(jobs), channels_last=config.engine.channels_last)
    if config.cache.hints != "never" or not all(job.method.hints(job.config.loss) for job in jobs):
        with Stop(accelerator.num_processes) as stop:
            frozen.use_cache(config, teachers, data, display, stop.check)
            stop.check()
    return teachers


def need_hints(jobs: Sequence[Job]) -> bool:
    return any(job.method.hints(job.config.loss) for job in jobs)


def distill(
    config: Config,
    data: datasets.ImageData,
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
    preflight.places(config)
    job = one_job(config, method, seed, student, teachers)
    return train(job, data, load_teachers(config, data, [job], display), display, resume=resume, fresh=fresh)


def one_job(config: Config, method: str, seed: int, student: str | None = None, teachers: int | None = None) -> Job:
    """The job that these names mean."""
    students = {each.name: each for each in (config.student, *config.compare.students)}
    if student is not None and student not in students:
        raise ConfigError(f"--student: one of {', '.join(students)} wanted, got {student!r}")
    if teachers is not None and not 1 <= teachers <= len(config.teachers):
        raise ConfigError(f"--teachers: 1 to {len(config.teachers)} wanted, got {teachers}")
    return student_job(config, method, seed, student=students.get(student or config.student.name), teachers=teachers)


@dataclass(frozen=True)
class Outcome:
    """What `compare` found, the files it wrote, and the pictures that could not be drawn, each with its reason."""

    found: results.Found
    files: list[Path]
    seconds: float
    failed: dict[str, str]


def compare(config: Config, display: Display, *, fresh: bool = False) -> Outcome:
    """Trains the teachers and every student that is not finished yet, and writes tables and pictures. RunError where
    another comparison is at work in the same folder."""
    began = time.perf_counter()
    session = Session(config, display, fresh=fresh)
    session.check()
    accelerator = make_accelerator(config.engine, config.folder)
    with alone(config.folder, accelerator, display):
        for phase in (TEACH, DISTILL):
            try:
                session.run(phase)
            except KeyboardInterrupt as stop:
                jobs = session.jobs[phase]
                done = sum(Run(job.folder).finished() for job in jobs)
                what = "teachers" if phase == TEACH else "students"
                raise KeyboardInterrupt(str(stop) or f"stopped; {done} of {len(jobs)} {what} are finished") from None
        jobs, data = session.jobs[DISTILL], session.data
        teachers = frozen.load(config, data, hints=need_hints(jobs)) if config.teachers else None
        found = results.collect(config, jobs, teachers, data)
        files, failed = list[Path](), dict[str, str]()
        if accelerator.is_main_process:
            files += results.write_tables(config, found, time.perf_counter() - began)
            pictures = results.write_figures(config, found, jobs, teachers, data)
            files, failed = [*files, *pictures.files], pictures.failed
        return Outcome(found, files, time.perf_counter() - began, failed)


def evaluate(
    config: Config, data: datasets.ImageData, folder: Path, split: str, teacher: str | None = None
) -> tuple[Path | str, float]:
    """(weights file, accuracy on a split) of the run in `folder`, from its weights and its recipe's model alone; of a teacher
    that brings its weights, from those."""
    given = next((one for one in config.teachers if one.name == teacher and brings_weights(one.model)), None)
    if given is not None:
        net = frozen.extractor(config, given, data, hints=False).to(data.train.images.device)
        return given.model.weights or given.model.factory, frozen.accuracy(net, getattr(data, split), data)
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
