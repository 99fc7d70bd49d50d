"""Losses of a whole vocabulary and of a part of it, from the same numbers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import amtml_fast as af

N, C, T, H = 7, 24, 3, 5
Cut = Callable[[Tensor, int], Tensor]  # the part of this process, of a tensor with classes in this dimension
Built = tuple[dict[str, Tensor], Callable]  # leaves, and the loss of them


# --- inputs. A builder makes the same numbers for one process, whose `cut` leaves them whole, and for a part.


class Numbers:
    def __init__(self, dtype: torch.dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(3), dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def weights(self, *shape: int) -> Tensor:
        w = self.uniform(*shape)
        return w / w.sum(-1, keepdim=True)

    def integers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, generator=self.generator)


def labels_of(numbers: Numbers, *shape: int, ignore_index: int = -100) -> Tensor:
    labels = numbers.integers(C, *shape)
    labels.view(-1)[:4] = torch.tensor([1, C - 1, ignore_index, C // 2])
    return labels


def dense(
    cut: Cut,
    dtype: torch.dtype = torch.float64,
    change: Callable = lambda *_: None,
    rows: bool = False,
    labeled: bool = True,
    weighted: bool = True,
    shape: tuple[int, ...] = (N,),
    **options: Any,
) -> Built:
    numbers = Numbers(dtype)
    student = 2 * numbers.normal(*shape, C)
    teachers = [2 * numbers.normal(*shape, C) for _ in range(T)]
    ignored = options.get("ignore_index", -100)
    labels = labels_of(numbers, *shape, ignore_index=ignored) if shape[0] else torch.zeros(shape, dtype=torch.int64)
    weights, alpha, tau = numbers.weights(*shape, T), numbers.uniform(*shape), 1 + numbers.uniform(*shape)
    change(student, teachers, labels, weights, alpha, tau)
    leaves = {"student": cut(student, -1)}
    if weighted:
        leaves["weights"] = weights
    if rows:
        leaves["alpha"] = alpha
        options |= dict(temperature=tau, teacher_temperature=[1.0, 2.0, 3.0])

    def loss(leaf: dict[str, Tensor], **group: Any) -> Any:
        more = options | ({"alpha": leaf["alpha"]} if rows else {}) | group
        given = [cut(t, -1) for t in teachers]
        return af.multi_teacher_kd_loss(
            leaf["student"], given, leaf.get("weights"), labels if labeled else None, **more
        )

    return leaves, loss


def topk(cut: Cut, dtype: torch.dtype = torch.float64, change: Callable = lambda *_: None, **options: Any) -> Built:
    numbers = Numbers(dtype)
    student = 2 * numbers.normal(N, C)
    k = options.pop("k", 4)
    tops = [(numbers.normal(N, C)).log_softmax(-1).topk(k - i) for i in range(T)]
    indices, log_probs = [t.indices for t in tops], [t.values for t in tops]
    labels = labels_of(numbers, N, ignore_index=options.get("ignore_index", -100))
    weights = numbers.weights(N, T)
    change(student, indices, log_probs, labels, weights)
    leaves = {"student": cut(student, -1), "weights": weights}
    options = dict(temperature=2.0) | options
    return leaves, lambda leaf, **group: af.topk_kd_loss(
        leaf["student"], indices, log_probs, leaf["weights"], labels, **options, **group
    )


def linear(
    cut: Cut,
    dtype: torch.dtype = torch.float64,
    kinds: str = "linear",
    rows: bool = False,
    index: bool = False,
    labeled: bool = True,
    ignored: bool = False,
    **options: Any,
) -> Built:
    numbers = Numbers(dtype)
    hidden, weight, bias = numbers.normal(N, H), numbers.normal(C, H), numbers.normal(C)
    made: list[Any] = []
    for t in range(T):
        kind = kinds if kinds != "mixed" else ("linear", "logits", "topk")[t]
        top = numbers.normal(N, C).log_softmax(-1).topk(4)
        if kind == "logits":
            made.append(cut(numbers.normal(N, C), -1))
        elif kind == "topk":
            made.append(af.TopKTeacher(top.indices, top.values))
        else:
            layer = numbers.normal(C, H + t), numbers.normal(C)
            made.append(af.LinearTeacher(numbers.normal(N, H + t), cut(layer[0], 0), cut(layer[1], 0) if t else None))
    labels, alpha, tau = labels_of(numbers, N), numbers.uniform(N), 1 + numbers.uniform(N)
    if ignored:
        labels = labels.fill_(-100)
    leaves = {"hidden": hidden, "weight": cut(weight, 0), "bias": cut(bias, 0)}
    if index:
        options["teacher_index"] = numbers.integers(T, N)
    else:
        leaves["weights"] = numbers.weights(N, T)
    if rows:
        leaves["alpha"] = alpha
        options |= dict(temperature=tau, teacher_temperature=[1.0, 2.0, 3.0])

    def loss(leaf: dict[str, Tensor], **group: Any) -> Any:
        more = options | ({"alpha": leaf["alpha"]} if rows else {}) | group
        return af.fused_linear_kd_loss(
            leaf["hidden"], leaf["weight"], made, leaf.get("weights"), labels if labeled else None,
            student_bias=leaf["bias"], **more,
        )  # fmt: skip

    return leaves, loss


def shifted(student: Tensor, teachers: list, *_: Tensor) -> None:
    for x in (student, *teachers):
        x.add_(1000)


# --- what is compared


def found(build: Callable[[Cut], Built], cut: Cut, **group: Any) -> dict[str, Tensor]:
    """The loss, its gradients and its statistics; of "none" with another incoming gradient for every row."""
    leaves, loss = build(cut)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    value = loss(leaves, **group)
    value, stats = value if isinstance(value, tuple) else (value, None)
    steps = torch.arange(1, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
    grads = torch.autograd.grad(value, list(leaves.values()), steps)
    out = {"loss": value.detach()} | {f"gradient to {name}": g for name, g in zip(leaves, grads)}
    return out if stats is None else out | stats._asdict()


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in norm; infinite where one is infinite or NaN and the other is not the same."""
    if got.shape != want.shape:
        return float("inf")
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(got.nan_to_num(7.5)[~finite], want.nan_to_num(7.5)[~finite]) or not got[finite].isfinite().all():
        return float("inf")
    return float((got - want)[finite].norm() / want[finite].norm().clamp(min=1e-3))


def whole(x: Tensor, dim: int) -> Tensor:
    return x


def part_of(rank: int, parts: int = 4) -> Cut:
    size = C // parts
    return lambda x, dim: x.narrow(dim, rank * size, size).contiguous()


def widened(build: Callable[[Cut], Built]) -> Callable[[Cut], Built]:
    """The same numbers, in float64."""

    def wide(cut: Cut) -> Built:
        leaves, loss = build(cut)
        return {name: x.double() for name, x in leaves.items()}, loss

    return wide
