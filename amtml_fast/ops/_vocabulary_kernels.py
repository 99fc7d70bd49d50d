"""Rows of a split vocabulary by the kernels of ``divergence``, which take the softmaxes over all classes as given and see the
classes of this process."""

from typing import Any

import torch
from torch import Tensor

from amtml_fast.ops._base import define, kernels
from amtml_fast.ops._vocabulary import IGNORED
from amtml_fast.ops._vocabulary_plain import Given

_ELSEWHERE = -2  # the label of another process


def rates_of(given: Given) -> Tensor:
    """[N or 1, S]: what the kernels multiply logits by, of each softmax."""
    rule, own_temperatures = given.rule, given.rule.divergence.teacher_temperatures

    def rate(tau: float | Tensor) -> Tensor:
        if isinstance(tau, Tensor):
            return (1 / tau.double()).to(rule.wide).double()
        return torch.full((1,), 1 / tau, dtype=rule.wide, device=given.student.device).double()

    own = rate(rule.temperature if given.temperatures is None else given.temperatures)
    one = torch.ones_like(own)
    of_teachers = [rate(tau).expand_as(own) for tau in own_temperatures] or [own] * len(given.teachers)
    return torch.stack([own, *[one] * rule.labeled, *of_teachers, *[one] * (rule.mode == "logits")], 1)


def _columns(
    teachers: int, mode: str, labeled: bool, need_totals: bool, need_weights: bool, need_stats: bool
) -> dict[str, int]:
    """What the shares of a row are, in their order, and how many numbers each is."""
    each = teachers if mode == "sum" else 1
    out = {"each": each}
    if need_totals:
        out["totals"] = each
    if need_weights and mode == "mixture":
        out["weights"] = teachers
    if need_weights and mode == "logits":
        out |= {"a_logits": teachers, "p_logits": teachers, "of_target": 1}
    if labeled:
        out["ce"] = 2
    if need_stats:
        out |= {"entropies": 2, "kls": teachers, "q_top": 2, "p_top": 2}
    return out


class KernelBlock:
    """Some rows, as far as this process has their classes. See ``PlainBlock``."""

    def __init__(self, given: Given):
        vocabulary, rule, student, teachers, weights, labels, temperatures = given
        self.given, self.rule, self.ops = given, rule, kernels(rule.backend)
        self.of_teachers, self.absent = list(rule.divergence.teacher_temperatures), None
        if weights is not None:
            weights = weights.to(rule.wide)
        if labels is not None:
            mine, place = vocabulary.here(labels)
            ignored = labels == rule.ignore_index
            if rule.labeled:
                self.absent = vocabulary.absent(labels) & ~ignored
            labels = place.masked_fill(~mine, _ELSEWHERE).masked_fill(ignored, IGNORED)
        self.rows: Any = student, teachers, weights, labels, temperatures

    def sums(self) -> Tensor:
        """[rows, S, 2]: maximum of the logits as they are, and sum of exponentials beside it. A part of -inf alone adds 0."""
        rule = self.rule
        return self.ops.divergence_part_sums.default(
            *self.rows, rule.mode, self.of_teachers, rule.temperature, rule.labeled
        )

    def shares(self, normal: Tensor) -> dict[str, Tensor]:
        """Of this process's classes, each [rows, ...]."""
        rule, count = self.rule, len(self.given.teachers)
        of_totals = rule.need_student and not rule.known_totals
        found = self.ops.divergence_part_fwd.default(
            *self.rows, normal, rule.divergence.name, rule.divergence.beta, rule.mode, self.of_teachers, rule.temperature,
            rule.labeled, self.given.vocabulary.rank == 0, of_totals, rule.need_weights, rule.need_stats,
        )  # fmt: skip
        sizes = _columns(count, rule.mode, rule.labeled, of_totals, rule.need_weights, rule.need_stats)
        out = dict(zip(sizes, found.split(list(sizes.values()), 1)))
        if self.absent is not None:
            out["ce"] = out["ce"].masked_fill(self.absent.unsqueeze(1), torch.nan)
        return out

    def gradient(self, normal: Tensor, totals: Tensor, of_each: Tensor, of_ce: Tensor) -> Tensor:
        """To the logits, from the gradients to ``each`` and ``ce``."""
        rule, (student, teachers, weights, *rest) = self.rule, self.rows
        of_kl, total = of_each[:, 0], totals[:, 0]
        if rule.mode == "sum" and len(teachers) == 1:  # a student like its teacher has the gradient 0 exactly
            weights = torch.ones_like(of_each)
        elif rule.mode == "sum":
            total = (of_each * totals).masked_fill(of_each == 0, 0).sum(1)  # 0 * NaN is 0
            of_kl, weights = torch.ones_like(total), of_each
        if self.absent is not None:
            of_ce = of_ce.masked_fill(self.absent, torch.nan)
        return self.ops.divergence_part_bwd.default(
            of_kl, of_ce if rule.labeled else None, total, student, teachers, weights, *rest, normal, rule.divergence.name,
            rule.divergence.beta, rule.mode, self.of_teachers, rule.temperature, rule.label_smoothing,
            rule.label_smoothing / self.given.vocabulary.classes,
        )  # fmt: skip


# labels: places in this part, IGNORED for a row that is left out, another negative number for a label elsewhere;
# normal [N, S, 2] float64: of all classes the maximum and the logarithm of the sum of exponentials beside it, of the student,
# of the student at temperature 1 where there is a cross-entropy, of the teachers, and in mode "logits" of what is mixed
_ROWS = "Tensor student, Tensor[] teachers, Tensor? weights, Tensor? labels, Tensor? temperatures"
_DIVERGENCE = "Tensor normal, str divergence, float beta, str mode, float[] teacher_temperatures, float temperature"


def softmaxes(teachers: int, mode: str, labeled: bool) -> int:
    """How many a row has."""
    return 1 + labeled + teachers + (mode == "logits")


# [N, S, 2] float64: maximum, and sum of exponentials beside it, of these classes
@define(
    "divergence_part_sums",
    f"({_ROWS}, str mode, float[] teacher_temperatures, float temperature, bool labeled) -> Tensor",
    triton="divergence_part",
)
def _(student, teachers, weights, labels, temperatures, mode, teacher_temperatures, temperature, labeled):
    return student.new_empty(student.shape[0], softmaxes(len(teachers), mode, labeled), 2, dtype=torch.float64)


# [N, K] float64, the shares of these classes; constants: with what is added to the sums of all classes once
@define(
    "divergence_part_fwd",
    f"({_ROWS}, {_DIVERGENCE}, bool labeled, bool constants, bool need_totals, bool need_weights, bool need_statistics) "
    "-> Tensor",
    triton="divergence_part",
)
def _(student, teachers, weights, labels, temperatures, normal, divergence, beta, mode, *settings):
    labeled, _, *needs = settings[2:]
    columns = sum(_columns(len(teachers), mode, labeled, *needs).values())
    return student.new_empty(student.shape[0], columns, dtype=torch.float64)


# the student's gradient from those to each row's D and cross-entropy; totals [N]: sum_c q_c dD/dq_c over all classes; even:
# label_smoothing / classes. Mode "sum" has the gradient to each teacher's D for weights, and 1 in of_kl
@define(
    "divergence_part_bwd",
    f"(Tensor of_kl, Tensor? of_ce, Tensor totals, {_ROWS}, {_DIVERGENCE}, float label_smoothing, float even) -> Tensor",
    triton="divergence_part",
)
def _(of_kl, of_ce, totals, student, *_):
    return student.new_empty(student.shape)
