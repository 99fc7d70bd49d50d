"""Forward + backward of every operator and of the whole loss, in pytest-benchmark groups.

Run with ``make bench``. Providers: ``cpp``, ``eager`` (the plain PyTorch reference) and ``compile`` (torch.compile of it, warmed
up). A case is timed only after its value and gradients have been found to match the float64 reference. Where the plain form does
not fit into memory, a smaller size of the same case stands for it (the angle loss alone), or our own float64 kernels do (the
whole loss at N = 512).
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import amtml_fast as af
from amtml_fast import autograd
from amtml_fast.testing import CASES, convert, relative_error, tensors, value_and_grads

SIZES: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("teacher_weights", (128, 64, 8, 8, 3)),
    ("multi_teacher_kd", (128, 100, 3)),
    ("multi_teacher_kd", (1024, 32000, 3)),
    ("angle", (128, 100)),
    ("angle", (256, 100)),
    ("distance", (512, 100)),
    ("hint", (128, 16, 16, 64, 8)),
    ("dual_softmax", (512, 512)),
)
WHOLE_LOSS = ((128, 100, 3), (512, 200, 3))
PROVIDERS = ("cpp", "eager", "compile")


def _name(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def _step(function: Callable[..., Any], args: tuple) -> Callable[[], object]:
    """Forward and backward; a loss as it is, as in a training loop, anything else by its sum."""
    leaves = [t for t in tensors(args) if t.requires_grad]

    def step() -> object:
        out = function(*args)
        return torch.autograd.grad(out if out.dim() == 0 else out.sum(), leaves)

    return step


def _time(benchmark: Any, step: Callable[[], object], seconds: float = 2.0) -> None:
    """At least 5 rounds and about ``seconds`` in all, after a warm-up."""
    step()
    rounds = max(5, min(200, int(seconds / max(_seconds(step), 1e-5))))
    benchmark.pedantic(step, rounds=rounds, warmup_rounds=2)


def _seconds(step: Callable[[], object]) -> float:
    from time import perf_counter

    start = perf_counter()
    step()
    return perf_counter() - start


@pytest.fixture
def backend(provider: str) -> Iterator[None]:
    torch._dynamo.reset()
    with af.use_backend("cpp" if provider == "cpp" else "reference"):
        yield


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("op", "size"), SIZES, ids=lambda x: _name(x) if isinstance(x, tuple) else x)
def test_op(benchmark: Any, op: str, size: tuple[int, ...], provider: str, backend: None) -> None:
    case = CASES[op]
    args = case.inputs(*size)
    function = torch.compile(case.function) if provider == "compile" else case.function
    _, want = value_and_grads(case.reference, convert(args, dtype=torch.float64))
    _, got = value_and_grads(function, args)
    assert all(relative_error(g, w) < 1e-4 for g, w in zip(got, want))
    del want, got
    benchmark.group = f"{op} {_name(size)} float32"
    benchmark.extra_info.update(provider=provider, bytes=case.bytes(4, *size), threads=torch.get_num_threads())
    _time(benchmark, _step(function, args))


def _soft_rows(kind: str, n: int, c: int) -> torch.Tensor:
    """Soft targets: of a network that has learnt little, and of one that is sure of itself (tight clusters of rows)."""
    g = torch.Generator().manual_seed(n + c)
    logits = torch.randn(n, c, generator=g)
    if kind == "clustered":
        logits += 10 * torch.nn.functional.one_hot(torch.randint(0, 10, (n,), generator=g), c)
    return (logits if kind == "clustered" else logits / 2).softmax(-1)


@pytest.mark.parametrize("kind", ["even", "clustered"])
@pytest.mark.parametrize("n", [128, 512, 1024, 4096])
def test_angle_grows(benchmark: Any, n: int, kind: str) -> None:
    """The angle loss alone, gradient to the student: triplets a second. The plain form would need N^3 memory."""
    student, teacher = _soft_rows(kind, n, 100).requires_grad_(), _soft_rows("even", n, 101)
    if n <= 128:
        _, want = value_and_grads(af.reference.angle_loss, (student.detach().double().requires_grad_(), teacher))
        _, got = value_and_grads(af.angle_loss, (student, teacher))
        assert relative_error(got[0], want[0]) < 1e-6
    benchmark.group = f"angle, {kind} rows"
    benchmark.extra_info.update(provider=f"cpp {n}", triplets=n**3, threads=torch.get_num_threads())
    step = _step(af.angle_loss, (student, teacher))
    if n == 4096:
        benchmark.pedantic(step, rounds=1)
    else:
        _time(benchmark, step)


def _whole_loss(n: int, c: int, t: int) -> tuple[Any, tuple, torch.Tensor]:
    student, teachers, _, labels = CASES["multi_teacher_kd"].inputs(n, c, t)
    features = torch.randn(n, 64, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return af.AMTMLLoss(af.TeacherAdapter(64, t)), (student, teachers, features), labels.clamp(min=0)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("size", WHOLE_LOSS, ids=_name)
def test_whole_loss(benchmark: Any, size: tuple[int, ...], provider: str, backend: None) -> None:
    """AMTMLLoss without hints: weights from [N, 64, 8, 8], KL + CE, angle."""
    loss, args, labels = _whole_loss(*size)
    function: Any = torch.compile(loss) if provider == "compile" else loss

    def whole(z: torch.Tensor, *rest: Any) -> torch.Tensor:
        return function(z, rest[0], labels, rest[1]).loss

    _, got = value_and_grads(whole, args)
    with af.use_backend("cpp" if size[0] > 256 else "reference"):  # in float64 the plain form takes 20 GB at 512
        exact = loss.double()
        _, want = value_and_grads(lambda z, ts, x: exact(z, ts, labels, x).loss, convert(args, dtype=torch.float64))
    loss.float()
    assert all(relative_error(g, w) < 1e-4 for g, w in zip(got, want))
    benchmark.group = f"whole loss {_name(size)} float32"
    benchmark.extra_info.update(provider=provider, threads=torch.get_num_threads())
    _time(benchmark, _step(whole, args))


class _Empty(torch.autograd.Function):
    """The least that any loss costs: one node with the inputs of the whole loss that need a gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return inputs[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        return ctx.saved_tensors


@pytest.mark.parametrize("provider", ["empty node", "whole loss, kernels replaced"])
def test_overhead(benchmark: Any, provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and dispatch of AMTMLLoss at N = 128, without its arithmetic."""
    loss, (student, teachers, features), labels = _whole_loss(128, 100, 3)
    leaves = [student, features, *loss.parameters()]
    if provider == "empty node":
        step = lambda: torch.autograd.grad(_Empty.apply(*leaves), leaves)  # noqa: E731
    else:
        results = {}

        class Recorded:  # each operator runs once, and from then on returns what it returned
            def __getattr__(self, name: str) -> Any:
                def call(*args: Any) -> Any:
                    if name not in results:
                        results[name] = getattr(torch.ops.amtml, name).default(*args)
                    return tuple(t.detach() for t in results[name])

                return type("Op", (), {"default": staticmethod(call)})

        monkeypatch.setattr(autograd, "ops", Recorded())
        step = lambda: torch.autograd.grad(loss(student, teachers, labels, features).loss, leaves)  # noqa: E731
    benchmark.group = "overhead at N = 128"
    benchmark.extra_info.update(provider=provider, threads=torch.get_num_threads())
    _time(benchmark, step, 1.0)


def test_copy_bandwidth(benchmark: Any) -> None:
    """What the shares of the limit refer to."""
    source, target = torch.ones(2**26), torch.zeros(2**26)
    benchmark.group = "limit"
    benchmark.extra_info.update(provider="copy", bytes=2 * 4 * 2**26, threads=torch.get_num_threads())
    _time(benchmark, lambda: target.copy_(source))
