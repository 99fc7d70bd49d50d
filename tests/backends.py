"""Which backends the tests run, and on which device: set by AMTML_TEST_BACKENDS.

Unset: the CPU's kernels. ``triton``: Triton's, through its interpreter. ``emulated``: the CUDA kernels, compiled for the CPU against
tests/cuda_emulator. ``gpu``: CUDA and Triton on a GPU.
"""

import contextlib
import os

import pytest
import torch

import amtml_fast as af

CHOSEN = os.environ.get("AMTML_TEST_BACKENDS", "")
DEVICE = "cuda" if CHOSEN == "gpu" else "cpu"
FUSED = {"": ["cpp"], "triton": ["triton"], "emulated": ["cuda"], "gpu": ["cuda", "triton"]}[CHOSEN]
BACKENDS = [*FUSED, "reference"]

cpu_only = pytest.mark.skipif(CHOSEN != "", reason="about the CPU's kernels")
in_memory_of_the_cpu = pytest.mark.skipif(CHOSEN == "gpu", reason="untouched pages cost nothing on the CPU alone")


@contextlib.contextmanager
def run_on(name):
    """The backend, and its device for new tensors."""
    with af.use_backend(name), torch.device(DEVICE) if DEVICE != "cpu" else contextlib.nullcontext():
        yield


def takes(name, *dtypes):
    """Whether the backend takes these dtypes."""
    return name in ("cpp", "reference") or torch.float64 not in dtypes
