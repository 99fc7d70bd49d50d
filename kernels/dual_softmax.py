"""Dual softmax of score matrices: over R (columns), then over K (rows).

    sequential: a = softmax_R(x), y = softmax_K(a)     da = y (g - sum_K g y),  dx = a (da - sum_R da a)
    product:    a = softmax_R(x), b = softmax_K(x)     y = a b,  dx = 2 g y - a sum_R g y - b sum_K g y

Shapes   scores [B, R, K] in float32|bfloat16|float16, read in place where K is dense -> result as scores, first (a)
         [B, R, K] and row_stats (maximum and sum of the softmax over K) [B, R, 2] float32; gradient as scores
Grid     columns: a program for a matrix and a block of columns, whose rows lie side by side in memory, walks over R;
         rows: a program for some rows of a matrix walks over K. Forward: columns, then rows; backward: rows, then columns
Traffic  bytes bind both. Forward: x once for the columns' maxima and sums; for the rows x twice (from cache where a
         tile's rows fit there), first and the result once. Backward: g and first (and x for product) for the rows' sums;
         for the columns the same twice (from cache where a block's columns fit), dx once. Scratch: 8 B K and 4 B R bytes
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, aligned, alignment, check_count, power_of_2
from ._launch import Launch, kept

TILE = 4096  # elements that a program holds at once; half where they move one by one and each has its own address
ROW = 2048  # most columns of a tile of rows
COLUMN_PROGRAMS = 256  # blocks of columns get narrower, from 128 bytes to 64, until there are as many


@triton.jit
def _online(x, highest, total, AXIS: tl.constexpr):
    """Maximum and sum of exponentials with one more tile. -inf is no shift: where all is -inf the sum is 0."""
    new = tl.maximum(highest, tl.max(x, axis=AXIS))
    shift = tl.where(new == -float("inf"), 0.0, new)
    more = tl.sum(tl.exp(x - tl.expand_dims(shift, AXIS)), axis=AXIS)
    return new, total * tl.exp(highest - shift) + more


@triton.jit
def _column_stats_kernel(
    x_ptr, stats_ptr, rows, columns, blocks, x_matrix, x_row,
    ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    columns, x_row = aligned(columns, ALIGN), aligned(x_row, ALIGN)
    x_ptr += b * aligned(x_matrix, ALIGN)
    highest = tl.full([BLOCK_K], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        mask = (r < rows)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + r[:, None] * x_row + k[None, :], mask=mask, other=-float("inf")).to(tl.float32)
        highest, total = _online(x, highest, total, 0)
    stats_ptr += b * 2 * columns + k
    tl.store(stats_ptr, highest, mask=k < columns)
    tl.store(stats_ptr + columns, total, mask=k < columns)


@triton.jit
def _first_softmax(x, stats_ptr, k, columns):
    highest = tl.load(stats_ptr + k, mask=k < columns, other=0.0)
    total = tl.load(stats_ptr + columns + k, mask=k < columns, other=1.0)
    return tl.exp(x - highest[None, :]) * (1 / total)[None, :]  # 0 in padding, where x is -inf


@triton.jit
def _rows_kernel(
    x_ptr, column_stats_ptr, first_ptr, row_stats_ptr, out_ptr, rows, columns, blocks, x_matrix, x_row,
    SEQUENTIAL: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    columns = aligned(columns, ALIGN)
    x_ptr += b * aligned(x_matrix, ALIGN) + r[:, None] * aligned(x_row, ALIGN)
    column_stats_ptr += b * 2 * columns
    highest = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (r < rows)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + k[None, :], mask=mask, other=-float("inf")).to(tl.float32)
        if SEQUENTIAL:
            x = tl.where(mask, _first_softmax(x, column_stats_ptr, k, columns), -float("inf"))
        highest, total = _online(x, highest, total, 1)
    row_stats_ptr += 2 * (b * rows + r)
    tl.store(row_stats_ptr, highest, mask=r < rows)
    tl.store(row_stats_ptr + 1, total, mask=r < rows)
    scale = 1 / total
    at = (b * rows + r[:, None]) * columns
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (r < rows)[:, None] & (k < columns)[None, :]
        x = tl.load(x_ptr + k[None, :], mask=mask, other=-float("inf")).to(tl.float32)
        a = _first_softmax(x, column_stats_ptr, k, columns)
        tl.store(first_ptr + at + k[None, :], a, mask=mask)
        if SEQUENTIAL:
            y = tl.exp(a - highest[:, None]) * scale[:, None]
        else:
            y = a * (tl.exp(x - highest[:, None]) * scale[:, None])
        tl.store(out_ptr + at + k[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_backward(
    grad_ptr, x_ptr, first_ptr, row_stats_ptr, b, r, k, rows, columns, grad_row, x_row, SEQUENTIAL: tl.constexpr
):  # fmt: skip
    """g, a and the softmax over K of some rows and columns; 0 outside."""
    mask = (r < rows)[:, None] & (k < columns)[None, :]
    grad = tl.load(grad_ptr + r[:, None] * grad_row + k[None, :], mask=mask, other=0.0).to(tl.float32)
    a = tl.load(first_ptr + (b * rows + r[:, None]) * columns + k[None, :], mask=mask, other=0.0)
    row_stats_ptr += 2 * (b * rows + r)
    highest = tl.load(row_stats_ptr, mask=r < rows, other=0.0)
    total = tl.load(row_stats_ptr + 1, mask=r < rows, other=1.0)
    if SEQUENTIAL:
        second = a
    else:
        second = tl.load(x_ptr + r[:, None] * x_row + k[None, :], mask=mask, other=-float("inf")).to(tl.float32)
    return grad, a, tl.exp(second - highest[:, None]) * (1 / total)[:, None]


@triton.jit
def _row_sums_kernel(
    grad_ptr, x_ptr, first_ptr, row_stats_ptr, sums_ptr, rows, columns, blocks, grad_matrix, grad_row, x_matrix, x_row,
    SEQUENTIAL: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_K g y."""
    b = (tl.program_id(0) // blocks).to(tl.int64)
    r = (tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    columns, grad_row, x_row = aligned(columns, ALIGN), aligned(grad_row, ALIGN), aligned(x_row, ALIGN)
    grad_ptr += b * aligned(grad_matrix, ALIGN)
    x_ptr += b * aligned(x_matrix, ALIGN)
    total = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, columns, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        grad, a, y = _load_backward(
            grad_ptr, x_ptr, first_ptr, row_stats_ptr, b, r, k, rows, columns, grad_row, x_row, SEQUENTIAL
        )
        total += tl.sum(grad * y if SEQUENTIAL else grad * y * a, axis=1)
    tl.store(sums_ptr + b * rows + r, total, mask=r < rows)


@triton.jit
def _columns_backward_kernel(
    grad_ptr, x_ptr, first_ptr, row_stats_ptr, sums_ptr, out_ptr, rows, columns, blocks,
    grad_matrix, grad_row, x_matrix, x_row,
    SEQUENTIAL: tl.constexpr, ALIGN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    columns, grad_row, x_row = aligned(columns, ALIGN), aligned(grad_row, ALIGN), aligned(x_row, ALIGN)
    grad_ptr += b * aligned(grad_matrix, ALIGN)
    x_ptr += b * aligned(x_matrix, ALIGN)
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)  # of da a, or of g y
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        grad, a, y = _load_backward(
            grad_ptr, x_ptr, first_ptr, row_stats_ptr, b, r, k, rows, columns, grad_row, x_row, SEQUENTIAL
        )
        if SEQUENTIAL:
            inner = tl.load(sums_ptr + b * rows + r, mask=r < rows, other=0.0)
            total += y * (grad - inner[:, None]) * a
        else:
            total += grad * y * a
    total = tl.sum(total, axis=0)
    for start in range(0, rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        grad, a, y = _load_backward(
            grad_ptr, x_ptr, first_ptr, row_stats_ptr, b, r, k, rows, columns, grad_row, x_row, SEQUENTIAL
        )
        inner = tl.load(sums_ptr + b * rows + r, mask=r < rows, other=0.0)
        if SEQUENTIAL:
            dx = a * (y * (grad - inner[:, None]) - total[None, :])
        else:
            dx = 2 * grad * y * a - y * inner[:, None] - a * total[None, :]
        at = out_ptr + (b * rows + r[:, None]) * columns + k[None, :]
        tl.store(at, dx.to(out_ptr.dtype.element_ty), mask=(r < rows)[:, None] & (k < columns)[None, :])


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(2) == 1 else t.contiguous()


def _tile(align: int) -> int:
    return TILE if align > 1 else TILE // 2


def _column_blocks(shape: tuple[int, ...], itemsize: int, align: int) -> tuple[int, dict[str, int]]:
    matrices, rows, columns = shape
    block_k = 128 // itemsize
    if matrices * triton.cdiv(columns, block_k) < COLUMN_PROGRAMS:
        block_k //= 2
    block_k = power_of_2(columns, block_k)
    block_r = power_of_2(rows, _tile(align) // block_k)
    return triton.cdiv(columns, block_k), {"BLOCK_R": block_r, "BLOCK_K": block_k, "num_warps": 8, **OPTIONS}


def _row_blocks(shape: tuple[int, ...], align: int) -> tuple[int, dict[str, int]]:
    rows, columns = shape[1:]
    block_k = power_of_2(columns, ROW)
    block_r = power_of_2(rows, _tile(align) // block_k)
    return triton.cdiv(rows, block_r), {"BLOCK_R": block_r, "BLOCK_K": block_k, "num_warps": 8, **OPTIONS}


@kept
def _forward(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int, mode: str) -> tuple[Launch, Launch]:
    """Columns, then rows."""
    b, r, k = shape
    check_count("dual_softmax: scores", max(r, k), "rows and columns")
    align = alignment(k, *strides)
    numbers = dict(rows=r, columns=k, x_matrix=strides[0], x_row=strides[1], ALIGN=align)
    blocks, config = _column_blocks(shape, itemsize, align)
    columns = Launch(_column_stats_kernel, (b * blocks,), blocks=blocks, **numbers, **config)
    blocks, config = _row_blocks(shape, align)
    sequential = mode == "sequential"
    return columns, Launch(_rows_kernel, (b * blocks,), blocks=blocks, SEQUENTIAL=sequential, **numbers, **config)


@kept
def _backward(
    shape: tuple[int, ...], grad: tuple[int, ...], x: tuple[int, ...], itemsize: int, mode: str
) -> tuple[Launch, Launch]:
    """Rows, then columns."""
    b, r, k = shape
    check_count("dual_softmax: scores", max(r, k), "rows and columns")
    align = alignment(k, *grad, *x)
    numbers = dict(
        rows=r,
        columns=k,
        grad_matrix=grad[0],
        grad_row=grad[1],
        x_matrix=x[0],
        x_row=x[1],
        SEQUENTIAL=mode == "sequential",
        ALIGN=align,
    )
    blocks, config = _row_blocks(shape, align)
    rows = Launch(_row_sums_kernel, (b * blocks,), blocks=blocks, **numbers, **config)
    blocks, config = _column_blocks(shape, itemsize, align)
    return rows, Launch(_columns_backward_kernel, (b * blocks,), blocks=blocks, **numbers, **config)


def dual_softmax_fwd(scores: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    b, r, k = scores.shape
    out = scores.new_empty(b, r, k)
    first = scores.new_empty(b, r, k, dtype=torch.float32)
    row_stats = first.new_empty(b, r, 2)
    if scores.numel() == 0:
        row_stats.zero_()  # of rows without columns
    else:
        x = _dense_rows(scores)
        column_stats = first.new_empty(b, 2, k)
        columns, rows = _forward(x.shape, x.stride()[:2], x.element_size(), mode)
        columns(x, column_stats)
        rows(x, column_stats, first, row_stats, out)
    return out, first, row_stats


def dual_softmax_bwd(grad: Tensor, scores: Tensor, first: Tensor, row_stats: Tensor, mode: str) -> Tensor:
    b, r, k = scores.shape
    out = scores.new_empty(b, r, k)
    if scores.numel():
        g, x = _dense_rows(grad), _dense_rows(scores)
        first, row_stats = first.contiguous(), row_stats.contiguous()
        sums = scores.new_empty(b, r, dtype=torch.float32)
        rows, columns = _backward(x.shape, g.stride()[:2], x.stride()[:2], x.element_size(), mode)
        rows(g, x, first, row_stats, sums)
        columns(g, x, first, row_stats, sums, out)
    return out
