"""Rows of more classes than kernels look at at once (1024 in csrc/cpu/kd_rows.h), whose parts have little in common."""

import pytest
import torch
from backends import CHOSEN

import amtml_fast as af
from amtml_fast.testing import convert, relative_error, value_and_grads

pytestmark = pytest.mark.usefixtures("fused")
CLASSES, LABELS = 2600, [1500, 3, 2100, 2599, 1024, 7]
TEMPERATURES = [3.0] if CHOSEN else [1.0, 2.0, 3.0, 4.0]  # the CPU's kernels raise to the power 1, 2 and 4


def _rows(seed):
    """Logits [6, CLASSES]."""
    z = 2 * torch.randn(6, CLASSES, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    z[0, 1024:2048] -= 60 / (1 + seed)  # a chunk far below the others
    z[1, :1024] += 25  # far above
    z[2, 1024:2048] = -torch.inf
    z[3, 2599] = 40  # the maximum is in the last chunk, which is short
    z[4] += 1000
    z[5, 100:] = -torch.inf
    return z


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("teachers", [1, 3])
@pytest.mark.parametrize("loss", ["mixture", "sum", "logits", "jsd", "top-k"])
def test_chunks_have_one_softmax(loss, teachers, temperature):
    student, *others = convert([_rows(seed) for seed in range(1 + teachers)], device=torch.empty(()).device)
    weights = torch.rand(6, teachers, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(student.device)
    labels = torch.tensor(LABELS, device=student.device)

    def function(z, w):
        if loss == "top-k":
            top = [x.topk(40) for x in others]
            log_probs = [v.to(z.dtype).log_softmax(1) for v, _ in top]
            return af.topk_kd_loss(z, [i for _, i in top], log_probs, w, labels, temperature=temperature)
        options = {"divergence": "jsd"} if loss == "jsd" else {"mode": loss}
        return af.multi_teacher_kd_loss(
            z, [x.to(z.dtype) for x in others], w, labels, temperature=temperature, **options
        )

    args = [student.requires_grad_(), weights.requires_grad_()]
    value, grads = value_and_grads(function, args)
    with af.use_backend("reference"):
        want, want_grads = value_and_grads(function, convert(args, dtype=torch.float64))
    assert relative_error(value, want) <= 1e-6
    assert all(relative_error(g, w) <= 3e-6 for g, w in zip(grads, want_grads))
