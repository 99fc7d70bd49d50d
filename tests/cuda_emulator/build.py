"""Compiles csrc/cuda/*.cu as C++ against the emulator's cuda_runtime.h, once for each state of the sources, and loads it."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
]
FLAGS += ["-DAMTML_EMULATED_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030a0000"]


def library() -> Path:
    """The library's path; it is built where it is missing."""
    sources = [ROOT / "csrc" / "module.cpp", *sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    flags = [*FLAGS, *os.environ.get("AMTML_EMULATOR_FLAGS", "").split()]
    headers = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.cuh"), HERE / "cuda_runtime.h"]
    state = hashlib.sha256(" ".join([torch.__version__, *flags]).encode())
    for file in sorted([*sources, *headers]):
        state.update(file.read_bytes())
    folder = ROOT / "build" / "cuda_emulator" / state.hexdigest()[:16]
    target = folder / "_C.abi3.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print("compiling the CUDA kernels for the emulator, for about a minute", file=sys.stderr)
    include = [HERE, *include_paths(), sysconfig.get_path("include")]
    compiler = [os.environ.get("CXX", "g++"), *flags, *(f"-I{path}" for path in include)]
    objects = [folder / f"{source.name}.o" for source in sources]

    def compiled(source: Path, target: Path) -> None:
        subprocess.run([*compiler, "-x", "c++", "-c", source, "-o", target], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compiled, sources, objects))
    libraries = Path(torch.__file__).parent / "lib"
    partial = target.with_suffix(f".{os.getpid()}")
    link = ["-shared", *objects, f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", partial]
    subprocess.run([*compiler, *link], check=True)
    partial.rename(target)
    return target


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("amtml_fast._C", library())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
