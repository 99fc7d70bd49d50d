"""Gradients that forward has made for an incoming gradient of 1, times that gradient: rows of float32, in place.

A factor of 1, what ``loss.backward()`` sends, moves nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS
from ._launch import Launch, kept

BLOCK, PROGRAMS = 1024, 4096


@triton.jit(do_not_specialize=["count", "length"])
def _scale_kernel(rows, by, count, length, by_stride, BLOCK: tl.constexpr):
    # In 64 bits: of nearly 2^31 numbers the next block would begin below 0.
    for i in range(tl.program_id(1).to(tl.int64), count, tl.num_programs(1)):
        factor = tl.load(by + i * by_stride)
        if factor != 1:
            for start in range(tl.program_id(0).to(tl.int64) * BLOCK, length, tl.num_programs(0) * BLOCK):
                cols = start + tl.arange(0, BLOCK)
                at = rows + i * length + cols
                tl.store(at, tl.load(at, mask=cols < length) * factor, mask=cols < length)


def scale_rows_(rows: Tensor, by: Tensor) -> None:
    size = rows.numel()
    if size:
        count, stride = (rows.shape[0], by.stride(0)) if by.dim() else (1, 0)
        _launch(count, size // count, stride)(rows, by)


@kept
def _launch(count: int, length: int, stride: int) -> Launch:
    grid = min(triton.cdiv(length, BLOCK), PROGRAMS), min(count, PROGRAMS)
    numbers = dict(count=count, length=length, by_stride=stride, BLOCK=BLOCK, num_warps=4)
    return Launch(_scale_kernel, grid, **numbers, **OPTIONS)
