"""Weighted multi-teacher distillation: cross-entropy, weighted KL and their gradients.

    q = softmax(z / tau), p_t = softmax(z_t / tau), p = sum_t w_t p_t, W = sum_t w_t      per row
    KL = sum_c p (log p - log q)   (mixture)    or    sum_t w_t sum_c p_t (log p_t - log q)   (sum)
    dKL/dz = (W q - p) / tau
    dKL/dw_t = sum_c p_t (log p - log q + 1)    or    sum_c p_t (log p_t - log q)

Shapes   student z [N, C] and T teachers z_t [N, C] in float32|bfloat16|float16, each its own, read in place where C is
         dense; weights [N, T] float32; labels [N] int64 -> losses [] or [N], stats [N, 3 + 2T] and gradients, float32
         (the student's in its dtype)
Grid     one program for a tile of whole rows. Tiles of up to HELD_BYTES are read once and stay in registers; a longer
         row is read twice, in chunks: first for maxima and sums (each lane its own, so that the loop has no barrier),
         then for all that follows from them. Backward has those in stats and reads every row once. One or two small
         kernels more count the rows and add them up
Traffic  (T + 1) N C elements in, and one out where there is a gradient; twice that in for long rows, the second time
         from L2 where that holds them. Memory should bind, if enough loads are under way; in 16 bits arithmetic comes
         close: T + 2 exponentials an element, and T + 2 more for long rows

A KL near 0 is made of terms that cancel, so each class adds p log(p / W q) - (p - W q), in which p and q are the
numbers that the gradient is made of: what approximate exponentials and rounded sums leave of sum p = W and sum q = 1
then counts in second order only. The logarithm is a polynomial of (p - W q) / W q where the two are close. It and the
exponential (a square: 2^x = (2^(x/2))^2) reach down to the smallest float32, where Triton's own flush to 0.

Half of that is for numbers that hardly any row has. So the whole blocks of a long row are swept first without it
(plain_sweep in _kd_rows.py). An infinite sum or a NaN tells of the others: those rows are swept again, with care.

A label out of range is an error only with TRITON_DEBUG=1: to look would cost a synchronization. Without, it makes the
loss of its row NaN, and nothing outside of the row is read or written. Weights are not looked at.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, aligned, alignment
from ._kd_rows import (
    LONG_WARPS,
    Settings,
    add,
    add_rows,
    counts_of,
    cross_entropy,
    dense,
    divergence_terms,
    find_rows,
    folded,
    inverses_of,
    load,
    load_all,
    load_stats,
    load_weights,
    log_ratios_of,
    mix,
    per_row,
    plain_sweep,
    row_numbers,
    slopes,
    softmax_sums,
    square,
    store_stats,
    student_grad,
    times,
    weighted,
)
from ._launch import Launch, kept

HELD_BYTES = 40960  # what a tile may keep in registers, T + 2 numbers a class: two programs share a multiprocessor
THREAD_NUMBERS = 80  # that a thread may hold, T + 2 a class, or it spills registers
LONG_NUMBERS = 56  # and of a row that is read in chunks
# Elements that a program takes, and the programs to have before that. An interpreted one is slow, whatever it takes.
TILE, PROGRAMS = (65536, 3) if triton.knobs.runtime.interpret else (1024, 128)


@triton.jit(do_not_specialize=["n", "num_counts"])
def _kd_forward_kernel(
    student, teachers, weights, labels, counts, stats, ce_out, kl_out, last_out, probs_out, targets_out, grad_out,
    slopes_out, n, c, stride, teacher_strides, weight_stride, weight_along, label_stride, num_counts, ignore_index,
    rate, rate1, per_tau, ce_weight, kl_weight, kl_scale, ce_grad, kl_grad, smoothing, even,
    MIXTURE: tl.constexpr, NONE: tl.constexpr, COUNT: tl.constexpr, COUNT_BLOCK: tl.constexpr, SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Losses of rows, and whatever else has a place to go. last_out: the loss if NONE, else 1 for a row that counts."""
    T: tl.constexpr = len(teachers)
    HELD: tl.constexpr = STEPS == 1
    PLAIN: tl.constexpr = not HELD and probs_out is None
    FOLD: tl.constexpr = VECTOR * PART // BLOCK
    c = aligned(c, ALIGN)
    rows, inside, used, label = find_rows(n, labels, label_stride, ignore_index, c, ROWS)
    w, total = load_weights(weights, rows, weight_stride, weight_along, used, T)
    z, xs = student, teachers
    if HELD:
        cols = tl.arange(0, BLOCK)[None, :]
        z = load(student, rows, stride, cols, used & (cols < c), ALIGN, -float("inf"))
        xs = load_all(teachers, rows, teacher_strides, cols, used & (cols < c), ALIGN)
    tops, totals, s1 = softmax_sums(
        z, xs, rows, stride, teacher_strides, c, used, (rate,) * (1 + T), rate1, None, True,
        HELD, ALIGN, BLOCK, STEPS, VECTOR,
    )  # fmt: skip
    m = tops[0]
    s = totals[0]
    maxima = tops[1:]
    sums = totals[1:]
    store_stats(stats, rows, inside, used, m, s, s1, maxima, sums)
    inverses = inverses_of(sums, w, False)
    log_ratios = log_ratios_of(sums, s, MIXTURE)
    by = per_row(counts, label_stride, num_counts, ignore_index, COUNT, COUNT_BLOCK)
    ce_grad = ce_grad * by
    kl_grad = kl_grad * by

    kl_sums = tl.zeros([ROWS, PART // FOLD], tl.float32)
    below = tl.zeros([ROWS, PART // FOLD], tl.float32)
    dots = (tl.zeros([ROWS, PART // FOLD], tl.float32),) * (0 if MIXTURE and slopes_out is None else T)
    first = 0
    if PLAIN:
        kl_sums, below, dots, first = plain_sweep(
            student, teachers, grad_out, rows, stride, teacher_strides, c, used, labels, label_stride, w, total, m, s, s1,
            maxima, sums, inverses, log_ratios, rate, rate1, per_tau, ce_grad, kl_grad, smoothing, even,
            not MIXTURE or slopes_out is not None, MIXTURE, SMOOTH, ALIGN, BLOCK, VECTOR,
        )  # fmt: skip
        first *= BLOCK // PART
        # Read again, so that the sweep has the registers.
        rows, inside, used, label = find_rows(n, labels, label_stride, ignore_index, c, ROWS)
        w, total = load_weights(weights, rows, weight_stride, weight_along, used, T)
        m, s, s1, maxima, sums = load_stats(stats, rows, used, T)
        inverses = inverses_of(sums, w, False)
        log_ratios = log_ratios_of(sums, s, MIXTURE)
        kl_sums *= total / s
    for step in range(1 if HELD else tl.cdiv(c, PART) - first):
        cols = (first + step) * PART + tl.arange(0, PART)[None, :]
        real = cols < c
        if HELD:
            z_tile, x_tiles = z, xs
        else:
            z_tile = load(student, rows, stride, cols, used & real, ALIGN, -float("inf"))
            x_tiles = load_all(teachers, rows, teacher_strides, cols, used & real, ALIGN)
        half = (z_tile - m) * rate
        e = square(tl.exp2(half))
        halves, exps, p = mix(x_tiles, maxima, inverses, w, rate)
        value, terms = divergence_terms(e, half, halves, exps, p, s, total, sums, log_ratios, MIXTURE)
        kl_sums += folded(value, FOLD, ALIGN)
        dots = add(dots, terms, FOLD, ALIGN)
        if SMOOTH:
            below += folded(tl.where(real, m - z_tile, 0.0), FOLD, ALIGN)
        at = rows * c + cols
        if probs_out is not None:
            tl.store(probs_out + at, tl.where(used, e / s, 0.0), mask=inside & real)
            tl.store(targets_out + at, tl.where(used, p, 0.0), mask=inside & real)
        if grad_out is not None:
            grad = student_grad(
                z_tile, e, p, cols, labels, label, m, s, s1, total, rate1, per_tau, ce_grad, kl_grad, smoothing, even
            )
            grad = tl.where(used & (z_tile != -float("inf")), grad, 0.0)
            tl.store(grad_out + at, grad.to(grad_out.dtype.element_ty), mask=inside & real)

    slope = slopes(dots, w, inverses, total, s, MIXTURE)
    if MIXTURE:
        kl = tl.sum(kl_sums, axis=1, keep_dims=True) + tl.where(total == 0, 0.0, total * tl.log(total))
    else:
        kl = tl.zeros([ROWS, 1], tl.float32)
        for t in tl.static_range(T):
            kl += tl.where(w[t] == 0, 0.0, w[t] * slope[t])
    if slopes_out is not None:
        for t in tl.static_range(T):
            grad = tl.where(used & (kl_grad != 0), kl_grad * slope[t], 0.0)
            tl.store(slopes_out + rows * T + t, grad, mask=inside)
    ce = tl.zeros([ROWS, 1], tl.float32)
    if labels is not None:
        z_rows = student + rows * aligned(stride, ALIGN)
        below_row = tl.sum(below, axis=1, keep_dims=True)
        ce = cross_entropy(z_rows, label, used, c, m, s1, below_row, smoothing, SMOOTH)
    ce = tl.where(used, ce, 0.0)
    kl = tl.where(used, kl_scale * kl, 0.0)
    last = used.to(tl.float32)
    if NONE:
        last = weighted(ce, kl, ce_weight, kl_weight)
    tl.store(ce_out + rows, ce, mask=inside)
    tl.store(kl_out + rows, kl, mask=inside)
    tl.store(last_out + rows, last, mask=inside)


@triton.jit(do_not_specialize=["n", "num_counts"])
def _kd_backward_kernel(
    grad_loss, grad_probs, grad_targets, student, teachers, weights, labels, counts, stats, grad_out, slopes_out, n, c,
    loss_stride, probs_stride, targets_stride, stride, teacher_strides, weight_stride, weight_along, label_stride,
    num_counts, ignore_index, rate, rate1, per_tau, ce_grad, kl_grad, smoothing, even,
    MIXTURE: tl.constexpr, COUNT: tl.constexpr, COUNT_BLOCK: tl.constexpr, ALIGN: tl.constexpr,
    RESCALE: tl.constexpr, BACK_ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    VECTOR: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Gradients from what comes back to loss, probabilities and soft targets, and from the stats of forward.

    With RESCALE they are there already, for an incoming gradient of 1, and are made again where they cannot be scaled
    without rounding them a second time."""
    T: tl.constexpr = len(teachers)
    PLAIN: tl.constexpr = STEPS > 1 and grad_probs is None and grad_targets is None
    FOLD: tl.constexpr = VECTOR * PART // BLOCK
    c = aligned(c, ALIGN)
    rows, inside, used, label = find_rows(n, labels, label_stride, ignore_index, c, ROWS)
    if RESCALE:
        scale = tl.load(grad_loss + rows * loss_stride, mask=used, other=1.0)
        if tl.max((scale != 1).to(tl.int32)) == 0:
            return
        bits = scale.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) & 255
        rounds = ((bits & 0x7FFFFF) != 0) | (exponent == 0) | (exponent == 255)  # all but powers of 2
        if tl.max(rounds.to(tl.int32)) == 0:
            if grad_out is not None:
                for step in range(STEPS):
                    cols = step * BLOCK + tl.arange(0, BLOCK)[None, :]
                    at = grad_out + rows * c + cols
                    grad = tl.load(at, mask=used & (cols < c)).to(tl.float32) * scale
                    tl.store(at, grad.to(grad_out.dtype.element_ty), mask=used & (cols < c))
            if slopes_out is not None:
                for t in tl.static_range(T):
                    at = slopes_out + rows * T + t
                    tl.store(at, tl.load(at, mask=used) * scale, mask=used)
            return
    w, total = load_weights(weights, rows, weight_stride, weight_along, used, T)
    m, s, s1, maxima, sums = load_stats(stats, rows, used, T)
    inverses = inverses_of(sums, w, False)
    log_ratios = log_ratios_of(sums, s, MIXTURE)
    by = per_row(counts, label_stride, num_counts, ignore_index, COUNT, COUNT_BLOCK)
    by *= tl.load(grad_loss + rows * loss_stride, mask=used, other=0.0).to(tl.float32)
    ce_grad = ce_grad * by
    kl_grad = kl_grad * by

    inner = tl.zeros([ROWS, PART // FOLD], tl.float32)  # of q and what comes back to it
    if grad_probs is not None:
        for step in range(1 if STEPS == 1 else tl.cdiv(c, PART)):
            cols = step * PART + tl.arange(0, PART)[None, :]
            keep = used & (cols < c)
            z = load(student, rows, stride, cols, keep, ALIGN, -float("inf"))
            back = load(grad_probs, rows, probs_stride, cols, keep, BACK_ALIGN, 0.0)
            inner += folded(square(tl.exp2((z - m) * rate)) * back, FOLD, ALIGN)
    inner = tl.sum(inner, axis=1, keep_dims=True) / s

    dots = (tl.zeros([ROWS, PART // FOLD], tl.float32),) * (0 if slopes_out is None else T)
    backs = (tl.zeros([ROWS, PART // FOLD], tl.float32),) * (0 if grad_targets is None else T)
    first = 0
    if PLAIN:
        _values, _below, dots, first = plain_sweep(
            student, teachers, grad_out, rows, stride, teacher_strides, c, used, labels, label_stride, w, total, m, s, s1,
            maxima, sums, inverses, log_ratios, rate, rate1, per_tau, ce_grad, kl_grad, smoothing, even,
            slopes_out is not None, MIXTURE, True, ALIGN, BLOCK, VECTOR,
        )  # fmt: skip
        first *= BLOCK // PART
        # Read again, so that the sweep has the registers.
        rows, inside, used, label = find_rows(n, labels, label_stride, ignore_index, c, ROWS)
        w, total = load_weights(weights, rows, weight_stride, weight_along, used, T)
        m, s, s1, maxima, sums = load_stats(stats, rows, used, T)
        inverses = inverses_of(sums, w, False)
        log_ratios = log_ratios_of(sums, s, MIXTURE)
    for step in range(1 if STEPS == 1 else tl.cdiv(c, PART) - first):
        cols = (first + step) * PART + tl.arange(0, PART)[None, :]
        keep = used & (cols < c)
        z = load(student, rows, stride, cols, keep, ALIGN, -float("inf"))
        xs = load_all(teachers, rows, teacher_strides, cols, keep, ALIGN)
        half = (z - m) * rate
        e = square(tl.exp2(half))
        halves, exps, p = mix(xs, maxima, inverses, w, rate)
        _, terms = divergence_terms(e, half, halves, exps, p, s, total, sums, log_ratios, MIXTURE)
        dots = add(dots, terms, FOLD, ALIGN)
        if grad_targets is not None:
            back = load(grad_targets, rows, targets_stride, cols, keep, BACK_ALIGN, 0.0)
            backs = add(backs, times(exps, back), FOLD, ALIGN)
        if grad_out is not None:
            grad = student_grad(
                z, e, p, cols, labels, label, m, s, s1, total, rate1, per_tau, ce_grad, kl_grad, smoothing, even
            )
            if grad_probs is not None:
                back = load(grad_probs, rows, probs_stride, cols, keep, BACK_ALIGN, 0.0)
                grad += (per_tau / s) * e * (back - inner)
            grad = tl.where(used & (z != -float("inf")), grad, 0.0)
            tl.store(grad_out + rows * c + cols, grad.to(grad_out.dtype.element_ty), mask=inside & (cols < c))

    slope = slopes(dots, w, inverses, total, s, MIXTURE)
    for t in tl.static_range(len(dots)):
        grad = tl.where(kl_grad != 0, kl_grad * slope[t], 0.0)
        if grad_targets is not None:
            grad += tl.sum(backs[t], axis=1, keep_dims=True) * inverses[t]
        tl.store(slopes_out + rows * T + t, tl.where(used, grad, 0.0), mask=inside)


def power_of_2_below(n: int) -> int:
    """The largest power of 2 up to n, 1 at least."""
    return 1 << max(n, 1).bit_length() - 1


def tiles(n: int, c: int, align: int, inputs: int, itemsize: int, simple: bool) -> dict[str, int]:
    """Rows and classes of a tile, how many tiles make a row, warps and registers. What is not ``simple`` takes more of those."""
    block = triton.next_power_of_2(c)
    if block * (inputs + 1) * itemsize > HELD_BYTES:
        vector = min(16 // itemsize, power_of_2_below(LONG_NUMBERS // inputs))
        block, numbers = LONG_WARPS * 32 * vector, vector * inputs
        # As few as do not spill, for what hides the latency of memory is the loads of many threads: with 64, 80 and 128 a
        # multiprocessor of 9.0 has 4, 3 and 2 programs at a time.
        few = simple and align * itemsize >= 16 and inputs <= 5 and numbers <= 32
        registers = (64 if numbers <= 16 else 80) if few else 128 if inputs <= 7 else 255
        return dict(
            ROWS=1,
            BLOCK=block,
            STEPS=triton.cdiv(c, block),
            VECTOR=vector,
            PART=block // min(vector, 4) if block < c else block,
            num_warps=LONG_WARPS,
            maxnreg=registers,
            **OPTIONS,
        )
    share = power_of_2_below(THREAD_NUMBERS // (inputs + 1))  # of each input
    rows = max(1, TILE // block)
    while rows > 1 and triton.cdiv(n, rows) < PROGRAMS:
        rows //= 2
    warps = rows * block // (32 * min(share, 16 if rows == 1 else 8))  # a thread has numbers of each of its rows, too
    return dict(ROWS=rows, BLOCK=block, STEPS=1, VECTOR=1, PART=block, num_warps=min(16, max(1, warps)), **OPTIONS)


class Layout(NamedTuple):
    """Where the rows lie; strides are None where there is no tensor."""

    n: int
    c: int
    stride: int
    teacher_strides: tuple[int, ...]
    weight_strides: tuple[int, ...] | None
    label_stride: int | None
    itemsize: int  # the largest of the logits


def laid_out(
    student: Tensor, teachers: list[Tensor], weights: Tensor | None, labels: Tensor | None
) -> tuple[Layout, Tensor, tuple[Tensor, ...]]:
    """The layout, and student and teachers as kernels read them."""
    student, dense_teachers = dense(student), tuple([dense(t) for t in teachers])
    at = Layout(
        student.shape[0],
        student.shape[1],
        student.stride(0),
        tuple([t.stride(0) for t in dense_teachers]),
        None if weights is None else weights.stride(),
        None if labels is None else labels.stride(0),
        max([t.element_size() for t in (student, *teachers)]),
    )
    return at, student, dense_teachers


def _numbers(at: Layout, of: Settings, count_rows: bool) -> dict:
    """What forward and backward give their kernels alike, but for the tensors."""
    align = alignment(at.c, at.stride, *at.teacher_strides)
    simple = of.mode == "mixture" and of.label_smoothing == 0
    return dict(
        **row_numbers(at, of, count_rows),
        teacher_strides=at.teacher_strides,
        MIXTURE=of.mode == "mixture",
        ALIGN=align,
        **tiles(at.n, at.c, align, 1 + len(at.teacher_strides), at.itemsize, simple),
    )


@kept
def _forward_launch(at: Layout, of: Settings, count_rows: bool) -> Launch:
    numbers = _numbers(at, of, count_rows)
    return Launch(
        _kd_forward_kernel,
        (triton.cdiv(at.n, numbers["ROWS"]),),
        **numbers,
        ce_weight=float(of.ce_weight),
        kl_weight=float(of.kl_weight),
        kl_scale=float(of.kl_scale),
        NONE=of.reduction == "none",
        SMOOTH=of.label_smoothing != 0 and at.label_stride is not None,
    )


@kept
def _backward_launch(
    at: Layout, of: Settings, loss_stride: int, probs_stride: int, targets_stride: int, rescale: bool
) -> Launch:
    numbers = _numbers(at, of, of.is_mean() and at.label_stride is not None)
    if "maxnreg" in numbers:
        numbers["maxnreg"] = max(numbers["maxnreg"], 128)  # with fewer it spills on Triton 3.6
    return Launch(
        _kd_backward_kernel,
        (triton.cdiv(at.n, numbers["ROWS"]),),
        **numbers,
        loss_stride=loss_stride,
        probs_stride=probs_stride,
        targets_stride=targets_stride,
        RESCALE=rescale,
        BACK_ALIGN=alignment(at.c, probs_stride, targets_stride),
    )


def multi_teacher_kd_fwd(
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    kl_scale: float,
    mode: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_student_grad: bool,
    need_weights_grad: bool,
    need_probs: bool,
) -> tuple[Tensor, ...]:
    """loss, ce, kl (scalars, or [N] for "none"), student_probs, soft_targets, stats, grad_student, grad_weights."""
    (n, c), none = student.shape, reduction == "none"
    values = [student.new_empty((n,) if none else (), dtype=torch.float32) for _ in range(3)]
    settings = Settings(
        temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing
    )  # fmt: skip
    if n == 0:
        for v in values:
            v.zero_()
    rows = values[1], values[2], values[0]
    if not none:
        sums = student.new_empty(3, n, dtype=torch.float32)
        rows = tuple(sums)
    probs, targets, stats, grad, slopes = forward_rows(
        student, teachers, weights, labels, settings, rows, need_student_grad, need_weights_grad, need_probs
    )
    if n and not none:
        add_rows(sums, values, float(ce_weight), float(kl_weight), settings.kl_divisor(c))
    nothing = values[0].new_empty
    return (
        *values,
        nothing(0) if probs is None else probs,
        nothing(0) if targets is None else targets,
        stats,
        nothing(0) if grad is None else grad,
        nothing(0) if slopes is None else slopes,
    )


def forward_rows(
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    settings: Settings,
    rows: tuple[Tensor, ...],
    need_student_grad: bool,
    need_weights_grad: bool,
    need_probs: bool,
) -> tuple[Any, Any, Tensor, Any, Any]:
    """Fills rows, [N] each: CE, KL, and the loss ("none") or whether the row counts. Returns student_probs, soft_targets, stats,
    grad_student, grad_weights, or None for what is not needed."""
    (n, c), count = student.shape, len(teachers)
    stats = student.new_empty(n, 3 + 2 * count, dtype=torch.float32)
    make = stats.new_empty  # to name a dtype takes as long as all the rest
    probs, targets = (make(n, c), make(n, c)) if need_probs else (None, None)
    grad = student.new_empty(n, c) if need_student_grad else None
    slopes = make(n, count) if need_weights_grad else None
    if n:
        at, student, dense_teachers = laid_out(student, teachers, weights, labels)
        counts = counts_of(labels, settings) if need_student_grad or need_weights_grad else None
        launch = _forward_launch(at, settings, counts is not None)
        launch(student, dense_teachers, weights, labels, counts, stats, *rows, probs, targets, grad, slopes)
    return probs, targets, stats, grad, slopes


def multi_teacher_kd_bwd(
    grad_loss: Tensor,
    grad_probs: Tensor | None,
    grad_targets: Tensor | None,
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    stats: Tensor,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    kl_scale: float,
    mode: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_student_grad: bool,
    need_weights_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to the student, in its dtype, and to the weights."""
    grad = student.new_empty(student.shape if need_student_grad else 0)
    slopes = stats.new_empty((student.shape[0], len(teachers)) if need_weights_grad else 0)
    back_q = dense(grad_probs) if grad_probs is not None and need_student_grad else None
    back_p = dense(grad_targets) if grad_targets is not None and need_weights_grad else None
    settings = Settings(temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing)
    backward(
        grad, slopes, grad_loss, back_q, back_p, student, teachers, weights, labels, stats, settings, rescale=False
    )
    return grad, slopes


def multi_teacher_kd_rescale_(
    grad_student: Tensor,
    grad_weights: Tensor,
    grad_loss: Tensor,
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    stats: Tensor,
    temperature: float,
    ce_weight: float,
    kl_weight: float,
    kl_scale: float,
    kl_of: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> None:
    """The gradients that forward has made for an incoming gradient of 1, for this one."""
    settings = Settings(temperature, ce_weight, kl_weight, kl_scale, kl_of, reduction, ignore_index, label_smoothing)
    backward(
        grad_student, grad_weights, grad_loss, None, None, student, teachers, weights, labels, stats, settings,
        rescale=True,
    )  # fmt: skip


def backward(
    grad: Tensor,
    slopes: Tensor,
    grad_loss: Tensor,
    back_q: Tensor | None,
    back_p: Tensor | None,
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    stats: Tensor,
    settings: Settings,
    rescale: bool,
) -> None:
    """Writes into grad and slopes, unless they are empty."""
    need_student, need_weights = grad.numel() > 0, slopes.numel() > 0
    if not (need_student or need_weights):
        return
    at, student, dense_teachers = laid_out(student, teachers, weights, labels)
    launch = _backward_launch(
        at,
        settings,
        grad_loss.stride(0) if grad_loss.dim() else 0,
        0 if back_q is None else back_q.stride(0),
        0 if back_p is None else back_p.stride(0),
        rescale,
    )
    launch(
        grad_loss,
        back_q,
        back_p,
        student,
        dense_teachers,
        weights,
        labels,
        counts_of(labels, settings),
        stats,
        grad if need_student else None,
        slopes if need_weights else None,
    )
