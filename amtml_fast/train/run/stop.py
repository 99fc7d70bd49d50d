"""Stopping a training between two steps: Ctrl-C, and SIGTERM where a cluster wants its machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .folder import Run
from .job import Job


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run: what is on disk can be resumed."""

    def __init__(self, job: Job, done: int, step: int = 0) -> None:
        more = f" and {step} steps of the next one" if step else ""
        super().__init__(f"{job.title}: stopped; {done} of {job.train.epochs} epochs{more} are safe in {job.folder}")


@contextmanager
def says_when_stopped(words: Callable[[], str]) -> Iterator[None]:
    """A stop in the block that says nothing itself says this: it is no longer one before anything was done."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or words()) from None


def how_many(jobs: Sequence[Job], what: str) -> str:
    return f"stopped; {sum(Run(job.folder).finished() for job in jobs)} of {len(jobs)} {what} are finished"


class Stop:
    """While it is open, Ctrl-C (and SIGTERM, where the caller handles it) only sets `asked`, to be looked at between steps.

    Raised anywhere, KeyboardInterrupt can come in the middle of another library's lock and leave it locked for good:
    TensorBoard's writer then waits for ever. A second Ctrl-C is raised at once; not in one of several processes, which
    get it from the terminal and again from what launched them.
    """

    def __init__(self, processes: int = 1) -> None:
        self.alone = processes == 1
        self.asked, self.previous = False, dict[int, Any]()

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if callable(signal.getsignal(number)):  # neither ignored nor left to the system
                    self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked and self.alone and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def check(self) -> None:
        if self.asked:
            raise KeyboardInterrupt
