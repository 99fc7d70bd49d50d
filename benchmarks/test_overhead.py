"""Python and dispatch of AMTMLLoss at N = 128 without its arithmetic, beside the least that any loss costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from amtml_fast.ops import whole_loss

from .providers import OURS, function_of, why_not
from .workloads import Workload

WORKLOAD = Workload("whole_loss", (128, 100, 3))
FACTS = {"overhead": True}


class Empty(torch.autograd.Function):
    """One node with the inputs of the whole loss that need a gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return ctx.saved_tensors


class Recorded:
    """torch.ops.amtml where each operator runs once, and from then on returns what it returned."""

    def __init__(self) -> None:
        self.results: dict[str, tuple[torch.Tensor, ...]] = {}

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            if name not in self.results:
                self.results[name] = getattr(torch.ops.amtml, name).default(*args)
            return tuple(t.detach() for t in self.results[name])

        return type("Op", (), {"default": staticmethod(call)})


@pytest.mark.quick
@pytest.mark.parametrize("provider", ["an empty node", "the whole loss, its kernels replaced"])
def test_overhead(provider: str, timed: Callable, leave_out: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    group, name = "overhead at N = 128", OURS[0]  # the others are made of several operators
    if reason := why_not(name, WORKLOAD):
        leave_out(group, provider, reason)

    def prepare() -> tuple:
        task = WORKLOAD.task()
        if provider == "an empty node":
            return lambda: torch.autograd.grad(Empty.apply(*task.leaves), task.leaves), FACTS
        return task.step(function_of(name, task)), FACTS

    recorded = Recorded()
    if provider != "an empty node":
        monkeypatch.setattr(whole_loss, "kernels", lambda name: recorded)
    timed(prepare, group, provider)
