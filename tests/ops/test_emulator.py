"""The emulator of CUDA (tests/cuda_emulator) tells what a GPU would stop at, or make a wrong number of."""

import os
import subprocess

import pytest
from backends import CHOSEN
from cuda_emulator import build

pytestmark = pytest.mark.skipif(CHOSEN != "emulated", reason="about the emulator")
FAULTS = {
    "barriers that differ": "threads wait at different barriers",
    "shuffles that differ": "threads wait at different barriers",
    "lanes that left": "a shuffle asks a lane that is not there",
    "too little shared memory": "written behind shared memory",
    "too many blocks": "no GPU takes such a launch",
    "too many threads": "no GPU takes such a launch",
    "too much shared memory": "no GPU takes such a launch",
    "read too soon": "read too soon",
}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the emulator says to a kernel: 0 is right, and each fault has a number from 1 on."""
    program = tmp_path_factory.mktemp("emulator") / "faults"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-std=c++17", "-O1", build.HERE / "faults.cpp", "-o", program], check=True)
    return lambda number: subprocess.run([program, str(number)], capture_output=True, text=True, check=True).stdout


def test_a_right_kernel_runs(told):
    assert told(0) == ""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(told, fault):
    assert told(1 + list(FAULTS).index(fault)).strip().removeprefix("CUDA emulation: ") == FAULTS[fault]
