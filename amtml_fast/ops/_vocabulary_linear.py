"""``fused_linear_kd_loss`` of output layers whose classes are split among processes.

Chunks of rows as in ``_linear_chunks``, whose rows are those of ``_vocabulary_rows``. Forward keeps some numbers a row; backward
makes the logits again, and from them the gradients. That to the hidden states is a sum over the processes.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from amtml_fast.ops._base import first_order, needs_grad, run, save, saved
from amtml_fast.ops._linear_checks import of_rows
from amtml_fast.ops._linear_chunks import NAME, Call, Settings, put_rows
from amtml_fast.ops._vocabulary import NO_SECOND, Vocabulary, check_alike
from amtml_fast.ops._vocabulary_kernels import softmaxes
from amtml_fast.ops._vocabulary_plain import Given, Rule
from amtml_fast.ops._vocabulary_rows import Rows, finished, logit_grads, rows_of, rule_of, weight_grads
from amtml_fast.terms import Divergence, KDOptions


def split_linear_loss(
    vocabulary: Vocabulary,
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [C / P, H]
    bias: Tensor | None,
    weights: Tensor | None,  # [N, T]
    labels: Tensor | None,
    index: Tensor | None,
    temperatures: Tensor | None,
    teachers: Sequence[Tensor],
    kinds: list[str],
    settings: Settings,
    options: KDOptions,
    divergence: Divergence,
    wide: torch.dtype,
    *,
    need_stats: bool,
) -> tuple[Tensor, Any]:
    """The loss of checked rows, and with ``need_stats`` their statistics."""
    inputs = hidden, weight, bias, weights
    needs = tuple(needs_grad(x) for x in inputs)
    rule = rule_of(
        options, divergence, labels, wide, (any(needs[:3]), needs[3]), need_stats, 1 if index is not None else len(kinds),
        *inputs, *teachers,
    )  # fmt: skip
    settings = settings._replace(row_kernel="divergence", reduction="none")
    shared = [x for x, same in zip(teachers, of_rows(kinds, logits=False)) if same]  # all processes have them alike
    dtypes = [None if x is None else x.dtype for x in (*inputs, *teachers)]
    doubt = check_alike(
        NAME, vocabulary, hidden, (options, rule, settings, kinds, needs, dtypes),
        integers=[labels, index, *(x for x in shared if not x.is_floating_point())],
        floats=[hidden, weights, divergence.alpha, temperatures, [x for x in shared if x.is_floating_point()]],
    )  # fmt: skip
    given = *inputs, labels, index, temperatures, *teachers
    each, ce, stats = run(SplitLinearKD, any(needs), vocabulary, rule, settings, kinds, needs, *given)
    return finished(vocabulary, each, ce, stats, weights, labels, options, divergence, need_stats, doubt)


class SplitLinearKD(torch.autograd.Function):
    """``each``, ``ce`` and ``stats`` of ``Rows``. ``needs``: a gradient to the hidden states, the weight, the bias and the
    teachers' weights; ``given``: the tensors of ``SplitCall``."""

    @staticmethod
    def forward(
        ctx: Any,
        vocabulary: Vocabulary,
        rule: Rule,
        settings: Settings,
        kinds: list[str],
        needs: tuple[bool, ...],
        *given: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.fixed = vocabulary, rule, settings, kinds, needs
        rows = SplitCall(*ctx.fixed, *given).rows_found()
        ctx.mark_non_differentiable(rows.stats)
        save(ctx, *given, rows.normal, rows.totals, rows.of_weights)
        return rows.each, rows.ce, rows.stats

    @staticmethod
    @first_order(NAME, NO_SECOND)
    def backward(ctx: Any, of_each: Tensor, of_ce: Tensor, *_: Tensor | None) -> tuple:
        *given, normal, totals, of_weights = saved(ctx)
        rule, needs = ctx.fixed[1], ctx.fixed[4]
        made: list[Any] = [None] * 3
        if any(needs[:3]):
            grads = SplitCall(*ctx.fixed, *given).gradients(normal, totals, of_each, of_ce)
            made = [g.to(x.dtype) if needed else None for g, x, needed in zip(grads, given, needs)]
        needed = needs[3] and rule.mode != "sum"
        grad_weights = weight_grads(of_weights, of_each) if needed else None
        return *(None,) * 5, *made, grad_weights, *(None,) * (len(given) - 4)


class SplitCall(Call):
    """One call, forward or backward."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        rule: Rule,
        settings: Settings,
        kinds: list[str],
        needs: tuple[bool, ...],
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        labels: Tensor | None,
        index: Tensor | None,
        temperatures: Tensor | None,
        *teachers: Tensor,
    ):
        given = hidden, weight, bias, weights, None, labels, index, temperatures, teachers, kinds
        super().__init__(None, *given, *settings, *needs, False, rule.need_stats)
        self.vocabulary, self.rule, self.wide = vocabulary, rule, rule.wide

    def scatter(self, out: Tensor, index: Tensor, values: Tensor) -> Tensor:
        mine, place = self.vocabulary.here(index)
        values = values.masked_fill(~mine, -torch.inf).masked_fill(self.vocabulary.absent(index), torch.nan)
        return out.scatter_reduce_(1, place, values, "amax")

    def made(self, grads: bool) -> Iterator[tuple[Any, list[int], Tensor, Given]]:
        """Of every chunk its rows, its teachers, its hidden states and what is made of them."""
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            for rows, only in self.chunks(self.segments(), grads):
                weights, labels, temperatures = (
                    None if x is None else self.take(x, rows) for x in (self.weights, self.labels, self.temperatures)
                )
                keep, hidden, student = self.student(rows, labels)
                teachers = [self.teacher(t, rows, keep) for t in only]
                rule, taus = self.rule, self.rule.divergence.teacher_temperatures
                if taus:
                    taus = tuple(taus[t] for t in only)
                    rule = rule._replace(divergence=rule.divergence._replace(teacher_temperatures=taus))
                yield rows, only, hidden, Given(self.vocabulary, rule, student, teachers, weights, labels, temperatures)

    def rows_found(self) -> Rows:
        n, count, rule, new = self.rows, len(self.kinds), self.rule, self.hidden.new_zeros
        together = 1 if self.index is not None else count
        columns = together if rule.mode == "sum" else 1
        out = Rows(
            new(n, columns, dtype=self.wide),
            new(n if rule.labeled else 0, dtype=self.wide),
            new((n, 4 + count) if rule.need_stats else 0, dtype=self.wide),
            new(n, softmaxes(together, rule.mode, rule.labeled), 2, dtype=torch.float64),
            new((n, columns) if rule.need_student else 0, dtype=self.wide),
            new((n, count) if rule.need_weights and rule.mode != "sum" else 0, dtype=self.wide),
        )
        for rows, only, _, given in self.made(False):
            part = rows_of(given)
            for name, x in part._asdict().items():
                if name != "stats" and x.numel():
                    put_rows(getattr(out, name), rows, x)
            if rule.need_stats:
                places = [0, 1, 2, 3, *(4 + t for t in only)]
                for i, place in enumerate(places):
                    put_rows(out.stats[:, place], rows, part.stats[:, i])
        return out

    def gradients(self, normal: Tensor, totals: Tensor, of_each: Tensor, of_ce: Tensor) -> list[Tensor]:
        """To the hidden states, the weight and the bias; what nobody asks for is empty."""
        self.out = self.outputs()
        grads = [self.out.grad_hidden, self.out.grad_weight, self.out.grad_bias]
        for x in grads:
            x.zero_()
        by = None
        if self.rows and self.narrow and self.hidden.dtype == torch.float16:  # which would round small gradients to 0
            by = torch.cat([of_each.abs().reshape(-1), of_ce.abs()]).amax().clamp(min=1e-30)
            of_each, of_ce = of_each / by, of_ce / by
        first, take = True, self.take
        for rows, _, hidden, given in self.made(True):
            student = given.student
            of_labels = take(of_ce, rows) if self.rule.labeled else of_ce
            grad = logit_grads(given, take(normal, rows), take(totals, rows), take(of_each, rows), of_labels)
            if self.set.softcap:
                self.uncap(grad, student)
            made = self.add_grads(grad, hidden, None, self.set.logit_scale, first)
            first = False
            if made is not None:
                put_rows(self.out.grad_hidden, rows, made)
        if by is not None:
            for x in grads:
                x.mul_(by)
        self.vocabulary.summed_(self.out.grad_hidden)
        return grads
