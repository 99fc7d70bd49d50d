"""Rows of a split vocabulary in plain PyTorch: every divergence, mode and option, by the reference's own functions and their
derivatives."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast import reference
from amtml_fast.ops._vocabulary import Vocabulary, largest_here
from amtml_fast.terms import Divergence, counted_rows


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
    backend: str  # whose kernels make the rows, "reference": none

    @property
    def known_totals(self) -> bool:
        """Whether G (of ``_vocabulary_rows``) is minus the sum of p: taken as that, the gradient at p = q is exactly 0."""
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


class PlainBlock:
    """Some rows, as far as this process has their classes."""

    def __init__(self, given: Given):
        _, rule, student, teachers, weights, labels, temperatures = given
        self.given, self.rule = given, rule
        rows, count, wide = student.shape[0], len(teachers), rule.wide
        self.hide = hide = ~counted_rows(student, rows, labels, rule.ignore_index).unsqueeze(1)
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
        first = 1 + rule.labeled
        self.teachers = slice(first, first + count)  # of the softmaxes

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
        found[self.teachers] = reference.with_weight(found[self.teachers], self.w)
        return found

    def targets(self, logs: list[Tensor], w: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the student is compared with: weight, probabilities and their logarithms."""
        ones, log_p = w.new_ones(len(w)), logs[self.teachers]
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
            a, p = made[-1], logs[-1].detach().exp()
            tops = normal[:, self.teachers, 0].to(rule.wide)
            tops = tops.masked_fill(~tops.isfinite(), 0)
            given = [x.masked_fill(x == -torch.inf, 0) for x in self.scaled]
            given = [x.masked_fill((self.w[:, t, None] == 0) & ~x.isfinite(), 0) for t, x in enumerate(given)]
            beside = [x - tops[:, t, None] for t, x in enumerate(given)]
            out["a_logits"] = torch.stack([reference.weighted(a, x).sum(1, dtype=torch.float64) for x in beside], 1)
            out["p_logits"] = torch.stack([reference.weighted(p, x).sum(1, dtype=torch.float64) for x in beside], 1)
            out["of_target"] = a.sum(1, keepdim=True, dtype=torch.float64)
        if rule.labeled:
            out["ce"] = ce_shares(self.given, logs[1])
        if rule.need_stats:
            self.add_stats(out, [x.detach() for x in logs])
        return out

    def add_stats(self, out: dict[str, Tensor], logs: list[Tensor]) -> None:
        log_q, log_p = logs[0], logs[self.teachers]
        q = log_q.exp()
        if self.rule.mode == "logits":
            p, log = logs[-1].exp(), logs[-1]
        else:
            p, log = reference.mixed_probs(log_p, self.w)
        out["entropies"] = torch.stack([reference.entropy_rows(q, log_q), reference.entropy_rows(p, log)], 1)
        out["kls"] = torch.stack([reference.kl_rows(x.exp(), x, log_q) for x in log_p], 1)
        for name, x in (("q_top", q), ("p_top", p)):
            out[name] = largest_here(x)

    def gradient(self, normal: Tensor, totals: Tensor, of_each: Tensor, of_ce: Tensor) -> Tensor:
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
            out.masked_fill_(reference.lost_classes(targets, self.z), 0)
        if rule.labeled:
            add_ce_gradient(self.given, logs[1], of_ce, out)
        return out.masked_fill_(self.hide | (self.z == -torch.inf), 0)


# --- the cross-entropy of labels, from log softmax(z) [rows, C / P]


def ce_shares(given: Given, log: Tensor) -> Tensor:
    """[rows, 2]: of the label, 0 where another process has its class, and of all classes together."""
    mine, place, absent = _label(given)
    of_label = log.gather(1, place.unsqueeze(1)).squeeze(1).masked_fill(~mine, 0)
    return torch.stack([of_label.masked_fill(absent, math.nan), log.sum(1)], 1)


def add_ce_gradient(given: Given, log: Tensor, of_ce: Tensor, out: Tensor) -> None:
    """Its gradient to the logits, from that to the cross-entropies [rows]."""
    mine, place, absent = _label(given)
    by, smoothing = of_ce.masked_fill(absent, math.nan).unsqueeze(1), given.rule.label_smoothing
    out.add_((log.exp() - smoothing / given.vocabulary.classes) * by)
    out.scatter_add_(1, place.unsqueeze(1), ((smoothing - 1) * by).masked_fill(~mine.unsqueeze(1), 0))


def _label(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the label's class is here, where, and whether it is none at all."""
    assert given.labels is not None
    mine, place = given.vocabulary.here(given.labels)
    return mine, place, given.vocabulary.absent(given.labels) & (given.labels != given.rule.ignore_index)
