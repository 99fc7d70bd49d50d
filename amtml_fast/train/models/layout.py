"""How images and maps lie in memory: pixel by pixel with their channels adjacent (channels_last), or channel by channel."""

from __future__ import annotations

import torch

# Sides from which "auto" takes it. Convolutions gained by it at 32 x 32, on CPUs and on an H200 (docs/training.md). Nothing between
# was measured; 8 x 8 stays as it was.
SMALLEST = 16


def channels_last(asked: bool | str, shape: torch.Size) -> bool:
    """engine.channels_last for images of this shape [..., H, W]; "auto": whether it pays for them."""
    return min(shape[-2:]) >= SMALLEST if asked == "auto" else bool(asked)


def memory_format(asked: bool | str, shape: torch.Size) -> torch.memory_format:
    return torch.channels_last if channels_last(asked, shape) else torch.contiguous_format
