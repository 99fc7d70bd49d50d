"""Top-k teachers where what they name is plain PyTorch, in float64 and with its autograd, between sweeps of the student's row."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast import reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import first_order, kernels, needs_grad, save, saved
from amtml_fast.ops._topk_bucket_kernels import sweep_settings
from amtml_fast.ops._topk_named import (
    NOBODY,
    Named,
    TopkInputs,
    at_heads,
    by_teacher,
    lost_entries,
    named_entries,
    of_outcomes,
    to_heads,
)
from amtml_fast.ops._vocabulary import IGNORED, NO_SECOND, Vocabulary, largest_here
from amtml_fast.ops._vocabulary_topk import absent_classes, grads_here, joined, plain_gradient, plain_sweep
from amtml_fast.reference import kl_rows, weighted
from amtml_fast.terms import Divergence, KDOptions, KDStats, connected, counted_rows, of_counted_rows

_EMPTY = -torch.inf


class _Rows(NamedTuple):
    """What the sweep finds in rows, float64."""

    # [N, 4]: logarithms of sums over the classes that nobody names, at the temperature and at 1; label's logit, mean. In a split
    # vocabulary [N, 5], with the sum of z over the classes that nobody names
    sums: Tensor
    z: Tensor  # [N, K]: logits that are named
    weights: Tensor | None
    stats: Tensor  # [N, 2]: over the classes that nobody names, of r = softmax: sum r log r; and the sum of z


def plain_bucket(
    chosen: str, given: TopkInputs, kept: Tensor | None, divergence: Divergence, *, need_stats: bool
) -> tuple[Tensor, Any]:
    """The loss with the tail "bucket", and the statistics. ``kept``: the entries that are not of the bucket; None: all."""
    sizes, tau = given.sizes, given.options.temperature
    valid, log_p, fixed = _counted(given)
    p = log_p.exp()
    named = named_entries(given.indices, kept, p, sizes, valid)
    rows = _sweep(chosen, given, named, need_stats)

    # What is not given, to its last digits, and what is given of other classes.
    rest = (-torch.stack([x.logsumexp(1) for x in log_p.split(sizes, 1)], 1).expm1()).clamp(min=0)
    if kept is not None:
        rest = rest + by_teacher(p.masked_fill(kept, 0), sizes)
    rest = rest.masked_fill(by_teacher(named.own, sizes) == given.classes, 0)

    x, outside = rows.z / tau, rows.sums[:, :1]
    if divergence.name == "reverse_kl":  # an outcome that a teacher has not makes it infinite, and gets no gradient
        gone = (rest == 0) & (fixed != 0)
        lost = lost_entries(named, gone, fixed != 0, sizes)
        x = torch.where(lost, x.detach(), x)
        outside = torch.where(gone.any(1, keepdim=True), outside.detach(), outside)
    log_sum, log_q = _log_q(x, outside, named)
    outcomes = torch.cat([named.p, rest], 1)
    log_p = reference.log_or_0(outcomes).masked_fill(outcomes == 0, _EMPTY)
    log_q = torch.cat([log_q, *_log_rests(x, outside, log_sum, named)], 1)
    # Every outcome as a row of its own, then added up by teacher.
    each = reference.divergence_rows(divergence, *(y.unsqueeze(2) for y in (outcomes, log_p, log_q.exp(), log_q)))
    distance = weighted(_weights(rows, fixed, valid), of_outcomes(each, sizes)).sum(1)
    loss = _reduced(distance, given, rows, named, valid)
    if not need_stats:
        return loss, None
    with torch.no_grad():
        target = at_heads(named, sizes, fixed, torch.zeros_like(fixed))
        mixed_rest = weighted(fixed, rest).sum(1, keepdim=True)
        entropy = _entropy(torch.cat([target.masked_fill(~named.heads, 0), mixed_rest], 1))
        kls = of_outcomes(kl_rows(*(y.unsqueeze(2) for y in (outcomes, log_p, log_q))), sizes)
        stats = _stats(
            given, rows, named, log_sum, log_q, target, torch.zeros_like(mixed_rest), entropy, kls, by_teacher(named.p, sizes),
            fixed, valid,
        )  # fmt: skip
    return loss, stats


def plain_tail(chosen: str, given: TopkInputs, *, need_stats: bool) -> tuple[Any, Any]:
    """With another tail: the loss, which is made in a split vocabulary only (else None), and the statistics."""
    sizes, tau, classes, tail = given.sizes, given.options.temperature, given.classes, given.options.mode
    valid, log_p, fixed = _counted(given)
    p = log_p.exp()
    mass = by_teacher(p, sizes)
    if tail == "renormalize":
        p = torch.cat([x.softmax(1) for x in log_p.split(sizes, 1)], 1)
    named = named_entries(given.indices, None, p, sizes, valid)
    rows = _sweep(chosen, given, named, need_stats or tail == "uniform")
    unnamed = classes - by_teacher(named.own, sizes)
    share = torch.zeros_like(mass)  # of each class that the teacher does not name
    if tail == "uniform":
        share = (1 - mass).clamp(min=0) / unnamed.clamp(min=1)
        share = share.masked_fill(unnamed == 0, 0)
    log_sum, log_q = _log_q(rows.z / tau, rows.sums[:, :1], named)
    others = classes - named.heads.sum(1)  # that nobody names
    loss = None
    if given.vocabulary is not None:
        w = _weights(rows, fixed, valid)
        target = at_heads(named, sizes, w, share).masked_fill(~named.heads, 0)
        kl = reference.kl_of_probs(target, log_q)
        if tail == "uniform":
            outside = rows.sums[:, 4] / tau - others * log_sum.squeeze(1)
            kl = kl + _even_kl(weighted(w, share).sum(1), others, outside)
        loss = _reduced(kl, given, rows, named, valid)
    if not need_stats:
        return loss, None
    with torch.no_grad():
        below = rows.stats[:, 1] / tau - others * log_sum.squeeze(1)  # the sum of their log q
        kls = []
        for t, (of_p, of_q) in enumerate(zip(named.p.split(sizes, 1), log_q.split(sizes, 1))):
            kl = reference.kl_of_probs(of_p, of_q)
            if tail == "uniform":
                outside = log_q.masked_fill(~named.heads | named.named[t], 0).sum(1) + below
                kl = kl + _even_kl(share[:, t], unnamed[:, t], outside)
            kls.append(kl)
        target = at_heads(named, sizes, fixed, share)
        outside = weighted(fixed, share).sum(1, keepdim=True)
        entropy = _entropy(target.masked_fill(~named.heads, 0)) + others * _entropy(outside)
        stats = _stats(
            given, rows, named, log_sum, log_q, target, outside, entropy, torch.stack(kls, 1), mass, fixed, valid
        )
    return loss, stats


def _counted(given: TopkInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count; and, in float64, detached, and without NaN where it counts nothing, log-probabilities and weights."""
    weights, labels, sizes = given.weights, given.labels, given.sizes
    rows, teachers = len(given.student), len(sizes)
    valid = counted_rows(given.student, rows, labels, given.options.ignore_index)
    w = valid.new_full((1, teachers), 1 / teachers, dtype=torch.float64) if weights is None else weights.detach()
    w = w.double().expand(rows, -1).masked_fill(~valid.unsqueeze(1), 0)
    log_p = given.log_probs.detach().double()
    dead = (w == 0) & ~(by_teacher(log_p.exp(), sizes) < torch.inf)
    of_entries = torch.cat([x.expand(-1, k) for x, k in zip(dead.split(1, 1), sizes)], 1)
    return valid, log_p.masked_fill(of_entries, _EMPTY), w


def _weights(rows: _Rows, fixed: Tensor, valid: Tensor) -> Tensor:
    """[N, T] with their gradient; ``fixed`` where none were given."""
    return fixed if rows.weights is None else rows.weights.double().masked_fill(~valid.unsqueeze(1), 0)


def _reduced(distance: Tensor, given: TopkInputs, rows: _Rows, named: Named, valid: Tensor) -> Tensor:
    """The loss of each row's D [N]."""
    options = given.options
    if options.t2_scale:
        distance = distance * options.temperature**2
    ce = _cross_entropy(rows, named, valid, options) if given.labels is not None else None
    loss = reference.reduced(ce, distance, valid, given.classes, options)[0]
    loss = connected(loss, rows.weights) if ce is not None and options.alpha == 0 else loss
    return loss.to(given.wide)


# --- the student


def _log_q(x: Tensor, outside: Tensor, named: Named) -> tuple[Tensor, Tensor]:
    """The student's log-sum [N, 1], and log q of the entries, -inf of those that count nothing."""
    log_sum = torch.cat([outside, x.masked_fill(~named.heads, _EMPTY)], 1).logsumexp(1, keepdim=True)
    return log_sum, (x - log_sum).masked_fill(~named.own, _EMPTY)


def _log_rests(x: Tensor, outside: Tensor, log_sum: Tensor, named: Named) -> list[Tensor]:
    """log q [N, 1] of each teacher's bucket: of all classes that it does not name."""
    out = []
    for names in named.named:
        others = outside
        if len(named.named) > 1:
            others = torch.cat([outside, x.masked_fill(~named.heads | names, _EMPTY)], 1)
        none = (others == _EMPTY).all(1, keepdim=True) & (log_sum != _EMPTY)
        out.append((others.masked_fill(none, 0).logsumexp(1, keepdim=True) - log_sum).masked_fill(none, _EMPTY))
    return out


def _cross_entropy(rows: _Rows, named: Named, valid: Tensor, options: KDOptions) -> Tensor:
    at_1, of_label, mean = rows.sums[:, 1:4].unbind(1)
    if options.temperature == 1:
        at_1 = rows.sums[:, 0]
    log_sum = torch.cat([at_1.unsqueeze(1), rows.z.masked_fill(~named.heads, _EMPTY)], 1).logsumexp(1)
    smoothing = options.label_smoothing
    ce = log_sum - of_label
    if smoothing != 0:  # not 0 * infinity
        ce = (1 - smoothing) * ce + smoothing * (log_sum - mean)
    return ce.masked_fill(~valid, 0)


# --- statistics


def _entropy(p: Tensor) -> Tensor:
    return reference.entropy_rows(p, reference.log_or_0(p))


def _even_kl(u: Tensor, count: Tensor, log_q: Tensor) -> Tensor:
    """``sum u (log u - log q)`` over ``count`` classes that all have the probability u, from the sum of their log q; [N] each."""
    return (u * (count * reference.log_or_0(u) - log_q)).masked_fill(u == 0, 0)


def _stats(
    given: TopkInputs,
    rows: _Rows,
    named: Named,
    log_sum: Tensor,  # [N, 1]
    log_q: Tensor,  # [N, K], or more
    target: Tensor,  # [N, K], at the heads
    outside: Tensor,  # [N, 1]: the target of a class that nobody names
    target_entropy: Tensor,
    kls: Tensor,  # [N, T]
    masses: Tensor,  # [N, T]
    w: Tensor,
    valid: Tensor,
) -> KDStats:
    classes, entries = given.classes, named.heads.shape[1]
    if given.vocabulary is None:
        of_student = given.student.detach().argmax(1)
    else:
        told = given.vocabulary.gathered(largest_here(given.student.detach()))
        of_student = given.vocabulary.first_largest(told)
    log_q = log_q[:, :entries].masked_fill(~named.heads, _EMPTY)
    log_others = rows.sums[:, 0] - log_sum.squeeze(1)  # q of all that nobody names
    of_others = (log_others.exp() * (log_others + rows.stats[:, 0])).masked_fill(log_others == _EMPTY, 0)
    # The largest of the target, of several the first class; of those that nobody names the first is the least that is missing.
    small = named.classes.masked_fill(~named.own | (named.classes > entries), entries + 1)
    there = small.new_zeros(len(w), entries + 2).scatter(1, small, 1)
    first = there[:, : entries + 1].argmin(1, keepdim=True)
    first = first.masked_fill(first >= classes, classes)
    values = torch.cat([target.masked_fill(~named.heads, -1), outside.masked_fill(first == classes, -1)], 1)
    places = torch.cat([named.classes, first], 1)
    is_largest = (values == values.amax(1, keepdim=True)) | values.isnan()
    largest = places.masked_fill(~is_largest, classes).amin(1)
    total = w.sum(1)
    stats = KDStats(
        reference.entropy_rows(log_q.exp(), log_q) - of_others,
        target_entropy,
        kls,
        weighted(w, masses).sum(1) / total.masked_fill(total == 0, 1),
        (of_student == largest).double(),
    )
    return KDStats(*(x.to(given.wide) for x in of_counted_rows(stats, valid)))


# --- the sweep


def _sweep(chosen: str, given: TopkInputs, named: Named, need_stats: bool) -> _Rows:
    student, weights, labels = given.student, given.weights, given.labels
    needs = needs_grad(student), needs_grad(weights)
    if weights is not None:
        weights = weights.expand(student.shape[0], -1)
    settings = *sweep_settings(given.options, labels is not None), given.wide == torch.float64
    out = _kd.run(
        given.values, TopkBucket, any(needs),
        chosen, student, weights, labels, named.classes, named.classes.masked_fill(~named.heads, NOBODY), named.home,
        given.sizes, settings, needs, need_stats, given.vocabulary,
    )  # fmt: skip
    return _Rows(*out)


def _places(vocabulary: Vocabulary, classes: Tensor) -> Tensor:
    mine, places = vocabulary.here(classes)
    return places.masked_fill(~mine, NOBODY)


class TopkBucket(torch.autograd.Function):
    """What ``_Rows`` holds. The weights pass through it, so that a second derivative is refused for them, too."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student: Tensor,
        weights: Tensor | None,
        labels: Tensor | None,
        classes: Tensor,
        heads: Tensor,
        home: Tensor,
        sizes: list[int],
        settings: tuple,
        needs: tuple[bool, bool],
        need_stats: bool,
        vocabulary: Vocabulary | None,
    ) -> tuple:
        ctx.vocabulary, ctx.mine = vocabulary, None
        if vocabulary is not None:
            absent = absent_classes(vocabulary, classes, labels, settings[1], NOBODY)
            classes, heads = (_places(vocabulary, x) for x in (classes, heads))
            if labels is not None:
                labels, ctx.mine = vocabulary.labels_here(labels, settings[1])
            settings = settings[0], IGNORED, *settings[2:]
        sweep: Any = kernels(backend).topk_bucket_fwd.default if backend != "reference" else plain_sweep
        found, z = sweep(student, classes, weights, labels, *settings, need_stats)
        if vocabulary is not None:
            found, z = joined(vocabulary, found, z, ctx.mine, absent, settings[0])
        top, logs, logs_1, of_label, total, entropy, below, _ = found.unbind(1)
        sums = [
            top / settings[0] + logs,
            top + logs_1,
            of_label,
            total / (student.shape[1] if vocabulary is None else vocabulary.classes),
        ]
        if vocabulary is not None:
            sums.append(below)
        stats = torch.stack([entropy, below], 1)
        ctx.mark_non_differentiable(stats)
        ctx.backend, ctx.sizes, ctx.settings, ctx.needs = backend, sizes, settings, needs
        save(ctx, student, weights, labels, heads, home, found)
        return torch.stack(sums, 1), z, None if weights is None else weights.view_as(weights), stats

    @staticmethod
    @first_order("topk_kd_loss", NO_SECOND)
    def backward(ctx: Any, of_sums: Tensor, of_z: Tensor, of_weights: Tensor | None, *_: Tensor | None) -> tuple:
        fixed = (None,) * (len(ctx.needs_input_grad) - 3)
        student, _, labels, heads, home, found = saved(ctx)
        grad = None
        if ctx.needs[0]:
            summed = torch.zeros_like(of_z)
            for part in to_heads(home, ctx.sizes, of_z):  # one after another: their sum has one order
                summed = summed + part
            if ctx.vocabulary is not None:
                of_sums, summed = grads_here(ctx.vocabulary, of_sums, summed, ctx.mine)
            sweep: Any = kernels(ctx.backend).topk_bucket_bwd.default if ctx.backend != "reference" else plain_gradient
            grad = sweep(of_sums, summed, student, heads, labels, found, *ctx.settings)
        return None, grad, of_weights if ctx.needs[1] else None, *fixed
