"""What is measured: operators of amtml_fast.testing.CASES at sizes that people use, and the whole loss."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import amtml_fast as af
from amtml_fast.testing import CASES, convert, relative_error, tensors

from .machine import DEVICE, GPU

# The most that is compared in float64: rows of what is O(N^3) in plain PyTorch, elements of a matrix.
MOST_CUBIC, MOST_ELEMENTS = 256, 2**25


@dataclass(frozen=True)
class Workload:
    """One row of the table: an operator, a size and a dtype. quick: part of the short run."""

    op: str
    size: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.size))} {str(self.dtype).removeprefix('torch.')}"

    @property
    def bytes(self) -> float:
        """Each input read once and each result written once, by forward and backward together."""
        item = torch.empty((), dtype=self.dtype).element_size()
        if self.op == "kl":
            return 3.0 * item * math.prod(self.size)
        if self.op == "whole_loss":
            n, c, t = self.size
            return CASES["multi_teacher_kd"].bytes(item, n, c, t) + CASES["teacher_weights"].bytes(item, n, 64, 8, 8, t)
        return float(CASES[self.op].bytes(item, *self.size))

    @property
    def flops(self) -> float:
        if self.op == "kl":
            return 12.0 * math.prod(self.size)
        if self.op == "whole_loss":
            n, c, t = self.size
            parts = (("angle", (n, c)), ("multi_teacher_kd", (n, c, t)), ("teacher_weights", (n, 64, 8, 8, t)))
            return float(sum(CASES[op].flops(*size) for op, size in parts))
        return float(CASES[self.op].flops(*self.size))

    def task(self) -> "Task":
        return MAKERS.get(self.op, _operator)(self)

    def checked(self) -> "Workload":
        """The workload whose gradients are compared with the reference: this one, or one of fewer rows where the reference in
        float64 would not fit."""
        n, *rest = self.size
        cubic, width = self.op in ("angle", "whole_loss"), max(rest, default=1)
        most = MOST_CUBIC if cubic else max(MOST_ELEMENTS // width, 1)
        return dataclasses.replace(self, size=(min(n, most), *rest))


@dataclass
class Task:
    """A workload's tensors: ``function(*args)`` is what is timed, with the gradient to ``leaves``.

    exact: gradients of the float64 reference.
    """

    op: str
    function: Callable[..., Tensor]
    args: tuple
    leaves: list[Tensor]
    exact: Callable[[], tuple[Tensor, ...]]

    def step(self, function: Callable[..., Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        """Forward and backward; a loss as it is, as in a training loop, anything else by its sum."""
        return lambda: _gradients(function, self.args, self.leaves)

    def check(self, step: Callable[[], tuple[Tensor, ...]], tolerance: float) -> None:
        """Raises unless the gradients are those of the reference."""
        for got, want in zip(step(), self.exact(), strict=True):
            error = relative_error(got, want)
            if not error <= tolerance:
                raise AssertionError(f"relative error {error:.2g} of a gradient, at most {tolerance:g} wanted")


def _leaves(args: Any) -> list[Tensor]:
    return [t for t in tensors(args) if t.requires_grad]


def _gradients(function: Callable[..., Tensor], args: tuple, leaves: list[Tensor] | None = None) -> tuple[Tensor, ...]:
    out = function(*args)
    return torch.autograd.grad(out if out.dim() == 0 else out.sum(), leaves or _leaves(args))


def inputs(op: str, *size: int, dtype: torch.dtype = torch.float32) -> tuple:
    """The case's, with a label in every row: the kernels leave out rows that are ignored (one in five of the tests' inputs),
    plain PyTorch computes them, too, and a share of the limit counts their bytes."""
    args = CASES[op].inputs(*size, dtype=dtype)
    return tuple(x.clamp(min=0) if isinstance(x, Tensor) and not x.is_floating_point() else x for x in args)


def _operator(workload: Workload) -> Task:
    case = CASES[workload.op]
    args = convert(inputs(workload.op, *workload.size, dtype=workload.dtype), device=DEVICE)
    return Task(
        workload.op,
        case.function,
        args,
        _leaves(args),
        lambda: _gradients(case.reference, convert(args, dtype=torch.float64)),
    )


def _kl(workload: Workload) -> Task:
    """KL alone from one teacher at temperature 1: what other libraries have."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(workload.size, generator=g).to(DEVICE, workload.dtype) for _ in range(2))
    args = (student.requires_grad_(), teacher)

    def kl(z: Tensor, x: Tensor) -> Tensor:
        return af.multi_teacher_kd_loss(z, [x], None, temperature=1.0, alpha=1.0)

    def plain(z: Tensor, x: Tensor) -> Tensor:
        return torch.nn.functional.kl_div(z.log_softmax(-1), x.softmax(-1), reduction="batchmean")

    return Task(workload.op, kl, args, [student], lambda: _gradients(plain, convert(args, dtype=torch.float64)))


def _whole_loss(workload: Workload) -> Task:
    """AMTMLLoss without hints: weights from [N, 64, 8, 8], KL + CE, angle."""
    n, c, t = workload.size
    student, teachers, _, labels = convert(inputs("multi_teacher_kd", n, c, t, dtype=workload.dtype), device=DEVICE)
    features = torch.randn(n, 64, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE, workload.dtype)
    torch.manual_seed(0)
    loss = af.AMTMLLoss(af.TeacherAdapter(64, t)).to(DEVICE)
    args = (student, teachers, labels, features.requires_grad_())

    def whole(*inputs: Any) -> Tensor:
        return loss(*inputs).loss

    def exact() -> tuple[Tensor, ...]:
        with af.use_backend("reference"):
            wide = af.AMTMLLoss(af.TeacherAdapter(64, t)).double()
            wide.load_state_dict(loss.state_dict())
            inputs = convert(args, dtype=torch.float64, device=torch.device("cpu"))
            return _gradients(lambda *a: wide(*a).loss, inputs, [*_leaves(inputs), *wide.parameters()])

    return Task(workload.op, whole, args, [student, features, *loss.parameters()], exact)


MAKERS = {"whole_loss": _whole_loss, "kl": _kl}

_BF16 = torch.bfloat16
_EVERYWHERE = (
    Workload("whole_loss", (128, 100, 3), quick=True),
    Workload("whole_loss", (512, 200, 3)),
    Workload("multi_teacher_kd", (128, 100, 3), quick=True),
    Workload("divergence", (128, 100, 3), quick=True),
    Workload("topk_kd", (128, 1000, 32, 3), quick=True),
    Workload("topk_bucket", (128, 1000, 32, 3), quick=True),
    Workload("angle", (128, 100), quick=True),
    Workload("hint", (128, 16, 16, 64, 8), quick=True),
    Workload("teacher_weights", (128, 64, 8, 8, 3), quick=True),
    Workload("dual_softmax", (512, 512), quick=True),
)
_CPU = (
    Workload("multi_teacher_kd", (16384, 10, 3)),
    Workload("multi_teacher_kd", (1024, 32000, 3)),
    Workload("multi_teacher_kd", (1024, 32000, 3), _BF16),
    Workload("divergence", (16384, 10, 3)),
    Workload("divergence", (1024, 32000, 3)),
    Workload("topk_kd", (1024, 32000, 64, 3)),
    Workload("topk_bucket", (1024, 32000, 64, 3)),
    Workload("kl", (1024, 32000)),
    Workload("kl", (128, 1000), quick=True),
    Workload("angle", (256, 100)),
    Workload("distance", (512, 100), quick=True),
    Workload("teacher_weights", (128, 64, 8, 8, 3), _BF16),
)
_GPU = (
    Workload("multi_teacher_kd", (524288, 21, 3)),
    Workload("multi_teacher_kd", (4096, 32000, 3), _BF16),
    Workload("multi_teacher_kd", (4096, 128256, 3), _BF16),
    Workload("multi_teacher_kd", (4096, 128256, 3)),
    Workload("divergence", (4096, 128256, 3), _BF16),
    Workload("topk_kd", (4096, 128256, 64, 3), _BF16),
    Workload("topk_bucket", (4096, 128256, 64, 3), _BF16),
    Workload("kl", (4096, 128256), _BF16),
    Workload("kl", (1024, 32000), quick=True),
    Workload("angle", (1024, 100)),
    Workload("angle", (4096, 100)),
    Workload("angle", (8192, 1000)),
    Workload("distance", (1024, 100), quick=True),
    Workload("teacher_weights", (128, 2048, 7, 7, 3), _BF16),
)
ORDER = [*MAKERS, *CASES]
WORKLOADS = sorted(_EVERYWHERE + (_GPU if GPU else _CPU), key=lambda workload: ORDER.index(workload.op))
