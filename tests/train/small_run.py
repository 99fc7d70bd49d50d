"""A small configuration with trained teachers in a folder of its own, to run the trainer on: in this process, and by its command."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amtml_fast import cli
from amtml_fast.train.compare.plan import checked
from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import Config
from amtml_fast.train.files import read_json
from amtml_fast.train.progress import Display
from amtml_fast.train.run import tasks, trainer
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.prepare import load_data
from amtml_fast.train.run.tasks import distill

ROOT = Path(__file__).resolve().parents[2]
QUIET = Display(quiet=True)

# A net without BatchNorm: its gradient is the mean over the rows, however they are split over processes. It is smooth,
# and its outputs tell the images apart from the first step: otherwise rounding tips a ReLU over, or fills the angle
# loss's differences of nearly equal rows, and two right runs drift apart.
PLAIN_NET = """
from torch import nn


def net(num_classes, in_channels, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), nn.Tanh(), nn.Conv2d(width, 2 * width, 3, padding=1), nn.Tanh(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8 * width, num_classes),
    )


def dropout_net(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, num_classes))
"""
YAML = """
name: small
data: {name: digits, val_fraction: 0.15}
teachers:
  - {name: a, model: {factory: small_cnn, args: {width: 6}}, hint: block3}
  - {name: b, model: {factory: small_cnn, args: {width: 4}}, hint: block2}
student: {factory: small_cnn, args: {width: 2}, features: block3, groups: {low: block1, high: block3}}
teach: {epochs: 1, batch_size: 128}
distill: {epochs: 4, batch_size: 128}
engine: {threads: 1, device: cpu}
"""


class Place:
    """A folder with a configuration and trained teachers in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.yaml = folder, folder / "small.yaml"

    def load(self, *overrides: str) -> Config:
        return checked(reading.load(self.yaml, [f"out={self.folder}", *overrides]))

    def words(self, command: str, *rest: str) -> list[str]:
        """A command line for this place's configuration and output folder; by the method that has the most parts."""
        method = ["--method=amtml_kd"] if command == "distill" and not any("--method" in word for word in rest) else []
        return [command, str(self.yaml), f"out={self.folder}", *method, *rest]

    def start(self, command: str, *rest: str, processes: int = 1, first: Callable[[], None] | None = None) -> Running:
        return Running(self.folder, self.words(command, *rest), processes=processes, first=first)

    def launch(self, *words: str, processes: int = 1) -> subprocess.Popen[str]:
        """The same by the launchers that people use: python -m, and torchrun for several processes."""
        several = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
        return subprocess.Popen(
            [sys.executable, "-m", *(several if processes > 1 else []), "amtml_fast", *self.words(*words)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # SIGINT is ignored where the tests run in the background.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def train(self, *overrides: str, method: str = "amtml_kd", seed: int = 0, resume: bool = False) -> Run:
        settings = self.load(*overrides)
        data = load_data(settings)
        return distill(settings, data, method, seed, QUIET, resume=resume, fresh=False)


def tensors(run: Run) -> dict[str, Tensor]:
    """Student and objective of a finished run."""
    found = load_file(run.folder / "student.safetensors")
    objective = run.folder / "objective.safetensors"
    if objective.is_file():
        found |= {f"objective.{key}": value for key, value in load_file(objective).items()}
    return found


def metrics(run: Run) -> list[dict[str, object]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "step_seconds")} for row in run.read_metrics()]


class Done(NamedTuple):
    returncode: int
    said: str  # stdout and stderr of all processes


FORKS: Any = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch._dynamo", "torch._inductor.compile_fx", "torch.utils.tensorboard", "amtml_fast.train.compare.session"]
)


class Running:
    """A command line under way, as a launcher starts it in one process or several, but forked from a process that has
    imported it all: imports are most of what a short training costs. `first` is called before the command."""

    def __init__(
        self, folder: Path, words: Sequence[str], *, processes: int = 1, first: Callable[[], None] | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        team = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.files = [folder / f"said-{port}-{rank}" for rank in range(processes)]
        self.team = []
        for rank, file in enumerate(self.files):
            place = {"RANK": rank, "LOCAL_RANK": rank, **team} if processes > 1 else {}
            environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
            self.team.append(FORKS.Process(target=_command, args=(environment, folder, file, list(words), first)))
            self.team[-1].start()
        self.pid: int = self.team[0].pid

    def at_work(self) -> bool:
        """Whether none of its processes has ended."""
        return all(process.is_alive() for process in self.team)

    def send(self, number: int) -> None:
        """A signal to every process that is still there, as a launcher passes it on."""
        for process in self.team:
            if process.is_alive():
                os.kill(process.pid, number)

    def end(self, seconds: float = 120) -> Done:
        """Waits for the end of all processes."""
        last = time.monotonic() + seconds
        for process in self.team:
            process.join(max(0, last - time.monotonic()))
        assert not any(process.is_alive() for process in self.team), f"no end: {self.said()}"
        return Done(max((process.exitcode for process in self.team), key=abs), self.said())

    def said(self) -> str:
        return "".join(file.read_text() for file in self.files if file.exists())


def _command(
    environment: dict[str, str], folder: Path, said: Path, words: list[str], first: Callable[[], None] | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in Place.launch
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["amtml-fast", *words]
    if first is not None:
        first()
    cli.main(words)


def in_two(place: Place, *words: str) -> Done:
    """The command in two processes, run to its end."""
    return place.start(*words, processes=2).end()


def wait_for(condition: Callable[[], object], process: Running | subprocess.Popen[str], what: str) -> None:
    last = time.monotonic() + 120
    while not condition():
        if isinstance(process, Running):
            assert process.at_work(), process.said()
        else:
            assert process.poll() is None, process.communicate()
        assert time.monotonic() < last, f"waited in vain for {what}"
        time.sleep(0.005)


def wait_for_epochs(place: Place, process: Running | subprocess.Popen[str], epochs: int) -> None:
    """Until so many epochs are in the metrics of its run."""
    run = Run(place.folder / "small" / "amtml_kd-seed0")
    wait_for(lambda: len(run.read_metrics()) >= epochs, process, "epochs")


def teach(folder: Path) -> Path:
    """The folder, with the configuration's teachers in it."""
    place = Place(folder)
    place.yaml.write_text(YAML)
    settings = place.load()
    tasks.teach(settings, load_data(settings), QUIET)
    return folder


def furnish(folder: Path, taught: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    shutil.copytree(taught, folder, dirs_exist_ok=True)
    (folder / "plain_net.py").write_text(PLAIN_NET)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Place(folder)


def weights(place: Place) -> list[tuple[int, Path]]:
    return [(i, place.folder / "small" / "teachers" / name / "model.safetensors") for i, name in enumerate("ab")]


def own_weights(place: Place) -> list[str]:
    return [f"teachers.{i}.model.weights={path}" for i, path in weights(place)]


def interrupt_after(epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C right after this epoch's checkpoint, in this process."""
    save = trainer.Trainer.save

    def save_and_stop(self: trainer.Trainer) -> None:
        save(self)
        if self.done == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "save", save_and_stop)


# One epoch is 9 steps.
PLAIN = [
    "student.factory=plain_net:net",
    "student.args={width: 4}",
    "student.features='3'",
    "student.groups={low: '1', high: '3'}",
    "distill.epochs=1",
    "distill.lr=0.05",
]


def assert_equal(one: Run, two: Run) -> None:
    """Two finished runs: the same tensors, metrics and result, bit for bit."""
    assert one.finished() and two.finished()
    assert metrics(one) == metrics(two) and read_json(one.result) == read_json(two.result)
    found, expected = tensors(one), tensors(two)
    assert found.keys() == expected.keys()
    assert not [key for key, value in found.items() if not torch.equal(value, expected[key])]


def assert_near(one: Run, two: Run, tolerance: float = 1e-5) -> None:
    """Same tensors and same metrics to `tolerance`, relative and absolute."""
    expected = tensors(one)
    found = tensors(two)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert ((value - expected[key]).abs() <= tolerance * (1 + expected[key].abs())).all(), key
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            assert value == pytest.approx(a[key], rel=tolerance, abs=tolerance), key
