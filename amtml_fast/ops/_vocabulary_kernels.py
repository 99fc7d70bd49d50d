"""Rows of a split vocabulary by the kernels of ``multi_teacher_kd``: the forward KL with modes "mixture" and "sum", at one temperature.

A kernel sees the classes of this process and makes softmaxes of these alone, p'_t = p_t / P_t and q' = q / Q, with P_t and Q the shares of
all that lies here. Its numbers are those of all classes:

    sum_c p_c log(p_c / q_c) = P (KL(sum_t w_t P_t / P p'_t || q') + log P - log Q)               p = sum_t w_t p_t, P = sum_t w_t P_t
    sum_c p_tc log(p_tc / q_c) = P_t (KL(p'_t || q') + log P_t - log Q)
    sum_c p_tc (log(p_c / q_c) + 1) = P_t (the kernel's gradient to the weight + log P - log Q)

Backward reads the normalizers of the softmaxes, and gets those of all classes.
"""

from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend
from amtml_fast.ops._base import kernels
from amtml_fast.ops._vocabulary import IGNORED
from amtml_fast.ops._vocabulary_plain import Given, Rule, add_ce_gradient, ce_shares


def backend_of(rule: Rule, temperatures: Tensor | None, first: Tensor, *others: Tensor | None) -> str:
    """Whose kernels make such rows, "reference" for none."""
    plain = rule.divergence.name != "forward_kl" or rule.mode == "logits" or rule.divergence.teacher_temperatures
    if plain or temperatures is not None or rule.need_stats:
        return "reference"
    return backend.choose("multi_teacher_kd", first, *others)


class KernelBlock:
    """Some rows, as far as this process has their classes. See ``PlainBlock``."""

    def __init__(self, given: Given):
        self.given, self.rule, self.ops = given, given.rule, kernels(given.rule.backend)
        rows, count, wide = given.student.shape[0], len(given.teachers), given.rule.wide
        self.labels, self.hide = None, torch.zeros(rows, 1, dtype=torch.bool, device=given.student.device)
        if given.labels is not None:
            self.labels, _ = given.vocabulary.labels_here(given.labels, given.rule.ignore_index)
            self.hide = (given.labels == given.rule.ignore_index).unsqueeze(1)
        weights = given.weights
        if weights is None:
            weights = torch.full((1, count), 1 / count, dtype=wide, device=given.student.device)
        self.w = weights.expand(rows, -1).masked_fill(self.hide, 0)

    def forward(self, weights: Tensor | None, need_weights: bool) -> Any:
        tau, given = self.rule.temperature, self.given
        return self.ops.multi_teacher_kd_fwd.default(
            given.student, given.teachers, weights, self.labels, tau, 0.0, 1.0, 1.0, self.rule.mode, "none", IGNORED, 0.0,
            False, need_weights, False,
        )  # fmt: skip

    def sums(self) -> Tensor:
        """[rows, S, 2]: maximum, and sum of exponentials beside it. A part of -inf alone adds 0."""
        tau, wide, given = self.rule.temperature, self.rule.wide, self.given
        stats = self.forward(None, False)[5].double()
        # Not the kernel's maxima, which leave NaN out: a part of -inf alone could not be told from one with NaN.
        tops = [x.amax(1).double().masked_fill(self.hide[:, 0], 0) for x in (given.student, *given.teachers)]
        totals = [self.kept(stats[:, 1]), *(self.kept(stats[:, 4 + 2 * t]) for t in range(len(given.teachers)))]
        out = [torch.stack([top / tau, total.masked_fill(top == -torch.inf, 0)], 1) for top, total in zip(tops, totals)]
        if self.rule.labeled:
            z, top = self.logits(), tops[0].to(wide)
            shifted = z - top.masked_fill(top == -torch.inf, 0).unsqueeze(1)
            out.insert(1, torch.stack([tops[0], shifted.exp().sum(1).double()], 1))
        return torch.stack(out, 1)

    def kept(self, sums: Tensor) -> Tensor:
        """What the kernels keep of sums of exponentials, and sums of what they keep: Triton's the sums, the others 1 / sum. (The
        CPU's are times 2^24, all of them.)"""
        return sums if self.rule.backend == "triton" else 1 / sums

    def logits(self) -> Tensor:
        return self.given.student.to(self.rule.wide).masked_fill(self.hide, 0)

    def log_softmax(self, normal: Tensor) -> Tensor:
        """Of the student, at temperature 1."""
        normal = normal[:, 1].to(self.rule.wide)
        return (self.logits() - normal[:, :1]) - normal[:, 1:]

    def shares(self, normal: Tensor, own: Tensor) -> dict[str, Tensor]:
        """Of this process's classes, each [rows, ...]; ``own``: what ``sums`` gave."""
        of_all = normal[..., 0] + normal[..., 1]
        log_mass = (own[..., 0] + own[..., 1].log() - of_all).masked_fill(own[..., 1] == 0, -torch.inf)
        log_q, log_p = log_mass[:, :1], log_mass[:, 1 + self.rule.labeled :]
        w, mass = self.w.double(), log_p.exp()
        unused = (w == 0) & mass.isnan()  # without weight a teacher counts nothing, even one that has no softmax
        mass, log_p = mass.masked_fill(unused, 0), log_p.masked_fill(unused, -torch.inf)
        broken = mass.isnan().any(1, keepdim=True)
        mixture = self.rule.mode == "mixture"
        log_total = torch.logsumexp(
            (w.log() + log_p).nan_to_num(-torch.inf), 1, keepdim=True
        )  # of one teacher exactly its own
        total = log_total.exp()
        given = (w * mass / total if mixture else mass).nan_to_num(0).to(self.rule.wide)
        made = self.forward(given, self.rule.need_weights or not mixture)
        if mixture:
            each = part_of(total, made[2].double().unsqueeze(1), log_total, log_q)
        else:
            each = part_of(mass, made[7].double(), log_p, log_q)
        out = {"each": each.masked_fill(broken, torch.nan)}
        if self.rule.need_weights and mixture:
            out["weights"] = part_of(mass, made[7].double(), log_total, log_q).masked_fill(broken, torch.nan)
        if self.rule.labeled:
            out["ce"] = ce_shares(self.given, self.log_softmax(normal))
        return {name: x.masked_fill(self.hide, 0) for name, x in out.items()}

    def gradient(self, normal: Tensor, _: Tensor, of_each: Tensor, of_ce: Tensor | None) -> Tensor:
        """To the logits, from the gradients to ``each`` and ``ce``."""
        tau, wide, given = self.rule.temperature, self.rule.wide, self.given
        weights, by = self.w, of_each[:, 0]
        if self.rule.mode == "sum":
            alone = len(given.teachers) == 1  # a student like its only teacher has the gradient 0 and not nearly
            weights, by = (torch.ones_like(of_each), by) if alone else (of_each, torch.ones_like(by))
        top, kept = normal[..., 0] * tau, self.kept(normal[..., 1].exp())
        first = 1 + self.rule.labeled
        of_student = torch.stack([top[:, 0], kept[:, 0], torch.ones_like(top[:, 0])], 1)
        of_teachers = torch.stack([top[:, first:], kept[:, first:]], 2).flatten(1)
        stats = torch.cat([of_student, of_teachers], 1).to(wide)
        grad, _ = self.ops.multi_teacher_kd_bwd.default(
            by, None, None, given.student.to(wide), given.teachers, weights, self.labels, stats,
            tau, 0.0, 1.0, 1.0, "mixture", "none", IGNORED, 0.0, True, False,
        )  # fmt: skip
        if of_ce is not None:
            add_ce_gradient(given, self.log_softmax(normal), of_ce, grad)
            grad.masked_fill_(self.hide | (given.student == -torch.inf), 0)
        return grad


def part_of(mass: Tensor, value: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """``mass (value + log P - log Q)``: 0 where the teachers have nothing here, and infinite where the student alone has nothing."""
    out = mass * (value + (log_p - log_q))
    return out.masked_fill(log_q == -torch.inf, torch.inf).masked_fill(mass == 0, 0)
