"""Triton kernels that are launched without Triton's binding of arguments: the same launches as Triton's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import CHOSEN, cpu_only

from amtml_fast import backend
from amtml_fast.ops._base import kernels

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton is not installed")


@cpu_only
def test_launches_are_those_of_triton():
    """In a process of its own: here kernels are interpreted."""
    script = Path(__file__).parent / "launch_by_hand.py"
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("passed") == 5


@pytest.mark.skipif(CHOSEN == "gpu", reason="about the interpreter")
def test_interpreted_kernels_are_launched_by_triton():
    from amtml_fast.kernels import _launch

    assert not _launch.by_hand


def test_whoever_traces_watches_or_profiles_sees_an_op():
    ops, direct = torch.ops.amtml_triton, kernels("triton")
    assert direct is not ops
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert kernels("triton") is ops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert kernels("triton") is ops
    seen = []
    torch.compile(lambda x: seen.append(kernels("triton") is ops) or x + 1, backend="eager", fullgraph=True)(
        torch.ones(1)
    )
    assert seen == [True]
    with torch._subclasses.FakeTensorMode() as mode:
        fake = torch.ones(4, 3)
    # Its mode is off: it is known by its type.
    out = direct.distance_fwd.default(fake, fake, 1.0, 1e-12, "mean", False, False)
    assert out[0].fake_mode is mode


def test_the_grid_of_a_large_map_is_one_of_a_gpu():
    """Its second and third sizes end at 65535."""
    from amtml_fast.kernels import hint

    for side, to in ((4096, 2048), (16384, 300)):  # small windows, and some that fill a program
        grid = hint._pool((2, 1, side, side), (side**2, side**2, side, 1), to, to, False).grid
        assert all(size < 1 << 16 for size in grid[1:])
