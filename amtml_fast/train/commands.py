"""The commands that need the `train` extra: teach, distill, eval, compare, report, methods (and backends, for --help)."""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ..backend import backends_table
from ..version import __version__
from .compare.plan import check_shared, checked
from .config.fields import RANGE, SEED
from .config.reading import changed, load, load_all
from .config.schema import TEACHERS, Config, ConfigError
from .config.yaml_text import INT
from .files import RunError
from .progress import Display
from .run.folder import Run
from .run.job import name_parts, one_method, run_name, teacher_count
from .run.timing import shares

if TYPE_CHECKING:
    from .compare import session

app = typer.Typer(
    name="amtml-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Source = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="A YAML file, a run folder, or a packaged name (digits; regimes:few of several)."
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as distill.epochs=5.")
]


SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}  # as options have them, and ImageData


def integer(text: str) -> int:
    """An option's number, read as in a configuration."""
    if not INT.fullmatch(text):
        raise typer.BadParameter(f"must be an integer without leading zeros and underscores, got {text}")
    return int(text, 0)


def seed_of(text: str) -> int:
    seed, allowed = integer(text), SEED[RANGE]
    if seed not in allowed:
        raise typer.BadParameter(f"must be {allowed}, got {seed}")
    return seed


DEFAULT_METHOD = "gated_kd"
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over, whatever the folders hold.")]


@app.command()
def teach(
    config: Source,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Continue an unfinished teacher.")] = True,
    fresh: Fresh = False,
) -> None:
    """Train the teachers; finished ones are skipped."""
    with friendly() as display:
        settings = checked(load(config, overrides or []))
        say_one_process(display)
        say_elsewhere(config, settings, overrides or [], display)
        from .run import tasks
        from .run.prepare import load_data

        if not settings.teachers:
            raise ConfigError("config: teachers must hold at least one, got none")
        runs = tasks.teach(settings, load_data(settings), display, resume=resume, fresh=fresh)
        for run in runs:
            display.say(f"wrote {run.folder}/model.safetensors, metrics.jsonl and run.json")


@app.command()
def distill(
    config: Source,
    overrides: Overrides = None,
    method: Annotated[str, typer.Option(help="A name that `amtml-fast methods` lists.")] = DEFAULT_METHOD,
    seed: Annotated[
        int | None, typer.Option(parser=seed_of, metavar="INTEGER", help="The run's; the configuration's if not given.")
    ] = None,
    student: Annotated[str | None, typer.Option(help="One of compare.students, by name.")] = None,
    teachers: Annotated[
        int | None, typer.Option(parser=integer, metavar="INTEGER", help="Only the first so many teachers.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    fresh: Fresh = False,
) -> None:
    """Train one student from the trained teachers."""
    with friendly("--resume") as display:
        settings = checked(load(config, overrides or []))
        say_one_process(display)
        say_elsewhere(config, settings, overrides or [], display)
        from .run import tasks
        from .run.prepare import load_data

        seed = settings.seed if seed is None else seed
        run = tasks.distill(
            settings,
            load_data(settings),
            method,
            seed,
            display,
            student=student,
            teachers=teachers,
            resume=resume,
            fresh=fresh,
        )
        show_result(run, display)
        display.say(f"wrote {run.folder}/student.safetensors (a plain state dict), metrics.jsonl and run.json")


@app.command("eval")
def evaluate(
    config: Source,
    overrides: Overrides = None,
    method: Annotated[
        str | None, typer.Option(help=f"Which method's student; the run's, or {DEFAULT_METHOD}, if not given.")
    ] = None,
    seed: Annotated[int | None, typer.Option(parser=seed_of, metavar="INTEGER", help="Which seed's student.")] = None,
    teacher: Annotated[str | None, typer.Option(help="A teacher's name, to measure it instead.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
) -> None:
    """Accuracy of a trained student or teacher. CONFIG may be the run's own folder, or that of one beside it."""
    with friendly() as display:
        settings = checked(load(config, overrides or []))
        if split not in SPLITS:
            raise ConfigError(f"--split must be one of train, validation, test, got {split!r}")
        from .run import tasks
        from .run.prepare import load_data

        data = load_data(settings)
        folder = find_run(config, settings, method, seed, teacher)
        file, accuracy = tasks.evaluate(settings, data, folder, SPLITS[split], teacher)
        images = len(getattr(data, SPLITS[split]).labels)
        display.say(f"{split} accuracy {100 * accuracy:.2f} % on {images} images of {data.name} ({file})")


@app.command()
def compare(
    config: Source,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG]... [KEY=VALUE]...", help="More of them, compared one after another; overrides of all."
        ),
    ] = None,
    fresh: Fresh = False,
) -> None:
    """Train methods x students x numbers of teachers x seeds at equal epochs; tables, pictures, what came out.

    Finished runs are skipped and killed ones continued: call it again after an interruption.
    """
    with friendly() as display:
        more, overrides = [w for w in words or [] if "=" not in w], [w for w in words or [] if "=" in w]
        files = [[checked(one) for one in load_all(source, overrides)] for source in (config, *more)]
        asked = [settings for file in files for settings in file]
        folders = [settings.folder for settings in asked]
        if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
            raise ConfigError(f"config: name must differ between comparisons, got {twice} twice")
        check_shared(asked)
        say_one_process(display)
        for source, file in zip((config, *more), files, strict=True):
            say_elsewhere(source, file[0], overrides, display)
        from .compare import results, session
        from .run.stop import says_when_stopped

        for settings in asked[1:]:  # the first is checked as it begins
            session.Session(settings, display).check()
        outcomes = [session.compare(asked[0], display, fresh=asked if fresh else ())]
        with says_when_stopped(lambda: f"stopped; {len(outcomes)} of {len(asked)} comparisons are finished"):
            for settings in asked[1:]:
                outcomes.append(session.compare(settings, display))
            by_folder = dict(zip(folders, outcomes, strict=True))
            for settings, outcome in zip(asked, outcomes, strict=True):
                show_outcome(settings, outcome, display)
            for file in files:
                if len(file) > 1:
                    founds = {settings.folder.name: by_folder[settings.folder].found for settings in file}
                    results.show_digest(file[0].folder.parent, founds, display)
    if any(outcome.failed for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUNS", help="A comparison's folder, or one or several run folders.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file; if not given, report.html in the folder, or here for several.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(metavar="3,17,...", help="Test images to show, by position; if not given, chosen.")
    ] = None,
) -> None:
    """One HTML page about finished or unfinished runs: tables, curves, weights on test images, where the time goes."""
    with friendly() as display:
        from .report import page

        display.say(f"wrote {page.write(runs, out, positions(images), display)}")


@app.command()
def methods(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Also lists its teachers and variants.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """The training methods that `distill --method` and compare.methods know, and what each needs."""
    with friendly() as display:
        from .methods.registry import METHODS, known

        settings = Config() if config is None else checked(load(config, overrides or []))
        found = METHODS if config is None else known(settings)
        listing = Table("name", "method", "needs", box=None, pad_edge=False)
        for method in found.values():
            needs = method.needs(changed(settings, method.settings(settings), method.name).loss)
            listing.add_row(*map(Text, (method.name, method.label, ", ".join(needs) or "-")))
        display.console.print(listing)
        if config is None:
            display.say("okd stands for okd-<teacher> for every teacher; variants are the configuration's own.")


@app.command()
def backends() -> None:
    """Which backend each operator can run on here, and why not."""
    print(backends_table())


@app.callback()
def shared(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False) -> None:
    """Fast multi-teacher knowledge distillation."""
    if version:
        print(f"amtml-fast {__version__}")
        raise typer.Exit


def find_run(source: str, config: Config, method: str | None, seed: int | None, teacher: str | None) -> Path:
    """The folder to evaluate: the one that the options name, in the comparison of the source where that is a run's folder."""
    run = Run(Path(source))
    if run.exists():
        record = run.read_record()
        if record["student"]:
            place = run.folder.parent
        else:  # a shared teacher is beside its comparisons, not in one
            place = config.folder if config.teachers_folder else run.folder.parent.parent
    else:
        record, place = {}, config.folder
    if teacher is not None:
        names = [one.name for one in config.teachers]
        if teacher not in names or method is not None or seed is not None:
            got = repr(teacher) if teacher not in names else f"{teacher!r} beside --method or --seed"
            raise ConfigError(
                f"--teacher must be one of {', '.join(names) or '(none)'}, without another choice, got {got}"
            )
        return config.teacher_folder(teacher) if config.teachers_folder else place / TEACHERS / teacher
    if run.exists() and method is None and seed is None:
        return run.folder
    student, number = config.student.name, None
    method_there, seed_there = DEFAULT_METHOD, config.seed
    if record.get("student"):
        student, method_there, seed_there = record["student"], record["method"], record["seed"]
        if one_method(config, method_there).teacher is None:  # one teacher by name says nothing about how many
            number = teacher_count(record)
    parts = name_parts(config, one_method(config, method or method_there), student, number)
    return place / run_name(parts, seed_there if seed is None else seed)


def say_one_process(display: Display) -> None:
    """accelerate's launcher starts one process on the CPU however many it is asked for, and leaves this trace of them."""
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "LOCAL_RANK")
    asked = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    if asked and not any(size in os.environ for size in sizes):
        display.warn(
            "accelerate launch was asked for several processes and started one; for several on the CPU: "
            "torchrun --nproc-per-node N -m amtml_fast ... engine.device=cpu"
        )


def say_elsewhere(source: str, config: Config, overrides: Sequence[str], display: Display) -> None:
    """A run's own folder says where its runs go: to where it was, if it was moved, or seen from another working directory."""
    run = Run(Path(source))
    if not run.exists() or {word.partition("=")[0].strip() for word in overrides} & {"out", "name", "teachers_folder"}:
        return
    try:
        student = run.read_record()["student"]
    except RunError:  # it cannot be read; whoever needs it says so
        return
    there = config.folder if student else config.teacher_folder(run.folder.name).parent
    if run.folder.resolve().parent != there.resolve():
        display.warn(
            f"{source} is not where its config.yaml puts runs. This command writes to {there}; out=... chooses another place"
        )


def positions(images: str | None) -> list[int] | None:
    """What --images asks for."""
    if images is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", images):
        raise ConfigError(f"--images must be positions in the test split such as 3,17, got {images!r}")
    return [int(word) for word in images.split(",")]


def show_result(run: Run, display: Display) -> None:
    result, record = run.read_result(), run.read_record()
    display.say(
        f"{record['label']}, seed {record['seed']}: validation {100 * result['val_accuracy']:.2f} %, "
        f"test {100 * result['test_accuracy']:.2f} %"
    )
    display.say(shares(record["step_seconds"]))


def show_outcome(settings: Config, outcome: session.Outcome, display: Display) -> None:
    from .figures import tables

    title = f"{settings.name}: {settings.distill.epochs} epochs"
    display.console.print(tables.terminal(outcome.found.main, outcome.found.teachers, title=title))
    display.say(outcome.found.sentence)
    display.say(f"Tables: {settings.folder}/results.md, results.csv, results.json")
    display.say(
        f"Pictures: {settings.folder}/figures/ ({', '.join(f.name for f in outcome.files if f.suffix == '.png')})"
    )
    display.say(f"All of it on one page: {shlex.join(['amtml-fast', 'report', str(settings.folder)])}")
    display.say(f"{outcome.seconds:.0f} s in all; the runs are in {settings.folder}/")
    for name, reason in outcome.failed.items():
        display.warn(f"{settings.folder}/figures/{name}.png is not drawn: {reason}")


@contextmanager
def friendly(resume: str = "") -> Iterator[Display]:
    """A display for the main process; mistakes as one line on stderr; Ctrl-C says how to go on.

    AMTML_DEBUG=1 shows tracebacks. Exit codes: 1 error, 2 unusable configuration, 130 Ctrl-C.
    """
    main_process = int(os.environ.get("RANK", "0")) == 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr has it: a name that the terminal has no letters for ends no training.
        sys.stdout.reconfigure(errors="backslashreplace")
    previous = signal.signal(signal.SIGTERM, _terminate)  # a cluster's polite stop is handled like Ctrl-C
    try:
        with Display(quiet=not main_process) as display:
            yield display
    except KeyboardInterrupt as stop:
        if main_process:
            stopped = str(stop)
            # What is to be started over is marked by now: --fresh again would throw away what was trained since.
            words = [word for word in sys.argv[1:] if word != "--fresh" or not stopped]
            words += [resume] if resume and not {resume, "--fresh"} & set(words) else []
            stopped = stopped or "stopped before anything was trained"
            print(f"\n{stopped}\nTo go on: {shlex.join(['amtml-fast', *words])}", file=sys.stderr)
        raise typer.Exit(130) from None
    except ModuleNotFoundError:
        raise  # amtml_fast.cli says what to install
    except (ConfigError, RunError, ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("AMTML_DEBUG"):
            raise
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {said}", file=sys.stderr)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt
