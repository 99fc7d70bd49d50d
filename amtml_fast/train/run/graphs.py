"""Work that is the same at every call, captured once as a CUDA graph and replayed: the host then launches one thing, not thousands.

A graph repeats its kernels with the addresses and the numbers of the call that was captured. So what changes between two calls must
be in its inputs, which are copied to tensors of its own, or in tensors that it shares with its caller and that are written in place.
Random numbers are drawn from the generator's seed and offset at the time of the replay, as without a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

# Calls that run as they are before one is captured: they fill the allocator's pools and make what is made once.
WARM_UP = 3


class Capture(Protocol):
    """How calls are captured on a kind of device."""

    def waits(self, function: Callable[[], object]) -> list[str]:
        """Calls it; where it made the host wait for the device, which no graph can repeat."""

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Calls it as it is, in the place where it will be captured."""

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Calls it without computing anything. What repeats it, and what it returned: memory that each replay fills."""


class CudaCapture:
    """By CUDA's stream capture, all on one side stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def waits(self, function: Callable[[], object]) -> list[str]:
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self.warm_up(function)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waiting = [each for each in said if "called a synchronizing" in str(each.message)]
        return [f"{Path(each.filename).name}, line {each.lineno}" for each in waiting]

    def warm_up(self, function: Callable[[], Any]) -> Any:
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            out = function()
        here.wait_stream(self.stream)
        return out

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            out = function()
        return graph.replay, out


# By type of device. (Tests enter a stand-in for the CPU.)
CAPTURES: dict[str, Callable[[torch.device], Capture]] = {"cuda": CudaCapture}


class Graph:
    """A function of tensors, called as it is a few times, then captured, then replayed: `graph(*inputs, key=...)`.

    It is captured anew for inputs of other shapes and for another `key`, which stands for everything else that the function
    does otherwise. What it returns is overwritten by the next call. `failed(error)` is told of a capture that did not succeed, and
    the function is then called as it is for good, unless `failed` raises.
    """

    def __init__(self, function: Callable[..., Any], capture: Capture, failed: Callable[[RuntimeError], None]) -> None:
        self.function, self.capture, self.failed = function, capture, failed
        self.key: Hashable = None
        self.calls = 0  # with this key
        self.works = True
        self.inputs: list[Tensor] = []
        self.replay: Callable[[], None] | None = None
        self.out: Any = None

    def __call__(self, *inputs: Tensor, key: Hashable = None) -> Any:
        if not self.works:
            return self.function(*inputs)
        key = (key, tuple((x.shape, x.dtype) for x in inputs))
        if key != self.key:
            self.key, self.calls, self.replay, self.out = key, 0, None, None
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.capture.warm_up(lambda: self.function(*inputs))
        if self.replay is None:
            self.inputs = [x.clone() for x in inputs]
            try:
                self.replay, self.out = self.capture.record(lambda: self.function(*self.inputs))
            except RuntimeError as error:
                self.works = False
                self.failed(error)
                return self.function(*inputs)
        for own, x in zip(self.inputs, inputs, strict=True):
            own.copy_(x, non_blocking=True)
        self.replay()
        return self.out
