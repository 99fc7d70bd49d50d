"""Distillation from teachers that give their largest classes only: cross-entropy, KL and their gradients.

    q = softmax(z / tau), p = sum_t w_t p_t, P = sum_c p                               per row
    KL = sum_c p (log p - log q),   dKL/dz = (P q - p) / tau,   dKL/dw_t = sum_c p_t (log p - log q + 1)

Shapes   student z [N, C] in float32|bfloat16|float16, read in place where C is dense; indices [N, K] int64 and log_probs
         [N, K] float32, of all teachers side by side; weights [N, T] float32; labels [N] int64 -> loss [] or [N], stats
         [N, 3] and gradients, float32 (backward: the student's in its dtype)
Grid     one program a row. Every entry is compared with every other, K^2 in tiles of PAIRS: of the entries of a class the
         first speaks for it and has its p_t of all teachers. Then the row as for p = b, the number that p is outside the
         union of the supports, and the gradient of the classes in it once more, behind a barrier
Traffic  N C elements in (twice for rows of more than HELD classes, the second time from L2 where that holds them) and one
         out where there is a gradient; 12 bytes an entry, which every program reads twice

What an entry costs is small beside the row, so that its exponential and logarithm are made in float64. Outside the union
the tail "uniform" needs the sum of log q: of all classes less that of the union, which may cancel, so in float64 too.

A label or class out of range is an error only with TRITON_DEBUG=1: to look would cost a synchronization. Without, it
makes the loss of its row NaN, and nothing outside of the row is read or written. Weights are not looked at.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, aligned, alignment
from ._kd_rows import (
    LN2,
    LONG_WARPS,
    Settings,
    add_rows,
    counts_of,
    cross_entropy,
    dense,
    find_rows,
    load,
    load_weights,
    per_row,
    row_numbers,
    softmax_sums,
    square,
    student_grad,
    weighted,
)
from ._launch import Launch, kept

HELD = 4096  # classes that a program keeps in registers; a longer row is read twice
LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)
PAIRS = 256  # of entries that a warp compares at a time: more of them spill registers


@triton.jit
def _teacher_probs(log_prob, mine, weight, RENORMALIZE: tl.constexpr):
    """Of one teacher, whose entries are ``mine``: what to subtract from a log-probability, what to multiply its
    exponential by, and the mass; 0 where a teacher without weight has NaN."""
    top = tl.zeros([1, 1], tl.float32)
    if RENORMALIZE:
        top = tl.max(tl.where(mine, log_prob, -float("inf")), axis=1, keep_dims=True)
    exps = tl.exp((log_prob - top).to(tl.float64))
    mass = tl.sum(tl.where(mine, exps, 0.0), axis=1, keep_dims=True)
    factor = tl.full([1, 1], 1.0, tl.float64)
    dead = (weight == 0) & ~(mass < LARGEST)  # what is above it is infinite in float32
    if RENORMALIZE:
        factor = 1.0 / mass
        mass = mass / mass  # 1, or NaN
    return top, tl.where(dead, 0.0, factor), tl.where(dead, 0.0, mass)


@triton.jit
def _probs(log_prob, top, factor):
    return tl.where(factor == 0, 0.0, tl.exp((log_prob - top).to(tl.float64)) * factor).to(tl.float32)


@triton.jit(do_not_specialize=["n", "num_counts"])
def _topk_kernel(
    grad_loss, student, indices, log_probs, starts, weights, labels, counts, stats, ce_out, kl_out, last_out, grad_out,
    slopes_out, n, c, loss_stride, stride, weight_stride, weight_along, label_stride, num_counts, ignore_index,
    rate, rate1, per_tau, ce_weight, kl_weight, kl_scale, ce_grad, kl_grad, smoothing, even,
    TAIL: tl.constexpr, NONE: tl.constexpr, COUNT: tl.constexpr, COUNT_BLOCK: tl.constexpr, SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr, ENTRIES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """A row: forward without grad_loss, else backward, which reads the stats. last_out: as for multi_teacher_kd."""
    T: tl.constexpr = len(starts) - 1
    HELD: tl.constexpr = STEPS == 1
    AGAIN: tl.constexpr = grad_loss is not None
    c = aligned(c, ALIGN)
    rows, inside, used, label = find_rows(n, labels, label_stride, ignore_index, c, 1)
    w, _ = load_weights(weights, rows, weight_stride, weight_along, used, T)
    z = student
    if HELD:
        cols = tl.arange(0, BLOCK)[None, :]
        z = load(student, rows, stride, cols, used & (cols < c), ALIGN, -float("inf"))
    at_stats = stats + rows * 3
    if AGAIN:
        m = tl.load(at_stats, mask=used, other=0.0)
        s = tl.load(at_stats + 1, mask=used, other=1.0)
        s1 = tl.load(at_stats + 2, mask=used, other=1.0)
    else:
        tops, sums_of_rows, s1 = softmax_sums(
            z, (), rows, stride, (), c, used, (rate,), rate1, None, True, HELD, ALIGN, BLOCK, STEPS, VECTOR
        )
        m = tops[0]
        s = sums_of_rows[0]
        tl.store(at_stats, tl.where(used, m, 0.0), mask=inside)
        tl.store(at_stats + 1, tl.where(used, s, 0.0), mask=inside)
        tl.store(at_stats + 2, tl.where(used, s1, 0.0), mask=inside)
    log_s = tl.log(s.to(tl.float64))
    by = per_row(counts, label_stride, num_counts, ignore_index, COUNT, COUNT_BLOCK)
    if AGAIN:
        by *= tl.load(grad_loss + rows * loss_stride, mask=used, other=0.0).to(tl.float32)
    ce_grad = ce_grad * by
    kl_grad = kl_grad * by

    # The entries of the row: their classes, and which of them is the first of its class.
    entry = tl.arange(0, ENTRIES)[None, :]
    real = used & (entry < starts[T])
    at = rows * starts[T] + entry
    index = tl.load(indices + at, mask=real, other=-1)
    log_prob = tl.load(log_probs + at, mask=real, other=-float("inf"))
    known = real & (index >= 0) & (index < c)
    tl.device_assert(known | ~real, "a class is out of range")
    first = real
    p = tl.zeros([1, ENTRIES], tl.float64)
    of_teacher = ()
    spreads = ()
    masses = ()
    outside = tl.zeros([1, 1], tl.float64)
    total = tl.zeros([1, 1], tl.float64)
    for t in tl.static_range(T):
        mine = real & (entry >= starts[t]) & (entry < starts[t + 1])
        top, factor, mass = _teacher_probs(log_prob, mine, w[t], TAIL == "renormalize")
        p_t = tl.zeros([1, ENTRIES], tl.float32)
        named = tl.zeros([1, ENTRIES], tl.int32)
        repeated = tl.zeros([1, ENTRIES], tl.int32)
        for start in range(starts[t], starts[t + 1], CHUNK):
            other = start + tl.arange(0, CHUNK)[:, None]
            there = used & (other < starts[t + 1])
            at_other = rows * starts[T] + other
            same = tl.load(indices + at_other, mask=there, other=-2) == index  # [CHUNK, ENTRIES]
            value = _probs(tl.load(log_probs + at_other, mask=there, other=-float("inf")), top, factor)
            p_t += tl.sum(tl.where(same, value, 0.0), axis=0, keep_dims=True)  # named twice: the sum of both
            named |= tl.max(same.to(tl.int32), axis=0, keep_dims=True)
            repeated |= tl.max((same & (other < entry)).to(tl.int32), axis=0, keep_dims=True)
        first = first & (repeated == 0)
        spread = tl.zeros([1, 1], tl.float64)
        if TAIL == "uniform":
            unnamed = c - tl.sum((mine & (repeated == 0)).to(tl.int32), axis=1, keep_dims=True)
            rest = tl.where((mass > 1) | (unnamed == 0) | (factor == 0), 0.0, 1.0 - mass)
            spread = rest / tl.maximum(unnamed, 1).to(tl.float64)
            mass += rest
        p_t = tl.where(named != 0, p_t, spread.to(tl.float32))
        weight = w[t].to(tl.float64)
        p += weight * p_t.to(tl.float64)
        outside += weight * spread.to(tl.float32).to(tl.float64)
        total += weight * mass
        of_teacher = of_teacher + (p_t,)
        spreads = spreads + (spread,)
        masses = masses + (mass,)
    p = tl.where(real & ~known, float("nan"), p)
    p_outside = outside.to(tl.float32)
    mass = total.to(tl.float32)

    # The row, as if nobody named a class.
    sums = tl.zeros([1, BLOCK], tl.float64)  # of m - z where that is finite
    masked = tl.zeros([1, BLOCK], tl.int32)  # where it is not
    for step in range(STEPS):
        cols = step * BLOCK + tl.arange(0, BLOCK)[None, :]
        keep = used & (cols < c)
        tile = z
        if not HELD:
            tile = load(student, rows, stride, cols, keep, ALIGN, -float("inf"))
        if (TAIL == "uniform") | SMOOTH:
            empty = tile == -float("inf")
            sums += tl.where(keep & ~empty, m - tile, 0.0).to(tl.float64)
            masked += (keep & empty).to(tl.int32)
        if grad_out is not None:
            e = square(tl.exp2((tile - m) * rate))
            grad = student_grad(
                tile, e, p_outside, cols, labels, label, m, s, s1, mass, rate1, per_tau, ce_grad, kl_grad, smoothing,
                even,
            )  # fmt: skip
            grad = tl.where(used & (tile != -float("inf")), grad, 0.0).to(grad_out.dtype.element_ty)
            tl.store(grad_out + rows * c + cols, grad, mask=inside & (cols < c))
    below = tl.sum(sums, axis=1, keep_dims=True)
    below_masked = tl.sum(masked, axis=1, keep_dims=True)

    # The classes that are named.
    z_named = tl.load(student + rows * aligned(stride, ALIGN) + index, mask=known, other=0.0).to(tl.float32)
    half = (z_named - m) * rate
    if grad_out is not None:
        grad = student_grad(
            z_named, square(tl.exp2(half)), p.to(tl.float32), index, labels, label, m, s, s1, mass, rate1, per_tau,
            ce_grad, kl_grad, smoothing, even,
        )  # fmt: skip
        grad = tl.where(z_named == -float("inf"), 0.0, grad).to(grad_out.dtype.element_ty)
        tl.debug_barrier()  # behind what other threads have written there
        tl.store(grad_out + rows * c + index, grad, mask=first & known)
    ratio = tl.log(tl.where(p == 0, 1.0, p)) - (half.to(tl.float64) * (2 * LN2) - log_s)
    kl = tl.sum(tl.where(first & (p != 0), p * ratio, 0.0), axis=1, keep_dims=True)
    others = (c - tl.sum(first.to(tl.int32), axis=1, keep_dims=True)).to(tl.float64)
    of_others = tl.zeros([1, 1], tl.float64)  # sum of log b - log q outside the union
    if TAIL == "uniform":
        empty = z_named == -float("inf")
        below_others = below - tl.sum(tl.where(first & ~empty, m - z_named, 0.0).to(tl.float64), axis=1, keep_dims=True)
        masked_others = below_masked - tl.sum((first & empty).to(tl.int32), axis=1, keep_dims=True)
        below_others = tl.where(masked_others > 0, float("inf"), below_others)
        of_others = others * (tl.log(tl.where(outside == 0, 1.0, outside)) + log_s) + below_others * rate * (2 * LN2)
        of_others = tl.where((outside == 0) | (others == 0), 0.0, of_others)
        kl += tl.where(of_others == 0, 0.0, outside * of_others)
    if slopes_out is not None:
        for t in tl.static_range(T):
            p_t = of_teacher[t].to(tl.float64)
            terms = tl.where(p == 0, -p_t, tl.where(p_t == 0, 0.0, p_t * ratio))
            slope = masses[t] + tl.sum(tl.where(first, terms, 0.0), axis=1, keep_dims=True)
            slope += tl.where(spreads[t] == 0, 0.0, spreads[t] * tl.where(outside == 0, -others, of_others))
            slope = tl.where(used & (kl_grad != 0), kl_grad * slope.to(tl.float32), 0.0)
            tl.store(slopes_out + rows * T + t, slope, mask=inside)
    if not AGAIN:
        ce = tl.zeros([1, 1], tl.float32)
        if labels is not None:
            z_rows = student + rows * aligned(stride, ALIGN)
            all_below = tl.where(below_masked > 0, float("inf"), below).to(tl.float32)
            ce = cross_entropy(z_rows, label, used, c, m, s1, all_below, smoothing, SMOOTH)
        ce = tl.where(used, ce, 0.0)
        kl = tl.where(used, kl_scale * kl.to(tl.float32), 0.0)
        tl.store(ce_out + rows, ce, mask=inside)
        tl.store(kl_out + rows, kl, mask=inside)
        last = used.to(tl.float32)
        if NONE:  # behind those stores: Triton 3.6 stops at it before them, for it takes there what they make
            last = weighted(ce, kl, ce_weight, kl_weight)
        tl.store(last_out + rows, last, mask=inside)


class Layout(NamedTuple):
    """Where the rows lie; strides are None where there is no tensor."""

    n: int
    c: int
    stride: int
    itemsize: int
    sizes: tuple[int, ...]
    weight_strides: tuple[int, ...] | None
    label_stride: int | None


def starts_of(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each teacher's entries begin in a row, and how many there are."""
    return tuple(sum(sizes[:t]) for t in range(len(sizes) + 1))


@kept
def _launch(at: Layout, of: Settings, count_rows: bool, loss_stride: int) -> Launch:
    c, sizes = at.c, at.sizes
    entries = triton.next_power_of_2(sum(sizes))
    block, vector, warps = triton.next_power_of_2(c), 1, LONG_WARPS
    if block > HELD:
        vector = 16 // at.itemsize
        block = LONG_WARPS * 32 * vector
    else:
        warps = min(LONG_WARPS, max(1, max(block, entries) // 512))
    return Launch(
        _topk_kernel,
        (at.n,),
        **row_numbers(at, of, count_rows),
        starts=starts_of(sizes),
        loss_stride=loss_stride,
        ce_weight=float(of.ce_weight),
        kl_weight=float(of.kl_weight),
        kl_scale=float(of.kl_scale),
        TAIL=of.mode,
        NONE=of.reduction == "none",
        SMOOTH=of.label_smoothing != 0 and at.label_stride is not None,
        ALIGN=alignment(c, at.stride),
        BLOCK=block,
        STEPS=triton.cdiv(c, block),
        VECTOR=vector,
        ENTRIES=entries,
        CHUNK=max(1, PAIRS * warps // entries),
        num_warps=warps,
        **OPTIONS,
    )


def _run(
    grad_loss: Tensor | None,
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    settings: Settings,
    need_grad: bool,
    *outputs: Tensor | None,
) -> None:
    student = dense(student)
    layout = Layout(
        student.shape[0],
        student.shape[1],
        student.stride(0),
        student.element_size(),
        tuple(sizes),
        None if weights is None else weights.stride(),
        None if labels is None else labels.stride(0),
    )
    counts = counts_of(labels, settings) if need_grad else None
    loss_stride = grad_loss.stride(0) if grad_loss is not None and settings.reduction == "none" else 0
    launch = _launch(layout, settings, counts is not None, loss_stride)
    launch(grad_loss, student, indices.contiguous(), log_probs.contiguous(), weights, labels, counts, *outputs)


def topk_kd_fwd(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    kl_scale: float,
    tail: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_student_grad: bool,
    need_weights_grad: bool,
) -> tuple[Tensor, ...]:
    """loss (a scalar, or [N] for "none"), stats, grad_student, grad_weights."""
    (n, c), none = student.shape, reduction == "none"

    def make(wanted: bool, *shape: int) -> Tensor:
        return student.new_empty(shape if wanted else (0,), dtype=torch.float32)

    loss, stats = make(True, *((n,) if none else ())), make(True, n, 3)
    grad, slopes = make(need_student_grad, n, c), make(need_weights_grad, n, len(sizes))
    if n == 0:
        loss.zero_()
        return loss, stats, grad, slopes
    settings = Settings(temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing)
    values = make(True, 3, n)
    ce_rows, kl_rows, last = values.unbind()
    _run(
        None,
        student,
        indices,
        log_probs,
        sizes,
        weights,
        labels,
        settings,
        need_student_grad or need_weights_grad,
        stats,
        ce_rows,
        kl_rows,
        loss if none else last,
        grad if need_student_grad else None,
        slopes if need_weights_grad else None,
    )
    if not none:
        add_rows(values, [loss, None, None], float(ce_weight), float(kl_weight), settings.kl_divisor(c))
    return loss, stats, grad, slopes


def topk_kd_bwd(
    grad_loss: Tensor,
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    stats: Tensor,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    kl_scale: float,
    tail: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_student_grad: bool,
    need_weights_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to the student, in its dtype, and to the weights."""
    n, c = student.shape
    grad = student.new_empty((n, c) if need_student_grad else (0,))
    slopes = stats.new_empty((n, len(sizes)) if need_weights_grad else (0,))
    if n == 0 or not (need_student_grad or need_weights_grad):
        return grad, slopes
    settings = Settings(temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing)
    _run(
        grad_loss,
        student,
        indices,
        log_probs,
        sizes,
        weights,
        labels,
        settings,
        True,
        stats,
        None,
        None,
        None,
        grad if need_student_grad else None,
        slopes if need_weights_grad else None,
    )
    return grad, slopes
