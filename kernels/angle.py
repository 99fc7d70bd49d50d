"""Triplet angle loss by the law of cosines, in O(N^2) memory.

    psi(i, j, k) = 1/2 r_ij r_kj (D_ij + D_kj - D_ik)    cosine at the vertex j
    L = sum_ijk huber_delta(psi_s - psi_t),  g = clamp(psi_s - psi_t, -delta, delta)

Each pair a < b meets every row c. Of the triangle a, b, c three angles move with D_ab: at a and at b it is an arm, at
c the far side. With h = 1/2 r r of the two arms,

    dL/dD_ab = 2 sum_c [ (g h)_a + (g h)_b - (g h)_c ] - r_ab^2 sum_c [ (g psi)_a + (g psi)_b ]

is therefore complete within one program, which keeps D_ab, r_ab and the sums in registers: no atomics, nothing is
summed in memory. The value is that of the angles at c (or, a number for each vertex, of those at a and b). Each angle
is evaluated three times instead of once.

Precision: D, the sum of three D, and the sums of g h are float64, all else float32. A pair at distance e puts +-1/e
into two elements of G = dL/dD that must cancel in a third row, so the float32 number g h of an angle must have the
same bits in the three programs that make it. Hence one function for all of them, symmetric in its arms, and no
contraction to multiply-add but the explicit ones (enable_fp_fusion=False: the compiler would choose by what else uses
a product). psi, g and h are kept doubled, which saves the 1/2.

student, teacher [N, C] float32, bfloat16 or float16; loss [] or [N], gradients [N, C], all float32. P is N rounded up
to 32, S the number of parts into which the rows c are cut where there are few tiles.
  distances_kernel, split_kernel  see pairs.py. The second returns at once unless some distances are much longer than others:
                    three D then leave a small part of them, and have two terms each
  triplets_kernel   grid (P / 32, P / 32, S), the programs below the diagonal leave at once. Reads 24 P^2 bytes once
                    from memory and P / 32 times from L2, writes 8 S P^2 for each side with a gradient. Bound by
                    arithmetic: for a pair and a row 15 float64 additions, 9 conversions from or to float64 and 25
                    float32 instructions (student gradient), of which the conversions are the slowest.
  finish_kernel     grid (C / 32, N / 4, sides + 1): the gradient of the rows (pairs.py), and the sum of the losses
Memory: 40 + 8 S bytes (both gradients: 40 + 16 S) for each of P^2 pairs; S = 1 from N = 481 on. With eps below 1e-18
all is float64, and 48 takes the place of 40.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Launch, kept
from ._pairs import (
    COLUMNS,
    ROWS,
    TILE,
    count_taking_part,
    distances,
    distances_launch,
    exceeds_float64,
    padded,
    row_gradient,
    side_numbers,
    split_launch,
    taking_part,
    total,
)
from ._pairs import sides as of_sides

CHUNK = 64  # rows c whose float32 sums are added up before they go into float64


@triton.jit
def _angle(first, second, far, limit, SPLIT: tl.constexpr):
    """Both sides at one vertex. Edges are (D, r) of the first side, then of the second, then the rests of both D. All that
    comes back is doubled: the clamped difference g, what the Huber loss multiplies it with, and h and psi of each side."""
    h1, h2 = first[1] * second[1], first[3] * second[3]
    u1, u2 = first[0] + second[0] - far[0], first[2] + second[2] - far[2]
    if SPLIT:
        u1, u2 = u1 + (first[4] + second[4] - far[4]), u2 + (first[5] + second[5] - far[5])
    psi1, psi2 = u1.to(h1.dtype) * h1, u2.to(h2.dtype) * h2
    x = psi1 - psi2
    if x.dtype == tl.float64:  # for which tl.clamp does not compile
        g = tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))
    else:
        g = tl.clamp(x, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
    return g, tl.fma(g, -0.5, x), h1, psi1, h2, psi2


@triton.jit
def _edges(distance, r, rest, at, second, SPLIT: tl.constexpr):
    """Edges of both sides; ``second``: how far the second side's matrices lie behind the first's."""
    d1, r1, d2, r2 = tl.load(distance + at), tl.load(r + at), tl.load(distance + second + at), tl.load(r + second + at)
    if SPLIT:
        return d1, r1, d2, r2, tl.load(rest + at), tl.load(rest + second + at)
    else:
        return d1, r1, d2, r2


@triton.jit
def _add(sums, psi_sums, g_a, h_a, psi_a, g_b, h_b, psi_b, g_c, h_c, weight_a, weight_b, weight_c):
    """Adds g h of three vertices in float64, where the product of two float32 numbers is exact, and g psi of two."""
    a, b, c = (g_a * h_a).to(tl.float64), (g_b * h_b).to(tl.float64), (g_c * h_c).to(tl.float64)
    if weight_a is None:
        sums = sums + a + b - c
    else:
        a_and_b = tl.fma(weight_b.to(tl.float64), b, tl.fma(weight_a.to(tl.float64), a, sums))
        sums = tl.fma(-weight_c.to(tl.float64), c, a_and_b)
        g_a, g_b = weight_a.to(g_a.dtype) * g_a, weight_b.to(g_b.dtype) * g_b
    return sums, tl.fma(g_b, psi_b, tl.fma(g_a, psi_a, psi_sums))


@triton.jit
def _taken_back(ab, bound, weight_a, weight_b, here, SPLIT: tl.constexpr):
    """What the sums start from. c = b at the vertex a, and c = a at b, are i = k: psi is 1 wherever the rows are, and
    what they will add to the gradient is taken back (``here``: by this program)."""
    zero, none = tl.zeros(ab[0].shape, tl.float64), tl.zeros(ab[1].shape, ab[1].dtype)
    far = zero, none, zero, none, zero, zero
    g, _, h1, psi1, h2, psi2 = _angle(ab, ab, far, bound, SPLIT)
    g = tl.where(here, -g, none)
    sum1, sum_psi1 = _add(zero, none, g, h1, psi1, g, h1, psi1, none, none, weight_a, weight_b, none)
    sum2, sum_psi2 = _add(zero, none, g, h2, psi2, g, h2, psi2, none, none, weight_a, weight_b, none)
    return sum1, sum_psi1, sum2, sum_psi2


@triton.jit
def _arms(r, psi):
    """What r of the arm itself contributes, to be added to sum g h."""
    r = r.to(tl.float64)
    return -0.5 * r * r * psi.to(tl.float64)


@triton.jit
def _store_both(to, values, a, b, p, off_diagonal):
    at_a, at_b = a.to(tl.int64)[:, None], b.to(tl.int64)[None, :]
    tl.store(to + at_a * p + at_b, values)
    if off_diagonal:
        tl.store(to + at_b * p + at_a, values)


@triton.jit(do_not_specialize=["n"])
def triplets_kernel(
    distance,  # [2, P, P] float64
    r,  # [2, P, P]
    rest, extremes,  # of the distances: see pairs.py
    weight,  # [N] of the vertices; or None: 1
    grad1, grad2,  # [S, P, P] float64, 2 dL/dD_ab with D_ab = D_ba as one variable; or None
    loss,  # [P / TILE, P / TILE, S] float64, or [P / TILE, S, P] for every vertex; or None
    n, p,
    limit: tl.float64,  # 2 delta
    SPLIT: tl.constexpr,  # of two launches one returns at once; a kernel with both would have too many registers
    PER_VERTEX: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    if exceeds_float64(extremes) != SPLIT:
        return
    a_block, b_block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks, parts = tl.num_programs(0), tl.num_programs(2)
    if a_block > b_block:
        if loss is not None and not PER_VERTEX:
            tl.store(loss + (a_block * blocks + b_block) * parts + part, 0.0)
        return
    a, b = a_block * TILE + tl.arange(0, TILE), b_block * TILE + tl.arange(0, TILE)
    pitch = p.to(tl.int64)
    second = pitch * p
    ab = _edges(distance, r, rest, a.to(tl.int64)[:, None] * p + b[None, :], second, SPLIT)
    bound = tl.full([TILE, TILE], limit, r.dtype.element_ty)
    weight_a, weight_b = None, None
    if weight is not None:
        weight_a = tl.load(weight + a, mask=a < n, other=0.0)[:, None]
        weight_b = tl.load(weight + b, mask=b < n, other=0.0)[None, :]
    sum1, psi1, sum2, psi2 = _taken_back(ab, bound, weight_a, weight_b, part == 0, SPLIT)
    value_a, value_b = tl.zeros([TILE], tl.float64), tl.zeros([TILE], tl.float64)
    begin, end = part * n // parts, (part + 1) * n // parts
    for first in range(begin, end, CHUNK):
        loss_a, loss_b = tl.zeros([TILE, TILE], r.dtype.element_ty), tl.zeros([TILE, TILE], r.dtype.element_ty)
        for c in range(first, tl.minimum(first + CHUNK, end)):
            row = pitch * c
            ac = _edges(distance, r, rest, row + a[:, None], second, SPLIT)
            bc = _edges(distance, r, rest, row + b[None, :], second, SPLIT)
            g_c, rest_c, h1_c, _, h2_c, _ = _angle(ac, bc, ab, bound, SPLIT)
            if PER_VERTEX or grad1 is not None:
                g_a, rest_a, h1_a, psi1_a, h2_a, psi2_a = _angle(ab, ac, bc, bound, SPLIT)
                g_b, rest_b, h1_b, psi1_b, h2_b, psi2_b = _angle(ab, bc, ac, bound, SPLIT)
            weight_c = tl.load(weight + c) if weight is not None else None
            if grad1 is not None:
                sum1, psi1 = _add(
                    sum1, psi1, g_a, h1_a, psi1_a, g_b, h1_b, psi1_b, g_c, h1_c, weight_a, weight_b, weight_c
                )  # fmt: skip
            if grad2 is not None:
                sum2, psi2 = _add(
                    sum2, psi2, g_a, h2_a, psi2_a, g_b, h2_b, psi2_b, g_c, h2_c, weight_a, weight_b, weight_c
                )  # fmt: skip
            if PER_VERTEX:
                loss_a, loss_b = tl.fma(g_a, rest_a, loss_a), tl.fma(g_b, rest_b, loss_b)
            elif loss is not None:
                loss_a = tl.fma(g_c, rest_c, loss_a)
        if grad1 is not None:
            sum1 += _arms(ab[1], psi1)
            psi1 = tl.zeros([TILE, TILE], r.dtype.element_ty)
        if grad2 is not None:
            sum2 += _arms(ab[3], psi2)
            psi2 = tl.zeros([TILE, TILE], r.dtype.element_ty)
        if loss is not None:
            value_a += tl.sum(loss_a.to(tl.float64), axis=1)
            value_b += tl.sum(loss_b.to(tl.float64), axis=0)
    if grad1 is not None:
        _store_both(grad1 + part * second, sum1, a, b, p, a_block != b_block)
    if grad2 is not None:
        _store_both(grad2 + part * second, sum2, a, b, p, a_block != b_block)
    if PER_VERTEX:
        tl.store(loss + (b_block * parts + part).to(tl.int64) * p + a, 0.25 * value_a)
        if a_block != b_block:
            tl.store(loss + (a_block * parts + part).to(tl.int64) * p + b, 0.25 * value_b)
    elif loss is not None:
        both = tl.where(a_block == b_block, 0.25, 0.5).to(tl.float64)
        tl.store(loss + (a_block * blocks + b_block) * parts + part, both * tl.sum(value_a))


@triton.jit
def _scale(row_mask, mask_stride, n, REDUCTION: tl.constexpr):
    m = count_taking_part(row_mask, mask_stride, n)
    one = tl.full([], 1.0, tl.float64)
    if REDUCTION == "mean":
        scale = 1.0 / tl.maximum(m * m * m, one)
    elif REDUCTION == "distinct":
        scale = tl.where(m < 3.0, 0.0, 1.0 / tl.maximum(m * (m - 1.0) * (m - 2.0), one))  # no triplet: 0
    elif REDUCTION == "none":
        scale = 1.0 / tl.maximum(m * m, one)
    else:
        scale = one
    return scale


@triton.jit
def _finish_loss(
    partial, count, loss, row_mask, mask_stride, scale, n, p, PER_VERTEX: tl.constexpr, ROWS: tl.constexpr
):
    if PER_VERTEX:
        j, program = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, 64)
        sums = tl.zeros([64, ROWS], tl.float64)
        for first in range(0, count, 64):
            at = (first + program).to(tl.int64)[:, None] * p + j[None, :]
            sums += tl.load(partial + at, mask=(first + program < count)[:, None], other=0.0)
        value = tl.where(taking_part(j, row_mask, mask_stride, n), scale * tl.sum(sums, axis=0), 0.0)
        tl.store(loss + j, value.to(tl.float32), mask=j < n)
    elif tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(loss, (scale * total(partial, count)).to(tl.float32))


@triton.jit(do_not_specialize=["n"])
def finish_kernel(
    first, first_row, first_column, first_width,
    other, other_row, other_column, other_width,
    row_mask, mask_stride,
    pair_grad1, pair_grad2, grad1, grad2,
    partial, count,  # losses as triplets_kernel leaves them, and of how many programs (a vertex); or None
    loss,
    n, p,
    gain: tl.float64,  # of the gradients
    REDUCTION: tl.constexpr, SIDES: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    scale = _scale(row_mask, mask_stride, n, REDUCTION)
    side = tl.program_id(2)
    up = scale * gain
    if pair_grad1 is not None:
        if side == 0:
            row_gradient(
                first, first_row, first_column, first_width, row_mask, mask_stride, pair_grad1, None, None, up,
                grad1, n, p, PARTS, ROWS, COLUMNS, TILE,
            )  # fmt: skip
    if pair_grad2 is not None:
        if side == 1:
            row_gradient(
                other, other_row, other_column, other_width, row_mask, mask_stride, pair_grad2, None, None, -up,
                grad2, n, p, PARTS, ROWS, COLUMNS, TILE,
            )  # fmt: skip
    if partial is not None:
        if side == SIDES:
            _finish_loss(partial, count, loss, row_mask, mask_stride, scale, n, p, REDUCTION == "none", ROWS)


def _parts(n: int) -> int:
    """Into how many parts to cut the rows c, so that there is a program for every multiprocessor: a power of 2."""
    blocks, parts = padded(n) // TILE, 1
    while parts < 16 and parts * blocks * (blocks + 1) < 2 * 132 and 16 * parts <= n:
        parts *= 2
    return parts


def run(
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,
    weight: Tensor | None,
    delta: float,
    eps: float,
    reduction: str,
    loss: Tensor | None,
    need_student: bool,
    need_teacher: bool,
    gain: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Fills ``loss`` unless it is None, and returns the gradients times ``gain``."""
    swap = need_teacher and not need_student  # the loss is the same with its sides exchanged
    first, second = (teacher, student) if swap else (student, teacher)
    sides, want_loss = need_student + need_teacher, loss is not None
    at = of_sides(first, second, row_mask)
    p, parts, count, launches = _plan(*at, delta, eps, reduction, sides, want_loss, gain)
    grads = [x.new_empty(x.shape if side < sides else 0, dtype=torch.float32) for side, x in enumerate((first, second))]
    distance, r = distances(first, p, eps)
    make = distance.new_empty
    rest, extremes = make(2, p, p), make(2, 2, dtype=torch.int64).zero_()
    pair_grads = make(parts, p, p) if sides else None, make(parts, p, p) if sides == 2 else None
    partial = make(count * (p if reduction == "none" else 1)) if want_loss else None
    measure, split, *triplets, finish = launches
    measure(first, second, row_mask, distance, r, None, extremes)
    split(first, second, row_mask, distance, rest, extremes)
    for form in triplets:
        form(distance, r, rest, extremes, weight, *pair_grads, partial)
    finish(first, second, row_mask, *pair_grads, *grads, partial, loss)
    return (grads[1], grads[0]) if swap else (grads[0], grads[1])


@kept
def _plan(
    first: tuple,
    second: tuple,
    mask_stride: int,
    delta: float,
    eps: float,
    reduction: str,
    sides: int,
    want_loss: bool,
    gain: float,
) -> tuple[int, int, int, tuple[Launch, ...]]:
    """P, S, the programs that leave a loss (for a vertex or in all), and the launches."""
    n, p, parts = first[0], padded(first[0]), _parts(first[0])
    blocks, per_vertex = p // TILE, want_loss and reduction == "none"
    count = blocks * parts * (1 if per_vertex else blocks)
    options = dict(num_warps=8, enable_fp_fusion=False)
    triplets = [
        Launch(
            triplets_kernel,
            (blocks, blocks, parts),
            n=n,
            p=p,
            limit=2.0 * delta,
            SPLIT=split,
            PER_VERTEX=per_vertex,
            TILE=TILE,
            CHUNK=CHUNK,
            **options,
        )
        for split in (False, True)
    ]
    widest = max(x[1] for x in (first, second)[: max(sides, 1)])
    finish = Launch(
        finish_kernel,
        (max(triton.cdiv(widest, COLUMNS), 1) if sides else 1, triton.cdiv(n, ROWS), sides + want_loss),
        **side_numbers("first", first),
        **side_numbers("other", second),
        mask_stride=mask_stride,
        count=count,
        n=n,
        p=p,
        gain=gain,
        REDUCTION=reduction,
        SIDES=sides,
        PARTS=parts,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        TILE=TILE,
        **options,
    )
    measure = distances_launch(first, second, mask_stride, eps), split_launch(first, second, mask_stride)
    return p, parts, count, (*measure, *triplets, finish)


def angle_fwd(
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,
    delta: float,
    eps: float,
    reduction: str,
    need_student_grad: bool,
    need_teacher_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, none = student.shape[0], reduction == "none"
    loss = student.new_empty((n,) if none else (), dtype=torch.float32)
    needs = need_student_grad and not none, need_teacher_grad and not none
    if n == 0:
        return loss.zero_(), *_no_rows(student, teacher, needs)
    return loss, *run(student, teacher, row_mask, None, delta, eps, reduction, loss, *needs)


def angle_bwd(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,
    delta: float,
    eps: float,
    need_student_grad: bool,
    need_teacher_grad: bool,
) -> tuple[Tensor, Tensor]:
    needs = need_student_grad, need_teacher_grad
    if student.shape[0] == 0 or not any(needs):
        return _no_rows(student, teacher, needs)
    weight = grad_loss.to(torch.float32).contiguous()
    if row_mask is not None:  # what comes in for a row that takes no part may be anything
        weight = torch.where(row_mask, weight, 0.0)
    return run(student, teacher, row_mask, weight, delta, eps, "none", None, *needs)


def _no_rows(student: Tensor, teacher: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
    grads = [
        x.new_empty(x.shape if needed else (0,), dtype=torch.float32) for x, needed in zip((student, teacher), needs)
    ]
    return grads[0], grads[1]
