"""``multi_teacher_kd_loss`` of logits whose classes are split among processes, in plain PyTorch.

D(p, q) and the cross-entropy are sums over classes, once all softmaxes are known. So every process makes of its own classes:

1. of each softmax the maximum and the sum of exponentials, which are gathered;
2. its shares of D, of the cross-entropy, of G = sum_c dD/dlog q_c, of the gradient to the weights and of the statistics, which
   are gathered;
3. in backward the gradient to its logits, (dD/dlog q_k - q_k G) / tau, with nothing more to ask for.

All of it in blocks of rows, whose derivatives are those of the reference's own functions.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast import reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import first_order, needs_grad, run, save, saved
from amtml_fast.ops._vocabulary import NO_SECOND, Vocabulary, check_alike, check_backend
from amtml_fast.ops.divergence import check_values
from amtml_fast.reference import Divergence, KDOptions, KDStats, wide_dtype

_CPU_BYTES, _GPU_BYTES = 2**23, 2**28  # of a block's logits, of all teachers and a few more


class Rule(NamedTuple):
    """What is computed of rows."""

    divergence: Divergence
    mode: str
    temperature: float  # where it is one for all rows
    ignore_index: int
    label_smoothing: float
    labeled: bool  # whether there is a cross-entropy
    need_student: bool  # gradients
    need_weights: bool
    need_stats: bool
    wide: torch.dtype

    @property
    def known_totals(self) -> bool:
        """Whether G is minus the sum of p: then p = q has the gradient 0 and not nearly."""
        return self.divergence.name == "forward_kl"


class Given(NamedTuple):
    """Rows of which this process has a part of the classes."""

    vocabulary: Vocabulary
    rule: Rule
    student: Tensor  # [N, C / P]
    teachers: Sequence[Tensor]
    weights: Tensor | None  # [N, T]
    labels: Tensor | None  # [N]
    temperatures: Tensor | None  # [N]


class Rows(NamedTuple):
    """What is known of rows after both exchanges."""

    each: Tensor  # [N, 1], D; with mode "sum" [N, T], of each teacher
    ce: Tensor  # [N]
    stats: Tensor  # [N, 4 + T]
    normal: Tensor  # [N, S, 2]: maximum, and logarithm of the sum beside it, of each softmax; float64
    totals: Tensor  # of each column of ``each``, G
    of_weights: Tensor  # [N, T]: dD / dw, but for mode "sum"


def rule_of(
    options: KDOptions,
    divergence: Divergence,
    labels: Tensor | None,
    wide: torch.dtype,
    needs: tuple[bool, bool],
    need_stats: bool,
) -> Rule:
    labeled = labels is not None and (divergence.alpha is not None or options.alpha != 1)
    return Rule(
        divergence._replace(alpha=None, temperature=None), options.mode, options.temperature, options.ignore_index,
        options.label_smoothing, labeled, *needs, need_stats, wide,
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
    check_backend(function, student, weights, divergence.alpha, *teachers)
    check_values(function, labels, options.ignore_index, divergence, vocabulary.classes, weights)
    wide = wide_dtype(student, *teachers, weights)
    if weights is not None:
        weights = weights.to(wide).expand(student.shape[0], -1)
    temperatures = None if divergence.temperature is None else divergence.temperature.to(wide)
    needs = needs_grad(student), needs_grad(weights)
    rule = rule_of(options, divergence, labels, wide, needs, need_stats)
    settings = options, rule, len(teachers), [None if x is None else x.dtype for x in (student, *teachers, weights)]
    floats = weights, divergence.alpha, temperatures
    doubt = check_alike(function, vocabulary, student, settings, integers=[labels], floats=floats)
    each, ce, stats = run(
        SplitKD, any(needs), vocabulary, rule, student, weights, _kd.as_long(labels), temperatures, *teachers
    )
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
    valid = each.new_ones(rows, dtype=torch.bool) if labels is None else labels != options.ignore_index
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
    if doubt is not None:
        loss = loss + doubt.to(loss.dtype)
    if not need_stats:
        return loss, None
    found = KDStats(stats[:, 0], stats[:, 1], stats[:, 4:], stats[:, 2], stats[:, 3])
    return loss, reference.of_counted_rows(found, valid)


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
            grad = torch.empty_like(student, memory_format=torch.contiguous_format)
            logit_grads(given, normal, totals, of_each, of_ce, grad)
        if ctx.rule.need_weights and ctx.rule.mode != "sum":
            grad_weights = weight_grads(of_weights, of_each)
        return None, None, grad, grad_weights, *(None,) * (2 + len(teachers))


def weight_grads(of_weights: Tensor, of_each: Tensor) -> Tensor:
    """[N, T]; a row that counts nothing has none, however large its D is."""
    return (of_weights * of_each).masked_fill(of_each == 0, 0)


# --- the three steps


def rows_of(given: Given) -> Rows:
    """Steps 1 and 2."""
    vocabulary, rule, student, teachers, weights, labels, _ = given
    normal = _normal(vocabulary, torch.cat([block.sums() for _, block in _blocks(given)]))
    parts = [block.shares(normal[rows]) for rows, block in _blocks(given)]
    sizes = {name: x.shape[1] for name, x in parts[0].items()}
    of_all = vocabulary.gathered(torch.cat([torch.cat([x.double() for x in part.values()], 1) for part in parts]))
    found = dict(zip(sizes, of_all.split(list(sizes.values()), 2)))  # [P, N, ...]
    total = {name: x.sum(0) for name, x in found.items()}
    wide, count, none = rule.wide, len(teachers), of_all.new_empty(0)
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
        agree = _first_largest(found["q_top"]) == _first_largest(found["p_top"])
        kls = total["kls"]
        stats = torch.cat([total["entropies"], used.unsqueeze(1), agree.double().unsqueeze(1), kls], 1)
    totals = total.get("totals", none)
    if rule.need_student and rule.known_totals:
        totals = torch.full_like(total["each"], -1)
        if rule.mode == "mixture" and weights is not None:
            totals = -weights.double().sum(1, keepdim=True)
    return Rows(total["each"].to(wide), ce.to(wide), stats.to(wide), normal, totals.to(wide), of_weights.to(wide))


def _normal(vocabulary: Vocabulary, sums: Tensor) -> Tensor:
    """[N, S, 2], of this process, -> of all."""
    largest, total = vocabulary.gathered(sums).unbind(-1)  # [P, N, S]
    top = largest.amax(0)
    return torch.stack([top, (total * (largest - top).exp()).sum(0).log()], -1)


def _first_largest(x: Tensor) -> Tensor:
    """Of [P, N, 2] (largest of a process, and where) [N] the class: of several largest the first."""
    rank = x[:, :, 0].argmax(0, keepdim=True)
    place = x[:, :, 1].gather(0, rank)
    return (rank * 2**40 + place.long()).squeeze(0)


def logit_grads(given: Given, normal: Tensor, totals: Tensor, of_each: Tensor, of_ce: Tensor, out: Tensor) -> Tensor:
    """Step 3, written into ``out``."""
    for rows, block in _blocks(given):
        out[rows] = block.gradient(
            normal[rows], totals[rows], of_each[rows], of_ce[rows] if given.rule.labeled else None
        )
    return out


def _blocks(given: Given) -> Iterator[tuple[slice, "_Block"]]:
    vocabulary, rule, student, teachers, *small = given
    rows, size = student.shape
    budget = _CPU_BYTES if student.device.type == "cpu" else _GPU_BYTES
    step = max(budget // (size * rule.wide.itemsize * (len(teachers) + 4)), 1)
    for start in range(0, max(rows, 1), step):
        some = slice(start, start + step)
        of_rows = (None if x is None else x[some] for x in small)
        yield some, _Block(Given(vocabulary, rule, student[some], [t[some] for t in teachers], *of_rows))


class _Block:
    """Some rows, as far as this process has their classes."""

    def __init__(self, given: Given):
        vocabulary, rule, student, teachers, weights, labels, temperatures = given
        self.vocabulary, self.rule, self.labels = vocabulary, rule, labels
        rows, count, wide = student.shape[0], len(teachers), rule.wide
        valid = student.new_ones(rows, dtype=torch.bool) if labels is None else labels != rule.ignore_index
        self.hide = hide = ~valid.unsqueeze(1)
        self.z = student.to(wide).masked_fill(hide, 0)
        self.tau: Any = rule.temperature
        if temperatures is not None:
            self.tau = temperatures.unsqueeze(1)
        self.x = self.z / self.tau
        of_teachers = rule.divergence.teacher_temperatures or (self.tau,) * count
        self.scaled = [t.to(wide).masked_fill(hide, 0) / by for t, by in zip(teachers, of_teachers)]
        if weights is None:
            weights = self.z.new_full((1, count), 1 / count)
        self.w = weights.expand(rows, -1).masked_fill(hide, 0)

    def softmaxes(self) -> list[Tensor]:
        """Their logits: of the student at its temperature and, for the cross-entropy, at 1, of the teachers and of what mode
        "logits" makes of them."""
        out = [self.x, self.z] if self.rule.labeled else [self.x]
        out += self.scaled
        return [*out, reference.mixed_logits(self.scaled, self.w)] if self.rule.mode == "logits" else out

    def sums(self) -> Tensor:
        """[rows, S, 2]: maximum, and sum of exponentials beside it. A part of -inf alone adds 0."""
        out = []
        for x in self.softmaxes():
            top = x.amax(1)
            shifted = x - top.masked_fill(top == -torch.inf, 0).unsqueeze(1)
            out.append(torch.stack([top, shifted.exp().sum(1)], 1))
        return torch.stack(out, 1).double()

    def logs(self, normal: Tensor) -> list[Tensor]:
        """The logarithms of the softmaxes over all classes."""
        normal = normal.to(self.rule.wide)
        found = [(x - normal[:, i, :1]) - normal[:, i, 1:] for i, x in enumerate(self.softmaxes())]
        first = 1 + self.rule.labeled
        for t in range(len(self.scaled)):  # without weight a teacher counts nothing, even one that has no softmax
            p = found[first + t]
            found[first + t] = p.masked_fill((self.w[:, t, None] == 0) & p.isnan(), -torch.inf)
        return found

    def targets(self, logs: list[Tensor], w: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the student is compared with: weight, probabilities and their logarithms."""
        first, ones = 1 + self.rule.labeled, w.new_ones(len(w))
        log_p = logs[first : first + len(self.scaled)]
        if self.rule.mode == "mixture":
            return [(ones, *reference.mixed_probs(log_p, w))]
        if self.rule.mode == "logits":
            return [(ones, logs[-1].exp(), logs[-1])]
        return [(w[:, t], p.exp(), p) for t, p in enumerate(log_p)]

    def shares(self, normal: Tensor) -> dict[str, Tensor]:
        """Of this process's classes, each [rows, ...]."""
        rule, logs, w, out = self.rule, self.logs(normal), self.w, {}
        divergence, log_q = rule.divergence, logs[0]
        of_weights = rule.need_weights and rule.mode != "sum"
        of_totals = rule.need_student and not rule.known_totals
        with torch.set_grad_enabled(of_totals or of_weights):
            if of_totals:
                log_q = logs[0] = log_q.requires_grad_()
            if of_weights and rule.mode == "mixture":
                w = w.clone().requires_grad_()
            elif of_weights:
                logs[-1].requires_grad_()
            q = log_q.exp()
            each, totals = [], []
            inputs = [log_q] * of_totals + ([w if rule.mode == "mixture" else logs[-1]] * of_weights)
            for _, p, log in self.targets(logs, w):
                d = reference.divergence_rows(divergence, p, log, q, log_q)
                each.append(d.detach())
                made = list(torch.autograd.grad(d.sum(), inputs, retain_graph=True)) if inputs else []
                if of_totals:
                    totals.append(made[0].sum(1, dtype=torch.float64))
        out["each"] = torch.stack(each, 1)
        if of_totals:
            out["totals"] = torch.stack(totals, 1)
        if of_weights and rule.mode == "mixture":
            out["weights"] = made[-1]
        elif of_weights:  # beside the largest logit of each teacher, which changes nothing, the sums keep their digits
            a, p, first = made[-1], logs[-1].detach().exp(), 1 + rule.labeled
            tops = normal[:, first:, 0].to(rule.wide)
            tops = tops.masked_fill(~tops.isfinite(), 0)
            given = [x.masked_fill(x == -torch.inf, 0) for x in self.scaled]
            given = [x.masked_fill((self.w[:, t, None] == 0) & ~x.isfinite(), 0) for t, x in enumerate(given)]
            beside = [x - tops[:, t, None] for t, x in enumerate(given)]
            out["a_logits"] = torch.stack([reference.weighted(a, x).sum(1, dtype=torch.float64) for x in beside], 1)
            out["p_logits"] = torch.stack([reference.weighted(p, x).sum(1, dtype=torch.float64) for x in beside], 1)
            out["of_target"] = a.sum(1, keepdim=True, dtype=torch.float64)
        if rule.labeled:
            mine, place, absent = self.label()
            of_label = logs[1].gather(1, place.unsqueeze(1)).squeeze(1).masked_fill(~mine, 0)
            of_label = of_label.masked_fill(absent, math.nan)
            out["ce"] = torch.stack([of_label, logs[1].sum(1)], 1)
        if rule.need_stats:
            self.add_stats(out, [x.detach() for x in logs])
        return out

    def add_stats(self, out: dict[str, Tensor], logs: list[Tensor]) -> None:
        first, log_q = 1 + self.rule.labeled, logs[0]
        q, log_p = log_q.exp(), logs[first : first + len(self.scaled)]
        if self.rule.mode == "logits":
            p, log = logs[-1].exp(), logs[-1]
        else:
            p, log = reference.mixed_probs(log_p, self.w)
        none = torch.zeros_like(q)
        out["entropies"] = torch.stack([-reference.kl_rows(x, y, none) for x, y in ((q, log_q), (p, log))], 1)
        out["kls"] = torch.stack([reference.kl_rows(x.exp(), x, log_q) for x in log_p], 1)
        for name, x in (("q_top", q), ("p_top", p)):
            top = x.max(1)
            out[name] = torch.stack([top.values.double(), top.indices.double()], 1)

    def label(self) -> tuple[Tensor, Tensor, Tensor]:
        """Whether the label's class is here, where, and whether it is none at all. (On the CPU that was an error before.)"""
        assert self.labels is not None
        mine, place = self.vocabulary.here(self.labels)
        absent = (self.labels < 0) | (self.labels >= self.vocabulary.classes)
        return mine, place, absent & ~self.hide.squeeze(1)

    def gradient(self, normal: Tensor, totals: Tensor, of_each: Tensor, of_ce: Tensor | None) -> Tensor:
        """To the logits, from the gradients to ``each`` and ``ce``."""
        rule, logs = self.rule, self.logs(normal)
        log_q = logs[0].requires_grad_()
        q, out = log_q.detach().exp(), torch.zeros_like(log_q)
        targets = self.targets(logs, self.w)
        for t, (_, p, log) in enumerate(targets):
            with torch.enable_grad():
                d = reference.divergence_rows(rule.divergence, p, log, log_q.exp(), log_q)
            (made,) = torch.autograd.grad(d, log_q, of_each[:, t])
            out.add_(made)
        out = out.sub_(q * (of_each * totals).sum(1, keepdim=True)).div_(self.tau)
        if rule.divergence.name == "reverse_kl":  # a class that no target has makes it infinite, and gets no gradient
            out.masked_fill_(reference.lost_classes([(w, p, log) for w, p, log in targets], self.z), 0)
        if of_ce is not None:
            mine, place, absent = self.label()
            by, smoothing = of_ce.masked_fill(absent, math.nan).unsqueeze(1), rule.label_smoothing
            out.add_((logs[1].exp() - smoothing / self.vocabulary.classes) * by)
            out.scatter_add_(1, place.unsqueeze(1), ((smoothing - 1) * by).masked_fill(~mine.unsqueeze(1), 0))
        return out.masked_fill_(self.hide | (self.z == -torch.inf), 0)
