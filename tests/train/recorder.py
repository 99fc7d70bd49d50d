"""Stands in for CUDA graphs on the CPU: records the operators of one call, with the tensors and the numbers that they had, and
repeats these, as a graph does. What no graph could hold is an error: the host reads a value, a tensor's shape depends on values,
a tensor is made of the host's numbers, random numbers are seeded.

    monkeypatch.setitem(graphs.CAPTURES, "cpu", Recorder)
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from amtml_fast import checks

# Operators that read values, or make tensors whose shapes depend on them; and that copy numbers from the host.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "bincount",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
}
WAITING |= {"unique_consecutive", "repeat_interleave"}
FROM_HOST = {"lift_fresh"}
LIBRARY = Path(checks.__file__).parent
READS = {"tolist", "numpy", "__array__", "cpu"}  # of Tensor: on the CPU no operator shows them


class Uncapturable(RuntimeError):
    """As CUDA says it."""


class Recorder:
    """A graphs.Capture."""

    def __init__(self, device: torch.device) -> None:
        self.launches: list[int] = []  # operators of each graph

    def waits(self, function: Callable[[], object]) -> list[str]:
        found: list[str] = []
        with (
            Operators(lambda func, args: found.append(name_of(func)) if waits(func, args) else None),
            Reads(found.append),
        ):
            function()
        return found

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape, seed = Tape(), torch.initial_seed()
        with Reads(refuse), tape:
            out = function()
        if torch.initial_seed() != seed:
            raise Uncapturable("the seed was set within the graph")
        self.launches.append(len(tape.calls))
        return tape.replay, out


def refuse(name: str) -> None:
    raise Uncapturable(f"{name}: not permitted when a graph is captured")


def name_of(func: Any) -> str:
    return func.overloadpacket.__name__


def waits(func: Any, args: Sequence[Any]) -> bool:
    """Whether the host would wait for the device's answer to this operator."""
    by_mask = name_of(func) == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
    return (by_mask or name_of(func) in WAITING) and not on_the_cpu_alone()


def on_the_cpu_alone() -> bool:
    """Asked by the losses, which look at values where that is free (checks.values_are_free, ops/_base.py)."""
    files = {frame.filename for frame in traceback.extract_stack()}
    return any(str(LIBRARY / name) in files for name in ("checks.py", "ops/_base.py"))


class Operators(TorchDispatchMode):
    """Tells of every operator."""

    def __init__(self, tell: Callable[[Any, Sequence[Any]], object]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.tell(func, args)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Tells of what reads values without an operator."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if getattr(func, "__name__", "") in READS:
            self.tell(func.__name__)
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """What was called, and its results. (Recording computes, which CUDA does not: the first replay has been done by then.)"""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.done = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if name_of(func) in FROM_HOST or waits(func, args):
            refuse(name_of(func))
        out = func(*args, **kwargs)
        if func.namespace != "profiler":
            self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        if self.done:
            self.done = False
            return
        with torch.inference_mode():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if place(old) != place(new):  # neither a view nor written in place
                        old.copy_(new)


def tensors(out: Any) -> list[Tensor]:
    return [x for x in tree_leaves(out) if isinstance(x, Tensor)]


def place(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
