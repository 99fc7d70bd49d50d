"""The forms of the CUDA angle loss that many rows have: larger blocks, fixed point, pairs of floats. The emulator's settings bring
them about with few rows."""

import pytest
import torch
from backends import CHOSEN

import amtml_fast as af
from amtml_fast import reference
from amtml_fast.ops.angle import EPS, angle
from amtml_fast.testing import relative_error

pytestmark = [
    pytest.mark.usefixtures("fused"),
    pytest.mark.skipif(CHOSEN != "emulated", reason="about forms that few rows have in the emulator alone"),
]


def _rows(kind, n=45, c=12):
    x, y = torch.rand(n, c), torch.rand(n, c)
    if kind == "clustered":  # squared distances from 1e-9 to 1: no fixed point
        x, y = x.round(), y.round()
        x, y = x + 3e-5 * torch.randn(n, c), y + 3e-5 * torch.randn(n, c)
    if kind == "huge":
        return 1e4 * x, 1e-4 * y
    if kind == "degenerate":  # among them rows that are one, which have no angle
        x[3] = x[7]
        y[5] = y[6] = y[7]
    return x, y


@pytest.mark.parametrize("pairs", ["0", "1"], ids=["double", "float pairs"])
@pytest.mark.parametrize("kind", ["even", "huge", "degenerate", "clustered"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("slots", ["1", "3"])
def test_all_forms_are_the_float64_reference(monkeypatch, pairs, kind, needs, slots):
    monkeypatch.setenv("AMTML_EMULATED_BLOCK", "32")
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
            assert relative_error(g, w) <= (2e-5 if kind == "clustered" else 3e-6)


def test_rows_that_are_not_finite_take_no_fixed_point(monkeypatch):
    monkeypatch.setenv("AMTML_EMULATED_BLOCK", "32")
    for bad in (torch.nan, torch.inf):
        x, y = _rows("even")
        x[4, 2] = bad
        assert af.angle_loss(x, y).isnan()
