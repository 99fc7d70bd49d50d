"""Distillation from hidden states and output layers: who computes it, and what it takes in memory.

    python -m benchmarks.linear 2048x512x32000x3 cpp eager Liger     # a JSON object: provider -> bytes above the inputs

Everyone computes KL(p || q) of the mean of T teachers at temperature 1, and its gradients to the student's hidden states and weight;
but for "products", which is the matrix products of it alone, on all rows at once, and "F.linear_cross_entropy", which is the
loss of a student with labels and no teacher.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import amtml_fast as af

from .machine import DEVICE, peak_bytes
from .providers import OURS, PLAIN

PEERS = ("products", "Liger", "Liger, compiled", "F.linear_cross_entropy")
ALL = (*OURS, *PLAIN, *PEERS)


@dataclass(frozen=True)
class Linear:
    """Rows, width of the hidden states, classes and teachers."""

    rows: int
    width: int
    classes: int
    teachers: int
    quick: bool = False

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.width}x{self.classes}x{self.teachers}"

    @property
    def name(self) -> str:
        return f"fused_linear_kd {self.size} float32"

    @property
    def flops(self) -> float:
        """Of the products: logits of the student and the teachers, gradients to hidden states and weight."""
        return 2.0 * (3 + self.teachers) * self.rows * self.width * self.classes


class Inputs:
    def __init__(self, case: Linear):
        g = torch.Generator().manual_seed(0)

        def layer() -> tuple[Tensor, Tensor]:
            hidden, weight = (torch.randn(n, case.width, generator=g).to(DEVICE) for n in (case.rows, case.classes))
            return hidden, weight / case.width**0.5

        self.hidden, self.weight = (x.requires_grad_() for x in layer())
        self.teachers = [af.LinearTeacher(*layer()) for _ in range(case.teachers)]
        self.labels = torch.randint(0, case.classes, (case.rows,), generator=g).to(DEVICE)


def why_not(provider: str, case: Linear) -> str | None:
    """Why a provider does not run a case here, or None. An empty answer: it has nothing of the kind."""
    if provider.startswith("Liger"):
        if case.teachers != 1:
            return ""
        try:
            import liger_kernel.chunked_loss  # noqa: F401
        except ImportError:
            return "not installed"
    if provider == "F.linear_cross_entropy" and (case.teachers != 1 or not hasattr(F, "linear_cross_entropy")):
        return ""
    return None


def loss_of(provider: str, inputs: Inputs) -> Callable[[], Tensor]:
    hidden, weight, teachers, labels = inputs.hidden, inputs.weight, inputs.teachers, inputs.labels
    if provider.startswith("Liger"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, temperature=1.0, compiled=provider != "Liger")
        return lambda: loss(hidden, weight, *teachers[0][:2], labels)
    if provider == "F.linear_cross_entropy":
        return lambda: F.linear_cross_entropy(hidden, weight, labels)
    function: Callable = af.fused_linear_kd_loss
    if provider == "compile":
        function = torch.compile(function, dynamic=False)

    def call() -> Tensor:
        with af.use_backend("reference" if provider in PLAIN else provider):
            return function(hidden, weight, teachers, temperature=1.0)

    return call


def step_of(provider: str, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the gradients to hidden states and weight."""
    leaves = inputs.hidden, inputs.weight
    if provider == "products":
        return lambda: products(inputs)
    loss = loss_of(provider, inputs)
    return lambda: torch.autograd.grad(loss(), leaves)


@torch.no_grad()
def products(inputs: Inputs) -> tuple[Tensor, ...]:
    hidden, weight = inputs.hidden, inputs.weight
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    for teacher in inputs.teachers:
        torch.mm(teacher.hidden, teacher.weight.t(), out=logits)
    torch.mm(hidden, weight.t(), out=logits)
    return logits @ weight, logits.t() @ hidden


def exact(inputs: Inputs) -> tuple[Tensor, ...]:
    """The gradients, in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    teachers = [af.LinearTeacher(t.hidden.double(), t.weight.double()) for t in inputs.teachers]
    loss = af.reference.fused_linear_kd_loss(hidden, weight, teachers, temperature=1.0)
    return torch.autograd.grad(loss, (hidden, weight))


def main(size: str, *providers: str) -> None:
    rows, width, classes, teachers = map(int, size.split("x"))
    inputs = Inputs(Linear(rows, width, classes, teachers))
    print(json.dumps({p: peak_bytes(step_of(p, inputs)) for p in providers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
