"""A vocabulary split among 2 and 4 processes (``process_group``) gives what one process gives with all of it.

Four processes are started once. Each runs all CASES and CALLS, compares with one process there, and writes down what it found.
"""

import functools
import itertools
import multiprocessing
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import cpu_only
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import amtml_fast as af
from amtml_fast import checks

N, C, T, H = 7, 24, 3, 5
DIVERGENCES = "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"
MODES = "mixture", "sum", "logits"
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


# --- what makes inputs hard


def padded(student: Tensor, teachers: list, labels: Tensor, *_: Tensor) -> None:
    """Two of four shards hold -inf alone; a class more is missing in the teachers, another in the student."""
    for x in (student, *teachers):
        x[:, C // 2 :] = -torch.inf
    teachers[0][:, 3] = -torch.inf
    labels.clamp_(max=C // 2 - 1)


def finite_apart(student: Tensor, teachers: list, labels: Tensor, *_: Tensor) -> None:
    """The student lacks what the teachers have, in one row, all of one shard."""
    student[1, : C // 4] = -torch.inf
    student[4, 2] = -torch.inf


def shifted(student: Tensor, teachers: list, *_: Tensor) -> None:
    for x in (student, *teachers):
        x.add_(1000)


def near(student: Tensor, teachers: list, *_: Tensor) -> None:
    for x in teachers:
        x.copy_(student + 0.1 * x)


def without_a_teacher(
    student: Tensor, teachers: list, labels: Tensor, weights: Tensor, alpha: Tensor, tau: Tensor
) -> None:
    """A teacher of NaN and -inf that has no weight; an alpha of 0 and of 1 where D is infinite."""
    weights[:, 1] = 0
    teachers[1][:3] = torch.nan
    teachers[1][3:, ::2] = -torch.inf
    student[4, 2] = student[5, 2] = -torch.inf
    alpha[4], alpha[5] = 0, 1


def ignored_nan(student: Tensor, teachers: list, labels: Tensor, weights: Tensor, alpha: Tensor, tau: Tensor) -> None:
    student[2], teachers[0][2] = torch.nan, torch.inf  # labels_of ignores row 2
    alpha[2] = tau[2] = torch.nan


def twice(student: Tensor, indices: list, log_probs: list, labels: Tensor, weights: Tensor) -> None:
    indices[0][:, 1] = indices[0][:, 0]
    indices[1][:, 0] = indices[0][:, 0]
    labels[5] = indices[0][5, 0]


def ignored_topk(student: Tensor, indices: list, log_probs: list, labels: Tensor, weights: Tensor) -> None:
    student[2], log_probs[0][2] = torch.nan, torch.nan  # labels_of ignores row 2
    indices[1][2] = -5


def ties(student: Tensor, indices: list, *_: Any) -> None:
    """In row 1 all logits, so that the first classes of all are the largest; teachers name the first of each part."""
    student.copy_(student.round())
    student[1] = 0
    indices[0][1] = torch.arange(0, C, C // 4)


def padded_topk(student: Tensor, indices: list, log_probs: list, labels: Tensor, weights: Tensor) -> None:
    student[:, C // 2 :] = -torch.inf
    for index in indices:
        index.remainder_(C // 2)
    labels.clamp_(max=C // 2 - 1)


# --- the cases

CASES: dict[str, Callable[[Cut], Built]] = {}


def case(name: str, build: Callable, **options: Any) -> None:
    assert name not in CASES
    CASES[name] = functools.partial(build, **options)


for _i, (_d, _m) in enumerate(itertools.product(DIVERGENCES, MODES)):
    _shared = dict(divergence=_d, mode=_m, return_stats=True)
    case(f"dense {_d} {_m}", dense, **_shared, label_smoothing=0.1 * (_i % 2), rows=_i % 2 == 0, reduction="none")
    case(f"dense {_d} {_m} near", dense, **_shared, dtype=torch.float32, change=near, temperature=2.0)
    case(f"dense {_d} {_m} padded", dense, **_shared, change=padded, rows=True)
    case(f"dense {_d} {_m} no weight", dense, **_shared, change=without_a_teacher, rows=True, reduction="none")
    if _i % 3 == 0:
        case(f"dense {_d} apart", dense, **_shared, change=finite_apart, reduction="none")
    if _i % 2 == 0:
        _kinds = ("linear", "mixed")[_i // 2 % 2]
        case(f"linear {_d} {_m}", linear, **_shared, kinds=_kinds, chunk_size=3, label_smoothing=0.1)

_PLAIN = dict(temperature=2.0, label_smoothing=0.1)
case("dense without labels", dense, labeled=False, **_PLAIN)
case("dense without weights", dense, weighted=False, mode="sum", return_stats=True, **_PLAIN)
case("dense mean", dense, reduction="mean", **_PLAIN)
case("dense sum", dense, reduction="sum", **_PLAIN)
case("dense items", dense, num_items_in_batch=11, **_PLAIN)
case("dense items in a tensor", dense, num_items_in_batch=torch.tensor(11), return_stats=True, **_PLAIN)
case("dense alpha 0", dense, alpha=0.0, **_PLAIN)
case("dense alpha 1", dense, alpha=1.0, **_PLAIN)
case("dense alpha 0 sum", dense, alpha=0.0, mode="sum", **_PLAIN)
case("dense alpha 0 no rows", dense, alpha=0.0, shape=(0,), **_PLAIN)
case("topk alpha 0", topk, alpha=0.0)
case("topk alpha 0 bucket", topk, alpha=0.0, tail="bucket")
case("dense temperature 1", dense, temperature=1.0, alpha=0.3, t2_scale=False)
case("dense [B, S, C]", dense, shape=(3, 2), reduction="none", return_stats=True, **_PLAIN)
case("dense no rows", dense, shape=(0,), return_stats=True, **_PLAIN)
case("dense ignored NaN", dense, change=ignored_nan, return_stats=True, rows=True)
case("dense ignore_index is a class", dense, ignore_index=0, return_stats=True, **_PLAIN)
case("dense float32", dense, dtype=torch.float32, **_PLAIN)
case("dense bfloat16", dense, dtype=torch.bfloat16, **_PLAIN)
case("dense float16", dense, dtype=torch.float16, divergence="jsd", **_PLAIN)
for _m in MODES:
    case(f"dense far off {_m}", dense, dtype=torch.float32, change=shifted, mode=_m, temperature=1.0)
case("dense cold", dense, dtype=torch.float32, temperature=0.05, divergence="jsd")
for _d in DIVERGENCES:
    case(f"topk bucket {_d}", topk, tail="bucket", divergence=_d, return_stats=True, label_smoothing=0.1)
    case(f"topk bucket {_d} of the student", topk, tail="bucket", divergence=_d, support="student", change=ties)
for _tail in ("renormalize", "ignore", "uniform", "bucket"):
    _shared = dict(tail=_tail, return_stats=True)
    case(f"topk {_tail}", topk, **_shared, label_smoothing=0.1)
    case(f"topk {_tail} twice", topk, **_shared, change=twice, reduction="none", ignore_index=0)
    case(f"topk {_tail} padded", topk, **_shared, change=padded_topk, temperature=1.0)
    case(f"topk {_tail} of all classes", topk, **_shared, k=C, num_items_in_batch=5)
    case(f"topk {_tail} float32", topk, **_shared, dtype=torch.float32, label_smoothing=0.1)
    case(f"topk {_tail} ignored NaN", topk, **_shared, change=ignored_topk, reduction="none", label_smoothing=0.1)
    case(f"topk {_tail} bfloat16", topk, tail=_tail, dtype=torch.bfloat16)
case("linear float32", linear, dtype=torch.float32, kinds="mixed", return_stats=True, **_PLAIN)
case("linear bfloat16", linear, dtype=torch.bfloat16, kinds="mixed", **_PLAIN)
case("linear bfloat16 sums", linear, dtype=torch.bfloat16, accumulate="bf16", chunk_size=3, **_PLAIN)
case("linear rows", linear, rows=True, kinds="mixed", reduction="none", chunk_size=2, return_stats=True)
case("linear routed", linear, index=True, kinds="mixed", mode="sum", return_stats=True, chunk_size=2, **_PLAIN)
case("linear routed rows", linear, index=True, rows=True, kinds="mixed", divergence="jsd", chunk_size=2)
case("linear top-k", linear, kinds="topk", **_PLAIN)
case("linear capped", linear, softcap=2.0, logit_scale=0.7, reduction="mean", return_stats=True, **_PLAIN)
case("linear all ignored", linear, ignored=True, return_stats=True, **_PLAIN)
case("linear without labels", linear, labeled=False, num_items_in_batch=3, temperature=2.0)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


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


class Wanted:
    """What one process gives. Of float32 the truth is what float64 makes of the same numbers, and ``slack`` is by how much
    plain PyTorch misses it: twice that is allowed, where it is more than 1e-5."""

    def __init__(self, build: Callable[[Cut], Built]):
        self.one = self.truth = found(build, whole)
        self.slack = dict.fromkeys(self.one, 1.0)
        if dtype_of(build) == torch.float32:
            self.truth = found(widened(build), whole)
            with af.use_backend("reference"):
                plain = found(build, whole)
            for name, value in self.truth.items():
                self.slack[name] = max(1.0, 2e5 * error(plain[name].double(), value))

    def far(self, build: Callable[[Cut], Built], rank: int, parts: int, group: Any) -> dict[str, float]:
        """By how much a part misses it."""
        cut = part_of(rank, parts)
        got, out = found(build, cut, process_group=group), {}
        for name, value in self.truth.items():
            for dim, (a, b) in enumerate(zip(value.shape, got[name].shape)):
                value = value if a == b else cut(value, dim)
            out[name] = error(got[name].double(), value.double()) / self.slack[name]
            if got[name].dtype != self.one[name].dtype:
                out[name] = float("inf")
        return out


def dtype_of(build: Any) -> torch.dtype:
    return build.keywords.get("dtype", torch.float64)


# --- other calls: what each says or gives

CALLS: dict[str, Callable[[int, Any], Any]] = {}


def call(function: Callable[[int, Any], Any]) -> Callable:
    CALLS[function.__name__] = function
    return function


def called(build: Callable, cut: Cut, **options: Any) -> Any:
    leaves, loss = build(cut)
    return loss({name: x.detach().requires_grad_() for name, x in leaves.items()}, **options)


def message(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return "no error"


@call
def uneven_shards(rank: int, group: Any) -> str:
    student = torch.randn(N, 6 + rank // 3)
    return message(lambda: af.multi_teacher_kd_loss(student, [student], None, process_group=group))


@call
def other_rows(rank: int, group: Any) -> str:
    student = torch.randn(N + rank // 3, 6)
    return message(lambda: af.multi_teacher_kd_loss(student, [student], None, process_group=group))


@call
def other_settings(rank: int, group: Any) -> str:
    tau = 2.0 if rank == 1 else 1.0
    return message(lambda: called(functools.partial(topk, temperature=tau), part_of(rank), process_group=group))


@call
def other_arguments(rank: int, group: Any) -> str:
    """One process has weights, the others have none."""
    z, weights = torch.zeros(3, 6), torch.ones(3, 1) if rank == 1 else None
    return message(lambda: af.multi_teacher_kd_loss(z, [z], weights, process_group=group))


@call
def other_labels(rank: int, group: Any) -> str:
    labels = torch.tensor([rank, 1, 2])
    return message(
        lambda: af.multi_teacher_kd_loss(torch.zeros(3, 6), [torch.zeros(3, 6)], None, labels, process_group=group)
    )


@call
def other_hidden_states(rank: int, group: Any) -> str:
    hidden = torch.randn(N, H, generator=torch.Generator().manual_seed(rank))
    teachers = [torch.zeros(N, 6)]
    return message(lambda: af.fused_linear_kd_loss(hidden, torch.ones(6, H), teachers, process_group=group))


@call
def other_order_of_labels(rank: int, group: Any) -> str:
    labels, z = torch.tensor([1, 2, 5] if rank else [2, 1, 5]), torch.zeros(3, 6)
    return message(lambda: af.multi_teacher_kd_loss(z, [z], None, labels, process_group=group))


@call
def other_teachers(rank: int, group: Any) -> list[str]:
    """Other hidden states of a teacher, and other top-k entries whose sums are the same."""
    hidden, weight = torch.ones(N, H), torch.ones(6, H)
    states = torch.randn(N, H, generator=torch.Generator().manual_seed(rank))
    top = torch.tensor([[3, 7] if rank else [4, 6]] * N)
    teachers = af.LinearTeacher(states, weight), af.TopKTeacher(top, torch.full((N, 2), -1.0))
    return [message(lambda t=t: af.fused_linear_kd_loss(hidden, weight, [t], process_group=group)) for t in teachers]


@call
def digits_of_float64(rank: int, group: Any) -> float:
    """Where one input alone is float64, all is."""
    numbers = Numbers(torch.float64)
    z, t, w = numbers.normal(N, C), numbers.normal(N, C), numbers.weights(N, 1)
    top = t.float().log_softmax(-1).topk(4)
    cut, out = part_of(rank), 0.0

    def far(loss: Callable, part: tuple, whole: tuple) -> float:
        return error(loss(*part, process_group=group), loss(*whole))

    for tail in ("renormalize", "uniform", "bucket"):
        loss = functools.partial(af.topk_kd_loss, tail=tail)
        given = [top.indices] * 3, [top.values] * 3, None
        out = max(out, far(loss, (cut(z, 1), *given), (z, *given)))
    z, t = z.float(), t.float()
    for mode in MODES:
        loss = functools.partial(af.multi_teacher_kd_loss, mode=mode)
        out = max(out, far(loss, (cut(z, 1), [cut(t, 1)], w), (z, [t], w)))
    return out


@call
def no_group(rank: int, group: Any) -> str:
    return message(lambda: called(dense, part_of(rank), process_group="world"))


@call
def labels_beyond_all_classes(rank: int, group: Any) -> str:
    def beyond(student: Tensor, teachers: list, labels: Tensor, *_: Tensor) -> None:
        labels[5] = C

    return message(lambda: called(functools.partial(dense, change=beyond), part_of(rank), process_group=group))


@call
def indices_beyond_all_classes(rank: int, group: Any) -> str:
    def beyond(student: Tensor, indices: list, *_: Any) -> None:
        indices[1][3, 1] = C

    return message(lambda: called(functools.partial(topk, change=beyond), part_of(rank), process_group=group))


@call
def named_backend(rank: int, group: Any) -> list[str]:
    """The backend that is asked for runs, or says why not."""
    found = []
    for name in ("cpp", "cuda"):
        with af.use_backend(name):
            found.append(message(lambda: called(dense, part_of(rank), process_group=group, divergence="jsd")))
    return found


@call
def the_reference(rank: int, group: Any) -> str:
    z = torch.zeros(2, 3)
    return message(lambda: af.reference.multi_teacher_kd_loss(z, [z], None, process_group=group))


@call
def second_derivatives(rank: int, group: Any) -> list[str]:
    out = []
    for build, leaf in ((dense, "student"), (topk, "student"), (linear, "hidden")):
        leaves, loss = build(part_of(rank))
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        value = loss(leaves, process_group=group)
        (grad,) = torch.autograd.grad(value, leaves[leaf], create_graph=True)
        out.append(message(lambda g=grad, x=leaves: torch.autograd.grad(g.sum(), list(x.values()))))
    return out


@call
def transforms(rank: int, group: Any) -> str:
    z = torch.zeros(N, 6)
    return message(lambda: torch.func.grad(lambda x: af.multi_teacher_kd_loss(x, [z], None, process_group=group))(z))


@call
def without_gradients(rank: int, group: Any) -> float:
    """What no gradient goes to sends fewer numbers, and is the same."""
    out = 0.0
    for build in (dense, topk, linear):
        with torch.no_grad():
            want, got = called(build, whole), called(build, part_of(rank), process_group=group)
        out = max(out, error(got, want))
    return out


@call
def far_off(rank: int, group: Any) -> float:
    """Where plain PyTorch loses digits of the gradient to the weights: logits around 1000."""
    build = functools.partial(dense, dtype=torch.float32, change=shifted, mode="logits", temperature=1.0)
    got = found(build, part_of(rank), process_group=group)
    return error(got["gradient to weights"].double(), found(widened(build), whole)["gradient to weights"])


@call
def same_bits(rank: int, group: Any) -> list[Tensor]:
    out = found(functools.partial(dense, dtype=torch.float32), part_of(rank), process_group=group)
    return [out["loss"], out["gradient to weights"]]


@call
def equal_models(rank: int, group: Any) -> list[list[float]]:
    """A student like its teacher has a KL of 0 and no gradient: by kernels, and by plain PyTorch."""
    z = torch.randn(N, C, generator=torch.Generator().manual_seed(0))
    z = part_of(rank)(z, -1).requires_grad_()
    found = []
    for mode in ("mixture", "sum"):
        for name in ("auto", "reference"):
            with af.use_backend(name):
                loss = af.multi_teacher_kd_loss(z, [z.detach()], None, temperature=2.0, mode=mode, process_group=group)
            found.append([float(loss.detach()), float(torch.autograd.grad(loss, z)[0].abs().max())])
    return found


@call
def what_is_sent(rank: int, group: Any) -> dict[str, list[int]]:
    """Of every exchange how many numbers this process gives, forward and backward."""
    sent: list[int] = []
    gather, reduce = dist.all_gather, dist.all_reduce
    wide = 4096

    def watched_gather(out: list, x: Tensor, **options: Any) -> Any:
        sent.append(x.numel())
        return gather(out, x, **options)

    def watched_reduce(x: Tensor, **options: Any) -> Any:
        sent.append(x.numel())
        return reduce(x, **options)

    dist.all_gather, dist.all_reduce = watched_gather, watched_reduce
    out = {}
    torch.manual_seed(0)
    z, w = torch.randn(N, wide), torch.rand(N, 2)
    top = torch.randn(N, wide).log_softmax(1).topk(3)
    hidden = torch.ones(N, H, requires_grad=True)
    calls = {
        "dense": lambda x: af.multi_teacher_kd_loss(x, [z, z], w, divergence="jsd", process_group=group),
        "topk": lambda x: af.topk_kd_loss(
            x, [top.indices] * 2, [top.values] * 2, w, tail="bucket", process_group=group
        ),
        "linear": lambda x: af.fused_linear_kd_loss(
            hidden, x.t() @ torch.ones(N, H), [z], None, chunk_size=4, process_group=group
        ),
    }
    for name, loss in calls.items():
        sent.clear()
        value = loss(torch.zeros(N, wide, requires_grad=True))
        forward = len(sent)
        value.backward()
        out[name] = [forward, *sent]
    dist.all_gather, dist.all_reduce = gather, reduce
    return out


@call
def not_read(rank: int, group: Any) -> list[bool]:
    """As on a GPU, whose values nobody reads: what does not fit makes the loss NaN."""
    read, checks.values_are_free = checks.values_are_free, lambda _: False
    uneven, labels = torch.randn(N, 6 + rank // 3), torch.tensor([0, 1, 2, C])
    z, hidden = torch.zeros(4, 6), torch.randn(N, H)
    top = torch.tensor([[0, C]] * 4)
    losses = (
        af.multi_teacher_kd_loss(torch.zeros(N, 6), [torch.zeros(N, 6)], None, process_group=group),
        af.multi_teacher_kd_loss(uneven, [uneven], None, process_group=group),
        af.fused_linear_kd_loss(hidden, torch.ones(6, H), [torch.zeros(N, 6)], process_group=group),
        af.multi_teacher_kd_loss(z, [z], None, labels, process_group=group),
        af.fused_linear_kd_loss(
            torch.ones(4, H), torch.ones(6, H), [af.TopKTeacher(top, torch.zeros(4, 2))], process_group=group
        ),
    )
    with af.use_backend("reference"):  # the C++ kernel looks at its places itself
        losses += (
            af.topk_kd_loss(z, [top], [torch.zeros(4, 2)], None, tail="bucket", process_group=group),
            af.topk_kd_loss(z, [top % C], [torch.zeros(4, 2)], None, labels, process_group=group),
        )
    checks.values_are_free = read
    return [bool(x.isnan()) for x in losses]


@call
def as_in_the_docs(rank: int, group: Any) -> list[float]:
    """The code of docs/language_models.md: how far its gradients are from those of one process."""
    torch.manual_seed(0)
    page = (Path(__file__).parents[2] / "docs" / "language_models.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page.split("## Tensor parallelism")[1].split("\n## ")[0], re.S)
    models = [torch.nn.ModuleDict({"lm_head": torch.nn.Linear(size, C, bias=False)}) for size in (H, H + 1)]
    models[1].requires_grad_(False)
    student, teacher = models
    hidden, teacher_hidden, next_tokens = torch.randn(2, N, H), torch.randn(2, N, H + 1), torch.randint(0, C, (2, N))
    hidden.requires_grad_()
    weight, taught = (x.lm_head.weight.detach() for x in models)
    leaves = [hidden, weight.clone().requires_grad_()]
    teachers = [af.LinearTeacher(teacher_hidden, taught)]
    want = torch.autograd.grad(af.fused_linear_kd_loss(*leaves, teachers, None, next_tokens), leaves)
    names = dict(
        student=student, teacher=teacher, mesh=init_device_mesh("cpu", (4,)), hidden=hidden, teacher_hidden=teacher_hidden,
        next_tokens=next_tokens, tensor_parallel_group=group, fused_linear_kd_loss=af.fused_linear_kd_loss,
        LinearTeacher=af.LinearTeacher, output_weight=part_of(rank)(weight, 0).requires_grad_(),
        teacher_output_weight=part_of(rank)(taught, 0),
    )  # fmt: skip
    out = []
    for block in blocks:
        hidden.grad = None
        exec(block, names)
        out.append(error(hidden.grad, want[0]))
    assert isinstance(student.lm_head.weight.grad, DTensor)
    out.append(error(student.lm_head.weight.grad.full_tensor(), want[1]))
    return [*out, error(names["output_weight"].grad, part_of(rank)(want[1], 0))]


def dtensors(build: Callable, mesh: DeviceMesh) -> dict[str, float]:
    """The same numbers, as DTensors and with no group; gradients are DTensors of the same placement."""

    def spread(x: Tensor, dim: int) -> Tensor:
        return distribute_tensor(x, mesh, [Shard(dim % x.dim())])

    def replicated(cut: Cut) -> Built:
        leaves, loss = build(cut)
        return {
            name: x if isinstance(x, DTensor) else distribute_tensor(x, mesh, [Replicate()])
            for name, x in leaves.items()
        }, loss

    want, got = found(build, whole), found(replicated, spread)
    out = {}
    for name, value in got.items():
        placement: Any = {"student": Shard(1), "weight": Shard(0), "bias": Shard(0)}.get(name.split()[-1], Replicate())
        if name.startswith("gradient"):
            assert isinstance(value, DTensor) and value.placements == (placement,), name
            value = value.full_tensor()
        out[name] = error(value, want[name])
    return out


@call
def dtensors_of_logits(rank: int, group: Any) -> dict[str, float]:
    return dtensors(functools.partial(dense, rows=True, return_stats=True), init_device_mesh("cpu", (4,)))


@call
def dtensors_with_topk(rank: int, group: Any) -> dict[str, float]:
    return dtensors(topk, init_device_mesh("cpu", (4,)))


@call
def dtensors_of_layers(rank: int, group: Any) -> dict[str, float]:
    return dtensors(functools.partial(linear, kinds="mixed"), init_device_mesh("cpu", (4,)))


@call
def wrong_dtensors(rank: int, group: Any) -> dict[str, str]:
    mesh, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    z = torch.zeros(8, C)

    def refused(student: Tensor, teacher: Tensor, **options: Any) -> str:
        return message(lambda: af.multi_teacher_kd_loss(student, [teacher], None, **options))

    split, rows, all_of_it = (distribute_tensor(z, mesh, [p]) for p in (Shard(1), Shard(0), Replicate()))
    backwards = DeviceMesh("cpu", [3, 2, 1, 0])
    return {
        "teacher of rows": refused(split, rows),
        "whole teacher": refused(split, all_of_it),
        "plain teacher": refused(split, z),
        "plain student": refused(z[:, :6], split, process_group=group),
        "with a group": refused(split, split, process_group=group),
        "two dimensions": refused(distribute_tensor(z, square, [Shard(0), Shard(1)]), split),
        "uneven": refused(*[distribute_tensor(torch.zeros(8, C + 1), mesh, [Shard(1)])] * 2),
        "backwards": refused(*[distribute_tensor(z, backwards, [Shard(1)])] * 2),
    }


# --- the processes


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    out: dict[str, Any] = {}
    for i, (name, build) in enumerate(CASES.items()):
        wanted = Wanted(build)
        out[name, 4] = wanted.far(build, rank, 4, dist.group.WORLD)
        if rank // 2 == i % 2:  # two cases at the same time
            out[name, 2] = wanted.far(build, rank % 2, 2, pairs[rank // 2])
        with af.use_backend("reference"):
            out[name, "reference"] = Wanted(build).far(build, rank, 4, dist.group.WORLD)
    for name, function in CALLS.items():
        torch.manual_seed(rank)
        out[name] = function(rank, dist.group.WORLD)
    torch.save(out, f"{folder}/{rank}")
    dist.destroy_process_group()


pytestmark = cpu_only


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("four")
    # Forked from a process that has imported the slow modules once.
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "amtml_fast"])
    torch.multiprocessing.start_processes(_process, (str(folder),), nprocs=4, start_method="forkserver")
    return [torch.load(Path(folder) / str(rank), weights_only=True) for rank in range(4)]


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_the_classes_gives_what_all_give(four: list[dict], name: str) -> None:
    """In 2 and in 4 processes, and in 4 without kernels."""
    for how in (2, 4, "reference"):
        tried = [one[name, how] for one in four if (name, how) in one]
        assert len(tried) == (2 if how == 2 else 4)
        for rank, errors in enumerate(tried):
            for what, far in errors.items():
                assert far <= TOLERANCE[dtype_of(CASES[name])], f"{what} of process {rank}, {how}"


def of_all(four: list[dict], name: str) -> Any:
    """What every process says; they say the same."""
    said = [one[name] for one in four]
    assert all(one == said[0] for one in said)
    return said[0]


SAME = "process_group must have the same"
REFUSED = {
    "uneven_shards": f"ValueError: multi_teacher_kd_loss: {SAME} number of classes on all processes, got [6, 6, 6, 7] by rank",
    "other_rows": f"ValueError: multi_teacher_kd_loss: {SAME} number of rows on all processes, got [7, 7, 7, 8] by rank",
    "other_labels": f"ValueError: multi_teacher_kd_loss: {SAME} labels or indices on all processes, got others",
    "other_order_of_labels": f"ValueError: multi_teacher_kd_loss: {SAME} labels or indices on all processes, got others",
    "other_hidden_states": f"ValueError: fused_linear_kd_loss: {SAME} hidden states, weights or log-probabilities on all "
    "processes, got others",
    "no_group": "TypeError: multi_teacher_kd_loss: process_group must be a torch.distributed.ProcessGroup that this process "
    "belongs to, or None, got str",
    "labels_beyond_all_classes": "ValueError: multi_teacher_kd_loss: labels[5] must be in [0, 24) or ignore_index -100, got 24",
    "indices_beyond_all_classes": "ValueError: topk_kd_loss: teacher_indices[1] must be in [0, 24), got 24 in row 3",
    "the_reference": "NotImplementedError: reference.multi_teacher_kd_loss: process_group must be None (the reference computes "
    "in one process), got one",
    "transforms": "RuntimeError: multi_teacher_kd_loss: process_group must be None under torch.func and in forward mode, got one",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_on_all_processes(four: list[dict], name: str) -> None:
    assert of_all(four, name) == REFUSED[name]


def test_other_refusals_say_why(four: list[dict]) -> None:
    for rank, one in enumerate(four):
        assert one["other_settings"].startswith(
            f"ValueError: topk_kd_loss: {SAME} settings on all processes, got others; "
        )
        assert f"process {rank} has (KDOptions(temperature={2.0 if rank == 1 else 1.0}," in one["other_settings"]
        assert f"multi_teacher_kd_loss: {SAME} settings on all processes" in one["other_arguments"]
    runs, cannot = of_all(four, "named_backend")
    assert runs == "no error" and 'backend "cuda" cannot run here' in cannot
    for said in of_all(four, "second_derivatives"):
        assert "process_group have no second derivative" in said


def test_teachers_that_differ_are_refused(four: list[dict]) -> None:
    states, entries = of_all(four, "other_teachers")
    assert f"{SAME} hidden states, weights or log-probabilities on all processes" in states
    assert f"{SAME} labels or indices on all processes" in entries


def test_one_float64_input_makes_all_of_it(four: list[dict]) -> None:
    assert max(one["digits_of_float64"] for one in four) < 1e-12


def test_without_gradients_it_is_the_same(four: list[dict]) -> None:
    assert max(one["without_gradients"] for one in four) < 1e-12


def test_large_logits_leave_the_weights_their_digits(four: list[dict]) -> None:
    assert of_all(four, "far_off") < 4e-5


def test_all_processes_have_the_same_bits(four: list[dict]) -> None:
    for one in four:
        assert all(map(torch.equal, one["same_bits"], four[0]["same_bits"]))


def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(four: list[dict]) -> None:
    for one in four:
        kernels, plain = one["equal_models"][::2], one["equal_models"][1::2]
        assert all(abs(loss) < 1e-6 and grad == 0 for loss, grad in kernels)  # the kernel's own KL is 1e-7 there
        assert plain == [[0, 0], [0, 0]]


def test_where_nobody_reads_values_the_loss_is_nan(four: list[dict]) -> None:
    assert of_all(four, "not_read") == [False] + 6 * [True]


def test_the_code_of_the_docs(four: list[dict]) -> None:
    for one in four:
        assert len(one["as_in_the_docs"]) == 4 and max(one["as_in_the_docs"]) < 1e-5


def test_only_numbers_of_rows_are_sent(four: list[dict]) -> None:
    """Of 4096 classes here, and 7 rows: how many exchanges in forward, and the numbers in each."""
    sent = of_all(four, "what_is_sent")
    header = 12  # and before it, what is to be the same
    assert sent["dense"] == [3, sent["dense"][1], 3 * N * 2, N * 2] and sent["dense"][1] <= header
    assert sent["topk"] == [2, sent["topk"][1], N * (7 + 2 * 3)] and sent["topk"][1] <= header
    assert sent["linear"][0] == 5 and sum(sent["linear"][2:6]) == N * (2 * 2 + 1) and sent["linear"][6:] == [N * H]


@pytest.mark.parametrize("name", ["dtensors_of_logits", "dtensors_with_topk", "dtensors_of_layers"])
def test_dtensors_need_no_group(four: list[dict], name: str) -> None:
    for one in four:
        assert max(one[name].values()) < 1e-12, one[name]


def test_dtensors_that_do_not_fit_are_refused(four: list[dict]) -> None:
    said = of_all(four, "wrong_dtensors")
    wanted = "teacher_logits[0] must be a DTensor with placement Shard(-1) on the mesh of student_logits, got"
    for name, got in (("rows", "(Shard(dim=0),) on"), ("whole", "(Replicate(),) on"), ("plain", "Tensor")):
        assert f"{wanted} {got}" in said[{"rows": "teacher of rows"}.get(name, f"{name} teacher")]
    assert "teacher_logits[0] must be [8, 6] like student_logits, got [8, 24]" in said["plain student"]
    assert "process_group must be None where student_logits is a DTensor" in said["with a group"]
    assert "student_logits must be on a device mesh of 1 dimension, got 2" in said["two dimensions"]
    assert "student_logits must have a number of classes that 4 processes share evenly" in said["uneven"]
    assert "in the order of its group, [0, 1, 2, 3], got [3, 2, 1, 0]" in said["backwards"]


# --- a group of one process


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("build", [dense, topk, linear])
def test_a_group_of_one_process_is_no_group(build: Callable, alone: Any) -> None:
    want, got = found(build, whole), found(build, whole, process_group=alone)
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_modules_take_the_group(alone: Any) -> None:
    z, hidden, weight = torch.randn(N, C), torch.randn(N, H), torch.randn(C, H)
    top = z.log_softmax(-1).topk(3)
    for module, given in (
        (af.MultiTeacherKDLoss, (z, [z])),
        (af.TopKKDLoss, (z, [top.indices], [top.values])),
        (af.FusedLinearKDLoss, (hidden, weight, [z])),
    ):
        assert torch.equal(module(process_group=alone)(*given), module()(*given))
        with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup"):
            module(process_group=1)(*given)


def test_compiled_code_is_refused_in_one_graph_and_else_left_out_of_graphs(alone: Any) -> None:
    z = torch.randn(N, C)

    def loss(x: Tensor) -> Tensor:
        return 2 * af.multi_teacher_kd_loss(x.sin(), [z], None, process_group=alone)

    with pytest.raises(RuntimeError, match="process_group must be None in compiled code"):
        torch.compile(loss, backend="eager", fullgraph=True)(z)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(loss, backend="eager")(z), loss(z))
