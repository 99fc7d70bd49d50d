"""Rows of a split vocabulary, one part after another in one process: the kernels of every backend give what the whole gives."""

from types import SimpleNamespace

import pytest
import torch
from backends import takes

from amtml_fast import reference
from amtml_fast.ops import _vocabulary_rows as rows
from amtml_fast.ops._vocabulary import Vocabulary
from amtml_fast.ops._vocabulary_kernels import KernelBlock, backend_of
from amtml_fast.ops._vocabulary_plain import Given, Rule
from amtml_fast.testing import relative_error

N, C, T, P, TAU, ALPHA = 9, 30, 3, 3, 2.0, 0.6


def numbers(dtype: torch.dtype, device: torch.device) -> tuple:
    student = 3 * torch.randn(N, C, dtype=dtype, device=device)
    teachers = [3 * torch.randn(N, C, dtype=dtype, device=device) for _ in range(T)]
    weights = torch.rand(N, T, dtype=torch.float32, device=device)
    labels = torch.tensor([0, 29, 10, -100, 9, 20, 19, 5, 0], device=device)
    teachers[0][1, :10] = -torch.inf  # nothing in the first part
    student[2, 20:], teachers[0][2, 20:], teachers[1][2, 20:], teachers[2][2, 20:] = (
        -torch.inf,
    ) * 4  # nor in the last
    student[7, :10] = -torch.inf  # the teachers have, so D is infinite
    student[3], teachers[1][3] = torch.nan, torch.nan  # a row that is ignored
    teachers[2][8, 3] = torch.nan
    weights[4, 1], teachers[1][4] = 0, torch.nan  # a teacher without weight
    return student, teachers, weights, labels


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labeled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("mode", ["mixture", "sum"])
def test_parts_make_the_whole(fused: str, mode: str, labeled: bool, dtype: torch.dtype) -> None:
    if not takes(fused, dtype):
        pytest.skip("no float64")
    student, teachers, weights, labels = numbers(dtype, torch.ones(()).device)
    wide = reference.wide_dtype(student)
    weights = weights.to(wide)
    divergence = reference.divergence_of(TAU, ALPHA, "forward_kl", None, None, T)
    rule = Rule(divergence, mode, TAU, -100, 0.1, labeled, True, True, False, wide, fused)
    assert backend_of(rule, None, student, weights, *teachers) == fused
    size = C // P
    parts = [slice(r * size, (r + 1) * size) for r in range(P)]
    blocks = [
        KernelBlock(
            Given(
                Vocabulary(None, r, P, size), rule, student[:, at], [t[:, at] for t in teachers], weights, labels, None
            )
        )
        for r, at in enumerate(parts)
    ]
    own = [block.sums() for block in blocks]
    normal = rows._normal(SimpleNamespace(gathered=lambda _: torch.stack(own)), own[0])
    shares = [block.shares(normal, mine) for block, mine in zip(blocks, own)]
    total = {name: sum(share[name] for share in shares) for name in shares[0]}
    by = ALPHA if labeled else 1.0
    of_each = torch.full((N, 1), by, dtype=wide, device=student.device) if mode == "mixture" else by * weights
    of_ce = torch.full((N,), 1 - ALPHA, dtype=wide, device=student.device) if labeled else None
    grad = torch.cat([block.gradient(normal, of_each, of_each, of_ce).to(wide) for block in blocks], 1)

    leaf, w = student.double().requires_grad_(), weights.double().requires_grad_()
    options = {
        "temperature": TAU,
        "alpha": ALPHA,
        "mode": mode,
        "t2_scale": False,
        "reduction": "none",
        "label_smoothing": 0.1,
    }
    wanted = [t.double() for t in teachers]
    if labeled:
        want = reference.multi_teacher_kd_loss(leaf, wanted, w, labels, **options)
    else:  # without labels no row is ignored: as with labels and all the weight on the teachers
        want = reference.multi_teacher_kd_loss(leaf, wanted, w, labels, **options | {"alpha": 1.0})
    want_grads = torch.autograd.grad(want.sum(), (leaf, w))
    distance = total["each"][:, 0] if mode == "mixture" else (w.detach() * total["each"]).sum(1)
    found = by * distance
    if labeled:
        of_label, of_classes = total["ce"].unbind(1)
        counted = labels != -100
        found = found - (1 - ALPHA) * (0.9 * of_label + 0.1 / C * of_classes) * counted
    finite = want.isfinite()  # label smoothing and a class that is out, too, make a row infinite
    assert torch.equal(found == torch.inf, want == torch.inf) and finite.sum() == N - 2 - labeled
    assert torch.equal(found.isnan(), want.isnan()) and want[8].isnan()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(found[finite], want[finite]) < tolerance
    assert relative_error(grad[:8], want_grads[0][:8]) < tolerance
    of_weights = by * (total["weights"] if mode == "mixture" else total["each"])
    assert relative_error(of_weights[finite], want_grads[1][finite]) < tolerance
