"""What the losses over pairs of rows share: all distances of both sides, and the way back from pairs to rows.

    D_ij = |x_i - x_j|^2,  r_ij = D_ij^-1/2, or 0 where sqrt(D_ij) <= eps (degenerate)
    dL/dx_i = factor * sum_j w_ij (x_i - x_j)

x [N, C] of float32, bfloat16 or float16 with any strides; D, w and every sum in float64: differences first, so that
what the rows have in common cancels exactly. Matrices of pairs are [P, P], N rounded up to whole tiles of 32: a row
that takes no part (padding, or False in row_mask) has D = r = 0 with every other, whatever it holds, and no kernel that
works on pairs needs a mask for it.

Where some distances are much shorter than others, D can be split (split_kernel): into a multiple of 2^-50 of the longest,
or half of that, so that sums are exact, and a rest with the digits of float64. csrc/cpu/pairs.h says how exact that is.

distances_kernel: a program makes one tile of the upper triangle of one side and stores it twice; grid
(P / 32, P / 32, 2), the programs below the diagonal leave at once. Reads the rows P / 32 times (from L2), writes 12 P^2
bytes a side. Bound by arithmetic from C of a few dozen on: for a column and a pair one conversion to float64, one
subtraction, one multiply-add.
row_gradient: a program owns 4 rows and 32 columns and walks over all rows j. Reads w once for 32 columns and the rows
N / 4 times (from L2), writes 4 N C bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import check_count
from ._launch import Launch

TILE = 32  # rows and columns of a tile of pairs; matrices of pairs are padded to a multiple
ROWS, COLUMNS = 4, 32  # of the gradient that a program of row_gradient owns


@triton.jit
def taking_part(rows, row_mask, mask_stride, n):
    keep = rows < n
    if row_mask is not None:
        keep = keep & (tl.load(row_mask + rows.to(tl.int64) * mask_stride, mask=keep, other=0) != 0)
    return keep


@triton.jit
def count_taking_part(row_mask, mask_stride, n):
    count = n.to(tl.float64)
    if row_mask is not None:
        seen = tl.zeros([1024], tl.int32)
        for first in range(0, n, 1024):
            seen += taking_part(first + tl.arange(0, 1024), row_mask, mask_stride, n).to(tl.int32)
        count = tl.sum(seen).to(tl.float64)
    return count


@triton.jit
def total(values, count):
    """Sum of ``count`` numbers of float64."""
    sums = tl.zeros([1024], tl.float64)
    for first in range(0, count, 1024):
        at = first + tl.arange(0, 1024)
        sums += tl.load(values + at, mask=at < count, other=0.0)
    return tl.sum(sums)


@triton.jit
def _squared_distances(x, row_stride, column_stride, width, i, j, keep_i, keep_j, TILE: tl.constexpr):
    """[TILE, TILE] between rows i and j. Columns in order for every pair: D_ij and D_ji are the same bits."""
    x_i, x_j = x + i.to(tl.int64) * row_stride, x + j.to(tl.int64) * row_stride
    squared = tl.zeros([TILE, TILE], tl.float64)
    for _ in tl.range(0, width, 1, loop_unroll_factor=4):
        a = tl.load(x_i, mask=keep_i, other=0.0).to(tl.float64)
        b = tl.load(x_j, mask=keep_j, other=0.0).to(tl.float64)
        difference = a[:, None] - b[None, :]
        squared = tl.fma(difference, difference, squared)
        x_i += column_stride
        x_j += column_stride
    return squared


@triton.jit(do_not_specialize=["n"])
def distances_kernel(
    student, student_row, student_column, student_width,
    teacher, teacher_row, teacher_column, teacher_width,
    row_mask, mask_stride,
    distance,  # [2, P, P] float64
    r,  # [2, P, P] float32 or float64
    sums,  # [2, 2, (P / TILE)^2] float64: of the distances (not squared) that are not degenerate, how many; or None
    extremes,  # [2, 2] int64, at first 0: bits of the longest D that is not degenerate, and of 1 / D of the shortest; or None
    n, p,
    eps: tl.float64,
    TILE: tl.constexpr,
):  # fmt: skip
    i_block, j_block, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles = tl.num_programs(0) * tl.num_programs(1)
    tile = 2 * side * tiles + i_block * tl.num_programs(1) + j_block
    if i_block > j_block:
        if sums is not None:
            tl.store(sums + tile, 0.0)
            tl.store(sums + tile + tiles, 0.0)
        return
    i, j = i_block * TILE + tl.arange(0, TILE), j_block * TILE + tl.arange(0, TILE)
    keep_i, keep_j = taking_part(i, row_mask, mask_stride, n), taking_part(j, row_mask, mask_stride, n)
    if side == 0:
        d = _squared_distances(student, student_row, student_column, student_width, i, j, keep_i, keep_j, TILE)
    else:
        d = _squared_distances(teacher, teacher_row, teacher_column, teacher_width, i, j, keep_i, keep_j, TILE)
    pair = keep_i[:, None] & keep_j[None, :] & (i[:, None] != j[None, :])
    d = tl.where(pair, d, 0.0)
    limit = tl.full([1, 1], eps, tl.float64)
    regular = pair & ((d > limit * limit) | (d != d))  # NaN is not degenerate: it stays NaN
    safe = tl.where(regular, d, 1.0)
    root = tl.sqrt(safe)
    inverse = tl.where(regular, root / safe, 0.0).to(r.dtype.element_ty)  # NaN at infinity
    here = side.to(tl.int64) * p * p + i.to(tl.int64)[:, None] * p + j[None, :]
    mirrored = side.to(tl.int64) * p * p + j.to(tl.int64)[None, :] * p + i[:, None]
    tl.store(distance + here, d)
    tl.store(r + here, inverse)
    if i_block != j_block:
        tl.store(distance + mirrored, d)
        tl.store(r + mirrored, inverse)
    if sums is not None:
        both = tl.where(i_block == j_block, 1.0, 2.0).to(tl.float64)
        tl.store(sums + tile, both * tl.sum(tl.where(regular, root, 0.0)))
        tl.store(sums + tile + tiles, both * tl.sum(regular.to(tl.float64)))
    if extremes is not None:
        known = regular & (d == d)
        longest, shortest = tl.max(tl.where(known, d, 0.0)), tl.min(tl.where(known, d, float("inf")))
        tl.atomic_max(extremes + 2 * side, longest.to(tl.int64, bitcast=True))
        tl.atomic_max(extremes + 2 * side + 1, (1.0 / shortest).to(tl.int64, bitcast=True))


@triton.jit
def exceeds_float64(extremes):
    """Whether the lengths of a side differ by a factor above 2^25; not where one is infinite."""
    far1, far2 = _extreme(extremes), _extreme(extremes + 2)
    near1, near2 = _extreme(extremes + 1), _extreme(extremes + 3)
    return ((far1 * near1 > 1125899906842624.0) | (far2 * near2 > 1125899906842624.0)) & (far1 + far2 < 1e300)


@triton.jit
def _extreme(at):
    return tl.load(at).to(tl.float64, bitcast=True)


@triton.jit
def _split_distances(x, row_stride, column_stride, width, i, j, keep_i, keep_j, shift, TILE: tl.constexpr):
    """The same in two parts. Adding ``shift`` rounds to a multiple."""
    x_i, x_j = x + i.to(tl.int64) * row_stride, x + j.to(tl.int64) * row_stride
    multiples, rest = tl.zeros([TILE, TILE], tl.float64), tl.zeros([TILE, TILE], tl.float64)
    for _ in tl.range(0, width, 1, loop_unroll_factor=1):
        a = tl.load(x_i, mask=keep_i, other=0.0).to(tl.float64)[:, None]
        b = tl.load(x_j, mask=keep_j, other=0.0).to(tl.float64)[None, :]
        d = a - b
        error = (a - (d + (a - d))) + ((a - d) - b)  # of d, exactly
        multiple = (d * d + shift) - shift
        upper = d * 134217729.0  # 2^27 + 1: half of the digits
        upper = upper - (upper - d)
        lower = d - upper
        square = (upper * upper - multiple) + 2.0 * upper * lower + lower * lower  # d^2 - multiple, as if exactly
        multiples += multiple
        rest += square + 2.0 * d * error
        x_i += column_stride
        x_j += column_stride
    return multiples, rest


@triton.jit(do_not_specialize=["n"])
def split_kernel(
    student, student_row, student_column, student_width,
    teacher, teacher_row, teacher_column, teacher_width,
    row_mask, mask_stride,
    distance, rest,  # [2, P, P] float64: D, which it replaces by the multiples, and what they lack. If D need not be
    extremes,        # split, nothing is written
    n, p,
    TILE: tl.constexpr,
):  # fmt: skip
    if not exceeds_float64(extremes):
        return
    i_block, j_block, side = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_block > j_block:
        return
    i, j = i_block * TILE + tl.arange(0, TILE), j_block * TILE + tl.arange(0, TILE)
    keep_i, keep_j = taking_part(i, row_mask, mask_stride, n), taking_part(j, row_mask, mask_stride, n)
    # 2^e <= longest < 2^(e + 1): sums of two are below 2^52 multiples of 2^(e - 50)
    shift = 6.0 * (tl.load(extremes + 2 * side) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    if side == 0:
        high, low = _split_distances(
            student, student_row, student_column, student_width, i, j, keep_i, keep_j, shift, TILE
        )  # fmt: skip
    else:
        high, low = _split_distances(
            teacher, teacher_row, teacher_column, teacher_width, i, j, keep_i, keep_j, shift, TILE
        )  # fmt: skip
    pair = keep_i[:, None] & keep_j[None, :]
    high, low = tl.where(pair, high, 0.0), tl.where(pair, low, 0.0)
    here = side.to(tl.int64) * p * p + i.to(tl.int64)[:, None] * p + j[None, :]
    mirrored = side.to(tl.int64) * p * p + j.to(tl.int64)[None, :] * p + i[:, None]
    tl.store(distance + here, high)
    tl.store(rest + here, low)
    if i_block != j_block:
        tl.store(distance + mirrored, high)
        tl.store(rest + mirrored, low)


def padded(n: int) -> int:
    return -(-n // TILE) * TILE  # triton.cdiv takes longer than an allocation


def sides(student: Tensor, teacher: Tensor, row_mask: Tensor | None) -> tuple[tuple, tuple, int]:
    """What the numbers of a launch are made of: shape and strides of both sides, and the stride of the mask."""
    for argument, x in (("student", student), ("teacher", teacher)):
        check_count(argument, x.shape[1], "columns")
    mask_stride = 0 if row_mask is None else row_mask.stride(0)
    return (*student.shape, *student.stride()), (*teacher.shape, *teacher.stride()), mask_stride


def distances(student: Tensor, p: int, eps: float) -> tuple[Tensor, Tensor]:
    """Memory for D and r [2, P, P]."""
    distance = student.new_empty(2, p, p, dtype=torch.float64)
    # The product of two r passes float32's range below distances of 1e-19, which a smaller eps allows.
    return distance, student.new_empty(2, p, p, dtype=torch.float64 if eps < 1e-18 else torch.float32)


def distances_launch(student: tuple, teacher: tuple, mask_stride: int, eps: float) -> Launch:
    """Its call takes both sides, row_mask, D, r and, if wanted, the sums of every tile and the extremes. N > 0."""
    return _tiles_launch(distances_kernel, student, teacher, mask_stride, eps=eps, num_warps=4)


def split_launch(student: tuple, teacher: tuple, mask_stride: int) -> Launch:
    """Its call takes both sides, row_mask, D, the rests and the extremes."""
    return _tiles_launch(split_kernel, student, teacher, mask_stride, num_warps=8)


def _tiles_launch(kernel: Any, student: tuple, teacher: tuple, mask_stride: int, **others: Any) -> Launch:
    """A program for each tile of pairs and side."""
    n, p = student[0], padded(student[0])
    return Launch(
        kernel,
        (p // TILE, p // TILE, 2),
        **side_numbers("student", student),
        **side_numbers("teacher", teacher),
        mask_stride=mask_stride,
        n=n,
        p=p,
        TILE=TILE,
        enable_fp_fusion=False,
        **others,
    )


def side_numbers(name: str, side: tuple) -> dict[str, int]:
    _, width, row, column = side
    return {f"{name}_row": row, f"{name}_column": column, f"{name}_width": width}


@triton.jit
def row_gradient(
    x, row_stride, column_stride, width, row_mask, mask_stride,
    weight,  # [PARTS, P, P] float64
    r,  # [P, P], or None
    level,  # with r: the weights are (weight - level) * r, or 0 where r is
    factor,  # float64
    out,  # [n, width]
    n, p,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Columns first: a grid's second dimension ends at 65535, and no memory holds the pairs of so many rows.
    i, c = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.arange(0, PARTS).to(tl.int64)[:, None, None] * p * p
    keep = taking_part(i, row_mask, mask_stride, n)
    column = c.to(tl.int64) * column_stride
    own = x + i.to(tl.int64)[:, None] * row_stride + column[None, :]
    own = tl.load(own, mask=keep[:, None] & (c < width)[None, :], other=0.0).to(tl.float64)
    sums = tl.zeros([ROWS, TILE, COLUMNS], tl.float64)
    for first in range(0, n, TILE):
        j = first + tl.arange(0, TILE)
        other = x + j.to(tl.int64)[:, None] * row_stride + column[None, :]
        used = taking_part(j, row_mask, mask_stride, n)[:, None] & (c < width)[None, :]
        other = tl.load(other, mask=used, other=0.0).to(tl.float64)
        pair = i.to(tl.int64)[:, None] * p + j[None, :]
        w = tl.sum(tl.load(weight + part + pair[None, :, :]), axis=0)
        if r is not None:
            inverse = tl.load(r + pair).to(tl.float64)
            w = tl.where(inverse == 0, 0.0, (w - level) * inverse)
        sums = tl.fma(w[:, :, None], own[:, None, :] - other[None, :, :], sums)
    gradient = tl.where(keep[:, None], factor * tl.sum(sums, axis=1), 0.0)
    at = out + i.to(tl.int64)[:, None] * width + c[None, :]
    tl.store(at, gradient.to(out.dtype.element_ty), mask=(i < n)[:, None] & (c < width)[None, :])
