"""How images and maps lie in memory: pixel by pixel with their channels adjacent (channels_last), or channel by channel."""

from __future__ import annotations

import torch

# Sides from which convolutions gained by it where it was measured (docs/training.md): on CPUs and on an H200 at 32 x 32, and not
# at 8 x 8.
SMALLEST = 16


def channels_last(asked: bool | str, shape: torch.Size) -> bool:
    """engine.channels_last for images of this shape [..., H, W]; "auto": whether it pays for them."""
    return min(shape[-2:]) >= SMALLEST if asked == "auto" else bool(asked)


def memory_format(asked: bool | str, shape: torch.Size) -> torch.memory_format:
    return torch.channels_last if channels_last(asked, shape) else torch.contiguous_format
