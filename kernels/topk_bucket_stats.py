"""Statistics of rows whose teachers give their largest classes only, from what ``topk_bucket`` finds in the student's rows: entropies,
the teachers' KLs, what they retain, and whether target and student are largest at one class.

    q = softmax(z / tau), p_t of teacher t: its named classes, and what the tail makes of the others             per row
    KL_t = sum_c p_t (log p_t - log q), with tail "bucket" over its named classes and one class for all others

Shapes   as in topk_bucket_rows -> [N, 4 + T] float32: entropy of student and target, retained mass, agreement, KLs
Grid     one program a row, as in topk_bucket_rows: K^2 comparisons of entries
Traffic  28 bytes an entry in, 12 of them twice

All numbers are float64. Nothing is looked at: what is out of range has a NaN in ``found`` or ``z``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._kd_rows import find_rows, load_weights
from ._launch import Launch, kept
from .topk_bucket_rows import (
    NOBODY,
    entry_numbers,
    find_outside,
    find_rest,
    log_mass_of,
    log_or,
    log_sum,
    of_teacher,
    row_max,
    row_sum,
    unnamed_mass,
)

NONE: tl.constexpr = tl.constexpr(1 << 62)  # no class


@triton.jit
def _kl(p, log_q):
    return tl.where(p == 0, 0.0, p * (log_or(p, 0.0) - log_q))


@triton.jit
def _entropy(p):
    return tl.where(p == 0, 0.0, -p * log_or(p, 0.0))


@triton.jit
def _weighted(w, x):
    return tl.where((w == 0) & ~(tl.abs(x) < float("inf")), 0.0, w * x)


@triton.jit(do_not_specialize=["n"])
def _bucket_stats_kernel(
    found, named, indices, log_probs, weights, labels, stats, starts, n, c, weight_stride, weight_along, label_stride,
    ignore_index, tau: tl.float64,
    TAIL: tl.constexpr, ENTRIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = len(starts) - 1
    rows, inside, used, _ = find_rows(n, labels, label_stride, ignore_index, c, 1)
    w, _ = load_weights(weights, rows, weight_stride, weight_along, used, T)
    entry = tl.arange(0, ENTRIES)[None, :]
    real = used & (entry < starts[T])
    at = rows * starts[T] + entry
    index = tl.load(indices + at, mask=real, other=NOBODY)
    x = tl.load(named + at, mask=real, other=0.0) / tau
    log_prob = tl.load(log_probs + at, mask=real, other=-float("inf")).to(tl.float64)
    here = real & (index != NOBODY)
    first = here
    given = ()
    names = ()
    rests = ()
    spreads = ()
    unnamed = ()
    retained = tl.zeros([1, 1], tl.float64)
    total = tl.zeros([1, 1], tl.float64)
    for t in tl.static_range(T):
        own = real & (entry >= starts[t]) & (entry < starts[t + 1])
        p = tl.exp(log_prob)
        kept = row_sum(tl.where(own & here, p, 0.0))
        left_out = row_sum(tl.where(own & ~here, p, 0.0))
        log_mass = log_mass_of(log_prob, own)
        shift = tl.zeros([1, 1], tl.float64)
        if TAIL == "renormalize":
            shift = log_mass
        dead = tl.zeros([1, 1], tl.int32) != 0
        if TAIL == "bucket":
            dead = (w[t] == 0) & ~(tl.exp(log_mass) < float("inf"))  # 0 * NaN is 0
        p_t, name, repeated = of_teacher(
            indices, log_probs, rows * starts[T], used, index, entry, starts[t], starts[t + 1], shift, CHUNK
        )
        p_t = tl.where(dead, 0.0, p_t)
        first = first & ~repeated
        others = c - row_sum((own & here & ~repeated).to(tl.int32))
        rest = tl.where(dead, 1.0, unnamed_mass(log_mass))
        spread = tl.zeros([1, 1], tl.float64)
        if TAIL == "uniform":
            spread = tl.where(others == 0, 0.0, rest / tl.maximum(others, 1).to(tl.float64))
        rest = tl.where(others == 0, 0.0, rest + tl.where(dead, 0.0, left_out))
        weight = w[t].to(tl.float64)
        retained += _weighted(weight, kept)
        total += weight
        given = given + (p_t,)
        names = names + (name,)
        rests = rests + (rest,)
        spreads = spreads + (spread,)
        unnamed = unnamed + (others.to(tl.float64),)

    at_found = found + rows * 8
    outside_top, outside_log = find_outside(found, rows, used, tau)
    top, log_all = log_sum(outside_top, outside_log, x, first)
    log_q = (x - top) - log_all
    q = tl.exp(log_q)
    e = tl.where(first, tl.exp(x - top), 0.0)
    e_outside = tl.exp((outside_top - top) + outside_log)
    student = -row_sum(tl.where(first & (q != 0), q * log_q, 0.0))
    log_others = (outside_top - top) - log_all + outside_log
    of_others = tl.exp(log_others) * (log_others + tl.load(at_found + 5, mask=used, other=0.0))
    student -= tl.where(log_others == -float("inf"), 0.0, of_others)
    others = (c - row_sum(first.to(tl.int32))).to(tl.float64)
    # The sum of log q where nobody names a class.
    below = tl.load(at_found + 6, mask=used, other=0.0) / tau - others * (top + log_all)

    target = tl.zeros([1, ENTRIES], tl.float64)
    target_outside = tl.zeros([1, 1], tl.float64)
    target_rest = tl.zeros([1, 1], tl.float64)
    at_stats = stats + rows * (4 + T)
    for t in tl.static_range(T):
        kl = row_sum(tl.where(first & names[t], _kl(given[t], log_q), 0.0))
        if TAIL == "bucket":
            _, _, _, log_rest = find_rest(x, e, first & ~names[t], e_outside, outside_top, outside_log, top, log_all)
            kl += _kl(rests[t], log_rest)
        if TAIL == "uniform":
            logs = row_sum(tl.where(first & ~names[t], log_q, 0.0)) + below
            of_spread = spreads[t] * (unnamed[t] * log_or(spreads[t], 0.0) - logs)
            kl += tl.where(spreads[t] == 0, 0.0, of_spread)
        tl.store(at_stats + 4 + t, tl.where(used, kl, 0.0).to(tl.float32), mask=inside)
        weight = w[t].to(tl.float64)
        target += _weighted(weight, tl.where(names[t], given[t], spreads[t]))
        target_outside += _weighted(weight, spreads[t])
        target_rest += _weighted(weight, rests[t])
    entropy = row_sum(tl.where(first, _entropy(target), 0.0))
    if TAIL == "bucket":
        entropy += _entropy(target_rest)
    else:
        entropy += others * _entropy(target_outside)

    # The first class that nobody names: 0, or behind one that is named.
    follower = index + 1
    followed = tl.zeros([1, ENTRIES], tl.int32)
    starts_at_0 = tl.min(tl.where(here, index, NONE), axis=1, keep_dims=True) == 0
    for start in range(0, starts[T], CHUNK):
        other = start + tl.arange(0, CHUNK)[:, None]
        there = used & (other < starts[T])
        same = tl.load(indices + rows * starts[T] + other, mask=there, other=-1) == follower
        followed |= tl.max((same & there).to(tl.int32), axis=0, keep_dims=True)
    free = tl.min(tl.where(here & (followed == 0), follower, NONE), axis=1, keep_dims=True)
    free = tl.where(starts_at_0, free, 0)
    # Of the largest the first class; NaN is larger than all others.
    of_free = tl.where(free < c, target_outside, -float("inf"))
    broken = (row_max(tl.where(first & (target != target), 1.0, 0.0)) != 0) | (of_free != of_free)
    most = tl.maximum(row_max(tl.where(first, target, -float("inf"))), tl.where(broken, -float("inf"), of_free))
    is_largest = first & tl.where(broken, target != target, target == most)
    largest = tl.min(tl.where(is_largest, index, NONE), axis=1, keep_dims=True)
    free_is = tl.where(broken, of_free != of_free, of_free == most)
    largest = tl.where(free_is, tl.minimum(largest, free), largest)
    agrees = largest == tl.load(at_found + 7, mask=used, other=0.0).to(tl.int64)

    tl.store(at_stats, tl.where(used, student, 0.0).to(tl.float32), mask=inside)
    tl.store(at_stats + 1, tl.where(used, entropy, 0.0).to(tl.float32), mask=inside)
    share = retained / tl.where(total == 0, 1.0, total)
    tl.store(at_stats + 2, tl.where(used, share, 0.0).to(tl.float32), mask=inside)
    tl.store(at_stats + 3, tl.where(used & agrees, 1.0, 0.0), mask=inside)


# --- launchers


@kept
def _launch(
    n: int,
    c: int,
    sizes: tuple[int, ...],
    weight_strides: tuple[int, ...],
    label_stride: int,
    temperature: float,
    ignore_index: int,
    tail: str,
) -> Launch:
    return Launch(
        _bucket_stats_kernel,
        (n,),
        **entry_numbers(sizes),
        n=n,
        c=c,
        weight_stride=weight_strides[0],
        weight_along=weight_strides[1],
        label_stride=label_stride,
        ignore_index=ignore_index,
        tau=float(temperature),
        TAIL=tail,
    )


def topk_bucket_stats(
    found: Tensor,
    z: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    classes: int,
    temperature: float,
    ignore_index: int,
    tail: str,
    in_float64: bool,
) -> Tensor:
    """Of every row the entropies of student and target, retained mass, agreement and each teacher's KL."""
    n = found.shape[0]
    stats = found.new_empty(n, 4 + len(sizes), dtype=torch.float32)
    if n == 0:
        return stats
    weight_strides = (0, 0) if weights is None else weights.stride()
    label_stride = 0 if labels is None else labels.stride(0)
    launch = _launch(n, classes, tuple(sizes), weight_strides, label_stride, temperature, ignore_index, tail)
    launch(found.contiguous(), z.contiguous(), indices.contiguous(), log_probs.contiguous(), weights, labels, stats)
    return stats
