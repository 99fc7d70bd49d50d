"""A vocabulary split among four processes: what is refused and why, what is sent, DTensors, the code of the docs.

Four processes are started once. Each runs all CALLS and writes down what it was told.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from backends import cpu_only
from parallel import in_processes
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from vocabulary_parts import (
    Built,
    C,
    Cut,
    H,
    N,
    Numbers,
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
from amtml_fast import checks
from amtml_fast.ops import _linear_chunks
from amtml_fast.ops.divergence import ALL_MODES

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
    for mode in ALL_MODES:
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
def no_rows(rank: int, group: Any) -> list[float]:
    """The largest gradient to the weight, by products of 16-bit factors as on a GPU."""

    def product(a: Tensor, b: Tensor, out: Tensor) -> None:
        torch.mm(a.float(), b.float(), out=out)

    found = []
    with (
        mock.patch.object(_linear_chunks.Call, "own_products", False),
        mock.patch.object(_linear_chunks, "_narrow", lambda hidden, weight, wide: hidden.dtype != wide),
        mock.patch.object(_linear_chunks, "_narrow_product", product),
        mock.patch.object(_linear_chunks, "_adds_to_float32", lambda device, dtype: False),
    ):
        for dtype in (torch.bfloat16, torch.float16):
            hidden, weight = (torch.zeros(n, H, dtype=dtype, requires_grad=True) for n in (0, 6))
            teacher = af.LinearTeacher(torch.zeros(0, H), torch.zeros(6, H))
            loss = af.fused_linear_kd_loss(hidden, weight, [teacher], process_group=group)
            found += [float(loss), float(torch.autograd.grad(loss, weight)[0].abs().max())]
    return found


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


def _calls(rank: int) -> dict[str, Any]:
    out = {}
    for name, function in CALLS.items():
        torch.manual_seed(rank)
        out[name] = function(rank, dist.group.WORLD)
    return out


pytestmark = cpu_only


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return in_processes(4, _calls, tmp_path_factory.mktemp("four"))


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


def test_without_rows_there_is_no_loss_and_no_gradient(four: list[dict]) -> None:
    for said in four:
        assert said["no_rows"] == [0, 0, 0, 0]


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
