"""Time and memory against N (angle loss), C (vocabulary) and T (teachers)."""

from collections.abc import Callable

import pytest
import torch

import amtml_fast as af

from . import memory
from .machine import DEVICE, GPU
from .providers import OURS, checked, why_not
from .workloads import Workload

BATCHES = [32, 64, 128, 256, 512, 1024, 2048, 4096, *([8192] if GPU else [])]
AXES = {
    "N": [Workload("angle", (n, 100)) for n in BATCHES],
    "C": [Workload("multi_teacher_kd", (64, c, 3)) for c in (10, 100, 1000, 10_000, 32_768, 131_072, 262_144)],
    "T": [Workload("multi_teacher_kd", (1024, 1000, t)) for t in (1, 2, 4, 8)],
}
PLACE = {"N": 0, "C": 1, "T": 2}  # of the axis in the size


@pytest.mark.parametrize("provider", [*OURS, "eager"])
@pytest.mark.parametrize(
    ("axis", "workload"),
    [
        pytest.param(axis, w, marks=[pytest.mark.quick] if axis == "N" and 64 <= w.size[0] <= 512 else [])
        for axis, row in AXES.items()
        for w in row
    ],
    ids=lambda x: x.name if isinstance(x, Workload) else x,
)
def test_scaling(
    axis: str, workload: Workload, provider: str, timed: Callable, leave_out: Callable, refuse_too_large: Callable
) -> None:
    group, value = f"{workload.op} against {axis}", workload.size[PLACE[axis]]
    row = f"{group}, {axis} = {value}"
    if reason := why_not(provider, workload):
        leave_out(row, provider, reason)
    refuse_too_large(memory.predicted(workload, provider), row, provider)

    def prepare() -> tuple:
        facts = {"axis": axis, "value": value, "flops": workload.flops, "bytes": workload.bytes}
        facts["extra_bytes"] = memory.of(workload.name, provider)[provider] if axis != "T" else None
        return checked(workload, provider, 1e-4), facts

    timed(prepare, group, provider)


def _rows(kind: str, n: int, c: int) -> torch.Tensor:
    """Soft targets: of a network that has learned little, and of one that is sure of itself (tight clusters of rows)."""
    g = torch.Generator().manual_seed(n + c)
    logits = torch.randn(n, c, generator=g)
    if kind == "clustered":
        logits += 10 * torch.nn.functional.one_hot(torch.randint(0, 10, (n,), generator=g), c)
    else:
        logits /= 2
    return logits.softmax(-1)


@pytest.mark.parametrize("provider", OURS)
@pytest.mark.parametrize("kind", ["even", "clustered"])
@pytest.mark.parametrize("n", [512, 4096])
def test_angle_of_rows_of_either_kind(n: int, kind: str, provider: str, timed: Callable) -> None:
    """The angle loss with the gradient to the student alone: triplets a second."""

    def prepare() -> tuple:
        student, teacher = (_rows(k, n, c).to(DEVICE) for k, c in ((kind, 100), ("even", 101)))
        student.requires_grad_()

        def step() -> object:
            with af.use_backend(provider):
                return torch.autograd.grad(af.angle_loss(student, teacher), [student])

        return step, {"triplets": n**3}

    timed(prepare, f"angle {n}x100, {kind} rows, one gradient", provider)
