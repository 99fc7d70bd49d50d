"""Shared by all tests: uninitialised memory is NaN, so that a kernel that leaves an element unwritten is seen."""

import os

import pytest
import torch

os.environ["AMTML_FILL_MEMORY"] = "1"  # what the C++ kernels take from the system; the fixture is for torch's own


@pytest.fixture(autouse=True)
def nan_filled_empties():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
