"""``topk_kd_loss`` with the tail "bucket", and the statistics of all tails.

On the CPU one kernel makes the loss and its gradients. Elsewhere kernels sweep the student's row of C classes, and what the
teachers name, [N, K] entries of all teachers side by side, is a kernel between the sweep of forward and that of backward. The
statistics, too, are a sweep and a kernel behind it. In a split vocabulary, and for more entries than the GPUs' kernels take, what is
named is plain PyTorch in float64, with its autograd. What passes between the two: of every row the logarithm of the sum over the
classes that nobody names, and the logits that are named. From these come all probabilities, by sums and never by differences.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast import backend, reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import define, first_order, kernels, needs_grad, operator, save, saved
from amtml_fast.ops._topk_bucket_kernels import (
    kernel_stats,
    one_pass_loss,
    sweep_settings,
    swept_loss,
)
from amtml_fast.ops._topk_named import (
    NOBODY,
    Named,
    at_heads,
    by_teacher,
    kept_entries,
    lost_entries,
    named_entries,
    of_outcomes,
    to_heads,
)
from amtml_fast.ops._vocabulary import IGNORED, NO_SECOND, Vocabulary
from amtml_fast.ops._vocabulary_topk import absent_classes, grads_here, joined, plain_gradient, plain_sweep
from amtml_fast.reference import kl_rows, weighted
from amtml_fast.terms import Divergence, KDOptions, KDStats, connected, of_counted_rows, wide_dtype

operator("topk_bucket")

_EMPTY = -torch.inf


class _Rows(NamedTuple):
    """What the kernels find in rows, float64."""

    # [N, 4]: logarithms of sums over the classes that nobody names, at the temperature and at 1; label's logit, mean. In a split
    # vocabulary [N, 5], with the sum of z over the classes that nobody names
    sums: Tensor
    z: Tensor  # [N, K]: logits that are named
    weights: Tensor | None
    stats: Tensor  # [N, 2]: over the classes that nobody names, of r = softmax: sum r log r; and the sum of z


def bucket_loss(
    student: Tensor,  # [N, C]
    indices: Tensor,  # [N, K]
    log_probs: Tensor,  # [N, K]
    sizes: list[int],
    weights: Tensor | None,  # [N, T], [1, T]
    labels: Tensor | None,  # [N]
    options: KDOptions,
    divergence: Divergence,
    support: str,
    values: tuple,
    vocabulary: Vocabulary | None,
    *,
    need_stats: bool,
) -> tuple[Tensor, Any]:
    """The loss of checked rows, and with ``need_stats`` their statistics."""
    chosen = _chosen(student, log_probs, weights, values, kernel_checks=vocabulary is None)
    if chosen == "reference" and vocabulary is None:
        apart = list(indices.split(sizes, 1)), list(log_probs.split(sizes, 1))
        return reference.topk_bucket(
            student, *apart, weights, labels, options, divergence, support, need_stats=need_stats
        )
    tau, classes, wide = options.temperature, _classes(student, vocabulary), wide_dtype(student, log_probs, weights)
    kept = kept_entries(chosen, student, indices, sizes, vocabulary) if support == "student" else None
    if vocabulary is None and (chosen == "cpp" or _kernels_take(sizes)):
        supported = indices if kept is None else indices.masked_fill(~kept, NOBODY)
        entries = supported, log_probs, sizes, weights, labels, options
        if chosen != "cpp":
            return swept_loss(chosen, student, *entries, divergence, need_stats=need_stats)
        loss = one_pass_loss(student, indices, kept, log_probs, sizes, weights, labels, options, divergence, values)
        return loss, kernel_stats(chosen, student, *entries) if need_stats else None
    valid, log_p, rough = _given(student, log_probs, sizes, weights, labels, options)
    given = log_p.exp()
    named = named_entries(indices, kept, given, sizes, valid)
    rows = _sweep(chosen, student, named, sizes, weights, labels, options, values, wide, need_stats, vocabulary)
    w = rough if rows.weights is None else rows.weights.double().masked_fill(~valid.unsqueeze(1), 0)

    # What is not given, to its last digits, and what is given of other classes.
    rest = (-torch.stack([x.logsumexp(1) for x in log_p.split(sizes, 1)], 1).expm1()).clamp(min=0)
    if kept is not None:
        rest = rest + by_teacher(given.masked_fill(kept, 0), sizes)
    rest = rest.masked_fill(by_teacher(named.own, sizes) == classes, 0)

    x, outside = rows.z / tau, rows.sums[:, :1]
    if divergence.name == "reverse_kl":  # an outcome that a teacher has not makes it infinite, and gets no gradient
        gone = (rest == 0) & (rough != 0)
        lost = lost_entries(named, gone, (rough != 0), sizes)
        x = torch.where(lost, x.detach(), x)
        outside = torch.where(gone.any(1, keepdim=True), outside.detach(), outside)
    log_sum, log_q = _log_q(x, outside, named)
    log_rests = []
    for names in named.named:
        others = outside
        if len(sizes) > 1:
            others = torch.cat([outside, x.masked_fill(~named.heads | names, _EMPTY)], 1)
        none = (others == _EMPTY).all(1, keepdim=True) & (log_sum != _EMPTY)
        log_rests.append((others.masked_fill(none, 0).logsumexp(1, keepdim=True) - log_sum).masked_fill(none, _EMPTY))
    outcomes = torch.cat([named.p, rest], 1)
    log_p = outcomes.masked_fill(outcomes == 0, 1).log().masked_fill(outcomes == 0, _EMPTY)
    log_q = torch.cat([log_q, *log_rests], 1)
    # Every outcome as a row of its own, then added up by teacher.
    each = reference.divergence_rows(divergence, *(y.unsqueeze(2) for y in (outcomes, log_p, log_q.exp(), log_q)))
    distance = weighted(w, of_outcomes(each, sizes)).sum(1)
    if options.t2_scale:
        distance = distance * tau**2
    ce = _cross_entropy(rows, named, valid, options) if labels is not None else None
    loss = _reduced(ce, distance, rows, valid, classes, options).to(wide)
    if not need_stats:
        return loss, None
    with torch.no_grad():
        target = at_heads(named, sizes, rough, torch.zeros_like(rough))
        mixed_rest = weighted(rough, rest).sum(1, keepdim=True)
        entropy = _entropy(torch.cat([target.masked_fill(~named.heads, 0), mixed_rest], 1))
        stats = _stats(
            student, vocabulary, rows, named, log_sum, log_q, target, torch.zeros_like(mixed_rest), entropy,
            of_outcomes(kl_rows(*(y.unsqueeze(2) for y in (outcomes, log_p, log_q))), sizes),
            by_teacher(named.p, sizes), rough, valid,
        )  # fmt: skip
    return loss, _typed(stats, wide)


@torch.no_grad()
def topk_stats(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    options: KDOptions,
    values: tuple,
) -> KDStats:
    """The statistics of checked rows with another tail."""
    chosen = _chosen(student, log_probs, weights, values)
    if chosen == "reference":
        apart = list(indices.split(sizes, 1)), list(log_probs.split(sizes, 1))
        return reference.topk_kd(student, *apart, weights, labels, options, need_stats=True)[1]
    given = student, indices, log_probs, sizes, weights, labels, options
    if chosen == "cpp" or _kernels_take(sizes):
        return kernel_stats(chosen, *given)
    return _tail_rows(chosen, *given, values, None, need_stats=True)[1]


def split_tail_loss(
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    options: KDOptions,
    values: tuple,
    vocabulary: Vocabulary,
    *,
    need_stats: bool,
) -> tuple[Tensor, Any]:
    """The loss of checked rows with another tail, whose classes are split among processes, and with ``need_stats`` their
    statistics."""
    chosen = _chosen(student, log_probs, weights, values)
    given = student, indices, log_probs, sizes, weights, labels, options
    return _tail_rows(chosen, *given, values, vocabulary, need_stats=need_stats)


def _tail_rows(
    chosen: str,
    student: Tensor,
    indices: Tensor,
    log_probs: Tensor,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    options: KDOptions,
    values: tuple,
    vocabulary: Vocabulary | None,
    *,
    need_stats: bool,
) -> tuple[Any, Any]:
    """The loss, which is made in a split vocabulary only, and the statistics."""
    tau, classes, tail = options.temperature, _classes(student, vocabulary), options.mode
    wide = wide_dtype(student, log_probs, weights)
    valid, log_p, rough = _given(student, log_probs, sizes, weights, labels, options)
    p = log_p.exp()
    mass = by_teacher(p, sizes)
    if tail == "renormalize":
        p = torch.cat([x.softmax(1) for x in log_p.split(sizes, 1)], 1)
    named = named_entries(indices, None, p, sizes, valid)
    swept = need_stats or tail == "uniform"
    rows = _sweep(chosen, student, named, sizes, weights, labels, options, values, wide, swept, vocabulary)
    unnamed = classes - by_teacher(named.own, sizes)
    share = torch.zeros_like(mass)  # of each class that the teacher does not name
    if tail == "uniform":
        share = (1 - mass).clamp(min=0) / unnamed.clamp(min=1)
        share = share.masked_fill(unnamed == 0, 0)
    log_sum, log_q = _log_q(rows.z / tau, rows.sums[:, :1], named)
    others = classes - named.heads.sum(1)  # that nobody names
    loss = None
    if vocabulary is not None:
        w = rough if rows.weights is None else rows.weights.double().masked_fill(~valid.unsqueeze(1), 0)
        target = at_heads(named, sizes, w, share).masked_fill(~named.heads, 0)
        kl = kl_rows(target, target.masked_fill(target == 0, 1).log(), log_q)
        if tail == "uniform":
            u = weighted(w, share).sum(1)
            outside = rows.sums[:, 4] / tau - others * log_sum.squeeze(1)
            kl = kl + (u * (others * u.masked_fill(u == 0, 1).log() - outside)).masked_fill(u == 0, 0)
        if options.t2_scale:
            kl = kl * tau**2
        ce = _cross_entropy(rows, named, valid, options) if labels is not None else None
        loss = _reduced(ce, kl, rows, valid, classes, options).to(wide)
    if not need_stats:
        return loss, None
    with torch.no_grad():
        below = rows.stats[:, 1] / tau - others * log_sum.squeeze(1)  # the sum of their log q
        kls = []
        for t, (of_p, of_q) in enumerate(zip(named.p.split(sizes, 1), log_q.split(sizes, 1))):
            kl = kl_rows(of_p, of_p.masked_fill(of_p == 0, 1).log(), of_q)
            if tail == "uniform":
                u = share[:, t]
                outside = log_q.masked_fill(~named.heads | named.named[t], 0).sum(1) + below
                kl = kl + (u * (unnamed[:, t] * u.masked_fill(u == 0, 1).log() - outside)).masked_fill(u == 0, 0)
            kls.append(kl)
        target = at_heads(named, sizes, rough, share)
        outside = weighted(rough, share).sum(1, keepdim=True)
        entropy = _entropy(target.masked_fill(~named.heads, 0)) + others * _entropy(outside)
        stats = _stats(
            student, vocabulary, rows, named, log_sum, log_q, target, outside, entropy, torch.stack(kls, 1), mass, rough,
            valid,
        )  # fmt: skip
    return loss, _typed(stats, wide)


def _classes(student: Tensor, vocabulary: Vocabulary | None) -> int:
    return student.shape[1] if vocabulary is None else vocabulary.classes


def _kernels_take(sizes: list[int]) -> bool:
    """Whether the GPUs' kernels of what is named take so many teachers and entries."""
    return len(sizes) <= backend.MOST_TEACHERS and sum(sizes) <= backend.MOST_ENTRIES


def _chosen(
    student: Tensor, log_probs: Tensor, weights: Tensor | None, values: tuple, *, kernel_checks: bool = False
) -> str:
    """The backend. ``kernel_checks``: the C++ kernel gets what the caller gave, and checks values itself."""
    chosen = backend.choose("topk_bucket", student, weights, log_probs)
    if chosen != "cpp" or not kernel_checks:
        _kd.check_values(*values)
    return chosen


def _reduced(
    ce: Tensor | None, distance: Tensor, rows: _Rows, valid: Tensor, classes: int, options: KDOptions
) -> Tensor:
    loss = reference.reduced(ce, distance, valid, classes, options)[0]
    return connected(loss, rows.weights) if ce is not None and options.alpha == 0 else loss


def _given(
    student: Tensor,
    log_probs: Tensor,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    options: KDOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count; and, in float64, detached, and without NaN where it counts nothing, log-probabilities and weights."""
    rows, teachers = len(student), len(sizes)
    valid = student.new_ones(rows, dtype=torch.bool) if labels is None else labels != options.ignore_index
    hide = ~valid.unsqueeze(1)
    w = valid.new_full((1, teachers), 1 / teachers, dtype=torch.float64) if weights is None else weights.detach()
    w = w.double().expand(rows, -1).masked_fill(hide, 0)
    log_p = log_probs.detach().double()
    dead = (w == 0) & ~(by_teacher(log_p.exp(), sizes) < torch.inf)
    of_entries = torch.cat([x.expand(-1, k) for x, k in zip(dead.split(1, 1), sizes)], 1)
    return valid, log_p.masked_fill(of_entries, _EMPTY), w


# --- the student


def _log_q(x: Tensor, outside: Tensor, named: Named) -> tuple[Tensor, Tensor]:
    """The student's log-sum [N, 1], and log q of the entries, -inf of those that count nothing."""
    log_sum = torch.cat([outside, x.masked_fill(~named.heads, _EMPTY)], 1).logsumexp(1, keepdim=True)
    return log_sum, (x - log_sum).masked_fill(~named.own, _EMPTY)


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
    return -kl_rows(p, p.masked_fill(p == 0, 1).log(), torch.zeros_like(p))


def _stats(
    student: Tensor,
    vocabulary: Vocabulary | None,
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
    classes, entries = _classes(student, vocabulary), named.heads.shape[1]
    if vocabulary is None:
        of_student = student.detach().argmax(1)
    else:
        top = student.detach().max(1)
        told = vocabulary.gathered(torch.stack([top.values.double(), top.indices.double()], 1))
        of_student = vocabulary.first_largest(told)
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
        -kl_rows(log_q.exp(), log_q, torch.zeros_like(log_q)) - of_others,
        target_entropy,
        kls,
        weighted(w, masses).sum(1) / total.masked_fill(total == 0, 1),
        (of_student == largest).double(),
    )
    return of_counted_rows(stats, valid)


def _typed(stats: KDStats, dtype: torch.dtype) -> KDStats:
    return KDStats(*(x.to(dtype) for x in stats))


# --- the kernels


def _sweep(
    chosen: str,
    student: Tensor,
    named: Named,
    sizes: list[int],
    weights: Tensor | None,
    labels: Tensor | None,
    options: KDOptions,
    values: tuple,
    wide: torch.dtype,
    need_stats: bool,
    vocabulary: Vocabulary | None,
) -> _Rows:
    needs = needs_grad(student), needs_grad(weights)
    if weights is not None:
        weights = weights.expand(student.shape[0], -1)
    settings = *sweep_settings(options, labels is not None), wide == torch.float64
    out = _kd.run(
        values, TopkBucket, any(needs),
        chosen, student, weights, labels, named.classes, named.classes.masked_fill(~named.heads, NOBODY), named.home,
        sizes, settings, needs, need_stats, vocabulary,
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
        sums = [top / settings[0] + logs, top + logs_1, of_label, total / _classes(student, vocabulary)]
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


_SETTINGS = "float temperature, int ignore_index, bool need_second, bool need_total, bool in_float64"


# Of every row, over the classes that are not among its indices: maximum m, log sum exp((z - m) / temperature), with
# need_second the same at temperature 1; the label's logit; with need_total the sum of all logits; and, with need_statistics,
# sum r log r of r = softmax(z / temperature), and the sum of z; of all classes the first with the largest logit. What is not asked
# for is 0, and so is an ignored row.
# -> [N, 8], logits at the indices [N, K]: float64
@define(
    "topk_bucket_fwd",
    f"(Tensor student, Tensor indices, Tensor? weights, Tensor? labels, {_SETTINGS}, bool need_statistics) -> (Tensor, Tensor)",
)
def _(student, indices, weights, labels, *settings):
    n, entries = indices.shape
    return student.new_empty(n, 8, dtype=torch.float64), student.new_empty(n, entries, dtype=torch.float64)


# From the gradients to these sums (not m and the logarithm, but that of the sum; the mean, not the sum) and to the logits at
# the indices, each class once, which have their part in no sum over classes but the mean
@define(
    "topk_bucket_bwd",
    f"(Tensor grad_sums, Tensor grad_z, Tensor student, Tensor indices, Tensor? labels, Tensor found, {_SETTINGS}) -> Tensor",
)
def _(grad_sums, grad_z, student, indices, labels, found, *settings):
    return student.new_empty(student.shape)


# Of every row and bound [N, T] the last class of the first `equal` [N, T] that have it as logit; C - 1 if there are fewer
@define("topk_bucket_last", "(Tensor student, Tensor bounds, Tensor equal) -> Tensor")
def _(student, bounds, equal):
    return torch.empty_like(equal)
