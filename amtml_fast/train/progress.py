"""What the user sees while something trains: bars with images/s and time left, one line per finished run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

# Bars are redrawn at most this often from the training loop.
SECONDS_BETWEEN_UPDATES = 0.1


class _Rate(ProgressColumn):
    """images/s of the tasks that count images."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if task.fields.get("unit") != "images" or not speed:
            return Text("")
        return Text(f"{speed:,.0f} images/s", style="progress.data.speed")


class Display:
    """Bars on a terminal; plain lines where the output is a file; nothing at all when `quiet`."""

    def __init__(self, console: Console | None = None, quiet: bool = False) -> None:
        self.console = console or Console(quiet=quiet)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
            speed_estimate_period=10.0,
        )

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def say(self, message: str) -> None:
        self.console.print(Text(message), soft_wrap=True)  # Text: no markup, and no pictures for :names:

    def warn(self, message: str) -> None:
        self.console.print(Text("warning: ", style="yellow") + Text(message), highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, description: str, total: float, unit: str = "images") -> Iterator[Bar]:
        """A bar over `total` images (or other units) that goes away when it is done."""
        task = self.progress.add_task(description, total=total, unit=unit, note="")
        bar = Bar(partial(self.progress.update, task))
        try:
            yield bar
        finally:
            bar.flush()
            self.progress.remove_task(task)


class Bar:
    """Counts without touching rich on every step; `update(advance=...)` and `update(note=...)` show it."""

    def __init__(self, update: Callable[..., object]) -> None:
        self.update = update
        self.waiting, self.last = 0.0, time.monotonic()

    def add(self, amount: float) -> None:
        self.waiting += amount
        if time.monotonic() - self.last > SECONDS_BETWEEN_UPDATES:
            self.flush()

    def note(self, text: str) -> None:
        self.update(note=text)

    def flush(self) -> None:
        self.update(advance=self.waiting)
        self.waiting, self.last = 0.0, time.monotonic()


class RemoteDisplay(Display):
    """What a worker process shows: sent to the process that has the terminal, as ("say", text) and the like."""

    def __init__(self, send: Callable[..., None]) -> None:
        super().__init__(quiet=True)
        self.send = send

    def say(self, message: str) -> None:
        self.send("say", message)

    def warn(self, message: str) -> None:
        self.send("warn", message)

    @contextmanager
    def bar(self, description: str, total: float, unit: str = "images") -> Iterator[Bar]:
        self.send("bar", description, total, unit)
        bar = Bar(lambda **change: self.send("update", change))
        try:
            yield bar
        finally:
            bar.flush()
            self.send("end")
