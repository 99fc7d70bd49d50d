"""Forms of the CUDA kernels that are for sizes too large for the emulator, or for trials. Its settings bring them about with few rows.

Angle loss: larger blocks, fixed point, pairs of floats, distances in two doubles. Weighted KL: rows that stay in shared memory between the sweeps.
Divergences: rows that several blocks share.
"""

import pytest
import torch
from backends import CHOSEN

import amtml_fast as af
from amtml_fast import reference
from amtml_fast.ops.angle import EPS, angle
from amtml_fast.testing import CASES, convert, relative_error, value_and_grads

pytestmark = [
    pytest.mark.usefixtures("fused"),
    pytest.mark.skipif(CHOSEN != "emulated", reason="about the emulator's settings"),
]


def _rows(kind, n=45, c=12):
    x, y = torch.rand(n, c), torch.rand(n, c)
    if kind == "clustered":  # squared distances from 1e-8 to 1: no fixed point
        x, y = (z[torch.randint(0, 5, (n,))] + 3e-5 * torch.randn(n, c) for z in (x, y))
    if kind == "near and far":  # distances from 1e-10 to 1: kept in two doubles
        x[:9], y[5:20] = 1e-10 * x[:9], 1e-7 * y[5:20]
    if kind == "huge":
        return 1e4 * x, 1e-4 * y
    if kind == "degenerate":  # among them rows that are one, which have no angle
        x[3] = x[7]
        y[5] = y[6] = y[7]
    return x, y


@pytest.mark.parametrize("pairs", ["0", "1"], ids=["double", "float pairs"])
@pytest.mark.parametrize(
    "kind, block",
    [*((k, "32") for k in ("even", "huge", "degenerate", "clustered", "near and far")), ("near and far", "16")],
)
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("slots", ["1", "3"])
def test_all_forms_are_the_float64_reference(monkeypatch, pairs, kind, block, needs, slots):
    monkeypatch.setenv("AMTML_EMULATED_BLOCK", block)
    monkeypatch.setenv("AMTML_EMULATED_PAIRS", pairs)
    monkeypatch.setenv("AMTML_EMULATED_SLOTS", slots)
    mask = torch.rand(45) < 0.9
    x, y = _rows(kind)
    for reduction in ("mean", "none"):
        a, b = x.clone().requires_grad_(needs[0]), y.clone().requires_grad_(needs[1])
        loss = angle(a, b, mask, delta=0.2, reduction=reduction)
        weight = torch.rand(loss.shape)
        got = torch.autograd.grad(loss, [t for t, n in ((a, needs[0]), (b, needs[1])) if n], weight)
        wide = [x.double().requires_grad_(needs[0]), y.double().requires_grad_(needs[1])]
        exact = reference.angle(*wide, mask, delta=0.2, reduction=reduction, eps=EPS)
        want = torch.autograd.grad(exact, [t for t, n in zip(wide, needs) if n], weight.double())
        assert relative_error(loss, exact) <= 1e-6
        for g, w in zip(got, want):
            g, w = g / w.norm(), w / w.norm()  # a small gradient is no rounding here
            assert relative_error(g, w) <= (2e-5 if kind == "clustered" else 3e-6)


def test_rows_that_are_not_finite_take_no_fixed_point(monkeypatch):
    monkeypatch.setenv("AMTML_EMULATED_BLOCK", "32")
    for bad in (torch.nan, torch.inf):
        x, y = _rows("even")
        x[4, 2] = bad
        assert af.angle_loss(x, y).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", ["3000", "100000"])  # part of a row, all of it
@pytest.mark.parametrize("teachers", [1, 3, 8])
def test_rows_that_stay_in_shared_memory(monkeypatch, dtype, kept, teachers):
    case = CASES["multi_teacher_kd"]
    inputs = convert(case.inputs(5, 4096, teachers), dtype=dtype)
    inputs[0].detach()[1, 7:40] = -torch.inf
    inputs[1][0][2, 5:300] = -torch.inf
    exact, exact_grads = value_and_grads(case.reference, convert(inputs, dtype=torch.float64))
    plain, plain_grads = value_and_grads(case.function, inputs)
    monkeypatch.setenv("AMTML_KEEP_BYTES", kept)
    got, grads = value_and_grads(case.function, inputs)
    for value, same, want in zip([got, *grads], [plain, *plain_grads], [exact, *exact_grads], strict=True):
        step = 1e-6 if value.dtype == torch.float32 else 2**-8
        assert relative_error(value, want) <= 2 * step
        assert relative_error(value, same) <= step


@pytest.mark.parametrize("mode", ["mixture", "sum", "logits"])
def test_divergences_of_long_rows_from_teachers_of_several_dtypes(mode):
    """Rows that several blocks share, four classes at a time, with more teachers than are loaded together; and statistics."""
    student, teachers, weights, labels = CASES["divergence"].inputs(3, 1040, 5)
    dtypes = torch.float32, torch.bfloat16, torch.float16
    args = student, [z.to(dtypes[t % 3]) for t, z in enumerate(teachers)], weights, labels
    alpha, temperature = torch.rand(3), torch.rand(3) + 0.5
    options = dict(mode=mode, reduction="none", temperature=temperature, label_smoothing=0.1, return_stats=True)
    for divergence in ("forward_kl", "reverse_kl", "skew_kl"):
        numbers = dict(divergence=divergence, alpha=alpha, **options)
        got, stats = af.multi_teacher_kd_loss(*args, **numbers)
        exact = convert((student, args[1], weights, labels), dtype=torch.float64)
        want, wanted = reference.multi_teacher_kd_loss(*exact, **numbers)
        assert relative_error(got, want) <= 1e-6
        for name, x, y in zip(stats._fields, stats, wanted):
            assert relative_error(x, y) <= 1e-6, name
        grads = torch.autograd.grad(got.sum(), (student, weights))
        for g, w in zip(grads, torch.autograd.grad(want.sum(), (exact[0], exact[2]))):
            assert relative_error(g, w) <= 1e-5
