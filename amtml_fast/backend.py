"""Which implementation runs an operator: loads the C++ extension, keeps the choice, and says why not.

This is the one place that chooses. ``auto`` takes the fastest backend that can run and falls back to the reference;
a backend chosen by name runs or raises.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch  # before _C: it brings libtorch into the process
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

BACKENDS = ("auto", "cpp", "cuda", "triton", "reference")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter runs kernels on the CPU
# The device types that each compiled backend serves; Triton's "cuda" is NVIDIA's and AMD's, "xpu" Intel's.
DEVICES = {"cpp": ("cpu",), "cuda": ("cuda",), "triton": ("cpu",) if INTERPRETED else ("cuda", "xpu")}
TRITON_FROM = 7  # the compute capability of an NVIDIA GPU
# The most that GPU kernels take of a row; entries are the classes that its top-k teachers name. CUDA kernels have no room for more;
# Triton's, which have code for each teacher, would take minutes to compile.
MOST_TEACHERS, MOST_ENTRIES = 32, 8192
# The operators, and those that each backend has: the files in ops/ fill both.
OPS: list[str] = []
KERNELS: dict[str, list[str]] = {"cpp": [], "cuda": [], "triton": []}


class Choice(NamedTuple):
    """What "auto" takes on a type of device, first choice first; the reference comes last everywhere."""

    device_type: str
    op: str | None  # None: every operator
    numbers: int  # of the operator's first tensor, from which on this holds
    backends: tuple[str, ...]


# The first line that fits holds. On an H200 CUDA was the faster of the two wherever both were timed (1.5 to 5 times), but for
# topk_kd: bfloat16 [4096, 128256], three teachers, k = 64 took Triton 2.58 ms and CUDA 3.24. CUDA also needs no compilation at run
# time. benchmarks/results/nvidia-h200 has the figures; `python -m benchmarks.tune` measures them on another GPU and prints lines.
AUTO = (
    Choice("cpu", None, 0, ("cpp",)),
    Choice("cuda", "topk_kd", 1 << 28, ("triton", "cuda")),
    Choice("cuda", None, 0, ("cuda", "triton")),
    Choice("xpu", None, 0, ("triton",)),
)

# Read by the C++ kernels, which would take a name that they do not know for the widest.
if (_vectors := os.environ.get("AMTML_CPU_VECTORS", "")) not in ("", "baseline", "avx2", "avx512"):
    raise ValueError(f"AMTML_CPU_VECTORS must be baseline, avx2 or avx512, got {_vectors!r}")

try:
    importlib.import_module("amtml_fast._C")  # registers the kernels
    WHY_NO_EXTENSION = None
except ImportError as error:
    WHY_NO_EXTENSION = str(error)  # kept: "not built" and "undefined symbol" are different problems

HAS_EXTENSION = WHY_NO_EXTENSION is None


def _why_no_triton() -> str | None:
    try:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
    except ImportError:  # an import hook that forbids it
        return "Triton is not installed"
    if importlib.util.find_spec("amtml_fast.kernels") is None:
        return f"there are no kernels (amtml_fast.kernels) for it beside {_FOLDER}; an installed package has them"
    return None


_FOLDER = Path(__file__).parent
WHY_NO_TRITON = _why_no_triton()
HAS_TRITON = WHY_NO_TRITON is None
torch.library.define("amtml::cuda_code", "(int device) -> int")
HAS_CUDA = HAS_EXTENSION and torch._C._dispatch_has_kernel_for_dispatch_key("amtml::whole_loss_fwd", "CUDA")


class BackendStatus(NamedTuple):
    """One row of ``backends()``. ``why_not`` is empty where ``available`` is true."""

    op: str
    backend: str
    available: bool
    why_not: str


def _known(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _without_extension() -> str:
    """What to do about it: the folder that is imported is a source folder, or one whose build has left word, or neither."""
    said = "amtml_fast runs on its plain PyTorch reference because its C++ extension does not load"
    if (_FOLDER.parent / "setup.py").is_file() and not any(_FOLDER.glob("_C.*")):
        return (
            f"{said}: {_FOLDER} is a source folder, in which it is not built. Where an installed package was meant, run from another "
            "folder. To build it here, or to see why that fails: AMTML_BUILD_EXT=1 pip install --no-build-isolation -e ."
        )
    note = _FOLDER / "not_built.txt"
    reason = f"it was not built: {note.read_text(encoding='utf-8').strip()}" if note.is_file() else WHY_NO_EXTENSION
    if sys.platform == "win32":
        return f"{said} ({reason})."
    return (
        f"{said} ({reason}). With torch, Python's headers and GCC or Clang, in its source folder: "
        "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps ."
    )


_active = _known(os.environ.get("AMTML_BACKEND") or "auto", "AMTML_BACKEND")
if _active == "auto" and not HAS_EXTENSION:
    warnings.warn(_without_extension(), stacklevel=2)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators inside the ``with`` block on one backend.

    Args:
        name: ``"auto"``, ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``. A backend other than ``auto`` never falls
            back: an operator that it cannot run raises ``RuntimeError`` and says why.

    The choice is process-wide while the block runs, not per thread: other threads see it too. (A ``ContextVar`` would
    break ``torch.compile(fullgraph=True)``.) The environment variable ``AMTML_BACKEND`` sets the choice at start.
    """
    global _active
    previous, _active = _active, _known(name, "use_backend")
    try:
        yield
    finally:
        _active = previous


def backends() -> list[BackendStatus]:
    """Every operator with every backend: can it run on this machine, and if not, why. See also ``amtml-fast backends``."""
    rows = []
    for op in OPS:
        for name in BACKENDS[1:]:
            device_type = DEVICES[name][0] if name in DEVICES else "cpu"
            reason = why_not(op, name, device_type) or _no_device(device_type)
            rows.append(BackendStatus(op, name, reason is None, reason or ""))
    return rows


def why_not(op: str, name: str, device_type: str, index: int | None = None) -> str | None:
    """Why backend ``name`` cannot run ``op`` on tensors of that device, by default the current one; None if it can."""
    if name == "reference":
        return None
    if op not in KERNELS[name]:
        return f"this version has no {name} kernel for {op}"
    if name == "triton":
        if not HAS_TRITON:
            return WHY_NO_TRITON
    elif not HAS_EXTENSION:
        return f"the C++ extension does not load ({WHY_NO_EXTENSION})"
    elif name == "cuda" and not HAS_CUDA:
        return "the C++ extension was built without CUDA (AMTML_BUILD_CUDA=1 builds it)"
    if device_type not in DEVICES[name]:
        return f"it needs {' or '.join(DEVICES[name])} tensors, got {device_type}"
    return why_not_gpu(name, index) if device_type == "cuda" and torch.version.hip is None else None


@functools.cache
def why_not_gpu(name: str, index: int | None) -> str | None:
    """Why backend ``name`` does not run on this NVIDIA GPU; None if it does, or if there is none to ask."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device() if index is None else index
    major, minor = torch.cuda.get_device_capability(device)
    if name == "triton" and major < TRITON_FROM:
        return f"Triton needs compute capability {TRITON_FROM}.0 or later, got {major}.{minor}"
    if name == "cuda" and torch.ops.amtml.cuda_code(device) == 0:
        wanted = f"{major}.{minor}" if major >= 8 else "8.0 or later"
        return (
            f"the C++ extension has no CUDA kernels for compute capability {major}.{minor}; they are compiled for {wanted} "
            f"where TORCH_CUDA_ARCH_LIST asks for it"
        )
    return None


@functools.cache
def shared_memory(index: int | None) -> int | None:
    """Bytes that a block may have on this NVIDIA GPU; None if there is none to ask."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device() if index is None else index
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)


# torch.compile takes their results as constants. torch.compiler.assume_constant_result does no more than this, but imports the
# compiler, which takes as long as importing torch.
why_not_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _no_device(device_type: str) -> str | None:
    if device_type == "cpu" or torch.get_device_module(device_type).is_available():
        return None
    return f"PyTorch sees no {device_type} device"


def _why_not_dtypes(name: str, tensors: tuple[torch.Tensor | None, ...]) -> str | None:
    """Why backend ``name`` does not take these dtypes; None if it does. GPU kernels compute in float32."""
    if name in ("cuda", "triton") and any(t is not None and t.dtype == torch.float64 for t in tensors):
        return "its kernels compute in float32, got a float64 tensor"
    return None


def _why_not_sizes(name: str, teachers: int, entries: int, index: int | None) -> str | None:
    """Why backend ``name`` does not take so many teachers, or entries of a row; None if it does."""
    if name not in ("cuda", "triton"):
        return None
    if teachers > MOST_TEACHERS:
        return f"its kernels take at most {MOST_TEACHERS} teachers, got {teachers}"
    if entries > MOST_ENTRIES:
        return f"its kernels take at most {MOST_ENTRIES} classes a row from all teachers together, got {entries}"
    # Of topk_kd. Up to half of the entries, and in other operators, it is less than any GPU has.
    if name == "cuda" and entries > MOST_ENTRIES // 2:
        need, have = 1024 + 8 * MOST_ENTRIES + 4 * (entries + 256 * teachers), shared_memory(index)
        if have is not None and need > have:
            return f"{teachers} teachers with {entries} classes a row take {need} bytes of shared memory, of which this GPU has {have}"
    return None


def runs(op: str, first: torch.Tensor, *others: torch.Tensor | None, teachers: int = 1) -> str | None:
    """The compiled backend that runs ``op`` on these tensors, or None; the chosen one may lack a kernel for it."""
    if _active != "auto" and op not in KERNELS.get(_active, ()):
        return None
    name = choose(op, first, *others, teachers=teachers)
    return None if name == "reference" else name


def order(op: str, first: torch.Tensor) -> tuple[str, ...]:
    """The backends that ``auto`` tries, from ``AUTO``."""
    device_type = first.device.type
    for choice in AUTO:
        if choice.device_type == device_type and (choice.op is None or choice.op == op):
            if choice.numbers == 0 or first.numel() >= choice.numbers:
                return choice.backends
    return ()


def choose(op: str, first: torch.Tensor, *others: torch.Tensor | None, teachers: int = 1, entries: int = 0) -> str:
    """The backend that runs ``op`` on these tensors: never ``auto``, raises if the chosen one cannot."""
    tensors, device_type = (first, *others), first.device.type
    plain = _needs_plain_torch(tensors)
    index = first.device.index
    if _active == "auto":
        if plain is None and not _is_exporting():
            for name in order(op, first):
                if why_not(op, name, device_type, index) is None and _why_not_dtypes(name, tensors) is None:
                    if _why_not_sizes(name, teachers, entries, index) is None:
                        return name
        return "reference"
    reason = why_not(op, _active, device_type, index) or _why_not_dtypes(_active, tensors)
    reason = reason or _why_not_sizes(_active, teachers, entries, index)
    reason = reason or (plain if _active != "reference" else None)
    if reason is not None:
        raise RuntimeError(f'{op}: backend "{_active}" cannot run here: {reason}. use_backend("reference") always runs')
    return _active


def _is_exporting() -> bool:
    """An exported program keeps a raw op, which has no derivative, and asks for this package where it runs."""
    # Not is_exporting(), which is always true in what torch 2.11 compiles.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _needs_plain_torch(tensors: tuple[torch.Tensor | None, ...]) -> str | None:
    """Fused kernels read memory: they have no vmap rule, no forward-mode derivative, and take no tensor that is made of
    others. Plain PyTorch has all three. Also asked while torch.compile traces a transform, whose state is then live."""
    if torch._C._are_functorch_transforms_active():
        return "it does not support functorch transforms (vmap, grad, jvp, ...)"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it does not support forward-mode differentiation"
    for t in tensors:
        if t is None or type(t) is torch.Tensor or type(t) is torch.nn.Parameter:
            continue
        if is_traceable_wrapper_subclass(t):
            return f"it takes tensors that hold their own values, got a {type(t).__name__}"
    return None


def backends_table() -> str:
    """``backends()`` as aligned text: operator, backend, yes or no, and why not."""
    rows = [("operator", "backend", "runs here", "why not")]
    rows += [(op, name, "yes" if available else "no", why or "") for op, name, available, why in backends()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
