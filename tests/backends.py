"""Which backends the tests run, and on which device: set by AMTML_TEST_BACKENDS.

Unset: the CPU's kernels. ``triton``: Triton's, through its interpreter. ``emulated``: the CUDA kernels, compiled for the CPU against
tests/cuda_emulator. ``gpu``: CUDA and Triton on a GPU.
"""

import contextlib
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from two_devices import TwoDevices

import amtml_fast as af

# Not installed, but built in place: setup.py maps the kernels to here.
if importlib.util.find_spec("amtml_fast.kernels") is None:
    af.__path__.append(str(Path(__file__).parents[1]))

CHOSEN = os.environ.get("AMTML_TEST_BACKENDS", "")
DEVICE = {"gpu": "cuda", "emulated": "cpu:0"}.get(CHOSEN, "cpu")  # "cpu:0" stands for a GPU: two_devices.py
FUSED = {"": ["cpp"], "triton": ["triton"], "emulated": ["cuda"], "gpu": ["cuda", "triton"]}[CHOSEN]
BACKENDS = FUSED if CHOSEN == "gpu" else [*FUSED, "reference"]  # time on a GPU is for what runs only there

cpu_only = pytest.mark.skipif(CHOSEN != "", reason="about the CPU's kernels")
in_memory_of_the_cpu = pytest.mark.skipif(CHOSEN == "gpu", reason="untouched pages cost nothing on the CPU alone")


@contextlib.contextmanager
def run_on(name):
    """The backend, and its device for new tensors."""
    with af.use_backend(name), torch.device(DEVICE) if DEVICE != "cpu" else contextlib.nullcontext():
        before, TwoDevices.unknown = TwoDevices.unknown, torch.device(DEVICE)
        try:
            yield
        finally:
            TwoDevices.unknown = before


def takes(name, *dtypes):
    """Whether the backend takes these dtypes."""
    return name in ("cpp", "reference") or torch.float64 not in dtypes
