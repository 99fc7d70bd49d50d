"""Where the time of a training step goes, measured without waiting for the device."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

# data: the next batch, and what is kept of the last one; teachers: running them or looking them up; student: forward and
# backward of the network; losses: forward and backward of everything behind it; optimizer: its step.
PARTS = ("data", "teachers", "student", "losses", "optimizer")
WHOLE = "whole"  # a step that was replayed as one graph


class StepTimer:
    """``mark(part)`` counts the time since the last mark as that part's.

    On CUDA a mark records an event; only completed events are read, so no step waits. In a graph the events are part of it,
    and each replay records them again: its parts are those of the last one, and `WHOLE` counts the time of all.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.totals = dict.fromkeys(PARTS, 0.0)
        self.last: Any = None
        self.passing = deque[tuple[str, Any, Any]]()
        self.inside: list[tuple[str, Any]] = []  # of the graph: what has ended, and its event

    def start(self) -> None:
        """What comes now is counted."""
        self.last = self._now()

    def stop(self) -> None:
        """What comes now is not counted."""
        self.last = None

    def begin(self) -> None:
        """What a step begins with."""
        if self.last is not None and self._captured():
            self.inside = [("", self._now(external=True))]

    def mark(self, part: str) -> None:
        if self.last is None:
            return
        if self._captured():
            self.inside.append((part, self._now(external=True)))
            return
        before, self.last = self.last, self._now()
        if not self.cuda:
            self.totals[part] = self.totals.get(part, 0.0) + self.last - before
            return
        self.passing.append((part, before, self.last))
        while self.passing and self.passing[0][2].query():
            self._count()

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last read; waits for the device once."""
        if self.passing:
            self.passing[-1][2].synchronize()
            while self.passing:
                self._count()
        totals, self.totals = self.totals, dict.fromkeys(PARTS, 0.0)
        if whole := totals.pop(WHOLE, 0.0):
            last = self._last_replay() or dict(totals)
            every = sum(last.values()) or 1.0
            totals = {part: seconds + whole * last.get(part, 0.0) / every for part, seconds in totals.items()}
        return totals

    def _last_replay(self) -> dict[str, float]:
        """Milliseconds of each part of the graph's last replay; empty where CUDA does not say."""
        parts: dict[str, float] = {}
        with suppress(RuntimeError):
            for (_, begin), (part, end) in itertools.pairwise(self.inside):
                parts[part] = parts.get(part, 0.0) + begin.elapsed_time(end)
        return parts

    def _captured(self) -> bool:
        return self.cuda and torch.cuda.is_current_stream_capturing()

    def _now(self, *, external: bool = False) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True, external=external)
        event.record()
        return event

    def _count(self) -> None:
        part, begin, end = self.passing.popleft()
        self.totals[part] = self.totals.get(part, 0.0) + begin.elapsed_time(end) / 1000


def shares(seconds: Mapping[str, float]) -> str:
    """`12.3 ms a step: data 1 %, teachers 60 %, ...`, for a step's parts in seconds."""
    whole = sum(seconds.values())
    if not whole:
        return "no times of steps were kept"
    parts = ", ".join(f"{part} {percent(value / whole)}" for part, value in seconds.items())
    return f"{1000 * whole:.1f} ms a step: {parts}"


def percent(share: float) -> str:
    """With a decimal where a whole number would say nothing."""
    return f"{100 * share:.0f} %" if share >= 0.095 or share == 0 else f"{100 * share:.1f} %"
