"""What the compilers make of the GPU kernels, read without a GPU: every Triton kernel as its launcher would run it on compute
capability 8.0, 9.0 and 10.0, and the CUDA kernels in the built library. None may spill registers to local memory."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from amtml_fast import backend

pytestmark = pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton (whose package has the tools) is not installed")
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a block may have
REGISTERS = 1 << 16  # of a multiprocessor
COMPILE = Path(__file__).parent / "compile_triton.py"


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def _sass(cubin: Path, *options: str) -> dict[str, str]:
    """Kernel name -> its instructions."""
    command = [_tool("cuobjdump"), "-sass", *options, cubin]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\s*Function : (\S+)$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def _resources(binary: Path, kind: str) -> dict[str, int]:
    """Kernel name -> registers ("REG") or bytes of local memory ("STACK"), the most of all architectures."""
    run = subprocess.run([_tool("cuobjdump"), "-res-usage", binary], check=True, capture_output=True, text=True)
    used: dict[str, int] = {}
    for name, size in re.findall(rf"Function (\S+):\n.*?\b{kind}:(\d+)", run.stdout + run.stderr):
        used[name] = max(int(size), used.get(name, 0))
    return used


def _spills(instructions: str) -> int:
    return len(re.findall(r"\b(?:LDL|STL)\b", instructions))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton_kernels_compile_and_do_not_spill(capability, tmp_path):
    run = subprocess.run([sys.executable, COMPILE, str(capability), tmp_path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (
        "FP_FUSION" not in run.stderr
    )  # a launch that leaves contraction to a default, which changes with Triton 3.10
    cubins = sorted(tmp_path.glob("*.cubin"))
    seen = {path.stem.rsplit("-", 1)[0] for path in cubins}
    source = "".join(p.read_text() for p in (Path(backend.__file__).parents[1] / "kernels").glob("*.py"))
    missing = set(re.findall(r"def (\w+_kernel)\(", source)) - seen
    assert not missing, f"no launcher ran {missing}"
    spilling, wide = {}, set()
    for path in cubins:
        kernel = path.stem.rsplit("-", 1)[0]
        for instructions in _sass(path).values():
            if "LDG.E.128" in instructions:
                wide.add(kernel)
            if _spills(instructions):
                spilling[path.stem] = _spills(instructions)
    assert not spilling
    for path in cubins:  # what a launch may ask for
        sizes, (registers,) = json.loads(path.with_suffix(".json").read_text()), _resources(path, "REG").values()
        assert sizes["shared_bytes"] <= SHARED_BYTES[capability], path.stem
        assert registers * 32 * sizes["warps"] <= REGISTERS, path.stem
    assert {"_kd_forward_kernel", "_kd_backward_kernel"} <= wide  # whole rows of multi_teacher_kd: 16 bytes at a time


@pytest.mark.skipif(not backend.HAS_CUDA, reason="the extension was built without CUDA")
def test_cuda_kernels_do_not_spill_and_load_16_bytes_at_a_time():
    library = Path(importlib.util.find_spec("amtml_fast._C").origin)
    stack = _resources(library, "STACK")  # in it lies what is spilled
    assert len(stack) > 100 and {name for name, size in stack.items() if size} == set()
    whole_packs = {
        name: text
        for name, text in _sass(library, "-arch", "sm_90").items()
        if re.search(r"11rows_kernelI.*Li[48]E", name) and "AnyType" not in name
    }
    assert len(whole_packs) == 6  # three dtypes, forward and backward
    for name, text in whole_packs.items():
        assert "LDG.E.128" in text, name
