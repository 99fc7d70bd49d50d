"""The loss from hidden states against its matrix products alone, the loss of all logits, and other libraries; timed only after the
gradients were found to be those of the float64 reference."""

import dataclasses
import functools
from collections.abc import Callable

import pytest

from amtml_fast.testing import relative_error

from . import linear, memory
from .linear import ALL, Inputs, Linear

CASES = (Linear(256, 64, 2000, 2, quick=True), Linear(2048, 512, 32000, 1), Linear(2048, 512, 32000, 3))
OTHER = ("products", "F.linear_cross_entropy")  # they compute something else


def _marked(case: Linear, *values: object) -> object:
    return pytest.param(
        case, *values, marks=[pytest.mark.quick] if case.quick else [], id="-".join((case.name, *map(str, values)))
    )


@pytest.mark.parametrize(
    ("case", "provider"), [_marked(c, p) for c in CASES for p in ALL if linear.why_not(p, c) != ""]
)
def test_linear(case: Linear, provider: str, timed: Callable, leave_out: Callable) -> None:
    if reason := linear.why_not(provider, case):
        leave_out(case.name, provider, reason)

    def prepare() -> tuple:
        facts: dict = {
            "size": (case.rows, case.width, case.classes, case.teachers),
            "dtype": "float32",
            "flops": case.flops,
        }
        if provider not in OTHER:
            few = Inputs(dataclasses.replace(case, rows=min(case.rows, 64)))
            for got, want in zip(linear.step_of(provider, few)(), linear.exact(few), strict=True):
                assert relative_error(got, want) <= 1e-4
            if not case.quick:
                facts["extra_bytes"] = memory.of(case.size, provider, module="benchmarks.linear")[provider]
        return linear.step_of(provider, _inputs(case)), facts

    timed(prepare, case.name, provider)


@functools.lru_cache(maxsize=1)  # all providers take the same tensors
def _inputs(case: Linear) -> Inputs:
    return Inputs(case)
