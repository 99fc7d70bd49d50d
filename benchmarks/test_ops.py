"""Forward and backward of every operator and of the whole loss, by every provider; timed only after the gradients were found
to be those of the float64 reference."""

from collections.abc import Callable

import pytest
import torch

from . import memory
from .machine import MOST, free_bytes
from .providers import ALL, OURS, PLAIN, checked, why_not
from .workloads import WORKLOADS, Workload

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of plain PyTorch in that dtype, too


def _marked(workload: Workload, *values: object) -> object:
    return pytest.param(workload, *values, marks=[pytest.mark.quick] if workload.quick else [])


@pytest.mark.parametrize(
    ("workload", "provider"),
    [_marked(w, p) for w in WORKLOADS for p in ALL if why_not(p, w) != ""],
    ids=lambda x: x.name if isinstance(x, Workload) else x,
)
def test_op(
    workload: Workload, provider: str, timed: Callable, leave_out: Callable, refuse_too_large: Callable
) -> None:
    if reason := why_not(provider, workload):
        leave_out(workload.name, provider, reason)
    refuse_too_large(memory.predicted(workload, provider), workload.name, provider)

    def prepare() -> tuple:
        facts: dict = {"op": workload.op, "size": workload.size, "dtype": str(workload.dtype).removeprefix("torch.")}
        facts |= {"bytes": workload.bytes, "flops": workload.flops}
        return checked(workload, provider, TOLERANCE[workload.dtype]), facts

    timed(prepare, workload.name, provider)


@pytest.mark.parametrize(
    "workload",
    [_marked(w) for w in WORKLOADS if w.dtype == torch.float32 and (not w.quick or w.op in ("angle", "whole_loss"))],
    ids=lambda w: w.name,
)
def test_memory(workload: Workload, remembered: dict) -> None:
    most = MOST * free_bytes()
    names = [p for p in (*OURS, *PLAIN) if why_not(p, workload) is None and memory.predicted(workload, p) <= most]
    for provider, taken in memory.of(workload.name, *names).items():
        remembered["memory"].append({"group": workload.name, "provider": provider, "bytes": taken})
