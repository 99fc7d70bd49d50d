"""No hidden inputs: torch's default dtype and device change no number."""

import ast
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from backends import cpu_only

import amtml_fast as af
from amtml_fast import dropin
from amtml_fast.testing import CASES, value_and_grads

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
MAKERS = {
    "tensor",
    "as_tensor",
    "full",
    "zeros",
    "ones",
    "empty",
    "rand",
    "randn",
    "randint",
    "randperm",
    "arange",
    "eye",
    "linspace",
}


@pytest.fixture
def defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def _whole_loss(num_items):
    loss = af.AMTMLLoss(af.TeacherAdapter(4, 2))
    batch = torch.randn(6, 5, requires_grad=True), [torch.randn(6, 5) for _ in range(2)], torch.arange(6) % 5
    features = torch.randn(6, 4, requires_grad=True)
    leaves = [batch[0], features, *loss.parameters()]

    def run():
        out = loss(*batch, features, num_items_in_batch=num_items)
        return [*out, *torch.autograd.grad(out.loss, leaves)]

    return run


@DTYPES
def test_operators_give_the_same_bits(dtype, on, defaults):
    runs = {op: partial(value_and_grads, case.function, case.inputs(*case.small)) for op, case in CASES.items()}
    runs["AMTMLLoss"] = _whole_loss(70_000)
    for name, run in runs.items():
        want = run()
        torch.set_default_dtype(dtype)
        with torch.device("meta"):
            got = run()
        torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@DTYPES
def test_parameters_start_the_same(dtype, defaults):
    def modules():
        torch.manual_seed(0)
        yield af.TeacherAdapter(4, 2)
        yield af.MultiGroupHintLoss({"a": 3, "b": 5}, [2, 4], teacher_scores=[1.0, 2.0])
        yield af.MultiGroupHintLoss({"a": 3, "b": 5}, [2, 4], mapping="random")
        yield dropin.FitNet(3, 5)
        yield dropin.Adapter([None, None], (6, 4))

    want = [dict(m.named_parameters()) for m in modules()]
    torch.set_default_dtype(dtype)
    assert all(map(torch.equal, (p for m in want for p in m.values()), (p for m in modules() for p in m.parameters())))
    with torch.device("meta"):  # where they are put is the caller's to say
        for module, parameters in zip(modules(), want):
            for name, p in module.named_parameters():
                assert p.device.type == "meta" and p.dtype == torch.float32 and p.shape == parameters[name].shape


@cpu_only
@pytest.mark.parametrize(
    "make",
    [
        lambda: af.TeacherAdapter(64, 3),
        lambda: af.TeacherAdapter(5, 2, init_scale=0.3),
        lambda: af.MultiGroupHintLoss({"a": 3, "b": 5}, [2, 4], teacher_scores=[1.0, 2.0]),
        lambda: af.TeacherGate(2, 5),
        lambda: dropin.FitNet(3, 5),
        lambda: dropin.Adapter([None, None], (6, 4)),
        lambda: dropin.MixtureAdapter([None, None], (6, 4)),
    ],
)
def test_parameters_made_on_meta_are_drawn_by_reset_parameters(make):
    torch.manual_seed(0)
    want = make().state_dict()
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    for part in module.modules():  # as FSDP2's users do
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    assert want
    torch.testing.assert_close(dict(module.state_dict()), dict(want), rtol=0, atol=0)


def test_tensors_are_made_with_a_dtype_and_a_device():
    """What the source can show: every call of a torch function that makes a tensor from nothing names both."""
    package = Path(af.__file__).parent
    for file in [*package.rglob("*.py"), *(package.parent / "kernels").glob("*.py")]:
        for call in ast.walk(ast.parse(file.read_text())):
            if (
                not isinstance(call, ast.Call)
                or not isinstance(call.func, ast.Attribute)
                or call.func.attr not in MAKERS
            ):
                continue
            if isinstance(call.func.value, ast.Name) and call.func.value.id == "torch":
                named = {keyword.arg for keyword in call.keywords}
                assert {"dtype", "device"} <= named, f"{file.name}:{call.lineno}: torch.{call.func.attr} names {named}"


# --- counts


@pytest.mark.parametrize(
    "count",
    [
        7,
        *(
            torch.tensor(7, dtype=dtype)
            for dtype in (torch.int64, torch.uint8, torch.float16, torch.float32, torch.float64)
        ),
    ],
    ids=repr,
)
def test_a_count_may_have_any_dtype(count, on):
    run, want = _whole_loss(count), _whole_loss(7)
    torch.manual_seed(0)
    args = CASES["multi_teacher_kd"].inputs(6, 5, 3)
    torch.testing.assert_close(
        af.multi_teacher_kd_loss(*args, num_items_in_batch=count), af.multi_teacher_kd_loss(*args, reduction="sum") / 7
    )
    assert [t.dtype for t in run()] == [t.dtype for t in want()]


@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.tensor(0.0), torch.tensor(0.0).half()], ids=repr)
def test_no_rows_that_count_and_a_count_of_0_are_0(count, on):
    labels = torch.full((6,), -100, dtype=torch.int64)
    student, weights = torch.randn(6, 5, requires_grad=True), torch.rand(6, 2, requires_grad=True)
    teachers = [torch.randn(6, 5) for _ in range(2)]
    top = [t.log_softmax(-1).topk(2) for t in teachers]
    adapter = af.TeacherAdapter(4, 2)
    losses = {
        "kd": af.multi_teacher_kd_loss(student, teachers, weights, labels, num_items_in_batch=count),
        "topk": af.topk_kd_loss(
            student, [t.indices for t in top], [t.values for t in top], weights, labels, num_items_in_batch=count
        ),
        "whole": af.AMTMLLoss(adapter, regularizer_weight=0.0)(
            student, teachers, labels, torch.randn(6, 4), num_items_in_batch=count
        ).loss,
    }
    for name, loss in losses.items():
        assert loss.item() == 0, name
        for grad in torch.autograd.grad(loss, [student, weights, *adapter.parameters()], allow_unused=True):
            assert grad is None or grad.count_nonzero() == 0, name


@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.tensor(0.0)], ids=repr)
def test_a_count_of_0_is_an_error_where_rows_count(count, on):
    labels = torch.tensor([-100, 1, 2, -100, 0, 3], dtype=torch.int32)
    student, teachers = torch.randn(6, 5), [torch.randn(6, 5)]
    top = [t.log_softmax(-1).topk(2) for t in teachers]
    losses = {
        "multi_teacher_kd_loss": lambda labels: af.multi_teacher_kd_loss(
            student, teachers, None, labels, num_items_in_batch=count
        ),
        "topk_kd_loss": lambda labels: af.topk_kd_loss(
            student, [t.indices for t in top], [t.values for t in top], None, labels, num_items_in_batch=count
        ),
        "fused_linear_kd_loss": lambda labels: af.fused_linear_kd_loss(
            student, torch.randn(5, 5), teachers, None, labels, num_items_in_batch=count
        ),
        "AMTMLLoss": lambda labels: af.AMTMLLoss(af.TeacherAdapter(4, 1))(
            student, teachers, labels, torch.randn(6, 4), num_items_in_batch=count
        ),
        "multi_teacher_kd_loss: num": lambda labels: dropin.generalized_jsd_loss(
            student, teachers[0], labels, num_items_in_batch=count
        ),
    }
    for name, loss in losses.items():
        with pytest.raises(ValueError, match=f"{name}.* must be above 0 where .* got {count}.* with 4 such labels"):
            loss(labels)
        with pytest.raises(
            ValueError, match=r"num_items_in_batch must be (in \[1, 2\*\*63\)|above 0) without labels, got 0"
        ):
            loss(None)


@cpu_only
def test_a_count_of_0_for_rows_that_count_is_no_small_number():
    """Where values cannot be looked at."""
    labels, count = torch.arange(6) % 5, torch.tensor(0)

    def loss(student):
        return af.multi_teacher_kd_loss(student, [torch.ones(6, 5)], None, labels, num_items_in_batch=count)

    assert torch.func.vmap(loss)(torch.randn(1, 6, 5)) > 1e36
    with pytest.raises(ValueError, match=re.escape("num_items_in_batch must be in [0, 2**63), got -1")):
        af.multi_teacher_kd_loss(torch.randn(6, 5), [torch.randn(6, 5)], None, labels, num_items_in_batch=-1)
