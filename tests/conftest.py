"""Shared by all tests: uninitialized memory is NaN, so that a kernel that leaves an element unwritten is seen."""

import os
import sys

import pytest
import torch

os.environ["AMTML_FILL_MEMORY"] = "1"  # what the C++ kernels take from the system; the fixture is for torch's own
if os.environ.get("AMTML_TEST_BACKENDS") in ("triton", "emulated"):
    # MKL's products, which stand in for a GPU's there, have the same bits wherever their arguments lie. On some processors they
    # have not by default, and tests of equal bits would be of the memory's alignment.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
if os.environ.get("AMTML_TEST_BACKENDS") != "gpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
if os.environ.get("AMTML_TEST_BACKENDS") == "emulated":
    from cuda_emulator import build

    sys.modules["amtml_fast._C"] = build.load()  # its CUDA kernels serve CPU tensors
    from amtml_fast import backend

    backend.HAS_CUDA, backend.DEVICES["cuda"], backend.KERNELS["cpp"] = True, ("cpu",), ()

    from two_devices import TwoDevices

    TwoDevices().__enter__()  # before the tests' modules make tensors

from backends import BACKENDS, FUSED, run_on

from amtml_fast import backend

if os.environ.get("AMTML_TEST_BACKENDS") == "triton" and not backend.HAS_TRITON:
    pytest.exit("Triton is not installed: nothing to test", returncode=0)
if os.environ.get("TRITON_INTERPRET") == "1" and backend.HAS_TRITON:
    import triton_interpreter

    triton_interpreter.round_to_bfloat16()
    triton_interpreter.stay_in_the_language()
    triton_interpreter.look_for_overflow_in_numpy()
    triton_interpreter.compute_as_a_gpu()


if os.environ.get("AMTML_TEST_BACKENDS") == "gpu":
    torch.backends.cudnn.allow_tf32 = False  # on by default: a convolution would be right to 1e-3
    torch.backends.cudnn.deterministic = True


@pytest.fixture(autouse=True)
def nan_filled_empties():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=FUSED)
def fused(request):
    """Each compiled backend that runs here."""
    with run_on(request.param):
        yield request.param


@pytest.fixture(params=BACKENDS)
def on(request):
    """Each of them, and the reference."""
    with run_on(request.param):
        yield request.param
