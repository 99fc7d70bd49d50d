"""Which implementation runs an operator: loads the C++ extension, keeps the choice, and says why not.

This is the one place that chooses. ``auto`` takes the fastest backend that can run and falls back to the reference;
a backend chosen by name runs or raises.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch  # before _C: it brings libtorch into the process

OPS = ("teacher_weights", "multi_teacher_kd", "angle", "distance", "hint", "dual_softmax", "whole_loss")
BACKENDS = ("auto", "cpp", "cuda", "triton", "reference")
DEVICE = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}  # the device type that each compiled backend serves
KERNELS = {"cpp": OPS, "cuda": (), "triton": ()}  # the operators that each of them has
AUTO = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}  # first choice first; then the reference

try:
    importlib.import_module("amtml_fast._C")  # registers the kernels
    WHY_NO_EXTENSION = None
except ImportError as error:
    WHY_NO_EXTENSION = str(error)  # kept: "not built" and "undefined symbol" are different problems

HAS_EXTENSION = WHY_NO_EXTENSION is None


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


_active = _known(os.environ.get("AMTML_BACKEND", "auto"), "AMTML_BACKEND")
if _active == "auto" and not HAS_EXTENSION:
    warnings.warn(
        f"amtml_fast runs on its plain PyTorch reference because its C++ extension does not load ({WHY_NO_EXTENSION}). "
        "With torch and a C++ compiler present, reinstall it: pip install --no-build-isolation amtml-fast",
        stacklevel=2,
    )


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
            reason = why_not(op, name, DEVICE.get(name, "cpu"))
            rows.append(BackendStatus(op, name, reason is None, reason or ""))
    return rows


def why_not(op: str, name: str, device_type: str) -> str | None:
    """Why backend ``name`` cannot run ``op`` on tensors of ``device_type``; None if it can."""
    if name == "reference":
        return None
    if op not in KERNELS[name]:
        return f"this version has no {name} kernel for {op}"
    if not HAS_EXTENSION:
        return f"the C++ extension does not load ({WHY_NO_EXTENSION})"
    if device_type != DEVICE[name]:
        return f"it needs {DEVICE[name]} tensors, got {device_type}"
    return None


def choose(op: str, *tensors: torch.Tensor) -> str:
    """The backend that runs ``op`` on these tensors: never ``auto``, raises if the chosen one cannot."""
    device_type = tensors[0].device.type
    plain = None if torch.compiler.is_compiling() else _needs_plain_torch()
    if _active == "auto":
        if plain is None:
            for name in AUTO.get(device_type, ()):
                if why_not(op, name, device_type) is None:
                    return name
        return "reference"
    reason = why_not(op, _active, device_type) or (plain if _active != "reference" else None)
    if reason is not None:
        raise RuntimeError(f'{op}: backend "{_active}" cannot run here: {reason}. use_backend("reference") always runs')
    return _active


def _needs_plain_torch() -> str | None:
    """Fused kernels have no vmap rule and no forward-mode derivative; plain PyTorch has both."""
    if torch._C._are_functorch_transforms_active():
        return "it does not support functorch transforms (vmap, grad, jvp, ...)"
    if torch.autograd.forward_ad._current_level >= 0:
        return "it does not support forward-mode differentiation"
    return None
