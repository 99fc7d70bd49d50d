"""The loss of teachers that give their largest classes only, with one class for all that a teacher does not name, from what
``topk_bucket`` finds in the student's rows; and its gradients to that.

    outcomes of teacher t: its named classes, with p_c, and the rest, with 1 - sum_c p_c               per row
    q_c = exp(x_c - L), x = z / tau, L = log sum_c exp x_c;   q_rest = exp(R_t - L), R_t = log sum over those it does not name
    D = sum_t w_t sum_o f(p_o, q_o),   dD_t/dx_c = B_o exp(x_c - log-sum of o) - q_c sum_o B_o,   B_o = q_o df/dq_o

Shapes   found [N, 8] and the logits of entries z [N, K] float64; indices [N, K] int64, of NOBODY for the bucket; log_probs
         [N, K] float32; weights [N, T] float32; labels [N] int64 -> loss [] or [N], its gradients [N, 4] and [N, K] float64, the
         classes that are named [N, K] int64, each once and NOBODY elsewhere, the gradient to the weights [N, T] float32
Grid     one program a row. Every entry is compared with every other, K^2 in tiles of PAIRS, as in topk_kd: of the entries of a
         class the first speaks for it and has its p_t of all teachers
Traffic  28 bytes an entry in, 12 of them twice, and 16 out

All numbers are float64: what an entry costs is small beside the row, and sums may be far below one another. Nothing is looked
at: what is out of range has a NaN in ``found`` or ``z``.
"""

import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS
from ._kd_rows import Settings, add_rows, counts_of, find_rows, load_weights, loss_numbers, per_row, weighted
from ._launch import Launch, kept
from .topk_kd import PAIRS, Layout, starts_of

NOBODY: tl.constexpr = tl.constexpr(-(2**62))
FAR: tl.constexpr = tl.constexpr(1e-280)  # of the largest exponential: below it a sum has a maximum of its own


@triton.jit
def row_sum(x):
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def row_max(x):
    """The largest; NaN is left out."""
    return tl.max(tl.where(x == x, x, -float("inf")), axis=1, keep_dims=True)


@triton.jit
def exp_or_0(x):
    """Of what may be -inf less -inf, where it does not count."""
    return tl.where(x == -float("inf"), 0.0, tl.exp(x))


@triton.jit
def log_or(x, empty):
    return tl.where(x == 0, empty, tl.log(tl.where(x == 0, 1.0, x)))


@triton.jit
def _log_of_ratio(u, ratio):
    """log(1 + u) where 1 + u = ratio: exact near 0 as well as far from it."""
    near = (u > -0.5) & (u < 0.5)
    y = tl.where(near, 1.0 + u, ratio)
    less = y - 1.0
    log = tl.log(y)
    return tl.where(near, tl.where(less == 0, u, log * (u / tl.where(less == 0, 1.0, less))), log)


@triton.jit
def _if_mass(probability, term):
    return tl.where(probability == 0, 0.0, term)


@triton.jit
def _outcome(p, q, log_q, beta, KIND: tl.constexpr):
    """Value and q df/dq, and the probability that makes reverse KL infinite. csrc/arithmetic.h has these in C++."""
    lost = tl.zeros(q.shape, tl.float64)
    if KIND == "forward_kl":
        value = _if_mass(p, p * (log_or(p, 0.0) - log_q))
        qb = -p
    elif KIND == "reverse_kl":
        gone = (p == 0) & (q != 0)
        lost = tl.where(gone, q, 0.0)
        qb = tl.where(gone, 0.0, _if_mass(q, q * (log_q - log_or(p, 0.0))))
        value = tl.where(gone, float("inf"), qb)
    elif KIND == "tvd":
        difference = p - q
        sign = tl.where(difference > 0, 0.5, tl.where(difference < 0, -0.5, difference))
        value = sign * difference
        qb = -q * sign
    else:
        share = beta
        if KIND == "skew_reverse_kl":
            share = 1.0 - beta
        m = share * p + (1.0 - share) * q
        over = tl.where(m == 0, 1.0, m)  # both are 0 then
        from_p = (1.0 - share) * (p - q)
        from_q = share * (q - p)
        q_m = q / over  # p may be above 1, and this 0 where q is not: nothing counts there
        if KIND == "skew_kl":
            value = _if_mass(p, p * _log_of_ratio(from_p / over, p / over)) - from_p
            qb = -(1.0 - share) * q * (p / over)
        elif KIND == "skew_reverse_kl":
            log_q_m = _log_of_ratio(from_q / over, q_m)
            value = _if_mass(q_m, q * log_q_m) - from_q
            qb = _if_mass(q_m, q * (log_q_m - (1.0 - share) * q_m))
        else:
            qb = _if_mass(q_m, q * ((1.0 - share) * _log_of_ratio(from_q / over, q_m)))
            value = _if_mass(p, p * (share * _log_of_ratio(from_p / over, p / over))) + qb
    return value, qb, lost


@triton.jit
def log_sum(top, log, x, first):
    """Of classes that nobody names, top + log, and of x at ``first``: in the same form."""
    most = tl.maximum(top, row_max(tl.where(first, x, -float("inf"))))
    terms = tl.where(first, tl.exp(x - most), 0.0)
    return most, tl.log(tl.exp(top - most + log) + row_sum(terms))


@triton.jit
def of_teacher(indices, log_probs, row, used, index, entry, begin, end, shift, CHUNK: tl.constexpr):
    """What a teacher, whose entries of a row are from ``begin`` to ``end``, gives the class of each entry in all of its own, where a
    log-probability less ``shift`` counts; whether it names that class; and whether it does so before that entry."""
    p = tl.zeros(index.shape, tl.float64)
    names = tl.zeros(index.shape, tl.int32)
    repeated = tl.zeros(index.shape, tl.int32)
    for start in range(begin, end, CHUNK):
        other = start + tl.arange(0, CHUNK)[:, None]
        there = used & (other < end)
        same = tl.load(indices + row + other, mask=there, other=-1) == index  # [CHUNK, ENTRIES]
        same = same & there & (index != NOBODY)
        log_prob = tl.load(log_probs + row + other, mask=there, other=-float("inf")).to(tl.float64)
        p += tl.sum(tl.where(same, tl.exp(log_prob - shift), 0.0), axis=0, keep_dims=True)
        names |= tl.max(same.to(tl.int32), axis=0, keep_dims=True)
        repeated |= tl.max((same & (other < entry)).to(tl.int32), axis=0, keep_dims=True)
    return p, names != 0, repeated != 0


@triton.jit
def log_mass_of(log_prob, own):
    """The logarithm of all that a teacher gives, whose entries are ``own``."""
    top = row_max(tl.where(own, log_prob, -float("inf")))
    shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    return shift + tl.log(row_sum(tl.where(own, tl.exp(log_prob - shift), 0.0)))


@triton.jit
def unnamed_mass(log_mass):
    """1 less the mass that is named, to the last digits of what is left; no more than all may be named."""
    mass = tl.exp(log_mass)
    inside = (mass != 0) & (mass != 1)
    rest = (1.0 - mass) * (log_mass / tl.where(inside, tl.log(tl.where(inside, mass, 0.5)), 1.0))
    rest = tl.where(mass == 0, 1.0, tl.where(mass == 1, -log_mass, rest))
    return tl.where(log_mass > 0, 0.0, rest)


@triton.jit
def find_outside(found, rows, used, tau):
    """Of the classes that nobody names the log-sum, as top + log."""
    m = tl.load(found + rows * 8, mask=used, other=0.0)
    log = tl.load(found + rows * 8 + 1, mask=used, other=0.0)
    none = log == -float("inf")
    return tl.where(none, -float("inf"), m / tau), tl.where(none, 0.0, log)


@triton.jit
def find_rest(x, e, rest, e_outside, outside_top, outside_log, top, log_all):
    """What a teacher does not name: of these classes the sum of exponentials below a maximum, the exponentials of those that others
    name, that of those that nobody does, and the student's log-probability of all. Where all of them are far below the rest of the
    row, they have a maximum of their own."""
    below = row_sum(tl.where(rest, e, 0.0)) + e_outside
    far = below < FAR
    far_top = tl.maximum(outside_top, row_max(tl.where(rest, x, -float("inf"))))
    shift = tl.where(far_top == -float("inf"), 0.0, far_top)
    each = tl.where(rest, tl.where(far, exp_or_0(x - shift), e), 0.0)
    outside = tl.where(far, exp_or_0((outside_top - shift) + outside_log), e_outside)
    total = tl.where(far, row_sum(each) + outside, below)
    log = (tl.where(far, far_top, top) - top) - log_all + log_or(total, -float("inf"))
    return total, each, outside, tl.where((total == 0) & (top != -float("inf")), -float("inf"), log)


@triton.jit(do_not_specialize=["n", "num_counts"])
def _bucket_rows_kernel(
    found, named, indices, log_probs, weights, labels, counts, of_sums, of_named, heads, of_weights, ce_out, kl_out,
    last_out, starts, n, c, weight_stride, weight_along, label_stride, num_counts, ignore_index, tau: tl.float64,
    beta: tl.float64, ce_weight, kl_weight, kl_scale, ce_grad, kl_grad, smoothing: tl.float64,
    KIND: tl.constexpr, HAS_CE: tl.constexpr, SMOOTH: tl.constexpr, NONE: tl.constexpr, COUNT: tl.constexpr,
    COUNT_BLOCK: tl.constexpr, UNIT: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = len(starts) - 1
    rows, inside, used, _ = find_rows(n, labels, label_stride, ignore_index, c, 1)
    w, _ = load_weights(weights, rows, weight_stride, weight_along, used, T)
    by = per_row(counts, label_stride, num_counts, ignore_index, COUNT, COUNT_BLOCK).to(tl.float64)
    ce_grad = ce_grad * by
    kl_grad = kl_grad * by

    # The entries of the row, and what each teacher gives their classes, in all of its entries.
    entry = tl.arange(0, ENTRIES)[None, :]
    real = used & (entry < starts[T])
    at = rows * starts[T] + entry
    index = tl.load(indices + at, mask=real, other=NOBODY)
    z = tl.load(named + at, mask=real, other=0.0)
    x = z / tau
    log_prob = tl.load(log_probs + at, mask=real, other=-float("inf")).to(tl.float64)
    first = real & (index != NOBODY)
    given = ()
    names = ()
    rests = ()
    for t in tl.static_range(T):
        own = real & (entry >= starts[t]) & (entry < starts[t + 1])
        left_out = row_sum(tl.where(own & (index == NOBODY), tl.exp(log_prob), 0.0))
        log_mass = log_mass_of(log_prob, own)
        dead = (w[t] == 0) & ~(tl.exp(log_mass) < float("inf"))  # 0 * NaN is 0
        p_t, name, repeated = of_teacher(
            indices, log_probs, rows * starts[T], used, index, entry, starts[t], starts[t + 1], 0.0, CHUNK
        )
        first = first & ~repeated
        classes = row_sum((own & (index != NOBODY) & ~repeated).to(tl.int32))
        rest = tl.where(dead, 1.0, unnamed_mass(log_mass) + left_out)
        given = given + (tl.where(dead, 0.0, p_t),)
        names = names + (name,)
        rests = rests + (tl.where(classes == c, 0.0, rest),)

    # The student's probabilities, as top + log of sums: a difference to that keeps the digits that large logits would take.
    at_found = found + rows * 8
    outside_top, outside_log = find_outside(found, rows, used, tau)
    top, log_all = log_sum(outside_top, outside_log, x, first)
    log_q = (x - top) - log_all
    q = tl.exp(log_q)
    e = tl.where(first, tl.exp(x - top), 0.0)
    e_outside = tl.exp((outside_top - top) + outside_log)

    distance = tl.zeros([1, 1], tl.float64)
    total_b = tl.zeros([1, 1], tl.float64)
    of_outside = tl.zeros([1, 1], tl.float64)
    grad = tl.zeros([1, ENTRIES], tl.float64)
    lost = tl.zeros([1, ENTRIES], tl.int32)
    outside_lost = tl.zeros([1, 1], tl.int32)
    for t in tl.static_range(T):
        weight = w[t].to(tl.float64)
        mine = first & names[t]
        rest_of = first & ~names[t]
        counts_here = weight != 0
        others, each, outside, log_rest = find_rest(x, e, rest_of, e_outside, outside_top, outside_log, top, log_all)
        none = log_rest == -float("inf")  # the student has none of these classes: a constant
        q_rest = tl.exp(log_rest)

        value, qb, gone = _outcome(given[t], q, log_q, beta, KIND)
        value_rest, qb_rest, gone_rest = _outcome(rests[t], q_rest, log_rest, beta, KIND)
        total = row_sum(tl.where(mine, qb, 0.0)) + tl.where(none, 0.0, qb_rest)
        own = row_sum(tl.where(mine, value, 0.0)) + value_rest
        mass = row_sum(tl.where(mine, given[t], 0.0)) + rests[t]
        if KIND == "skew_kl":
            own = tl.where(mass == 0, 0.0, own + (1.0 - beta) * (mass - 1.0))  # of no mass 0, whatever q is
            total = tl.where(mass == 0, 0.0, total)
        if KIND == "skew_reverse_kl":
            own += (1.0 - beta) * (1.0 - mass)
        lost_mass = row_sum(tl.where(mine, gone, 0.0)) + gone_rest
        broken = ~counts_here & ~(tl.abs(own) < float("inf"))
        slope = tl.where(used & ~broken & (kl_grad != 0), kl_grad * own, 0.0)
        tl.store(of_weights + rows * T + t, slope.to(tl.float32), mask=inside)

        distance += tl.where(counts_here, weight * own, 0.0)
        total_b += tl.where(counts_here, weight * (total - lost_mass), 0.0)
        factor = tl.where(none, 0.0, weight * qb_rest / tl.where(none, 1.0, others))
        of_outside += tl.where(counts_here & ~none, factor * outside, 0.0)
        grad += tl.where(counts_here & mine, weight * qb, 0.0)
        grad += tl.where(counts_here & rest_of & ~none, factor * each, 0.0)
        if KIND == "reverse_kl":
            rest_lost = counts_here & (rests[t] == 0)
            lost |= ((counts_here & mine & (given[t] == 0)) | (rest_of & rest_lost)).to(tl.int32)
            outside_lost |= rest_lost.to(tl.int32)
    kept_kl = kl_grad != 0  # without weight in the loss teachers may hold NaN
    grad = tl.where((lost != 0) | ~kept_kl, 0.0, (kl_grad / tau) * (grad - total_b * q))
    of_outside -= total_b * tl.exp((outside_top - top) - log_all + outside_log)
    of_outside = tl.where((outside_lost != 0) | ~kept_kl, 0.0, kl_grad * of_outside)

    ce = tl.zeros([1, 1], tl.float64)
    of_outside1 = tl.zeros([1, 1], tl.float64)
    label_grad = tl.zeros([1, 1], tl.float64)
    mean_grad = tl.zeros([1, 1], tl.float64)
    if HAS_CE:
        top1 = outside_top * tau
        log1 = outside_log
        if not UNIT:
            top1 = tl.load(at_found, mask=used, other=0.0)
            log1 = tl.load(at_found + 2, mask=used, other=0.0)
            top1 = tl.where(log1 == -float("inf"), -float("inf"), top1)
            log1 = tl.where(log1 == -float("inf"), 0.0, log1)
        all_top1, log_all1 = log_sum(top1, log1, z, first)
        of_label = tl.load(at_found + 3, mask=used, other=0.0)
        mean = tl.load(at_found + 4, mask=used, other=0.0) / c
        ce = (all_top1 - of_label) + log_all1
        if SMOOTH:  # not 0 * infinity
            ce = (1.0 - smoothing) * ce + smoothing * ((all_top1 - mean) + log_all1)
        grad += ce_grad * tl.exp((z - all_top1) - log_all1)
        of_outside1 = ce_grad * tl.exp((top1 - all_top1) - log_all1 + log1)
        label_grad = -(1.0 - smoothing) * ce_grad
        mean_grad = -smoothing * ce_grad
    tl.store(of_named + at, tl.where(first, grad, 0.0), mask=inside & (entry < starts[T]))
    tl.store(heads + at, tl.where(first, index, NOBODY), mask=inside & (entry < starts[T]))
    at_sums = of_sums + rows * 4
    if UNIT:
        of_outside += of_outside1
        of_outside1 = tl.zeros([1, 1], tl.float64)
    tl.store(at_sums, tl.where(used, of_outside, 0.0), mask=inside)
    tl.store(at_sums + 1, tl.where(used, of_outside1, 0.0), mask=inside)
    tl.store(at_sums + 2, tl.where(used, label_grad, 0.0), mask=inside)
    tl.store(at_sums + 3, tl.where(used, mean_grad, 0.0), mask=inside)
    ce = tl.where(used, ce, 0.0).to(tl.float32)
    kl = tl.where(used, kl_scale * distance, 0.0).to(tl.float32)
    tl.store(ce_out + rows, ce, mask=inside)
    tl.store(kl_out + rows, kl, mask=inside)
    last = used.to(tl.float32)
    if NONE:
        last = weighted(ce, kl, ce_weight, kl_weight)
    tl.store(last_out + rows, last, mask=inside)


# --- launchers


def entry_numbers(sizes: tuple[int, ...]) -> dict:
    """Numbers of a kernel that compares all entries of a row, and options of its launch."""
    entries = triton.next_power_of_2(sum(sizes))
    warps = min(8, max(1, entries // 128))
    chunk = max(1, PAIRS * warps // entries)
    return dict(starts=starts_of(sizes), ENTRIES=entries, CHUNK=chunk, num_warps=warps, **OPTIONS)


@kept
def _launch(at: Layout, of: Settings, divergence: str, beta: float, count_rows: bool) -> Launch:
    return Launch(
        _bucket_rows_kernel,
        (at.n,),
        **loss_numbers(at, of, count_rows),
        **entry_numbers(at.sizes),
        tau=float(of.temperature),
        beta=float(beta),
        ce_weight=float(of.ce_weight),
        kl_weight=float(of.kl_weight),
        kl_scale=float(of.kl_scale),
        KIND=divergence,
        HAS_CE=at.label_stride is not None and of.ce_weight != 0,
        SMOOTH=of.label_smoothing != 0,
        NONE=of.reduction == "none",
        UNIT=of.temperature == 1,
    )


def topk_bucket_rows(
    found: Tensor,
    z: Tensor,
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
    divergence: str,
    beta: float,
) -> tuple[Tensor, ...]:
    """loss (a scalar, or [N] for "none"), its gradients to ``found`` and to the logits of entries, heads, grad_weights."""
    (n, c), none = student.shape, reduction == "none"
    loss = log_probs.new_empty((n,) if none else ())
    of_sums, of_named = found.new_empty(n, 4), found.new_empty(z.shape)
    heads, of_weights = indices.new_empty(indices.shape), log_probs.new_empty(n, len(sizes))
    if n == 0:
        loss.zero_()
        return loss, of_sums, of_named, heads, of_weights
    settings = Settings(temperature, ce_weight, kl_weight, kl_scale, tail, reduction, ignore_index, label_smoothing)
    layout = Layout(
        n,
        c,
        0,
        0,
        tuple(sizes),
        None if weights is None else weights.stride(),
        None if labels is None else labels.stride(0),
    )
    counts = counts_of(labels, settings)
    values = log_probs.new_empty(3, n)
    ce_rows, kl_rows, last = values.unbind()
    _launch(layout, settings, divergence, beta, counts is not None)(
        found.contiguous(), z.contiguous(), indices.contiguous(), log_probs.contiguous(), weights, labels, counts, of_sums,
        of_named, heads, of_weights, ce_rows, kl_rows, loss if none else last,
    )  # fmt: skip
    if not none:
        add_rows(values, [loss, None, None], float(ce_weight), float(kl_weight), settings.kl_divisor(c))
    return loss, of_sums, of_named, heads, of_weights
