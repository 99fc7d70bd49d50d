"""The angle loss: distances of all sizes, equal rows, rows that are not finite, left out or shifted, and memory."""

import subprocess
import sys

import pytest
import torch
from backends import CHOSEN, DEVICE, cpu_only, takes

import amtml_fast as af
from amtml_fast import reference
from amtml_fast.ops._base import kernels
from amtml_fast.ops.angle import EPS, angle
from amtml_fast.testing import CASES, convert, relative_error, value_and_grads


@pytest.mark.parametrize("ratio", [60, 70, 1e4], ids=["fixed point", "past it", "far past it"])
def test_angle_of_distances_that_differ_is_as_good_as_float64(ratio, fused):
    """Up to a ratio of 64 of the squared distances sums are made in 32-bit fixed point, beyond it in float64."""
    n = 90 if fused == "cpp" or CHOSEN == "gpu" else 40  # an interpreter's time
    student = torch.eye(n, dtype=torch.float64) + 1e-3 * torch.randn(n, n, dtype=torch.float64)  # all distances 2^1/2
    student[0] = torch.eye(n, dtype=torch.float64)[0] * (2 * ratio - 1) ** 0.5  # but those to one row far away
    squared = torch.pdist(student).square()
    assert (squared.max() / squared.min()).item() == pytest.approx(ratio, rel=0.05)
    sides = student.float().requires_grad_(), torch.randn(n, 7, requires_grad=True)
    want, want_grads = value_and_grads(reference.angle_loss, convert(sides, dtype=torch.float64))
    got, grads = value_and_grads(af.angle_loss, sides)
    assert relative_error(got, want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-6 for g, w in zip(grads, want_grads))


def _near_and_far(kind, generator):
    """Rows of which some are up to 1e15 times closer to each other than to the rest."""
    rows = torch.randn(24, 10, dtype=torch.float64, device="cpu", generator=generator)
    if kind == "sure":  # what a sure teacher says: rows of a class 1e-4 to 1e-12 apart
        rows = (25 * rows).softmax(1)
    elif kind == "three sizes":
        rows[:6] *= 1e-6
        rows[:3] *= 1e-4
    else:  # features after a ReLU, two rows of which are all but dead
        rows = float(kind) * rows.relu()
        rows[:2] = 0
        rows[0, 4], rows[1, 3] = 2e-10, 1e-10
    return rows.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["sure", "three sizes", "1", "1e3", "1e5"])
def test_angle_between_arms_of_very_different_length(kind, dtype, fused):
    """Three squared distances then leave a small part of each: within 1e-6, or twice the error of plain float32."""
    if not takes(fused, dtype):
        pytest.skip("takes no float64")
    generator = torch.Generator("cpu").manual_seed(36)
    sides = tuple(_near_and_far(kind, generator).to(dtype).requires_grad_() for _ in range(2))
    want, want_grads = value_and_grads(reference.angle_loss, convert(sides, dtype=torch.float64))
    _, plain = value_and_grads(reference.angle_loss, sides)
    got, grads = value_and_grads(af.angle_loss, sides)
    exact = dtype == torch.float64
    assert relative_error(got, want) <= (1e-12 if exact else 1e-6)
    for g, p, w in zip(grads, plain, want_grads):
        g, p, w = (x.double() / w.norm() for x in (g, p, w))  # a small gradient is no rounding here
        assert relative_error(g, w) <= max(1e-10 if exact else 1e-6, 2 * relative_error(p, w))


def test_degenerate_pairs_of_the_angle_loss(on):
    """Equal rows: psi is 0 with gradient 0, and 1 against 0 at i = k where only one side is degenerate."""
    student = torch.randn(5, 3)
    student[1] = student[0]
    student.requires_grad_()
    teacher = torch.randn(5, 3)
    loss, (grad,) = value_and_grads(af.angle_loss, (student, teacher), torch.tensor(1.0), reduction="sum")
    x, y = student.detach().double(), teacher.double()
    total = 0.0
    for j in range(5):
        for i in range(5):
            for k in range(5):
                psi = []
                for r in (x, y):
                    a, b = r[i] - r[j], r[k] - r[j]
                    psi.append(float(a @ b / (a.norm() * b.norm())) if a.norm() > 0 and b.norm() > 0 else 0.0)
                d = abs(psi[0] - psi[1])
                total += d * d / 2 if d <= 1 else d - 0.5
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert grad.isfinite().all()
    nan = student.detach().clone()
    nan[0, 0] = torch.nan
    assert af.angle_loss(nan, teacher).isnan()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize(
    ("loss", "reduction"),
    [(af.angle_loss, "mean"), (af.angle_loss, "none"), (af.rkd_distance_loss, "mean")],
    ids=["angle", "angle of vertices", "distance"],
)
def test_a_row_that_is_not_finite_is_no_degenerate_one(loss, reduction, side, value, on):
    rows = [torch.randn(20, 5) for _ in range(2)]
    rows[side][3, 2] = value
    for x in rows:
        x.requires_grad_()
    out, grads = value_and_grads(loss, rows, reduction=reduction)
    assert out.isnan().all() and grads[side].isnan().all()


def test_distinct_without_three_rows_is_0(on):
    for n in (0, 1, 2):
        assert af.angle_loss(torch.ones(n, 3), torch.eye(3)[:n], reduction="distinct") == 0


@cpu_only
@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_shifting_all_rows_leaves_the_angle_loss_alone(name):
    student, teacher = (x.detach().double() for x in CASES["angle"].inputs(20, 5))
    with af.use_backend(name):
        want = af.angle_loss(student, teacher)
        torch.testing.assert_close(af.angle_loss(student * 3 + 7, teacher - 2), want, rtol=1e-9, atol=0)


def test_angle_of_masked_rows_is_that_of_the_others(on):
    student, teacher = CASES["angle"].inputs(9, 4)
    mask = torch.tensor([True, False, True, True, True, False, True, True, True])
    for reduction in ("mean", "sum"):
        got, grads = value_and_grads(angle, (student, teacher, mask), delta=1.0, reduction=reduction)
        rows = tuple(x.detach()[mask].requires_grad_() for x in (student, teacher))
        want, want_grads = value_and_grads(af.angle_loss, rows, reduction=reduction)
        torch.testing.assert_close(got, want)
        for g, w in zip(grads, want_grads):
            torch.testing.assert_close(g[mask], w)
            assert (g[~mask] == 0).all()


@cpu_only
def test_angle_memory_is_quadratic_and_small():
    """Peak memory of a child process over what it had before: a quarter of the gigabyte promised at 4096 rows."""
    code = """
import resource, torch, amtml_fast as af
s = torch.randn(2048, 100).softmax(1).requires_grad_()
t = torch.randn(2048, 100).softmax(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
af.angle_loss(s, t).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""
    gigabytes = float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert gigabytes < 0.25, gigabytes


@pytest.mark.parametrize("rows", [5, 70])
def test_backward_of_neither_side_makes_nothing(rows, fused):
    backward = kernels(fused).angle_bwd.default
    got = backward(torch.ones(rows), torch.randn(rows, 3), torch.randn(rows, 4), None, 1.0, EPS, False, False)
    assert [g.numel() for g in got] == [0, 0]
