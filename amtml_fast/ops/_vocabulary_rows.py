"""``multi_teacher_kd_loss`` of logits whose classes are split among processes.

D(p, q) and the cross-entropy are sums over classes, once all softmaxes are known. So every process makes of its own classes:

1. of each softmax the maximum and the sum of exponentials, which are gathered;
2. its shares of D, of the cross-entropy, of G = sum_c dD/dlog q_c, of the gradient to the weights and of the statistics, which
   are gathered;
3. in backward the gradient to its logits, (dD/dlog q_k - q_k G) / tau, with nothing more to ask for.

The shares are made by kernels where there are any (``_vocabulary_kernels``), else by plain PyTorch in blocks of rows
(``_vocabulary_plain``).
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast import backend, reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import first_order, needs_grad, run, save, saved
from amtml_fast.ops._vocabulary import NO_SECOND, Vocabulary, check_alike
from amtml_fast.ops._vocabulary_kernels import KernelBlock, rates_of
from amtml_fast.ops._vocabulary_plain import Given, PlainBlock, Rule
from amtml_fast.ops.divergence import check_values
from amtml_fast.terms import Divergence, KDOptions, connected, counted_rows, of_counted_rows, wide_dtype

# Of a block of plain PyTorch: on a CPU it is fastest where its logits, those of all teachers and a few more stay in the cache.
_CPU_BYTES, _GPU_BYTES = 2**23, 2**28


class Rows(NamedTuple):
    """What is known of rows after both exchanges."""

    each: Tensor  # [N, 1], D; with mode "sum" [N, T], of each teacher
    ce: Tensor  # [N]
    stats: Tensor  # [N, 4 + T]
    normal: Tensor  # [N, S, 2]: of each softmax the maximum and the logarithm of the sum beside it; float64
    totals: Tensor  # of each column of ``each``, G
    of_weights: Tensor  # [N, T]: dD / dw, but for mode "sum"


def rule_of(
    options: KDOptions,
    divergence: Divergence,
    labels: Tensor | None,
    wide: torch.dtype,
    needs: tuple[bool, bool],
    need_stats: bool,
    teachers: int,
    student: Tensor,
    *others: Tensor | None,
) -> Rule:
    """``teachers``: of a row; ``others``: all other tensors with numbers, but for alpha."""
    labeled = labels is not None and (divergence.alpha is not None or options.alpha != 1)
    chosen = backend.choose("divergence", student, *others, divergence.alpha, teachers=teachers)
    return Rule(
        divergence._replace(alpha=None, temperature=None), options.mode, float(options.temperature), options.ignore_index,
        float(options.label_smoothing), labeled, *needs, need_stats, wide, chosen,
    )  # fmt: skip


def split_loss(
    function: str,
    vocabulary: Vocabulary,
    student: Tensor,  # [N, C / P]
    teachers: Sequence[Tensor],  # T x [N, C / P]
    weights: Tensor | None,  # [N, T], [1, T]
    labels: Tensor | None,  # [N]
    options: KDOptions,
    divergence: Divergence,
    *,
    need_stats: bool,
) -> tuple[Tensor, Any]:
    """The loss of checked rows, and with ``need_stats`` their statistics."""
    check_values(function, labels, options.ignore_index, divergence, vocabulary.classes, weights)
    wide = wide_dtype(student, *teachers, weights)
    if weights is not None:
        weights = weights.to(wide).expand(student.shape[0], -1)
    divergence = divergence.in_dtype(wide)
    temperatures = divergence.temperature
    needs = needs_grad(student), needs_grad(weights)
    rule = rule_of(options, divergence, labels, wide, needs, need_stats, len(teachers), student, weights, *teachers)
    settings = options, rule, len(teachers), [None if x is None else x.dtype for x in (student, *teachers, weights)]
    floats = weights, divergence.alpha, temperatures
    doubt = check_alike(function, vocabulary, student, settings, integers=[labels], floats=floats)
    each, ce, stats = run(SplitKD, any(needs), vocabulary, rule, student, weights, labels, temperatures, *teachers)
    return finished(vocabulary, each, ce, stats, weights, labels, options, divergence, need_stats, doubt)


def finished(
    vocabulary: Vocabulary,
    each: Tensor,
    ce: Tensor,
    stats: Tensor,
    weights: Tensor | None,
    labels: Tensor | None,
    options: KDOptions,
    divergence: Divergence,
    need_stats: bool,
    doubt: Tensor | None,
) -> tuple[Tensor, Any]:
    """The loss of what ``Rows`` holds, on all processes the same."""
    rows, columns = each.shape
    valid = counted_rows(each, rows, labels, options.ignore_index)
    distance = each[:, 0]
    if options.mode == "sum" and (columns > 1 or weights is not None):
        w = each.new_full((1, columns), 1 / columns) if weights is None else weights
        w = w.expand(rows, -1).masked_fill(~valid.unsqueeze(1), 0)
        if divergence.alpha is not None:  # an infinite D counts nothing where alpha is 0
            without = (divergence.alpha == 0).unsqueeze(1) & ~each.isfinite()
            w = torch.where(without, w.detach(), w)
        distance = reference.weighted(w, each).sum(1)
    if options.t2_scale:
        tau: Any = options.temperature
        if divergence.temperature is not None:
            tau = divergence.temperature.to(each.dtype).masked_fill(~valid, 1)
        distance = distance * (tau * tau)
    if labels is not None and ce.numel() == 0:
        ce = torch.zeros_like(distance)
    loss = reference.reduced(
        ce if labels is not None else None, distance, valid, vocabulary.classes, options, divergence.alpha
    )[0]
    if rows == 0 or (labels is not None and options.alpha == 0):
        loss = connected(loss, each, ce, weights)
    if doubt is not None:
        loss = loss + doubt.to(loss.dtype)
    if not need_stats:
        return loss, None
    return loss, of_counted_rows(_kd.named_stats(stats), valid)


class SplitKD(torch.autograd.Function):
    """``each``, ``ce`` and ``stats`` of ``Rows``; the last is not differentiable."""

    @staticmethod
    def forward(
        ctx: Any,
        vocabulary: Vocabulary,
        rule: Rule,
        student: Tensor,
        weights: Tensor | None,
        labels: Tensor | None,
        temperatures: Tensor | None,
        *teachers: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows_of(Given(vocabulary, rule, student, teachers, weights, labels, temperatures))
        ctx.vocabulary, ctx.rule = vocabulary, rule
        ctx.mark_non_differentiable(rows.stats)
        save(ctx, student, weights, labels, temperatures, rows.normal, rows.totals, rows.of_weights, *teachers)
        return rows.each, rows.ce, rows.stats

    @staticmethod
    @first_order("multi_teacher_kd_loss", NO_SECOND)
    def backward(ctx: Any, of_each: Tensor, of_ce: Tensor, *_: Tensor | None) -> tuple:
        kept = saved(ctx)  # once: a checkpoint gives each tensor but once
        student, weights, labels, temperatures, normal, totals, of_weights, *teachers = kept
        grad = grad_weights = None
        if ctx.rule.need_student:
            given = Given(ctx.vocabulary, ctx.rule, student, teachers, weights, labels, temperatures)
            grad = logit_grads(given, normal, totals, of_each, of_ce)
        if ctx.rule.need_weights and ctx.rule.mode != "sum":
            grad_weights = weight_grads(of_weights, of_each)
        return None, None, grad, grad_weights, *(None,) * (2 + len(teachers))


def weight_grads(of_weights: Tensor, of_each: Tensor) -> Tensor:
    """[N, T]; a row that counts nothing has none, however large its D is."""
    return (of_weights * of_each).masked_fill(of_each == 0, 0)


# --- the three steps


def rows_of(given: Given) -> Rows:
    """Steps 1 and 2."""
    sums = [block.sums() for _, block in blocks(given)]
    normal = normal_of(given, given.vocabulary.gathered(torch.cat(sums)))
    parts = [block.shares(normal[rows]) for rows, block in blocks(given)]
    sizes = {name: x.shape[1] for name, x in parts[0].items()}
    of_all = given.vocabulary.gathered(torch.cat([torch.cat([x.double() for x in part.values()], 1) for part in parts]))
    return joined(given, normal, dict(zip(sizes, of_all.split(list(sizes.values()), 2))))


def normal_of(given: Given, sums: Tensor) -> Tensor:
    """[N, S, 2], from the sums [P, N, S, 2] of all processes."""
    largest, total = sums.unbind(-1)
    top = largest.amax(0)
    below = largest - top
    if given.rule.backend != "reference":  # plain PyTorch's are over their temperatures already
        below = below * rates_of(given)
    return torch.stack([top, (total * below.exp()).sum(0).log()], -1)


def joined(given: Given, normal: Tensor, found: dict[str, Tensor]) -> Rows:
    """``found``: the shares [P, N, ...] of all processes."""
    vocabulary, rule, student, teachers, weights, labels, _ = given
    total = {name: x.sum(0) for name, x in found.items()}
    wide, count, none = rule.wide, len(teachers), normal.new_empty(0)
    of_weights, stats, ce = none, none, none
    if "weights" in total:
        of_weights = total["weights"]
    elif "p_logits" in total:  # mode "logits": as for the student's logits
        of_weights = total["a_logits"] - total["p_logits"] * total["of_target"]
    if rule.labeled:
        of_label, of_classes = total["ce"].unbind(1)
        smoothing = rule.label_smoothing
        ce = -of_label
        if smoothing != 0:  # not 0 * infinity
            ce = -(1 - smoothing) * of_label - (smoothing / vocabulary.classes) * of_classes
        ce = ce if labels is None else ce.masked_fill(labels == rule.ignore_index, 0)
    if rule.need_stats:
        w = student.new_ones(1, count, dtype=torch.float64) if weights is None else weights.double()
        used = (w.sum(1) > 0).double().expand(len(student))
        agree = vocabulary.first_largest(found["q_top"]) == vocabulary.first_largest(found["p_top"])
        kls = total["kls"]
        stats = torch.cat([total["entropies"], used.unsqueeze(1), agree.double().unsqueeze(1), kls], 1)
    totals = total.get("totals", none)
    if rule.need_student and rule.known_totals:
        totals = torch.full_like(total["each"], -1)
        if rule.mode == "mixture" and weights is not None:
            totals = -weights.double().sum(1, keepdim=True)
    return Rows(total["each"].to(wide), ce.to(wide), stats.to(wide), normal, totals.to(wide), of_weights.to(wide))


def logit_grads(given: Given, normal: Tensor, totals: Tensor, of_each: Tensor, of_ce: Tensor) -> Tensor:
    """Step 3: to the logits, in their dtype. of_ce: anything where there is no cross-entropy."""
    if given.rule.backend != "reference":
        return KernelBlock(given).gradient(normal, totals, of_each, of_ce)
    out = torch.empty_like(given.student, memory_format=torch.contiguous_format)
    for rows, block in blocks(given):
        out[rows] = block.gradient(normal[rows], totals[rows], of_each[rows], of_ce[rows])
    return out


def blocks(given: Given) -> Iterator[tuple[slice, "PlainBlock | KernelBlock"]]:
    """Kernels take all rows. Of plain PyTorch so many that its numbers in ``wide`` stay small beside what is given."""
    if given.rule.backend != "reference":
        yield slice(None), KernelBlock(given)
        return
    vocabulary, rule, student, teachers, *small = given
    rows, size = student.shape
    most = _CPU_BYTES if student.device.type == "cpu" else _GPU_BYTES
    step = max(most // (size * rule.wide.itemsize * (len(teachers) + 4)), 1)
    for start in range(0, max(rows, 1), step):
        some = slice(start, start + step)
        of_rows = (None if x is None else x[some] for x in small)
        yield some, PlainBlock(Given(vocabulary, rule, student[some], [t[some] for t in teachers], *of_rows))
