"""Any of six divergences between the student and what its teachers say, with temperatures of their own, and numbers by row.

    q = softmax(z / tau), p_t = softmax(z_t / tau_t)                                   per row
    p = sum_t w_t p_t (mixture), softmax(sum_t w_t z_t / tau_t) (logits), or each p_t, weighed by w_t (sum)
    D(p, q) = sum_c f(p_c, q_c), a = df/dp, r = -q df/dq, R = sum_c r_c
    dD/dz = (R q - r) / tau                                              for forward KL r is p itself
    dD/dw_t = sum_c p_t a    or    sum_c (p a - p sum_k p_k a_k) z_t / tau_t    or    D(p_t, q)

Shapes   student z [N, C] and T teachers z_t [N, C] in float32|bfloat16|float16, each its own, read in place where C is
         dense; weights [N, T], alpha [N] and temperature [N] float32; labels [N] int64 -> loss [] or [N], gradients and
         statistics [N, 4 + T], float32 (backward: the student's gradient in its dtype)
Grid     as for multi_teacher_kd: one program for a tile of whole rows that stays in registers, or for one long row
Traffic  (T + 1) N C elements in, and one out where there is a gradient. A long row is read for maxima and sums; again for D and
         R; and a third time for what needs R: the student's gradient, of all but forward KL, whose R is known, and the weights'
         of mixed logits. From L2 where that holds it. Backward of a 16-bit student does all of this again

What a class adds is small where p is near q, as in multi_teacher_kd: the two KLs add p log(p / q) - (p - q), and what that
leaves out is known. A class that the student has and the target has not makes reverse KL infinite; no gradient goes through
it, and with it goes its share of the constant 1 that r leaves out: r = q there, beside 0 for the gradient.

A label out of range is an error only with TRITON_DEBUG=1: to look would cost a synchronization. Without, it makes the loss of its
row NaN, and nothing outside of the row is read or written. Weights, alpha and temperature are not looked at.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import aligned, alignment, rate_of
from ._kd_rows import (
    LN2,
    Settings,
    add,
    add_rows,
    counts_of,
    cross_entropy,
    find_rows,
    folded,
    inverses_of,
    load,
    load_all,
    load_weights,
    log_over,
    log_ratio,
    log_ratios_of,
    mix_logits,
    one_and_log,
    per_row,
    row_numbers,
    softmax_sums,
    square,
    student_grad,
)
from ._launch import Launch, kept
from .multi_teacher_kd import Layout, laid_out, tiles

RATE: tl.constexpr = tl.constexpr(0.5 * math.log2(math.e))  # at a temperature of 1
LEAST: tl.constexpr = tl.constexpr(1e-30)  # of a mixture of teachers whose logarithm is taken from itself
LEAST_MIXTURE: tl.constexpr = tl.constexpr(2.0**-120)  # of p and q, whose inverse is finite


@triton.jit
def _class_terms(p, q, log, difference, log_total, by_total, share, KIND: tl.constexpr):
    """What a class adds to D, r and a (but for a constant: see ``constants``). The two KLs need log(p / (total q)), which does
    not count where one side has no probability, p - total q, and log total and 1 / total, where total is the mass of p. share: of p
    and of q in the mixture m."""
    if KIND == "forward_kl":
        value = tl.where(p == 0, 0.0, p * log) - difference
        r = p
        a = log
    elif KIND == "reverse_kl":
        r = tl.where(q == 0, 0.0, q * (log + log_total))
        value = difference * by_total - r
        a = -q / p
    elif KIND == "tvd":
        apart = p - q  # may be fused with the product that q is: then it is not 0 where they are equal
        a = tl.where(p > q, 0.5, tl.where(p < q, -0.5, tl.where(p == q, 0.0, apart)))  # NaN stays NaN
        value = a * apart
        r = q * a
    else:
        m = share[0] * p + share[1] * q
        inverse = 1.0 / tl.maximum(m, LEAST_MIXTURE)  # below it nothing counts, and infinity would meet a 0
        from_p = share[1] * (p - q)
        from_q = share[0] * (q - p)
        if KIND == "skew_kl":
            log_p = tl.where(p == 0, 0.0, log_over(p, from_p, inverse))
            value = p * log_p - from_p
            r = share[1] * q * (p * inverse)
            a = tl.where(p == 0, 0.0, log_p + 1.0 - share[0] * (p * inverse))
        elif KIND == "skew_reverse_kl":
            log_q = tl.where(q == 0, 0.0, log_over(q, from_q, inverse))
            value = q * log_q - from_q
            r = q * (share[1] * (q * inverse) - log_q)
            a = -share[0] * (q * inverse)
        else:
            of_p = tl.where(p == 0, 0.0, share[0] * log_over(p, from_p, inverse))
            of_q = tl.where(q == 0, 0.0, share[1] * log_over(q, from_q, inverse))
            value = p * of_p + q * of_q
            r = -(q * of_q)
            a = tl.where(p == 0, tl.where(q == 0, 0.0, -share[0]), of_p)
    return value, r, a


@triton.jit
def _log_of_tiny(halves, half, log_ratios, inverses, weights):
    """log(p / q) of a mixture p that is too small for a number, -inf where no teacher with weight has the class; and p_t / p, 0
    where that is too large for one, as of a teacher without weight."""
    top = tl.full(half.shape, -float("inf"), tl.float32)
    logs = ()
    for t in tl.static_range(len(halves)):
        log = tl.where(inverses[t] == 0, -float("inf"), (halves[t] - half) * (2 * LN2) - log_ratios[t])
        top = tl.maximum(top, tl.where(weights[t] == 0, -float("inf"), log))
        logs = logs + (log,)
    top = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros(half.shape, tl.float32)
    exps = ()
    for t in tl.static_range(len(halves)):
        e = tl.exp(logs[t] - top)
        e = tl.where(e == float("inf"), 0.0, e)
        total += tl.where(weights[t] == 0, 0.0, weights[t] * e)
        exps = exps + (e,)
    shares = ()
    for t in tl.static_range(len(halves)):
        shares = shares + (exps[t] / total,)
    return top + tl.log(total), shares


@triton.jit
def probabilities(xs, maxima, inverses, rates):
    """Of every softmax half the exponent, and the probability, 0 where a teacher without weight has none."""
    halves = ()
    probs = ()
    for t in tl.static_range(len(xs)):
        half = (xs[t] - maxima[t]) * rates[t]
        p = tl.where(inverses[t] == 0, 0.0, square(tl.exp2(half)) * inverses[t])
        halves = halves + (half,)
        probs = probs + (p,)
    return halves, probs


@triton.jit
def _mixture_of(probs, weights):
    p = tl.zeros(probs[0].shape, tl.float32)
    for t in tl.static_range(len(probs)):
        p += weights[t] * probs[t]
    return p


@triton.jit
def _to_mixture(
    e,
    half,
    inverse,
    halves,
    probs,
    weights,
    inverses,
    log_ratios,
    total,
    log_total,
    by_total,
    share,
    KIND: tl.constexpr,
):
    """D, r, p_t a of every teacher, and the classes that are lost: the student has them and the mixture has not."""
    q = e * inverse
    p = _mixture_of(probs, weights)
    log = p
    difference = p
    tiny = p < LEAST
    lost = p != p
    shares = probs
    if (KIND == "forward_kl") | (KIND == "reverse_kl"):
        log, difference = log_ratio(p, e, half, total * inverse)
    if KIND == "reverse_kl":
        log_tiny, shares = _log_of_tiny(halves, half, log_ratios, inverses, weights)
        log = tl.where(tiny, log_tiny - log_total, log)
        lost = tiny & (q != 0) & (log == -float("inf"))
    value, r, a = _class_terms(p, q, log, difference, log_total, by_total, share, KIND)
    if KIND == "reverse_kl":
        r = tl.where(lost, q, r)
    if KIND == "forward_kl":
        a = tl.where(p == 0, -one_and_log(total), a)
    terms = ()
    for t in tl.static_range(len(probs)):
        if KIND == "reverse_kl":
            term = tl.where(tiny, -q * shares[t], probs[t] * a)
            term = tl.where((q == 0) | lost, 0.0, term)
        else:
            term = tl.where(probs[t] == 0, 0.0, probs[t] * a)
        terms = terms + (term,)
    return (value,), r, terms, lost


@triton.jit
def to_each(e, half, inverse, halves, probs, weights, log_ratios, share, KIND: tl.constexpr, LOGITS: tl.constexpr):
    """D of every target, r of all of them, p a if the target is that of mixed logits, and the classes that a target has lost."""
    q = e * inverse
    all_r = tl.zeros(q.shape, tl.float32)
    lost = q != q
    values = ()
    terms = ()
    for t in tl.static_range(len(probs)):
        p = probs[t]
        log = p
        if (KIND == "forward_kl") | (KIND == "reverse_kl"):
            log = (halves[t] - half) * (2 * LN2) - log_ratios[t]
        value, r, a = _class_terms(p, q, log, p - q, 0.0, 1.0, share, KIND)
        values = values + (value,)
        gone = (q != 0) & (log == -float("inf")) & (weights[t] != 0)
        if KIND == "reverse_kl":
            r = tl.where(gone, q, r)
            lost = lost | gone
        all_r += tl.where(weights[t] == 0, 0.0, weights[t] * r)
        if LOGITS:
            # Less the a of p = q: it adds nothing, and beside it the small differences would be rounded away.
            if KIND == "reverse_kl":  # p is 0 where its logarithm is infinite
                pa = p - tl.where(log == -float("inf"), 0.0, q)
            else:
                if KIND == "skew_kl":
                    a -= share[1]
                elif KIND == "skew_reverse_kl":
                    a += share[0]
                pa = tl.where(p == 0, 0.0, p * a)
            terms = terms + (pa,)
    return values, all_r, terms, lost


@triton.jit
def compare(
    z, xs, m, inverse, rate, maxima, inverses, rates, weights, log_ratios, total, log_total, by_total, share,
    KIND: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The student of a tile beside its targets: its exponentials, and what the classes add."""
    half = (z - m) * rate
    e = square(tl.exp2(half))
    halves, probs = probabilities(xs, maxima, inverses, rates)
    if MODE == "mixture":
        values, r, terms, lost = _to_mixture(
            e, half, inverse, halves, probs, weights, inverses, log_ratios, total, log_total, by_total, share, KIND
        )
    else:
        values, r, terms, lost = to_each(
            e, half, inverse, halves, probs, weights, log_ratios, share, KIND, MODE == "logits"
        )
    return e, values, r, terms, lost


@triton.jit
def mass_of(total, LOGITS: tl.constexpr):
    """Of what the student is compared with: the sum of its weights (1 of mixed logits), its logarithm, and 1 over it."""
    mass = total
    if LOGITS:
        mass = tl.full(total.shape, 1.0, tl.float32)
    return mass, tl.where(mass == 0, 0.0, tl.log(mass)), tl.where(mass == 0, 0.0, tl.div_rn(1.0, mass))


@triton.jit
def constants(total, share, KIND: tl.constexpr, MASS: tl.constexpr):
    """What the classes leave out of D, of a target with this mass, and of a."""
    value = 0.0 * total
    slope = value
    if KIND == "forward_kl":
        slope = one_and_log(total)
        value = tl.where(total == 0, 0.0, total * tl.log(total))
    elif KIND == "skew_kl":
        value = share[1] * (total - 1.0)
    elif KIND == "skew_reverse_kl":
        value = share[0] * (1.0 - total)
    if not MASS:
        value = 0.0 * total
    return value, slope


@triton.jit
def write_grad(
    grad_out, z, e, r, lost, rows, inside, used, cols, c, labels, label, m, s, s1, all_r, rate1, per_tau, ce_grad, kl_grad,
    smoothing, even, KIND: tl.constexpr,
):  # fmt: skip
    if KIND == "reverse_kl":  # no gradient of D through these
        e = tl.where(lost, 0.0, e)
        r = tl.where(lost, 0.0, r)
    grad = student_grad(
        z, e, r, cols, labels, label, m, s, s1, all_r, rate1, per_tau, ce_grad, kl_grad, smoothing, even
    )
    grad = tl.where(used & (z != -float("inf")), grad, 0.0)
    tl.store(grad_out + rows * c + cols, grad.to(grad_out.dtype.element_ty), mask=inside & (cols < c))


@triton.jit
def add_statistics(sums, best, z, xs, cols, m, inverse, rate, maxima, inverses, rates, weights, log_ratios, mixed,
                    FOLD: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Adds the entropies of q and p and the KL(p_t || q) of a tile, and keeps where q and p are largest. ``mixed``: p of mixed
    logits, or None."""
    half = (z - m) * rate
    q = square(tl.exp2(half)) * inverse
    halves, probs = probabilities(xs, maxima, inverses, rates)
    p = mixed
    if mixed is None:
        p = _mixture_of(probs, weights)
    terms = (
        tl.where(q == 0, 0.0, -q * log_over(q, q - 1.0, 1.0)),
        tl.where(p == 0, 0.0, -p * log_over(p, p - 1.0, 1.0)),
    )
    for t in tl.static_range(len(xs)):
        log = (halves[t] - half) * (2 * LN2) - log_ratios[t]
        terms = terms + (tl.where(probs[t] == 0, 0.0, probs[t] * log) - (probs[t] - q),)
    best_q, at_q, best_p, at_p = best
    at_q = tl.where(q > best_q, cols, at_q)
    best_q = tl.where(q > best_q, q, best_q)
    at_p = tl.where(p > best_p, cols, at_p)
    best_p = tl.where(p > best_p, p, best_p)
    return add(sums, terms, FOLD, ALIGN), (best_q, at_q, best_p, at_p)


@triton.jit
def first_largest(best, at):
    top = tl.max(best, axis=1, keep_dims=True)
    return tl.min(tl.where(best == top, at, 2147483647), axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["n", "num_counts"])
def _divergence_kernel(
    grad_loss, student, teachers, weights, labels, alphas, temperatures, counts, ce_out, kl_out, last_out, grad_out,
    slopes_out, alpha_out, stats_out, n, c, loss_stride, stride, teacher_strides, weight_stride, weight_along, label_stride,
    alpha_stride, temperature_stride, num_counts, ignore_index, rate, rate1, per_tau, teacher_rates, teacher_per_taus, share,
    kl_scale, ce_weight, kl_weight, ce_grad, kl_grad, smoothing, even,
    KIND: tl.constexpr, MODE: tl.constexpr, T2: tl.constexpr, NONE: tl.constexpr, COUNT: tl.constexpr,
    COUNT_BLOCK: tl.constexpr, SMOOTH: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS: tl.constexpr, VECTOR: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Losses, gradients and statistics of rows, whatever has a place to go; in backward with grad_loss. last_out: the loss if
    NONE, else 1 for a row that counts. ce_grad and kl_grad are without the weights of CE and KL, which may be a row's."""
    T: tl.constexpr = len(teachers)
    HELD: tl.constexpr = STEPS == 1
    FOLD: tl.constexpr = VECTOR * PART // BLOCK
    LOGITS: tl.constexpr = MODE == "logits"
    KNOWN: tl.constexpr = KIND == "forward_kl"  # R
    DOTS: tl.constexpr = 0 if MODE == "sum" or slopes_out is None else 1 if LOGITS else T
    OWN: tl.constexpr = not LOGITS or slopes_out is not None or stats_out is not None  # softmax of every teacher
    c = aligned(c, ALIGN)
    rows, inside, used, label = find_rows(n, labels, label_stride, ignore_index, c, ROWS)
    w, total = load_weights(weights, rows, weight_stride, weight_along, used, T)
    if temperatures is not None:
        tau = tl.load(temperatures + rows * temperature_stride, mask=used, other=1.0)
        per_tau = tl.div_rn(tl.full([ROWS, 1], 1.0, tl.float32), tau)
        rate = tl.div_rn(tl.full([ROWS, 1], RATE, tl.float32), tau)
        if T2:
            kl_scale = tau * tau
    if alphas is not None:
        kl_weight = tl.load(alphas + rows * alpha_stride, mask=used, other=0.0)
        ce_weight = 1.0 - kl_weight
    rates = (rate,) * T
    per_taus = (per_tau,) * T
    if teacher_rates is not None:
        rates = teacher_rates
        per_taus = teacher_per_taus
    by = per_row(counts, label_stride, num_counts, ignore_index, COUNT, COUNT_BLOCK)
    if grad_loss is not None:
        by *= tl.load(grad_loss + rows * loss_stride, mask=used, other=0.0).to(tl.float32)
    ce_by = ce_grad * by
    kl_by = kl_grad * by
    ce_grad = ce_by * ce_weight
    kl_grad = kl_by * kl_weight * kl_scale

    z, xs = student, teachers
    targets = xs
    of_sums = xs
    sum_rates = (rate,) + rates
    mixing = None
    if HELD:
        cols = tl.arange(0, BLOCK)[None, :]
        keep = used & (cols < c)
        z = load(student, rows, stride, cols, keep, ALIGN, -float("inf"))
        xs = load_all(teachers, rows, teacher_strides, cols, keep, ALIGN)
        targets = xs
        of_sums = xs
    if LOGITS:
        mixing = (w, per_taus)
        sum_rates = (rate, RATE)
        if HELD:
            targets = (mix_logits(xs, keep, w, per_taus),)
            of_sums = targets
        if OWN:
            sum_rates = sum_rates + rates
            if HELD:
                of_sums = targets + xs
    tops, totals, s1 = softmax_sums(
        z,
        of_sums,
        rows,
        stride,
        teacher_strides,
        c,
        used,
        sum_rates,
        rate1,
        mixing,
        OWN,
        HELD,
        ALIGN,
        BLOCK,
        STEPS,
        VECTOR,
    )
    m = tops[0]
    s = totals[0]
    # Exact, as all inverses here: an error of all classes would not cancel in D, and equal sides would differ.
    inverse = tl.div_rn(1.0, s)
    maxima = tops[1:]
    inverses = inverses_of(totals[1 : 1 + T], w, True)
    log_ratios = log_ratios_of(totals[1:], s, False)
    target_w = w
    target_rates = rates
    own_maxima = maxima
    own_inverses = inverses
    own_log_ratios = log_ratios
    mass, log_total, by_total = mass_of(total, LOGITS)
    if LOGITS:
        target_w = (mass,)
        target_rates = (RATE,)
        inverses = (tl.div_rn(1.0, totals[1]),)
        own_maxima = tops[2:]
        if OWN:
            own_inverses = inverses_of(totals[2:], w, True)
        own_log_ratios = log_ratios[1:]
    all_r = mass

    values = (tl.zeros([ROWS, PART // FOLD], tl.float32),) * (T if MODE == "sum" else 1)
    r_sums = tl.zeros([ROWS, PART // FOLD], tl.float32)
    below = tl.zeros([ROWS, PART // FOLD], tl.float32)
    dots = (tl.zeros([ROWS, PART // FOLD], tl.float32),) * DOTS
    stat_sums = (tl.zeros([ROWS, PART // FOLD], tl.float32),) * (0 if stats_out is None else 2 + T)
    least = tl.full([ROWS, PART], -1.0, tl.float32)
    nowhere = tl.zeros([ROWS, PART], tl.int32)
    best = (least, nowhere, least, nowhere)
    for step in range(1 if HELD else tl.cdiv(c, PART)):
        cols = step * PART + tl.arange(0, PART)[None, :]
        real = cols < c
        z_tile, x_tiles, target_tiles = z, xs, targets
        if not HELD:
            z_tile = load(student, rows, stride, cols, used & real, ALIGN, -float("inf"))
            x_tiles = load_all(teachers, rows, teacher_strides, cols, used & real, ALIGN)
            target_tiles = x_tiles
            if LOGITS:
                target_tiles = (mix_logits(x_tiles, used & real, w, per_taus),)
        e, value, r, terms, lost = compare(
            z_tile, target_tiles, m, inverse, rate, maxima, inverses, target_rates, target_w, log_ratios, mass, log_total,
            by_total, share, KIND, MODE,
        )  # fmt: skip
        values = add(values, value, FOLD, ALIGN)
        r_sums += folded(r, FOLD, ALIGN)
        dots = add(dots, terms, FOLD, ALIGN)
        if SMOOTH:
            below += folded(tl.where(real, m - z_tile, 0.0), FOLD, ALIGN)
        if stats_out is not None:
            mixed = None
            if LOGITS:
                _, mixed_probs = probabilities(target_tiles, maxima, inverses, target_rates)
                mixed = mixed_probs[0]
            stat_sums, best = add_statistics(
                stat_sums, best, z_tile, x_tiles, cols, m, inverse, rate, own_maxima, own_inverses, rates, w, own_log_ratios,
                mixed, FOLD, ALIGN,
            )  # fmt: skip
        if KNOWN and grad_out is not None:
            write_grad(
                grad_out, z_tile, e, r, lost, rows, inside, used, cols, c, labels, label, m, s, s1, all_r, rate1, per_tau,
                ce_grad, kl_grad, smoothing, even, KIND,
            )  # fmt: skip

    poison = 0.0 * inverse  # a NaN that a logarithm has lost
    for t in tl.static_range(len(inverses)):
        poison += 0.0 * inverses[t]
    constant, slope_constant = constants(mass, share, KIND, MODE != "sum")
    slopes = ()
    if MODE == "sum":
        distance = tl.zeros([ROWS, 1], tl.float32)
        for t in tl.static_range(T):
            own = tl.sum(values[t], axis=1, keep_dims=True)
            if (
                KIND == "forward_kl"
            ):  # a teacher that counts nothing has p = 0, where the classes have added up q - p to 1
                own -= tl.where(inverses[t] == 0, 1.0, 0.0)
            elif KIND == "skew_kl":
                own -= tl.where(inverses[t] == 0, share[1], 0.0)
            elif KIND == "skew_reverse_kl":
                own += tl.where(inverses[t] == 0, share[0], 0.0)
            distance += tl.where(w[t] == 0, 0.0, w[t] * own)
            own = tl.where((w[t] == 0) & ~(tl.abs(own) < float("inf")), 0.0, own)
            slopes = slopes + (own,)
    else:
        distance = tl.sum(values[0], axis=1, keep_dims=True) + constant + poison
        if MODE == "mixture":
            for t in tl.static_range(DOTS):
                slope = tl.sum(dots[t], axis=1, keep_dims=True) + slope_constant
                slopes = slopes + (tl.where(inverses[t] == 0, 0.0, slope) + poison,)
    if not KNOWN:
        all_r = tl.sum(r_sums, axis=1, keep_dims=True) + poison

    # What needs a sum over all classes.
    AGAIN: tl.constexpr = (grad_out is not None and not KNOWN) or (LOGITS and slopes_out is not None)
    if AGAIN:
        mean_a = tl.zeros([ROWS, 1], tl.float32)
        if LOGITS and slopes_out is not None:
            mean_a = tl.sum(dots[0], axis=1, keep_dims=True)
        shifts = ()  # of logits, for the slopes add up to 0
        for t in tl.static_range(T if LOGITS and slopes_out is not None else 0):
            shifts = shifts + (tl.where(tl.abs(own_maxima[t]) < 1e38, own_maxima[t], 0.0),)
        mixed_dots = (tl.zeros([ROWS, PART // FOLD], tl.float32),) * (T if LOGITS and slopes_out is not None else 0)
        for step in range(1 if HELD else tl.cdiv(c, PART)):
            cols = step * PART + tl.arange(0, PART)[None, :]
            z_tile, x_tiles, target_tiles = z, xs, targets
            if not HELD:
                keep_tile = used & (cols < c)
                z_tile = load(student, rows, stride, cols, keep_tile, ALIGN, -float("inf"))
                x_tiles = load_all(teachers, rows, teacher_strides, cols, keep_tile, ALIGN)
                target_tiles = x_tiles
                if LOGITS:
                    target_tiles = (mix_logits(x_tiles, keep_tile, w, per_taus),)
            e, value, r, terms, lost = compare(
                z_tile, target_tiles, m, inverse, rate, maxima, inverses, target_rates, target_w, log_ratios, mass,
                log_total, by_total, share, KIND, MODE,
            )  # fmt: skip
            if LOGITS and slopes_out is not None:
                _, p = probabilities(target_tiles, maxima, inverses, target_rates)
                slope = terms[0] - p[0] * mean_a
                products = ()
                for t in tl.static_range(T):
                    y = (x_tiles[t] - shifts[t]) * per_taus[t]
                    # A class that the teacher has not: a logit of 0. (Not y - y == 0: fused, it is the rounding of y.)
                    y = tl.where(tl.abs(y) < float("inf"), y, -shifts[t] * per_taus[t])
                    products = products + (slope * y,)
                mixed_dots = add(mixed_dots, products, FOLD, ALIGN)
            if not KNOWN and grad_out is not None:
                write_grad(
                    grad_out, z_tile, e, r, lost, rows, inside, used, cols, c, labels, label, m, s, s1, all_r, rate1,
                    per_tau, ce_grad, kl_grad, smoothing, even, KIND,
                )  # fmt: skip
        for t in tl.static_range(len(mixed_dots)):
            slopes = slopes + (tl.sum(mixed_dots[t], axis=1, keep_dims=True) + poison,)

    if slopes_out is not None:
        for t in tl.static_range(T):
            grad = tl.where(used & (kl_grad != 0), kl_grad * slopes[t], 0.0)
            tl.store(slopes_out + rows * T + t, grad, mask=inside)
    ce = tl.zeros([ROWS, 1], tl.float32)
    if labels is not None:
        z_rows = student + rows * aligned(stride, ALIGN)
        below_row = tl.sum(below, axis=1, keep_dims=True)
        ce = cross_entropy(z_rows, label, used, c, m, s1, below_row, smoothing, SMOOTH)
    kl = kl_scale * distance
    if alpha_out is not None:  # what is infinite has no gradient either where it has no weight
        of_kl = tl.where((kl_weight == 0) & ~(tl.abs(kl) < float("inf")), 0.0, kl_by * kl)
        of_ce = tl.where((ce_weight == 0) & ~(tl.abs(ce) < float("inf")), 0.0, ce_by * ce)
        tl.store(alpha_out + rows, tl.where(used, of_kl - of_ce, 0.0), mask=inside)
    ce = tl.where(used & (ce_weight != 0), ce_weight * ce, 0.0)
    kl = tl.where(used & (kl_weight != 0), kl_weight * kl, 0.0)
    if NONE and last_out is not None:
        tl.store(last_out + rows, ce + kl, mask=inside)
    elif last_out is not None:
        tl.store(ce_out + rows, ce, mask=inside)
        tl.store(kl_out + rows, kl, mask=inside)
        tl.store(last_out + rows, used.to(tl.float32), mask=inside)
    if stats_out is not None:
        at = stats_out + rows * (4 + T)
        for i in tl.static_range(2):
            tl.store(at + i, tl.where(used, tl.sum(stat_sums[i], axis=1, keep_dims=True), 0.0), mask=inside)
        tl.store(at + 2, tl.where(used & (total > 0), 1.0, 0.0), mask=inside)
        agree = first_largest(best[0], best[1]) == first_largest(best[2], best[3])
        tl.store(at + 3, tl.where(used & agree, 1.0, 0.0), mask=inside)
        for t in tl.static_range(T):
            kl_t = tl.sum(stat_sums[2 + t], axis=1, keep_dims=True)
            kl_t = tl.where(used & (own_inverses[t] != 0), kl_t, 0.0)
            tl.store(at + 4 + t, kl_t, mask=inside)


def shares_of(divergence: str, beta: float) -> tuple[float, float]:
    """What p and q have in the mixture m. Not 1 - beta in a kernel: float32 would lose a small beta, and one near 1."""
    return (1 - beta, float(beta)) if divergence == "skew_reverse_kl" else (float(beta), 1 - beta)


class Options(NamedTuple):
    """What multi_teacher_kd has not."""

    divergence: str
    beta: float
    teacher_temperatures: tuple[float, ...]
    t2_scale: bool


@kept
def _launch(
    at: Layout,
    of: Settings,
    more: Options,
    alpha_stride: int | None,
    temperature_stride: int | None,
    count_rows: bool,
    loss_stride: int,
) -> Launch:
    align = alignment(at.c, at.stride, *at.teacher_strides)
    numbers = row_numbers(at, of._replace(ce_weight=1.0, kl_weight=1.0, kl_scale=1.0), count_rows)
    if at.label_stride is not None and (temperature_stride is not None or more.divergence == "reverse_kl"):
        # Apart from q, of which a row's temperature or a lost class leaves nothing.
        numbers["rate1"] = math.log2(math.e)
    taus = more.teacher_temperatures
    teachers = len(at.teacher_strides)
    shape = tiles(at.n, at.c, align, 1 + teachers, at.itemsize, False)
    if shape["STEPS"] == 1 and teachers > 3:  # the terms take more registers than the KL's
        shape["num_warps"] = min(16, 2 * shape["num_warps"])
    return Launch(
        _divergence_kernel,
        (triton.cdiv(at.n, shape["ROWS"]),),
        **numbers,
        **shape,
        teacher_strides=at.teacher_strides,
        loss_stride=loss_stride,
        alpha_stride=alpha_stride or 0,
        temperature_stride=temperature_stride or 0,
        teacher_rates=tuple(rate_of(tau) for tau in taus) or None,
        teacher_per_taus=tuple(1 / tau for tau in taus) or None,
        share=shares_of(more.divergence, more.beta),
        kl_scale=float(of.kl_scale),
        ce_weight=float(of.ce_weight),
        kl_weight=float(of.kl_weight),
        KIND=more.divergence,
        MODE=of.mode,
        T2=more.t2_scale,
        NONE=of.reduction == "none",
        SMOOTH=of.label_smoothing != 0 and at.label_stride is not None,
        ALIGN=align,
    )


def _run(
    grad_loss: Tensor | None,
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    alphas: Tensor | None,
    temperatures: Tensor | None,
    settings: Settings,
    more: Options,
    rows: tuple[Tensor | None, ...],
    grads: list[Tensor | None],
    stats: Tensor | None,
) -> None:
    at, student, dense_teachers = laid_out(student, teachers, weights, labels)
    counts = counts_of(labels, settings) if any(g is not None for g in grads) else None
    launch = _launch(
        at,
        settings,
        more,
        None if alphas is None else alphas.stride(0),
        None if temperatures is None else temperatures.stride(0),
        counts is not None,
        grad_loss.stride(0) if grad_loss is not None and grad_loss.dim() else 0,
    )
    launch(
        grad_loss,
        student,
        dense_teachers,
        weights,
        labels,
        alphas,
        temperatures,
        counts,
        *rows,
        *grads,
        stats,
    )


def divergence_fwd(
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    alphas: Tensor | None,
    temperatures: Tensor | None,
    divergence: str,
    beta: float,
    mode: str,
    teacher_temperatures: list[float],
    temperature: float,
    t2_scale: bool,
    ce_weight: float,
    kl_weight: float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_student_grad: bool,
    need_weights_grad: bool,
    need_alpha_grad: bool,
    need_statistics: bool,
) -> tuple[Tensor, ...]:
    """loss (a scalar, or [N] for "none"), grad_student, grad_weights, grad_alpha, statistics [N, 4 + T]."""
    (n, c), count, none = student.shape, len(teachers), reduction == "none"
    loss = student.new_empty((n,) if none else (), dtype=torch.float32)
    make = loss.new_empty
    grads = [
        make(n, c) if need_student_grad else None,
        make(n, count) if need_weights_grad else None,
        make(n) if need_alpha_grad else None,
    ]
    stats = make(n, 4 + count) if need_statistics else None
    if n == 0:
        loss.zero_()
    else:
        kl_scale = temperature**2 if t2_scale else 1.0
        settings = Settings(temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing)
        more = Options(divergence, beta, tuple(teacher_temperatures), t2_scale)
        values = None if none else make(3, n)
        rows = (None, None, loss) if values is None else values.unbind()
        _run(None, student, teachers, weights, labels, alphas, temperatures, settings, more, rows, grads, stats)
        if values is not None:
            add_rows(values, [loss, None, None], 1.0, 1.0, settings.kl_divisor(c))
    return loss, *(make(0) if x is None else x for x in (*grads, stats))


def divergence_bwd(
    grad_loss: Tensor,
    student: Tensor,
    teachers: list[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    alphas: Tensor | None,
    temperatures: Tensor | None,
    divergence: str,
    beta: float,
    mode: str,
    teacher_temperatures: list[float],
    temperature: float,
    t2_scale: bool,
    ce_weight: float,
    kl_weight: float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    need_student_grad: bool,
    need_weights_grad: bool,
    need_alpha_grad: bool,
) -> tuple[Tensor, ...]:
    """Gradients to the student, in its dtype, to the weights and to alpha, made anew with the incoming one."""
    n, count = student.shape[0], len(teachers)
    wide = {"dtype": torch.float32}
    grads = [
        student.new_empty(student.shape) if need_student_grad else None,
        student.new_empty(n, count, **wide) if need_weights_grad else None,
        student.new_empty(n, **wide) if need_alpha_grad else None,
    ]
    if n and any(g is not None for g in grads):
        kl_scale = temperature**2 if t2_scale else 1.0
        settings = Settings(temperature, ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, label_smoothing)
        more = Options(divergence, beta, tuple(teacher_temperatures), t2_scale)
        rows = (None, None, None)
        _run(grad_loss, student, teachers, weights, labels, alphas, temperatures, settings, more, rows, grads, None)
    nothing = student.new_empty
    return tuple(
        nothing(0, dtype=student.dtype if i == 0 else torch.float32) if g is None else g for i, g in enumerate(grads)
    )
