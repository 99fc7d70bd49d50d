"""What the compilers make of the GPU kernels, read without a GPU: every Triton kernel as its launchers would run it on compute
capability 8.0, 9.0 and 10.0 in the operators' tests and at large sizes, and the CUDA kernels in the built library. None of
large sizes may spill registers to local memory, and of the tests' no more than one number."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from backends import cpu_only

from amtml_fast import backend

pytestmark = [
    cpu_only,
    pytest.mark.skipif(not backend.HAS_TRITON, reason="Triton (whose package has the tools) is not installed"),
]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a block may have
REGISTERS = 1 << 16  # of a multiprocessor
# Bytes of local memory, where spilled registers lie, that a thread may use, never in a loop. The assembler of Triton 3.6 (CUDA 12.8)
# parks as many as 6 numbers there in a few kernels; later ones up to 4, but in small sizes of the tests alone.
OLD_ASSEMBLER = backend.HAS_TRITON and tuple(map(int, version("triton").split(".")[:2])) < (3, 9)
SPILLED = {"large": 24, "small": 24} if OLD_ASSEMBLER else {"large": 0, "small": 16}
COMPILE = Path(__file__).parent / "compile_triton.py"
LIBRARY = Path(importlib.util.find_spec("amtml_fast._C").origin) if backend.HAS_CUDA else None
# What addresses of Triton kernels are made of in 32 bits, by the beginning of the line; and why it does not wrap.
PAIRS = "there is memory for the pairs, [P, P]"
PIXELS = "more pixels, and a longer side times what it is pooled to, are refused"
NARROW = {
    "_pairs.py: tile = 2 * side * tiles + ": PAIRS,
    "_pairs.py: tiles = tl.num_programs(0) * ": PAIRS,
    "angle.py: begin, end =": PAIRS,
    "angle.py: tl.store(loss + (": PAIRS,
    "hint.py: blocks = tl.cdiv(height * width": PIXELS,
    "hint.py: outputs = out_height * out_width": PIXELS,
    "hint.py: return i * size // out": PIXELS,
    "hint.py: norm = tl.load(norms_ptr + n * height * width + y * width": PIXELS,
    "hint.py: grad = grad_ptr + n * channels * (pixels if SAME else": PIXELS,
    "hint.py: at = grad + c[:, None] * (out_height * out_width)": PIXELS,
    "hint.py: i, j = y * out_height // height": PIXELS,
    "teacher_weights.py: for start in range(part * BLOCK_C, channels": "more than 2^30 channels are refused",
}
# Every call of the operators' tests for every capability; else a part for each.
ALL = os.environ.get("AMTML_CUBINS") == "all"


def _tool(name: str) -> str:
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    return str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name)


def _sass(cubin: Path) -> dict[str, str]:
    """Kernel name -> its instructions. (cuobjdump -sass takes half a second a kernel, nvdisasm a tenth.)"""
    text = subprocess.run([_tool("nvdisasm"), "-c", cubin], check=True, capture_output=True, text=True).stdout
    parts = re.split(r"^\.text\.(\S+):$", text, flags=re.M)[1:]
    return dict(zip(parts[::2], parts[1::2]))


def _spills_in_a_loop(text: str) -> bool:
    """Whether one of the instructions between a label and a later jump back to it reads or writes local memory."""
    lines = text.splitlines()
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.startswith(".L_")}
    for at, line in enumerate(lines):
        to = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)
        loop = lines[labels.get(to[1], at) : at] if to else []
        if any(re.search(r"\b(STL|LDL)\b", each) for each in loop):
            return True
    return False


def _library_sass(kernel: str, folder: Path) -> dict[str, str]:
    """The same of the CUDA library's source file that has this kernel, for compute capability 9.0."""
    subprocess.run([_tool("cuobjdump"), "-xelf", "all", LIBRARY], cwd=folder, check=True, capture_output=True)
    (cubin,) = (c for c in folder.glob("*.sm_90.cubin") if any(kernel in n for n in _resources(c, "REG")["REG"]))
    return _sass(cubin)


def _resources(binary: Path, *kinds: str) -> dict[str, dict[str, int]]:
    """Of registers ("REG") or bytes of local memory ("STACK"): kernel name -> the most of all architectures."""
    run = subprocess.run([_tool("cuobjdump"), "-res-usage", binary], check=True, capture_output=True, text=True)
    used: dict[str, dict[str, int]] = {kind: {} for kind in kinds}
    for name, sizes in re.findall(r"Function (\S+):\n(.*)", run.stdout + run.stderr):
        for kind, of in used.items():
            of[name] = max(int(re.search(rf"\b{kind}:(\d+)", sizes)[1]), of.get(name, 0))
    return used


@pytest.mark.parametrize(("part", "capability"), list(enumerate(SHARED_BYTES)), ids=map(str, SHARED_BYTES))
def test_triton_kernels_compile_and_do_not_spill(part, capability, tmp_path):
    command = [sys.executable, COMPILE, str(capability), tmp_path, *([] if ALL else [str(part)])]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    # No launch leaves contraction to a default, which changes with Triton 3.10.
    assert "FP_FUSION" not in run.stderr
    cubins = sorted(tmp_path.glob("*.cubin"))
    seen = {path.stem.rsplit("-", 1)[0] for path in cubins}
    (kernels,) = importlib.util.find_spec("amtml_fast.kernels").submodule_search_locations
    source = "".join(p.read_text() for p in Path(kernels).glob("*.py"))
    missing = set(re.findall(r"def (\w+_kernel)\(", source)) - seen
    assert not missing or (capability != 90 and not ALL), f"no launcher ran {missing}"  # 9.0 has all large sizes
    spilling, narrow, wide, rows = {}, set(), set(), {"_kd_forward_kernel", "_kd_backward_kernel"}
    for path in cubins:
        facts = json.loads(path.with_suffix(".json").read_text())
        narrow.update(facts["narrow"])
        used = _resources(path, "REG", "STACK")
        (registers,), (stack,) = used["REG"].values(), used["STACK"].values()
        assert facts["shared_bytes"] <= SHARED_BYTES[capability], path.stem  # what a launch may ask for
        assert registers * 32 * facts["warps"] <= REGISTERS, path.stem
        of_loops = stack > 0 and any(map(_spills_in_a_loop, _sass(path).values()))
        if stack > SPILLED["large" if facts["large"] else "small"] or of_loops:
            spilling[path.stem] = stack
        name = path.stem.rsplit("-", 1)[0]
        if name in rows - wide and facts["large"] and any("LDG.E.128" in text for text in _sass(path).values()):
            wide.add(name)
    assert not spilling
    narrow = {line for line in narrow if not line.startswith(tuple(NARROW))}
    assert not narrow, "beyond 2^31 elements these wrap: 64 bits, or a size that is refused and a line of NARROW"
    assert wide == rows  # whole rows of multi_teacher_kd: 16 bytes at a time


with_cuda = pytest.mark.skipif(not backend.HAS_CUDA, reason="the extension was built without CUDA")


@with_cuda
def test_no_cuda_kernel_spills():
    stack = _resources(LIBRARY, "STACK")["STACK"]
    assert len(stack) > 100 and {name for name, size in stack.items() if size} == set()


@with_cuda
def test_rows_of_the_distillation_are_read_16_bytes_at_a_time(tmp_path):
    kernels = _library_sass("sweeps_kernel", tmp_path)
    whole_packs = {
        name: text
        for name, text in kernels.items()
        if re.search(r"11rows_kernelI.*Li[48]E", name) and "AnyType" not in name
    }
    assert len(whole_packs) == 6  # three dtypes, forward and backward
    for name, text in whole_packs.items():
        assert "LDG.E.128" in text, name

    registers = _resources(LIBRARY, "REG")["REG"]
    sweeps = {name: text for name, text in kernels.items() if "13sweeps_kernelI" in name}
    assert len(sweeps) == 24  # three dtypes, one to eight teachers
    for name, text in sweeps.items():
        teachers = int(re.search(r"Li(\d)E", name)[1])
        assert len(re.findall(r"LDG\.E\S*\.128", text)) >= 2 * (teachers + 1), name
        assert re.search(r"STG\.E\S*\.128", text), name
        most = 64 if teachers <= 2 else 80 if teachers <= 4 else 128  # on 8.0, for 4, 3, 2 blocks
        assert registers[name] <= most, name
