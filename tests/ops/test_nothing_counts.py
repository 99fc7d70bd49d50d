"""What counts nothing changes nothing: rows that are ignored, terms without weight, classes that are out, and no rows at all."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from backends import takes
from torch import Tensor

import amtml_fast as af
from amtml_fast import dropin
from amtml_fast.testing import relative_error

everywhere = pytest.mark.usefixtures("on")
N, C, T, D, H = 5, 6, 2, 4, 3
IGNORED = 2
KEPT = [0, 1, 3, 4]


def labels() -> Tensor:
    return torch.tensor([0, 5, -100, 3, 1])


# --- an ignored row


class Adapter(torch.nn.Module):
    """Not the library's own: the loss calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = af.TeacherAdapter(D, T)

    def forward(self, features: Tensor) -> Tensor:
        return self.inner(features)

    def regularizer(self) -> Tensor:
        return self.inner.regularizer()


@everywhere
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("shape", [(D,), (D, 2, 2)], ids=["vectors", "maps"])
@pytest.mark.parametrize("kind", ["max", "avg", "called"])
def test_features_of_an_ignored_row_reach_no_gradient(kind: str, shape: tuple, bad: float) -> None:
    student, teachers = torch.randn(N, C), [torch.randn(N, C) for _ in range(T)]
    features = torch.randn(N, *shape)
    features[IGNORED] = bad
    loss = af.AMTMLLoss(Adapter() if kind == "called" else af.TeacherAdapter(D, T, pool=kind))

    def gradients(rows: list[int] | slice) -> list[Tensor]:
        leaves = [student[rows].requires_grad_(), features[rows].requires_grad_()]
        out = loss(leaves[0], [t[rows] for t in teachers], labels()[rows], leaves[1])
        return [out.loss, *torch.autograd.grad(out.loss, [*leaves, *loss.parameters()])]

    value, to_student, to_features, *rest = gradients(slice(None))
    want, want_student, want_features, *want_rest = gradients(KEPT)
    assert to_student[IGNORED].abs().sum() == 0 and to_features[IGNORED].abs().sum() == 0
    pairs = [(value, want), (to_student[KEPT], want_student), (to_features[KEPT], want_features), *zip(rest, want_rest)]
    for got, of_others in pairs:
        assert relative_error(got, of_others) < 1e-5


def _loss_of_rows(call: str, student: Tensor, weights: Tensor, alpha: Tensor) -> Tensor:
    """One value a row."""
    teachers = [torch.randn(N, C) for _ in range(T)]
    top = [t.log_softmax(1).topk(2) for t in teachers]
    named = [t.indices for t in top], [t.values for t in top]
    if call in ("forward_kl", "jsd"):
        return af.multi_teacher_kd_loss(student, teachers, weights, labels(), divergence=call, reduction="none")
    if call == "alpha":
        return af.multi_teacher_kd_loss(student, teachers, weights, labels(), alpha=alpha, reduction="none")
    if call == "linear":
        return af.fused_linear_kd_loss(student, torch.eye(C), teachers, weights, labels(), reduction="none")
    return af.topk_kd_loss(student, *named, weights, labels(), tail=call, reduction="none")


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("call", ["forward_kl", "jsd", "alpha", "linear", "renormalize", "bucket"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_comes_back_to_an_ignored_row_reaches_no_gradient(
    on: str, dtype: torch.dtype, call: str, bad: float
) -> None:
    """A mean over rows of which none counts sends NaN back to them, even where ``torch.where`` puts 0 in its place."""
    if not takes(on, dtype):
        pytest.skip("GPU kernels compute in float32")
    torch.manual_seed(0)
    leaves = [torch.randn(N, C).to(dtype), torch.rand(T), torch.rand(N)]  # one weight a teacher: summed over the rows
    given = [t.requires_grad_() for t in leaves]
    loss = _loss_of_rows(call, *given)

    def gradients(of_ignored: float) -> list[Tensor]:
        incoming = torch.ones_like(loss)
        incoming[IGNORED] = of_ignored
        grads = torch.autograd.grad(loss, given, incoming, retain_graph=True, allow_unused=True)
        return [g for g in grads if g is not None]

    want = gradients(0.0)
    assert len(want) == (3 if call == "alpha" else 2)
    for got, of_nothing in zip(gradients(bad), want):
        assert torch.equal(got, of_nothing)


@everywhere
@pytest.mark.parametrize("call", ["forward_kl", "jsd", "whole"])
def test_a_number_beyond_int32_ignores_no_int32_label(call: str) -> None:
    """Cut to 32 bits it would be the label 3."""
    student, teachers, ignored = torch.randn(N, C), [torch.randn(N, C)], 2**32 + 3
    features, loss = torch.randn(N, D), af.AMTMLLoss(af.TeacherAdapter(D, 1), ignore_index=2**32 + 3)
    made = []
    for dtype in (torch.int64, torch.int32):
        of_rows = torch.tensor([0, 5, 2, 3, 1], dtype=dtype)
        leaf = student.clone().requires_grad_()
        if call == "whole":
            value = loss(leaf, teachers, of_rows, features).loss
        else:
            value = af.multi_teacher_kd_loss(
                leaf, teachers, None, of_rows, divergence=call, reduction="none", ignore_index=ignored
            )
        made.append((value, *torch.autograd.grad(value.sum(), leaf)))
    for wide, narrow in zip(*made):
        assert torch.equal(wide, narrow)


@everywhere
def test_bytes_as_labels_of_a_drop_in() -> None:
    """No byte is -100; cut to 8 bits that would be 156."""
    student, teacher, said = torch.randn(3, C), torch.randn(3, C), torch.tensor([156, 0, 255])
    losses = [dropin.reverse_kl(student, teacher, {"label": x}) for x in (said, said.to(torch.uint8))]
    assert torch.equal(*losses)


def test_weights_that_nothing_comes_back_to(fused: str) -> None:
    features, theta, v = torch.randn(N, D), torch.randn(T, D), torch.randn(D)
    features[IGNORED, 1] = math.nan
    leaves = [x.requires_grad_() for x in (features, theta, v)]
    incoming = torch.randn(N, T)
    incoming[IGNORED] = 0
    for grad in torch.autograd.grad(af.teacher_weights(*leaves), leaves, incoming):
        assert grad.isfinite().all()


def _losses() -> dict:
    z, t = torch.randn(N, C), [torch.randn(N, C) for _ in range(T)]
    top = t[0].log_softmax(1).topk(3)
    entries = [top.indices] * T, [top.values] * T
    return {
        "multi_teacher_kd": lambda w, y: af.multi_teacher_kd_loss(z, t, w, y),
        "divergence": lambda w, y: af.multi_teacher_kd_loss(z, t, w, y, divergence="jsd"),
        "topk_kd": lambda w, y: af.topk_kd_loss(z, *entries, w, y),
        "topk_bucket": lambda w, y: af.topk_kd_loss(z, *entries, w, y, tail="bucket"),
        "fused_linear_kd": lambda w, y: af.fused_linear_kd_loss(z, torch.eye(C), t, w, y),
    }


LOSSES = pytest.mark.parametrize(
    "name", ["multi_teacher_kd", "divergence", "topk_kd", "topk_bucket", "fused_linear_kd"]
)


@everywhere
@pytest.mark.parametrize("bad", [math.nan, -1.0, math.inf], ids=str)
@LOSSES
def test_weights_of_an_ignored_row_may_be_anything(name: str, bad: float) -> None:
    loss, weights = _losses()[name], torch.rand(N, T)
    want = loss(weights, labels())
    weights[IGNORED] = bad
    weights.requires_grad_()
    got = loss(weights, labels())
    (grad,) = torch.autograd.grad(got, weights)
    assert relative_error(got, want) < 1e-6 and grad.isfinite().all() and (grad[IGNORED] == 0).all()


# --- a term without weight


@everywhere
@LOSSES
@pytest.mark.parametrize("row", ["ordinary", "NaN", "-inf"])
def test_all_the_weight_on_labels_leaves_teachers_a_gradient_of_0(name: str, row: str) -> None:
    """Whatever a row of theirs holds. Not None: who looks for parameters without a gradient finds none."""
    z = torch.randn(N, C, requires_grad=True)
    t = [torch.randn(N, C) for _ in range(T)]
    top = t[0].log_softmax(1).topk(3)
    if row != "ordinary":
        t[0][1] = top.values[1] = float(row)
    entries, w = ([top.indices] * T, [top.values] * T), torch.rand(N, T, requires_grad=True)
    linear = [af.LinearTeacher(teacher, torch.eye(C)) for teacher in t]
    calls = {
        "multi_teacher_kd": lambda **o: af.multi_teacher_kd_loss(z, t, w, labels(), **o),
        "divergence": lambda **o: af.multi_teacher_kd_loss(z, t, w, labels(), divergence="jsd", **o),
        "topk_kd": lambda **o: af.topk_kd_loss(z, *entries, w, labels(), **o),
        "topk_bucket": lambda **o: af.topk_kd_loss(z, *entries, w, labels(), tail="bucket", **o),
        "fused_linear_kd": lambda **o: af.fused_linear_kd_loss(z, torch.eye(C), t, w, labels(), **o),
        "linear teachers": lambda **o: af.fused_linear_kd_loss(z, torch.eye(C), linear, w, labels(), **o),
    }
    names = [name, "linear teachers"] if name == "fused_linear_kd" else [name]
    everyone = [{"alpha": 0.0}]
    if "topk" not in name:
        everyone = [
            {"alpha": alpha, "mode": mode} for mode in ("mixture", "sum", "logits") for alpha in (0.0, torch.zeros(N))
        ]
    for call, chosen, reduction in itertools.product(names, everyone, ("batchmean", "none")):
        loss = calls[call](**chosen, reduction=reduction)
        want = F.cross_entropy(z, labels(), reduction="none" if reduction == "none" else "mean")
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        grads = torch.autograd.grad(loss.sum(), (z, w))
        (right,) = torch.autograd.grad(want.sum(), z)
        torch.testing.assert_close(grads[0], right, rtol=1e-5, atol=1e-6)
        assert grads[1].shape == w.shape and (grads[1] == 0).all()


@everywhere
@pytest.mark.parametrize("row", ["NaN", "-inf"])
def test_all_the_weight_on_labels_leaves_an_adapter_as_it_is(row: str) -> None:
    student, teachers, features = torch.randn(N, C), [torch.randn(N, C) for _ in range(T)], torch.randn(N, D)
    teachers[0][1] = float(row)
    adapter = af.TeacherAdapter(D, T)
    af.AMTMLLoss(adapter, alpha=0.0, angle_weight=0.0, regularizer_weight=0.0)(
        student, teachers, labels(), features
    ).loss.backward()
    assert all((p.grad == 0).all() for p in adapter.parameters())


@everywhere
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_the_half_without_weight_of_symmetric_losses(side: int) -> None:
    """What one side lacks makes one of the two infinite."""
    logits = [torch.randn(N, C), torch.randn(N, C)]
    logits[side][:, 1] = -math.inf
    batch = {"label": labels()}
    forward, reverse = dropin.ForwardKLLoss(), dropin.ReverseKLLoss()
    want = (reverse if side == 0 else forward)(*logits, labels())
    assert want.isfinite()
    assert dropin.SymmetricKLLoss(float(side))(*logits, labels()) == want
    got = dropin.symmetric_kl(*logits, batch, 1.0 - side)
    assert got == (dropin.reverse_kl if side == 0 else dropin.forward_kl)(*logits, batch)


@everywhere
def test_a_hint_without_weight() -> None:
    maps = {"low": torch.full((N, D, 2, 2), math.inf, requires_grad=True)}
    hints = af.MultiGroupHintLoss({"low": D}, [D], teacher_scores=[1.0])
    given = torch.randn(N, C, requires_grad=True), [torch.randn(N, C)] * T, labels(), torch.randn(N, D)
    loss = af.AMTMLLoss(af.TeacherAdapter(D, T), hints=hints, hint_weight=0.0)
    out = loss(*given, student_maps=maps, teacher_maps=[torch.randn(N, D, 2, 2)])
    assert out.loss.isfinite() and not out.hint.isfinite()
    for grad in torch.autograd.grad(out.loss, list(hints.parameters())):
        assert (grad == 0).all()


# --- classes that are out


@everywhere
def test_masked_classes_stay_masked_under_a_softcap() -> None:
    """A vocabulary filled up with zeros in the weight and a bias of -inf is the shorter one."""
    hidden, weight, bias = torch.randn(N, H), torch.randn(C, H), torch.randn(C)
    taught, states = torch.randn(C, H), torch.randn(N, H)

    def loss(padded: int) -> tuple:
        more, out = torch.zeros(padded, H), torch.full((padded,), -math.inf)
        leaves = [x.clone().requires_grad_() for x in (hidden, torch.cat([weight, more]), torch.cat([bias, out]))]
        teacher = af.LinearTeacher(states, torch.cat([taught, more]), torch.cat([torch.zeros(C), out]))
        value = af.fused_linear_kd_loss(
            leaves[0], leaves[1], [teacher], None, labels(), student_bias=leaves[2], softcap=2.0, temperature=2.0
        )
        return value, *torch.autograd.grad(value, leaves)

    (value, to_hidden, to_weight, to_bias), want = loss(3), loss(0)
    assert (to_weight[C:] == 0).all() and (to_bias[C:] == 0).all()
    for got, right in zip((value, to_hidden, to_weight[:C], to_bias[:C]), want):
        assert relative_error(got, right) < 1e-5


# --- no rows


@everywhere
@pytest.mark.parametrize("kind", ["linear", "logits", "topk"])
@pytest.mark.parametrize("stats", [False, True])
def test_no_rows_from_hidden_states(kind: str, stats: bool) -> None:
    hidden, weight = torch.randn(0, H, requires_grad=True), torch.randn(C, H)
    teacher = {
        "linear": lambda: af.LinearTeacher(torch.randn(0, H), weight),
        "logits": lambda: torch.randn(0, C),
        "topk": lambda: af.TopKTeacher(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)),
    }[kind]()
    out = af.fused_linear_kd_loss(hidden, weight, [teacher], return_stats=stats)
    loss = out[0] if stats else out
    assert loss == 0 and torch.autograd.grad(loss, hidden)[0].shape == (0, H)
    if stats:
        assert out[1].teacher_kl.shape == (0, 1)
