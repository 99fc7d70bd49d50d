"""RKD's distance loss: distances over their mean, compared pair by pair.

    psi_ij = d_ij / mu,  mu = mean of d over the K (ordered) pairs that are not degenerate
    L = sum_ij huber_delta(psi_s - psi_t),  g = clamp(psi_s - psi_t, -delta, delta)
    dL/dd_ij = (g_ij - (sum g psi) / K) / mu,  dL/dx_i = 2 sum_j dL/dd_ij (x_i - x_j) / d_ij

Degenerate pairs have psi 0 and no gradient. All in float64, but for 1 / d in float32 (unless eps is below 1e-18):
beside the distances themselves it costs little.

student, teacher [N, C] float32, bfloat16 or float16; loss [], gradients [N, C], all float32. P is N rounded up to 32.
  distances_kernel  see pairs.py; also sums of d over each tile
  compare_kernel    grid P / 8: a program owns 8 rows of pairs. Reads 24 P^2 bytes, writes 8 P^2 (g). Bound by a float64
                    square root and division for each side of a pair
  finish_kernel     grid (C / 32, N / 4, sides + 1): the gradient of the rows (pairs.py), and the sum of the losses.
                    Reads 12 P^2 bytes a side once for 32 columns
Memory: 24 bytes for each of P^2 pairs, 32 with gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS
from ._launch import Launch, kept
from ._pairs import COLUMNS, ROWS, TILE, distances, distances_launch, padded, row_gradient, side_numbers, sides, total

BLOCK = 8, 128  # rows, and columns at a time, of a program of compare_kernel


@triton.jit
def _mean(sums, tiles):
    """Mean distance of a side, and over how many pairs."""
    pairs = total(sums + tiles, tiles)
    count = tl.maximum(pairs, tl.full([], 1.0, tl.float64))
    return tl.where(pairs > 0, total(sums, tiles) / count, 1.0), count


@triton.jit
def compare_kernel(
    distance,  # [2, P, P] float64
    r,  # [2, P, P]
    sums,  # [2, 2, tiles] float64
    means,  # [2, 2] float64, written here: mean distance of either side, and over how many pairs
    grad,  # [P, P] float64: g; or None
    partial,  # [3, P / ROWS] float64: sums of the loss, of g psi_student and of g psi_teacher
    tiles, p,
    delta: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    mean1, pairs1 = _mean(sums, tiles)
    mean2, pairs2 = _mean(sums + 2 * tiles, tiles)
    if tl.program_id(0) == 0:
        tl.store(means, mean1)
        tl.store(means + 1, pairs1)
        tl.store(means + 2, mean2)
        tl.store(means + 3, pairs2)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    second = p.to(tl.int64) * p
    limit = tl.full([1, 1], delta, tl.float64)
    zeros = tl.zeros([ROWS, COLUMNS], tl.float64)
    loss, g_psi1, g_psi2 = zeros, zeros, zeros
    for first in range(0, p, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        at, inside = i.to(tl.int64)[:, None] * p + j[None, :], (j < p)[None, :]
        d1 = tl.sqrt(tl.load(distance + at, mask=inside, other=0.0))
        d2 = tl.sqrt(tl.load(distance + second + at, mask=inside, other=0.0))
        psi1 = tl.where(tl.load(r + at, mask=inside, other=0.0) == 0, 0.0, d1 / mean1)
        psi2 = tl.where(tl.load(r + second + at, mask=inside, other=0.0) == 0, 0.0, d2 / mean2)
        x = psi1 - psi2
        g = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))  # NaN stays NaN
        loss += g * (x - 0.5 * g)
        g_psi1 += g * psi1
        g_psi2 += g * psi2
        if grad is not None:
            tl.store(grad + at, g, mask=inside)
    partial += tl.program_id(0)
    tl.store(partial, tl.sum(loss))
    tl.store(partial + tl.num_programs(0), tl.sum(g_psi1))
    tl.store(partial + 2 * tl.num_programs(0), tl.sum(g_psi2))


@triton.jit(do_not_specialize=["n"])
def finish_kernel(
    student, student_row, student_column, student_width,
    teacher, teacher_row, teacher_column, teacher_width,
    r, means, pair_grad, partial, programs, grad_student, grad_teacher, loss,
    n, p,
    scale: tl.float64,
    NEED_STUDENT: tl.constexpr, NEED_TEACHER: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    role = tl.program_id(2)
    if NEED_STUDENT:
        if role == 1:
            mean, level = tl.load(means), total(partial + programs, programs) / tl.load(means + 1)
            row_gradient(
                student, student_row, student_column, student_width, None, 0, pair_grad, r, level, 2.0 * scale / mean,
                grad_student, n, p, 1, ROWS, COLUMNS, TILE,
            )  # fmt: skip
    if NEED_TEACHER:
        if role == NEED_STUDENT + 1:
            mean, level = tl.load(means + 2), total(partial + 2 * programs, programs) / tl.load(means + 3)
            row_gradient(
                teacher, teacher_row, teacher_column, teacher_width, None, 0, pair_grad, r + p.to(tl.int64) * p, level,
                -2.0 * scale / mean, grad_teacher, n, p, 1, ROWS, COLUMNS, TILE,
            )  # fmt: skip
    if role + tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(loss, (scale * total(partial, programs)).to(tl.float32))


def distance_fwd(
    student: Tensor,
    teacher: Tensor,
    delta: float,
    eps: float,
    reduction: str,
    need_student_grad: bool,
    need_teacher_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n = student.shape[0]
    needs = need_student_grad, need_teacher_grad
    loss = student.new_empty((), dtype=torch.float32)
    grads = [
        x.new_empty(x.shape if needed else (0,), dtype=torch.float32) for x, needed in zip((student, teacher), needs)
    ]
    if n == 0:
        return loss.zero_(), grads[0], grads[1]
    scale = 1 / max({"mean": n * n, "distinct": n * (n - 1), "sum": 1}[reduction], 1)
    p, at = padded(n), sides(student, teacher, None)
    distance, r = distances(student, p, eps)
    sums = distance.new_empty(2, 2, (p // TILE) ** 2)
    pair_grad = distance.new_empty(p, p) if any(needs) else None
    means, partial = distance.new_empty(2, 2), distance.new_empty(3, p // BLOCK[0])
    measure, compare, finish = _launches(*at[:2], delta, eps, scale, needs)
    measure(student, teacher, None, distance, r, sums, None)
    compare(distance, r, sums, means, pair_grad, partial)
    finish(student, teacher, r, means, pair_grad, partial, *grads, loss)
    return loss, grads[0], grads[1]


@kept
def _launches(
    student: tuple, teacher: tuple, delta: float, eps: float, scale: float, needs: tuple[bool, bool]
) -> tuple[Launch, Launch, Launch]:
    n, p = student[0], padded(student[0])
    compare = Launch(
        compare_kernel,
        (p // BLOCK[0],),
        tiles=(p // TILE) ** 2,
        p=p,
        delta=delta,
        ROWS=BLOCK[0],
        COLUMNS=BLOCK[1],
        num_warps=8,
        **OPTIONS,
    )
    widest = max((x[1] for x, needed in zip((student, teacher), needs) if needed), default=1)
    grid = max(triton.cdiv(widest, COLUMNS), 1), triton.cdiv(n, ROWS), 1 + sum(needs)
    finish = Launch(
        finish_kernel,
        grid if any(needs) else (1, 1, 1),
        **side_numbers("student", student),
        **side_numbers("teacher", teacher),
        programs=p // BLOCK[0],
        n=n,
        p=p,
        scale=scale,
        NEED_STUDENT=needs[0],
        NEED_TEACHER=needs[1],
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        TILE=TILE,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return distances_launch(student, teacher, 0, eps), compare, finish
