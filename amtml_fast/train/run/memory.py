"""How much memory a training took at its peak."""

from __future__ import annotations

import ctypes
import gc
import importlib
from pathlib import Path

import torch

# What the first training of a process would load meanwhile, 35 MB that are no part of it.
LOADED = ("torch._dynamo", "torch.utils.tensorboard")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`read()`: the most that was held, in bytes, beyond what was there when this was made: network, gradients, optimizer
    and one step; not the data and the teachers, which trainings share. On a GPU by PyTorch's count, on Linux by the
    system's, without the pages of files that it has mapped (the teacher cache); None where the system does not say."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: int | None = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        for name in LOADED:
            importlib.import_module(name)
        give_back()
        try:
            CLEAR.write_text("5")  # the high-water mark of this process starts again at what it holds now
            self.before = held("VmRSS:")
        except OSError:
            pass  # not Linux

    def read(self) -> int | None:
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if cuda else held("VmHWM:")
        return None if self.before is None or peak is None else max(0, peak - self.before)


def give_back() -> None:
    """Returns free malloc pages to the system, so that reusing them counts toward the peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass  # not glibc


def held(field: str) -> int | None:
    """Bytes in a line of this process's status, less those of mapped files."""
    whole, mapped = status(field), status("RssFile:")
    return None if whole is None else whole - (mapped or 0)


def status(field: str) -> int | None:
    """Bytes in a line of this process's status."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
