"""Several trainings side by side: one process a GPU, or as many on the CPU as `compare.workers` says.

The parent hands out jobs by their position in lists that every process makes from the same configuration, shows what
the workers say, and passes a stop on. A worker that has lost its parent stops too: its pipe is broken.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ..config.schema import Config
from ..files import RunError
from ..progress import Bar, Display, RemoteDisplay

VISIBLE = "CUDA_VISIBLE_DEVICES"
STOPPED = 130  # a worker's exit code after a stop


class Task(NamedTuple):
    """A job by its position in one of Session's lists."""

    phase: str
    position: int
    title: str


class Trains(Protocol):
    """The interface of session.Session. It is passed in because session.py imports this file."""

    def __init__(self, config: Config, display: Display) -> None: ...

    def train(self, phase: str, position: int) -> None: ...


def count(config: Config) -> int:
    """How many trainings run side by side: compare.workers, else one a GPU. One under accelerate launch or torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return 1
    return config.compare.workers or max(1, gpus(config))


def run(
    session: type[Trains],
    config: Config,
    tasks: Iterable[Task],
    display: Display,
    *,
    done: Callable[[Task], None],
) -> None:
    """Trains the tasks in count(config) processes, done(task) after each. Every process makes a `session` of its own.

    Raises a worker's error, RunError for a worker that died, KeyboardInterrupt after a stop; before, the others have
    been stopped, with what they had after their last epoch on the disk.
    """
    queue = deque(tasks)
    team = [Worker(number, session, config) for number in range(min(count(config), len(queue)))]
    try:
        for worker in team:
            worker.give(queue.popleft())
        while busy := {worker.connection: worker for worker in team if worker.task is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                finished = worker.hear(display)
                if finished is not None:
                    done(finished)
                    if queue:
                        worker.give(queue.popleft())
    except BaseException:
        for worker in team:
            worker.process.terminate()
        raise
    finally:
        for worker in team:
            worker.close()


class Worker:
    """The parent's side of one process."""

    def __init__(self, number: int, session: type[Trains], config: Config) -> None:
        context: Any = multiprocessing.get_context(how := start_method(config))
        context.set_forkserver_preload(preloaded(session))
        self.connection, theirs = context.Pipe()
        environment = dict(os.environ) if how == "forkserver" else {}
        self.process = context.Process(target=work, args=(theirs, session, share(config), environment))
        with its_gpu(config, number):
            self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.bars: list[tuple[ExitStack, Bar]] = []

    def give(self, task: Task) -> None:
        self.task = task
        self.connection.send(task)

    def hear(self, display: Display) -> Task | None:
        """Takes one message; returns the task that it says is done."""
        try:
            kind, *args = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            title = self.task.title if self.task else "starting"
            raise RunError(
                f"{title}: its process ended with exit code {self.process.exitcode}; what it had after its last epoch is "
                "kept, and the same command (without --fresh) goes on from there"
            ) from None
        if kind == "failed":
            raise args[0]
        if kind == "done":
            done, self.task = self.task, None
            return done
        self.show(display, kind, *args)
        return None

    def show(self, display: Display, kind: str, *args: Any) -> None:
        """What the worker's RemoteDisplay sent."""
        if kind == "bar":
            stack = ExitStack()
            self.bars.append((stack, stack.enter_context(display.bar(*args))))
        elif kind == "update":
            self.bars[-1][1].update(**args[0])
        elif kind == "end":
            self.bars.pop()[0].close()
        else:
            getattr(display, kind)(*args)

    def close(self) -> None:
        while self.bars:
            self.bars.pop()[0].close()
        self.connection.close()
        try:
            self.process.join()
        except KeyboardInterrupt:  # a second stop does not wait for the end of a step
            self.process.kill()
            raise


def start_method(config: Config) -> str:
    """CUDA and OpenMP do not survive a fork. A forkserver has used neither when it forks, and imports once for all workers,
    which takes seconds; but its environment is the first worker's, and CUDA's is read before Python runs."""
    methods = multiprocessing.get_all_start_methods()
    return "forkserver" if "forkserver" in methods and not gpus(config) else "spawn"


def preloaded(session: type[Trains]) -> list[str]:
    """What the forkserver imports. It looks in the working directory first: where an amtml_fast other than this one is there, as in a
    source folder, the session is left out, and each worker imports this package by itself."""
    there = Path("amtml_fast")
    another = there.is_dir() and not Path(__file__).resolve().is_relative_to(there.resolve())
    return ["torch._dynamo", *([] if another else [session.__module__])]


def work(connection: Connection, session: type[Trains], config: Config, environment: dict[str, str]) -> None:
    """The worker's side: trains what it is given until its pipe is closed."""
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal: the parent's word counts
    signal.signal(signal.SIGTERM, _stop)

    def send(*message: object) -> None:
        try:
            connection.send(message)
        except OSError:
            raise KeyboardInterrupt from None  # nobody is there to show it to

    try:
        jobs = session(config, RemoteDisplay(send))
        while True:
            task = connection.recv()
            jobs.train(task.phase, task.position)
            send("done")
    except EOFError:
        return
    except KeyboardInterrupt:
        sys.exit(STOPPED)
    except (RunError, ValueError, TypeError, OSError, ImportError) as error:
        send("failed", error)
    finally:
        gc.unfreeze()  # what a Session froze; nanobind would call it leaked


def gpus(config: Config) -> int:
    return torch.cuda.device_count() if config.engine.device == "auto" else 0


@contextmanager
def its_gpu(config: Config, number: int) -> Iterator[None]:
    """While a worker starts, the environment shows one GPU: once CUDA is in use in a process, it would be too late."""
    if not gpus(config):
        yield
        return
    before = os.environ.get(VISIBLE)
    visible = before.split(",") if before else list(map(str, range(gpus(config))))
    os.environ[VISIBLE] = visible[number % len(visible)]
    try:
        yield
    finally:
        if before is None:
            del os.environ[VISIBLE]
        else:
            os.environ[VISIBLE] = before


def share(config: Config) -> Config:
    """The configuration for one of several workers: on the CPU with its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = config.engine.threads or (None if gpus(config) else max(1, cores // count(config)))
    return replace(config, engine=replace(config.engine, threads=threads))


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt
