"""Forward + backward of every operator and of the whole loss, in pytest-benchmark groups.

Run with ``make bench``. Providers: ``cpp``, ``eager`` (the plain PyTorch reference) and ``compile`` (torch.compile of it, warmed
up). A case is timed only after its value and gradients have been found to match the float64 reference.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import amtml_fast as af
from amtml_fast.testing import CASES, convert, relative_error, tensors, value_and_grads

SIZES: dict[str, tuple[int, ...]] = {
    "teacher_weights": (128, 64, 8, 8, 3),
    "multi_teacher_kd": (128, 100, 3),
    "angle": (128, 100),
    "hint": (128, 16, 16, 64, 8),
    "dual_softmax": (512, 512),
}
PROVIDERS = ("cpp", "eager", "compile")
WHOLE_LOSS = (128, 100, 3)


def _step(function: Callable[..., Any], args: tuple) -> Callable[[], object]:
    leaves = [t for t in tensors(args) if t.requires_grad]
    return lambda: torch.autograd.grad(function(*args).sum(), leaves)


@pytest.fixture
def backend(provider: str) -> Iterator[None]:
    torch._dynamo.reset()
    with af.use_backend("cpp" if provider == "cpp" else "reference"):
        yield


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("op", SIZES)
def test_op(benchmark: Any, op: str, provider: str, backend: None) -> None:
    case, size = CASES[op], SIZES[op]
    args = case.inputs(*size)
    function = torch.compile(case.function) if provider == "compile" else case.function
    _, want = value_and_grads(case.reference, convert(args, dtype=torch.float64))
    _, got = value_and_grads(function, args)
    assert all(relative_error(g, w) < 1e-4 for g, w in zip(got, want))
    benchmark.group = f"{op} {'x'.join(map(str, size))} float32"
    benchmark.extra_info.update(provider=provider, bytes=case.bytes(4, *size), threads=torch.get_num_threads())
    benchmark.pedantic(_step(function, args), rounds=15, warmup_rounds=3)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_whole_loss(benchmark: Any, provider: str, backend: None) -> None:
    """AMTMLLoss without hints: weights from [N, 64, 8, 8], KL + CE, angle."""
    n, c, t = WHOLE_LOSS
    student, teachers, _, labels = CASES["multi_teacher_kd"].inputs(n, c, t)
    features = torch.randn(n, 64, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = af.AMTMLLoss(af.TeacherAdapter(64, t))
    function: Any = torch.compile(loss) if provider == "compile" else loss

    def whole(z: torch.Tensor, *rest: Any) -> torch.Tensor:
        return function(z, rest[0], labels, rest[1]).loss

    args = (student, teachers, features)
    _, got = value_and_grads(whole, args)
    with af.use_backend("reference"):
        exact = loss.double()
        _, want = value_and_grads(lambda z, ts, x: exact(z, ts, labels, x).loss, convert(args, dtype=torch.float64))
    loss.float()
    assert all(relative_error(g, w) < 1e-4 for g, w in zip(got, want))
    benchmark.group = f"whole loss {n}x{c}x{t} float32"
    benchmark.extra_info.update(provider=provider, threads=torch.get_num_threads())
    benchmark.pedantic(_step(whole, args), rounds=15, warmup_rounds=3)
