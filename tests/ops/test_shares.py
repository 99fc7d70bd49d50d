"""Work that the CPU's threads share piece by piece (csrc/cpu/shares.h): all of it is done, and who does it changes no bit."""

import pytest
import torch
from backends import cpu_only
from parallel import on_threads

import amtml_fast as af
from amtml_fast.testing import CASES, convert, relative_error, value_and_grads

pytestmark = cpu_only
# Past 2^22 elements, with a last share that is shorter than the others.
SIZES = {
    "multi_teacher_kd": (301, 5000, 1),
    "divergence": (301, 5000, 1),
    "topk_kd": (301, 8000, 9, 2),
    "dual_softmax": (2055, 2060),
    "teacher_weights": (301, 64, 15, 15, 2),
}


@pytest.mark.parametrize("op", SIZES)
def test_every_share_is_taken_once(op):
    case = CASES[op]
    args = case.inputs(*SIZES[op])
    with af.use_backend("cpp"):
        runs = on_threads((1, 2, 3), lambda: value_and_grads(case.function, args))
    want, want_grads = value_and_grads(case.reference, convert(args, dtype=torch.float64))
    assert relative_error(runs[0][0], want) <= 1e-6
    assert all(relative_error(g, w) <= 1e-5 for g, w in zip(runs[0][1], want_grads))
    for out, grads in runs[1:]:
        assert torch.equal(out, runs[0][0]) and all(map(torch.equal, grads, runs[0][1]))
