"""The machine that is measured: its device, clock, limits and memory."""

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
MOST = 0.8  # of the free memory, that a baseline may take


class EventClock:
    """perf_counter for a GPU: seconds between calls, as the device saw them, by CUDA events."""

    __name__ = "cuda_events"  # pytest-benchmark writes down a timer's name

    def __init__(self) -> None:
        self.last: torch.cuda.Event | None = None
        self.total = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self.last is not None:
            self.total += self.last.elapsed_time(event) / 1e3
        self.last = event
        return self.total


clock: Callable[[], float] = EventClock() if GPU else time.perf_counter


def flush_cache() -> None:
    """On a GPU: the second-level cache holds something else afterwards, and nothing is under way."""
    if GPU:
        _other_data().zero_()
        torch.cuda.synchronize()


@functools.cache
def _other_data() -> torch.Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)


def seconds(step: Callable[[], object]) -> float:
    """One run of it."""
    flush_cache()
    start = clock()
    step()
    return clock() - start


@functools.cache
def limits() -> dict[str, float]:
    """Bytes a second that a copy reads and writes; float32 operations a second of a matrix product (no TF32)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.ones(2**28 if GPU else 2**26, device=DEVICE)
    target = torch.zeros_like(source)
    n = 8192 if GPU else 2048
    a = torch.randn(n, n, device=DEVICE)
    return {
        "bytes_per_s": 2 * source.nbytes / _median(lambda: target.copy_(source)),
        "flops_per_s": 2 * n**3 / _median(lambda: a @ a),
    }


def _median(step: Callable[[], object]) -> float:
    step()
    return statistics.median(seconds(step) for _ in range(5))


def free_bytes() -> int:
    """Memory of the device that is free."""
    if GPU:
        return torch.cuda.mem_get_info()[0]
    available = _told("/proc/meminfo", "MemAvailable")
    return _bytes(available) if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_bytes(step: Callable[[], object]) -> int | None:
    """What a step takes above what was there before it, at most. On a GPU from the allocator. On the CPU from the high-water
    mark of this process (Linux; None elsewhere), right only where malloc gives freed memory back: see memory.py."""
    step()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    marks = Path("/proc/self/clear_refs")
    if not marks.exists():
        return None
    marks.write_text("5")  # the high-water mark starts again from what is held now
    before = _bytes(_told("/proc/self/status", "VmRSS"))
    step()
    return _bytes(_told("/proc/self/status", "VmHWM")) - before


def _told(path: str, key: str) -> str:
    """What a file of /proc, which Linux alone has, says of the key; empty where it says nothing."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else ()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def _bytes(told: str) -> int:
    return int(told.removesuffix(" kB")) << 10


def name() -> str:
    """The processor as people call it."""
    if GPU:
        return torch.cuda.get_device_name()
    return _told("/proc/cpuinfo", "model name") or "CPU"
