"""A vocabulary split among 2 and 4 processes (``process_group``) gives what one process gives with all of it.

Four processes are started once. Each runs all CASES, compares with one process there, and writes down what it found.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import cpu_only
from parallel import in_processes
from torch import Tensor
from vocabulary_parts import (
    Built,
    C,
    Cut,
    H,
    N,
    dense,
    error,
    found,
    linear,
    part_of,
    shifted,
    topk,
    whole,
    widened,
)

import amtml_fast as af
from amtml_fast.ops.divergence import ALL_MODES, DIVERGENCES

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


for _i, (_d, _m) in enumerate(itertools.product(DIVERGENCES, ALL_MODES)):
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
for _m in ALL_MODES:
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


def _cases(rank: int) -> dict[tuple, dict[str, float]]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    out = {}
    for i, (name, build) in enumerate(CASES.items()):
        wanted = Wanted(build)
        out[name, 4] = wanted.far(build, rank, 4, dist.group.WORLD)
        if rank // 2 == i % 2:  # two cases at the same time
            out[name, 2] = wanted.far(build, rank % 2, 2, pairs[rank // 2])
        with af.use_backend("reference"):
            out[name, "reference"] = Wanted(build).far(build, rank, 4, dist.group.WORLD)
    return out


pytestmark = cpu_only


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return in_processes(4, _cases, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_the_classes_gives_what_all_give(four: list[dict], name: str) -> None:
    """In 2 and in 4 processes, and in 4 without kernels."""
    for how in (2, 4, "reference"):
        tried = [one[name, how] for one in four if (name, how) in one]
        assert len(tried) == (2 if how == 2 else 4)
        for rank, errors in enumerate(tried):
            for what, far in errors.items():
                assert far <= TOLERANCE[dtype_of(CASES[name])], f"{what} of process {rank}, {how}"


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
