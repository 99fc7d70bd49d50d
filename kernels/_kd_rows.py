"""What multi_teacher_kd and topk_kd share: softmax sums, mixture, logarithms and gradients of rows, as pieces of a kernel, and
the launchers that count rows and add them up.

A tile is [rows, classes] float32, -inf outside; what there is of every row is [rows, 1], of every teacher a tuple. A
row has the maximum and the sum of exp((x - maximum) / tau) of the student (m, s; s1 with tau = 1) and of every teacher
(maxima, sums). rate is log2(e) / (2 tau), rate1 log2(e), and half is half of log2 exp((x - maximum) / tau).

Another divergence replaces ``divergence_terms``, ``plain_terms`` and ``slopes``, and what their gradients to the student are.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, aligned, check_count, rate_of
from ._launch import Launch, kept

LONG_WARPS = 8  # share a row too long for registers, with 16 bytes of an input a thread at a time
INLINE = 1024  # rows whose labels every program counts itself
SPAN = 4096  # rows that one program adds up

FLOOR: tl.constexpr = tl.constexpr(2.0**-64)  # least exponential that a ratio is taken to; ``half`` has the rest
LN2: tl.constexpr = tl.constexpr(math.log(2))
SQRT_HALF: tl.constexpr = tl.constexpr(0x3F3504F3)  # its bits
LEAST_P: tl.constexpr = tl.constexpr(2.0**-100)  # beside a logarithm
LEAST_SHARE: tl.constexpr = tl.constexpr(2.0**-20)  # of the weights, from which on LEAST_P changes too little to count
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def find_rows(n, labels, label_stride, ignore_index, c, ROWS: tl.constexpr):
    """The rows of this program, which of them exist, which count, and their labels."""
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = rows < n
    used = inside
    label = rows  # a compiled function returns no None; without labels nobody looks
    if labels is not None:
        label = tl.load(labels + rows * label_stride, mask=inside, other=ignore_index)
        used = inside & (label != ignore_index)
        tl.device_assert(((label >= 0) & (label < c)) | (label == ignore_index), "a label is out of range")
    return rows, inside, used, label


@triton.jit
def load(matrix, rows, stride, cols, keep, ALIGN: tl.constexpr, OTHER: tl.constexpr):
    """Elements in float32, OTHER where they are not to be kept."""
    return tl.load(matrix + rows * aligned(stride, ALIGN) + cols, mask=keep, other=OTHER).to(tl.float32)


@triton.jit
def load_whole(matrix, rows, stride, cols, ALIGN: tl.constexpr):
    """The same where all are there."""
    return tl.load(matrix + rows * aligned(stride, ALIGN) + cols).to(tl.float32)


@triton.jit
def load_all_whole(matrices, rows, strides, cols, ALIGN: tl.constexpr):
    out = ()
    for t in tl.static_range(len(matrices)):
        out = out + (load_whole(matrices[t], rows, strides[t], cols, ALIGN),)
    return out


@triton.jit
def load_all(matrices, rows, strides, cols, keep, ALIGN: tl.constexpr):
    out = ()
    for t in tl.static_range(len(matrices)):
        out = out + (load(matrices[t], rows, strides[t], cols, keep, ALIGN, -float("inf")),)
    return out


@triton.jit
def load_weights(weights, rows, row_stride, stride, used, T: tl.constexpr):
    """The weights of rows, uniform if there are none, and their sum."""
    out = ()
    total = tl.zeros(rows.shape, tl.float32)
    if weights is not None:
        weights += rows * row_stride
    for _ in tl.static_range(T):
        if weights is None:
            w = tl.full(rows.shape, 1.0 / T, tl.float32)
        else:
            w = tl.load(weights, mask=used, other=0.0).to(tl.float32)
            weights += stride  # not t * stride, which 32 bits may not hold
        total += w
        out = out + (w,)
    return out, total


@triton.jit
def mix_logits(xs, keep, weights, per_taus):
    """sum_t w_t z_t / tau_t of a tile, -inf where a teacher with weight has it and none has NaN. One without counts nothing."""
    out = tl.zeros(keep.shape, tl.float32)
    masked = ~keep
    for t in tl.static_range(len(xs)):
        masked = masked | ((xs[t] == -float("inf")) & (weights[t] != 0))
        without = (weights[t] == 0) | (xs[t] == -float("inf"))
        out += tl.where(without, 0.0, weights[t] * (xs[t] * per_taus[t]))
    return tl.where(masked & (out == out), -float("inf"), out)


@triton.jit
def square(x):
    """2^y from x = 2^(y/2): down to the smallest float32, where Triton's exp2 flushes to 0 below 2^-126."""
    return x * x


@triton.jit
def held_sums(x, rate, rate1):
    """Maximum of rows in registers, and their sums of exponentials at tau and, if rate1 is not None, at 1."""
    m = tl.max(x, axis=1, keep_dims=True)
    s = tl.sum(square(tl.exp2((x - m) * rate)), axis=1, keep_dims=True)
    s1 = s
    if rate1 is not None:
        s1 = tl.sum(tl.exp2((x - m) * rate1), axis=1, keep_dims=True)
    return m, s, s1


@triton.jit
def vectors(x, ALIGN: tl.constexpr, VECTOR: tl.constexpr):
    """[1, classes] of a long row as [pieces, threads, classes next to each other]: a thread holds all of a column."""
    NEXT: tl.constexpr = min(ALIGN, VECTOR)
    return tl.reshape(x, [VECTOR // NEXT, x.shape[1] // VECTOR, NEXT])


@triton.jit
def top_of(x):
    return tl.max(tl.max(x, axis=2), axis=0)[None, :, None]


@triton.jit
def sum_of(x):
    return tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None]


@triton.jit
def streamed_sums(
    x, others, rows, stride, strides, c, used, rates, rate1, mixing, OWN: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The same of rows that are read in chunks, a tuple of them side by side, so that many loads are under way: every thread
    has its own maximum, which moves once a chunk. Less than 2^-126 of a maximum adds nothing to a sum from 1 on. A row of -inf
    has the sum 0 beside LOWEST."""
    T: tl.constexpr = len(rates)
    LANES: tl.constexpr = BLOCK // VECTOR
    maxima = (tl.full([1, LANES, 1], LOWEST, tl.float32),) * T  # finite: -inf - m is no NaN
    sums = (tl.zeros([1, LANES, 1], tl.float32),) * T
    sum1 = tl.zeros([1, LANES, 1], tl.float32)
    for step in range(STEPS):
        cols = step * BLOCK + tl.arange(0, BLOCK)[None, :]
        keep = used & (cols < c)
        tiles = (load(x, rows, stride, cols, keep, ALIGN, -float("inf")),)
        read = load_all(others, rows, strides, cols, keep, ALIGN)
        if mixing is not None:
            tiles = tiles + (mix_logits(read, keep, mixing[0], mixing[1]),)
        if OWN:
            tiles = tiles + read
        new_maxima = ()
        new_sums = ()
        for t in tl.static_range(T):
            tile = vectors(tiles[t], ALIGN, VECTOR)
            m = tl.maximum(maxima[t], top_of(tile))  # a NaN is none and makes the sum NaN
            below = tile - m
            fell = maxima[t] - m
            unit = rates[t] + rates[t]
            s = sums[t] * tl.exp2(fell * unit) + sum_of(tl.exp2(below * unit))
            if t == 0 and rate1 is not None:
                sum1 = sum1 * tl.exp2(fell * rate1) + sum_of(tl.exp2(below * rate1))
            new_maxima = new_maxima + (m,)
            new_sums = new_sums + (s,)
        maxima = new_maxima
        sums = new_sums
    tops = ()
    totals = ()
    total1 = tl.zeros([1, 1], tl.float32)
    for t in tl.static_range(T):
        m = tl.reshape(maxima[t], [1, LANES])
        top = tl.max(m, axis=1, keep_dims=True)
        unit = rates[t] + rates[t]
        total = tl.sum(tl.reshape(sums[t], [1, LANES]) * tl.exp2((m - top) * unit), axis=1, keep_dims=True)
        if t == 0:
            total1 = total
            if rate1 is not None:
                total1 = tl.sum(tl.reshape(sum1, [1, LANES]) * tl.exp2((m - top) * rate1), axis=1, keep_dims=True)
        tops = tops + (top,)
        totals = totals + (total,)
    return tops, totals, total1


@triton.jit
def softmax_sums(
    x, others, rows, stride, strides, c, used, rates, rate1, mixing, OWN: tl.constexpr,
    HELD: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of rows, each at its own rate, and of x's the sum at tau = 1. x and others are what they hold, or where
    they are: then ``mixing`` (weights, and 1 / tau of each) puts the row of mixed logits before the others, which are left out
    unless OWN."""
    if HELD:
        m, s, s1 = held_sums(x, rates[0], rate1)
        maxima = (m,)
        sums = (s,)
        for t in tl.static_range(len(others)):
            m, s, _ = held_sums(others[t], rates[1 + t], None)
            maxima = maxima + (m,)
            sums = sums + (s,)
    else:
        maxima, sums, s1 = streamed_sums(
            x, others, rows, stride, strides, c, used, rates, rate1, mixing, OWN, ALIGN, BLOCK, STEPS, VECTOR
        )
        found = ()
        for t in tl.static_range(len(rates)):
            found = found + (tl.where(sums[t] == 0, float("nan"), sums[t]),)  # a row of -inf
        sums = found
        if rate1 is None:
            s1 = sums[0]
    return maxima, sums, s1


@triton.jit
def store_stats(stats, rows, inside, used, m, s, s1, maxima, sums):
    """Rows of stats [N, 3 + 2T]: maximum and sums (at tau, at 1) of the student, maximum and sum of every teacher."""
    T: tl.constexpr = len(sums)
    at = stats + rows * (3 + 2 * T)
    tl.store(at, tl.where(used, m, 0.0), mask=inside)
    tl.store(at + 1, tl.where(used, s, 0.0), mask=inside)
    tl.store(at + 2, tl.where(used, s1, 0.0), mask=inside)
    for t in tl.static_range(T):
        tl.store(at + 3 + 2 * t, tl.where(used, maxima[t], 0.0), mask=inside)
        tl.store(at + 4 + 2 * t, tl.where(used, sums[t], 0.0), mask=inside)


@triton.jit
def load_stats(stats, rows, used, T: tl.constexpr):
    at = stats + rows * (3 + 2 * T)
    maxima = ()
    sums = ()
    for t in tl.static_range(T):
        maxima = maxima + (tl.load(at + 3 + 2 * t, mask=used, other=0.0),)
        sums = sums + (tl.load(at + 4 + 2 * t, mask=used, other=1.0),)
    m = tl.load(at, mask=used, other=0.0)
    s = tl.load(at + 1, mask=used, other=1.0)
    s1 = tl.load(at + 2, mask=used, other=1.0)
    return m, s, s1, maxima, sums


@triton.jit
def inverses_of(sums, weights, EXACT: tl.constexpr):
    """1 / sum of every teacher; 0 where a teacher without weight has no softmax: 0 * NaN is 0. EXACT, correctly rounded, takes registers."""
    out = ()
    for t in tl.static_range(len(sums)):
        dead = (weights[t] == 0) & (sums[t] != sums[t])
        inverse = tl.div_rn(1.0, sums[t]) if EXACT else 1.0 / sums[t]
        out = out + (tl.where(dead, 0.0, inverse),)
    return out


@triton.jit
def log_ratios_of(sums, s, MIXTURE: tl.constexpr):
    """log sum_t / sum of every teacher, which mode ``sum`` needs."""
    out = ()
    for t in tl.static_range(0 if MIXTURE else len(sums)):
        out = out + (tl.log(sums[t] / s),)
    return out


@triton.jit
def mix(xs, maxima, inverses, weights, rate):
    """Of every teacher half and exponential; and the mixture p = sum_t w_t p_t."""
    halves = ()
    exps = ()
    p = tl.zeros(xs[0].shape, tl.float32)
    for t in tl.static_range(len(xs)):
        half = (xs[t] - maxima[t]) * rate
        e = tl.where(inverses[t] == 0, 0.0, square(tl.exp2(half)))
        p += (weights[t] * inverses[t]) * e
        halves = halves + (half,)
        exps = exps + (e,)
    return halves, exps, p


@triton.jit
def log_near_1(f):
    """log(1 + f) = f + f^2 g(f) to 1e-7, for 1 + f from 2^-1/2 to 2^1/2."""
    g = f * 0.0897955596446991 - 0.14426901936531067
    g = g * f + 0.14883683621883392
    g = g * f - 0.16551785171031952
    g = g * f + 0.19963476061820984
    g = g * f - 0.25002583861351013
    g = g * f + 0.3333393335342407
    g = g * f - 0.4999998211860657
    return g * (f * f) + f


@triton.jit
def exponent_and_mantissa(x):
    """Of a positive normal x = 2^k (1 + f): 2^23 k, and f from 2^-1/2 - 1 to 2^1/2 - 1."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF) & -8388608
    return exponent, (bits - exponent).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def log_over(x, difference, inverse):
    """log(x / m) of a positive x from x - m and 1 / m: exact where the two are close, too. Loses a NaN."""
    quotient = (x * 16777216.0) * inverse  # 2^24: a subnormal x becomes normal
    exponent, f = exponent_and_mantissa(quotient)
    f = tl.where(exponent == 24 * 8388608, difference * inverse, f)
    return (exponent.to(tl.float32) * 2.0**-23 - 24.0) * LN2 + log_near_1(f)


@triton.jit
def log_ratio(p, e, half, ratio):
    """log(p / (ratio e)), 0 where p is 0, and p - ratio e. Loses a NaN; ``slopes`` brings it back."""
    base = ratio * tl.maximum(e, FLOOR)
    difference = p - base
    log = log_over(p, difference, 1.0 / base)
    log += tl.maximum(half * (-2 * LN2) - 64 * LN2, 0.0)
    return tl.where(p == 0, 0.0, log), difference


@triton.jit
def folded(x, FOLD: tl.constexpr, ALIGN: tl.constexpr):
    """Sums by FOLD of what a thread holds: whole tiles would fill its registers."""
    if FOLD > 1:
        x = tl.reshape(sum_of(vectors(x, ALIGN, FOLD)), [1, x.shape[1] // FOLD])
    return x


@triton.jit
def add(sums, terms, FOLD: tl.constexpr, ALIGN: tl.constexpr):
    out = ()
    for t in tl.static_range(len(sums)):
        out = out + (sums[t] + folded(terms[t], FOLD, ALIGN),)
    return out


@triton.jit
def times(terms, by):
    out = ()
    for t in tl.static_range(len(terms)):
        out = out + (terms[t] * by,)
    return out


@triton.jit
def divergence_terms(e, half, halves, exps, p, s, total, sums, log_ratios, MIXTURE: tl.constexpr):
    """What a class adds to the KL of the mixture; and, times sum_t, to what ``slopes`` makes of all classes."""
    value = p
    out = ()
    if MIXTURE:
        log, difference = log_ratio(p, e, half, total / s)
        value = p * log - difference
        by = tl.where(p == 0, -one_and_log(total), log)
        for t in tl.static_range(len(exps)):  # p_t = 0 counts 0, whatever the logarithm is
            out = out + (tl.where(exps[t] == 0, 0.0, exps[t] * by),)
    else:
        for t in tl.static_range(len(exps)):
            log = (halves[t] - half) * (2 * LN2) - log_ratios[t]
            out = out + (tl.where(exps[t] == 0, 0.0, exps[t] * log) - (exps[t] - e * (sums[t] / s)),)
    return value, out


@triton.jit
def plain_terms(e, y, exps, ys, p, s, sums, log_ratios, MIXTURE: tl.constexpr):
    """The same where nothing needs care. y are the exponents of e and exps; p and the value are over total / s, next to e."""
    value = p
    out = ()
    if MIXTURE:
        exponent, f = exponent_and_mantissa(tl.maximum(p, LEAST_P))
        log = (exponent.to(tl.float32) * 2.0**-23 - y) * LN2 + log_near_1(f)
        value = p * log - (p - e)
        for t in tl.static_range(len(exps)):
            out = out + (exps[t] * log,)
    else:
        for t in tl.static_range(len(exps)):
            log = (ys[t] - y) * LN2 - log_ratios[t]
            out = out + (exps[t] * log - (exps[t] - e * (sums[t] / s)),)
    return value, out


@triton.jit
def one_and_log(total):
    return tl.where(total == 0, 0.0, 1.0 + tl.log(total))


@triton.jit
def slopes(dots, weights, inverses, total, s, MIXTURE: tl.constexpr):
    """d KL / d w_t, which for ``sum`` is KL_t, from the sums of ``divergence_terms``."""
    poison = 0.0 * (total / s)
    for t in tl.static_range(len(inverses)):
        poison += 0.0 * inverses[t]
    out = ()
    for t in tl.static_range(len(dots)):
        dot = tl.sum(dots[t], axis=1, keep_dims=True) * inverses[t]
        if MIXTURE:
            dot = tl.where(inverses[t] == 0, 0.0, dot + one_and_log(total)) + poison
        else:  # without weight a teacher counts only if it has a KL
            dot = tl.where((weights[t] == 0) & ((inverses[t] == 0) | (tl.abs(dot) == float("inf"))), 0.0, dot)
        out = out + (dot,)
    return out


@triton.jit
def plain_exponentials(z, xs, m, maxima, factors, unit):
    """Of a student and its teachers z - m, its exponent and exponential, theirs, and the mixture over total / s."""
    ys = ()
    exps = ()
    p = tl.zeros(z.shape, tl.float32)
    for t in tl.static_range(len(xs)):
        y = (xs[t] - maxima[t]) * unit
        e = tl.exp2(y)
        p += factors[t] * e
        ys = ys + (y,)
        exps = exps + (e,)
    below = z - m
    y = below * unit
    return below, y, tl.exp2(y), ys, exps, p


@triton.jit
def plain_grad(below, e, p, labels, of_kl, of_ce, at_all, rate1, SMOOTH: tl.constexpr):
    """d loss / d z but for what the label adds."""
    grad = of_kl * (e - p)
    if labels is not None:
        e1 = e
        if rate1 is not None:
            e1 = tl.exp2(below * rate1)
        if SMOOTH:
            grad -= at_all
        grad += of_ce * e1
    return grad


@triton.jit
def plain_sweep(
    student, teachers, grad_out, rows, stride, teacher_strides, c, used, labels, label_stride, w, total, m, s, s1, maxima,
    sums, inverses, log_ratios, rate, rate1, per_tau, ce_grad, kl_grad, smoothing, even,
    SLOPES: tl.constexpr, MIXTURE: tl.constexpr, SMOOTH: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Sums over a long row, and its gradient, as far as whole blocks go and nothing needs care, which costs much. The first
    sum is yet to be multiplied by total / s: kept through the sweep, that would cost it a register.

    Returns after the sums how many blocks that were: none if something turns out to need care. What does: teachers without
    weight or almost, which meet the logarithm of a p next to 0; ignored rows; and what makes a sum infinite or NaN."""
    T: tl.constexpr = len(teachers)
    LANES: tl.constexpr = BLOCK // VECTOR
    unit = rate + rate
    scale = total / s
    plain = used & (total > 0)
    factors = ()
    for t in tl.static_range(T):
        plain = plain & (w[t] >= (total * LEAST_SHARE if SLOPES and MIXTURE else 0.0))
        factors = factors + ((w[t] / total) * (s * inverses[t]),)
    of_kl = kl_grad * per_tau * scale
    of_ce = ce_grad / s1
    at_all = ce_grad * even
    values = tl.zeros([1, LANES], tl.float32)
    sum_below = tl.zeros([1, LANES], tl.float32)
    dots = (tl.zeros([1, LANES], tl.float32),) * (T if SLOPES else 0)
    steps = tl.max(tl.where(plain, c // BLOCK, 0))
    for step in range(steps):
        cols = step * BLOCK + tl.arange(0, BLOCK)[None, :]
        z = load_whole(student, rows, stride, cols, ALIGN)
        xs = load_all_whole(teachers, rows, teacher_strides, cols, ALIGN)
        below, y, e, ys, exps, p = plain_exponentials(z, xs, m, maxima, factors, unit)
        if grad_out is not None:
            grad = plain_grad(below, e, p, labels, of_kl, of_ce, at_all, rate1, SMOOTH)
            tl.store(grad_out + rows * c + cols, grad.to(grad_out.dtype.element_ty))
        if SMOOTH:
            sum_below -= folded(below, VECTOR, ALIGN)
        value, terms = plain_terms(e, y, exps, ys, p, s, sums, log_ratios, MIXTURE)
        values += folded(value, VECTOR, ALIGN)
        dots = add(dots, terms, VECTOR, ALIGN)
    check = values
    for t in tl.static_range(len(dots)):
        check += dots[t]
    odd = ~(tl.abs(tl.sum(check, axis=1, keep_dims=True)) < float("inf"))
    steps = tl.max(tl.where(odd, 0, steps))
    values = tl.where(odd, 0.0, values)
    sum_below = tl.where(odd, 0.0, sum_below)
    out = ()
    for t in tl.static_range(len(dots)):
        out = out + (tl.where(odd, 0.0, dots[t]),)
    tl.debug_barrier()  # what was stored may be read or stored again, by other threads
    if grad_out is not None and labels is not None:
        label = tl.load(labels + rows * label_stride)
        there = (label >= 0) & (label < steps * BLOCK)
        at = tl.where(there, label, 0)
        z = load_whole(student, rows, stride, at, 1)
        xs = load_all_whole(teachers, rows, teacher_strides, at, 1)
        below, y, e, ys, exps, p = plain_exponentials(z, xs, m, maxima, factors, unit)
        grad = plain_grad(below, e, p, labels, of_kl, of_ce, at_all, rate1, SMOOTH) - ce_grad * (1.0 - smoothing)
        tl.store(grad_out + rows * c + at, grad.to(grad_out.dtype.element_ty), mask=there)
    return values, sum_below, out, steps


@triton.jit
def student_grad(z, e, p, cols, labels, label, m, s, s1, total, rate1, per_tau, ce_grad, kl_grad, smoothing, even):
    """d loss / d z of a tile, from d loss / d CE and d loss / d KL of its rows."""
    b = kl_grad * per_tau
    a = tl.where(b == 0, 0.0, b * total) / s
    grad = a * e - tl.where(b == 0, 0.0, b * p)  # where the KL has no weight a teacher may hold NaN
    if labels is not None:
        e1 = e
        if rate1 is not None:
            e1 = tl.exp2((z - m) * rate1)
        grad += (ce_grad / s1) * e1 - ce_grad * even
        grad -= tl.where(cols == label, ce_grad * (1.0 - smoothing), 0.0)
    return grad


@triton.jit
def cross_entropy(z, label, used, c, m, s1, below, smoothing, SMOOTH: tl.constexpr):
    """-(1 - smoothing) log q1_label - smoothing / C sum_c log q1_c; z points to rows, below is sum_c m - z_c."""
    log_sum = tl.log(s1)
    at_label = tl.load(z + label, mask=used & (label >= 0) & (label < c), other=float("nan")).to(tl.float32)
    ce = log_sum - (at_label - m)
    if SMOOTH:
        ce = (1.0 - smoothing) * ce + smoothing * (log_sum + below / c)
    return ce


@triton.jit
def weighted(ce, kl, ce_weight, kl_weight):
    """ce_weight ce + kl_weight kl, in which 0 * infinity is 0."""
    return tl.where(ce_weight == 0, 0.0, ce_weight * ce) + tl.where(kl_weight == 0, 0.0, kl_weight * kl)


@triton.jit
def per_row(counts, stride, num_counts, ignore_index, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """1 / how many rows count: of their labels (COUNT "labels"), of partial counts ("parts"), or 1."""
    out = tl.full([1, 1], 1.0, tl.float32)
    if COUNT != "none":
        i = tl.arange(0, BLOCK)
        if COUNT == "labels":
            count = tl.load(counts + i.to(tl.int64) * stride, mask=i < num_counts, other=ignore_index) != ignore_index
        else:
            count = tl.load(counts + i, mask=i < num_counts, other=0)
        out /= tl.maximum(tl.sum(count.to(tl.int32), axis=0), 1).to(tl.float32)
    return out


# --- launchers


def dense(t: Tensor) -> Tensor:
    """t with neighboring columns: itself where that is so."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


@triton.jit(do_not_specialize=["n"])
def _count_rows_kernel(labels, label_stride, parts, n, ignore_index, SPAN: tl.constexpr):
    """How many of SPAN rows count."""
    rows = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    count = tl.load(labels + rows * label_stride, mask=rows < n, other=ignore_index) != ignore_index
    tl.store(parts + tl.program_id(0), tl.sum(count.to(tl.int32), axis=0))


class Settings(NamedTuple):
    """As in the schemas; ``mode`` is the tail of topk_kd."""

    temperature: float
    ce_weight: float
    kl_weight: float
    kl_scale: float
    mode: str
    reduction: str
    ignore_index: int
    label_smoothing: float

    def is_mean(self) -> bool:
        return self.reduction in ("mean", "batchmean")

    def kl_divisor(self, c: int) -> float:
        """For ``add_rows``: what divides the KL beside the number of rows; 0 stands for sums."""
        return {"sum": 0.0, "batchmean": 1.0, "mean": float(c)}[self.reduction]


def counts_of(labels: Tensor | None, of: Settings) -> Tensor | None:
    """What a kernel counts the rows of a mean by: their labels, or of many rows partial counts; None if it need not."""
    if labels is None or not of.is_mean():
        return None
    n = labels.shape[0]
    if n <= INLINE:
        return labels
    parts = labels.new_empty(triton.cdiv(n, SPAN), dtype=torch.int32)
    _count_rows_launch(n, labels.stride(0), of.ignore_index)(labels, parts)
    return parts


def count_numbers(n: int, count_rows: bool) -> dict:
    """What goes with ``counts_of``, or with None."""
    if not count_rows:
        return dict(num_counts=0, COUNT="none", COUNT_BLOCK=1)
    kind = "labels"
    if n > INLINE:
        n, kind = triton.cdiv(n, SPAN), "parts"
    return dict(num_counts=n, COUNT=kind, COUNT_BLOCK=max(256, triton.next_power_of_2(n)))


def loss_numbers(at: Any, of: Settings, count_rows: bool) -> dict:
    """What all kernels of rows have in common, of a layout with n, c, weight_strides and label_stride."""
    check_count("student_logits", at.c, "classes")
    labeled, weight_strides = at.label_stride is not None, at.weight_strides or (0, 0)
    rows = max(at.n, 1) if of.is_mean() and not labeled else 1
    return dict(
        n=at.n,
        c=at.c,
        weight_stride=weight_strides[0],
        weight_along=weight_strides[1],
        label_stride=at.label_stride or 0,
        ignore_index=of.ignore_index,
        ce_grad=of.ce_weight / rows,
        kl_grad=of.kl_weight * of.kl_scale / (rows * at.c if of.reduction == "mean" else rows),
        smoothing=float(of.label_smoothing),
        **count_numbers(at.n, count_rows),
    )


def row_numbers(at: Any, of: Settings, count_rows: bool) -> dict:
    """And those that read the student's logits, in a layout that has their stride, too."""
    return dict(
        **loss_numbers(at, of, count_rows),
        stride=at.stride,
        rate=rate_of(of.temperature),
        rate1=None if at.label_stride is None or of.temperature == 1 else math.log2(math.e),
        per_tau=1 / of.temperature,
        even=of.label_smoothing / at.c,
    )


@kept
def _count_rows_launch(n: int, stride: int, ignore_index: int) -> Launch:
    numbers = dict(label_stride=stride, n=n, ignore_index=ignore_index, SPAN=SPAN, num_warps=8)
    return Launch(_count_rows_kernel, (triton.cdiv(n, SPAN),), **numbers, **OPTIONS)


@triton.jit(do_not_specialize=["n"])
def _add_rows_kernel(
    values, parts, loss, ce, kl, n, ce_weight, kl_weight, classes, FINAL: tl.constexpr, SPAN: tl.constexpr
):
    """Sums of values [3, n] (CE, KL, rows that count) by SPAN rows into parts [3, programs], or at last the losses.

    classes is ``Settings.kl_divisor``.
    """
    rows = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    ce_sum = tl.sum(tl.load(values + rows, mask=rows < n, other=0.0).to(tl.float64), axis=0)
    kl_sum = tl.sum(tl.load(values + n + rows, mask=rows < n, other=0.0).to(tl.float64), axis=0)
    count = tl.sum(tl.load(values + n + n + rows, mask=rows < n, other=0.0).to(tl.float64), axis=0)
    if FINAL:
        by = tl.where(classes == 0, 1.0, tl.maximum(count, 1.0))
        ce_sum = ce_sum / by
        kl_sum = kl_sum / (by * tl.where(classes == 0, 1.0, classes))
        if ce is not None:
            tl.store(ce, ce_sum.to(tl.float32))
            tl.store(kl, kl_sum.to(tl.float32))
        tl.store(loss, weighted(ce_sum, kl_sum, ce_weight, kl_weight).to(tl.float32))
    else:
        at = parts + tl.program_id(0)
        tl.store(at, ce_sum)
        tl.store(at + tl.num_programs(0), kl_sum)
        tl.store(at + 2 * tl.num_programs(0), count)


def add_rows(values: Tensor, outputs: list[Any], ce_weight: float, kl_weight: float, classes: float) -> None:
    """Loss, and unless they are None CE and KL, from values [3, N]: CE, KL and whether a row counts."""
    values = few_rows(values)
    _add_rows_launch(values.shape[1], ce_weight, kl_weight, classes, True)(values, values, *outputs)


def few_rows(values: Tensor) -> Tensor:
    """Sums of values [3, N], no more than SPAN of each."""
    while values.shape[1] > SPAN:
        n = values.shape[1]
        parts = values.new_empty(3, triton.cdiv(n, SPAN), dtype=torch.float64)
        _add_rows_launch(n, 0.0, 0.0, 0.0, False)(values, parts, None, None, None)
        values = parts
    return values


@kept
def _add_rows_launch(n: int, ce_weight: float, kl_weight: float, classes: float, final: bool) -> Launch:
    grid = 1 if final else triton.cdiv(n, SPAN)
    numbers = dict(n=n, ce_weight=ce_weight, kl_weight=kl_weight, classes=classes, FINAL=final, SPAN=SPAN, num_warps=8)
    return Launch(_add_rows_kernel, (grid,), **numbers, **OPTIONS)
