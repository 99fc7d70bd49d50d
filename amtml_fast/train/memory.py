"""How much memory a training took at its peak."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """`bytes`, once closed: on a GPU the most that PyTorch had allocated, on Linux the most that the process held, data
    and teachers' outputs included; None where the system does not say."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, None if device.type == "cuda" else process_peak()

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                CLEAR.write_text("5")  # the high-water mark of this process starts again at what it holds now
            except OSError:
                pass  # not Linux: what it was before is part of the figure, or there is none
        return self

    def __exit__(self, *error: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else process_peak()


def process_peak() -> int | None:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
