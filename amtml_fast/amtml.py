"""AMTML-KD's whole objective (Eq 3) as one module."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from amtml_fast import checks
from amtml_fast.losses import TeacherAdapter
from amtml_fast.ops import whole_loss
from amtml_fast.ops._kd import REDUCTIONS, as_long, check_num_items
from amtml_fast.ops.angle import angle
from amtml_fast.ops.multi_teacher_kd import MODES, check_arguments, multi_teacher_kd
from amtml_fast.ops.teacher_weights import check_adapter
from amtml_fast.terms import KDOptions, connected, over_items, times

REDUCTIONS_OF_ALL = [r for r in REDUCTIONS if r != "none"]  # the terms beside kd have no value of a row


class AMTMLOutput(NamedTuple):
    """All but ``loss`` are detached; ce, kl (temperature**2 KL), angle, hint and regularizer are unweighted."""

    loss: Tensor
    kd: Tensor
    ce: Tensor
    kl: Tensor
    angle: Tensor
    hint: Tensor
    regularizer: Tensor
    weights: Tensor  # [N, T]


class AMTMLLoss(nn.Module):
    """The whole objective (Eq 3)::

        weights = adapter(features)
        kd = (1 - alpha) * CE + alpha * temperature**2 * KL(sum_t w_t p_t || q)
        loss = kd + angle_weight * L_angle(q, sum_t w_t p_t) + hint_weight * L_hint + regularizer_weight * (|v|^2 + |theta|^2)

    Give its parameters (the adapter's and the hints') to the optimizer together with the student's.

    Args:
        adapter: ``TeacherAdapter``, or any module from features to weights [N, T]; with a ``regularizer()``, unless its weight is 0.
        hints: ``MultiGroupHintLoss``, or None for no hint term.
        angle_trains_weights: let the angle loss train the adapter too. By default its teacher side is detached, as in the
            authors' code.
        reduction: ``"batchmean"``, ``"mean"`` or ``"sum"``, of the kd term.
        gather_angle: take the angle loss over the rows of all processes, by a differentiable all-gather; right under
            gradients averaged over processes, as DDP and FSDP do. Every process computes the angle loss of all R rows:
            O(R^2 (R + C)) work and O(R^2 + R C) memory; 2 R C numbers are gathered forward, R C summed backward.
            True: processes may have different numbers of rows; they tell each other, and on a GPU wait for it at every
            step. ``"even"``: the caller knows that all have the same number, and nothing is asked.
        Other arguments as in ``multi_teacher_kd_loss`` and ``angle_loss``. Ignored rows take no part in the angle loss.
    """

    def __init__(
        self,
        adapter: nn.Module,
        hints: nn.Module | None = None,
        *,
        temperature: float = 4.0,
        alpha: float = 0.7,
        mode: str = "mixture",
        angle_weight: float = 1.0,
        hint_weight: float = 1.0,
        regularizer_weight: float = 1e-3,
        delta: float = 1.0,
        angle_trains_weights: bool = False,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        gather_angle: bool | str = False,
    ):
        super().__init__()
        name = "AMTMLLoss"
        if not isinstance(adapter, nn.Module):
            raise TypeError(f"{name}: adapter must be a torch.nn.Module, got {type(adapter).__name__}")
        if hints is not None and not isinstance(hints, nn.Module):
            raise TypeError(f"{name}: hints must be a torch.nn.Module or None, got {type(hints).__name__}")
        checks.one_of(name, "mode", mode, MODES)
        checks.number(name, "temperature", temperature, *checks.POSITIVE)
        checks.number(name, "alpha", alpha, 0, 1)
        checks.number(name, "delta", delta, *checks.POSITIVE)
        checks.number(name, "label_smoothing", label_smoothing, 0, 1)
        checks.ignore_index(name, ignore_index)
        self.adapter: Any = adapter
        self.hints: Any = hints
        self.temperature, self.alpha, self.mode, self.reduction = temperature, alpha, mode, reduction
        self.angle_weight, self.hint_weight, self.regularizer_weight = angle_weight, hint_weight, regularizer_weight
        self.delta, self.angle_trains_weights, self.gather_angle = delta, angle_trains_weights, gather_angle
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self._check_settings()
        if regularizer_weight != 0:
            self._check_regularizer()

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        labels: Tensor | None,
        features: Tensor,
        student_maps: Mapping[str, Tensor] | None = None,
        teacher_maps: Sequence[Tensor] | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> AMTMLOutput:
        """Logits [N, C] (or [B, S, C]) and T teachers' like it, labels [N], features [N, d, H, W] or [N, d].

        ``num_items_in_batch`` divides the kd term alone; the others count in full in every call. docs/training.md shows what to
        give and what to divide under gradient accumulation and on several processes.

        Raises:
            ValueError, TypeError, RuntimeError: an argument that does not fit; nothing is computed then.
        """
        name = "AMTMLLoss"
        given = student_maps is not None, teacher_maps is not None
        if given != ((True, True) if self.hints is not None else (False, False)):
            raise ValueError(
                f"{name}: student_maps and teacher_maps must be given exactly when hints are, "
                f"got hints={'none' if self.hints is None else 'given'}, student_maps={'given' if given[0] else None}, "
                f"teacher_maps={'given' if given[1] else None}"
            )
        self._check_settings()  # they may have been set since
        gather = (
            bool(self.gather_angle)
            and self.angle_weight != 0
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        )
        rows, classes, teachers = check_arguments(name, student_logits, teacher_logits, None, labels, self.ignore_index)
        labels = as_long(labels)
        if num_items_in_batch is not None:
            check_num_items(name, num_items_in_batch, self.reduction, labels, self.ignore_index)
        student = student_logits
        if student.dim() != 2:
            student, teachers = student.reshape(rows, classes), [t.reshape(rows, classes) for t in teachers]
            labels = None if labels is None else labels.reshape(rows)
        chosen, sources = None, (None, None, None, None)
        if not gather:
            sources = self._sources(features, student, labels, len(teachers))
            chosen = whole_loss.fused_by(student, teachers, *sources)
        if chosen is not None:
            out = self._fused(chosen, student, teachers, labels, sources, num_items_in_batch)
        else:
            weights = self._weights(features, student, labels, len(teachers)) if sources[3] is None else sources[3]
            out = self._composed(student, teachers, labels, weights, num_items_in_batch, gather)
        if self.hints is None:
            return out
        hint = _scalar("the hints' loss", self.hints(student_maps, teacher_maps))
        loss, kd, ce, kl, angle, _, regularizer, weights = out  # no _replace: torch.compile 2.11 cannot trace it
        if self.hint_weight != 0:
            loss = loss + times(hint, self.hint_weight)
        else:  # not 0 * infinity
            loss = connected(loss, *self.hints.parameters())
        return AMTMLOutput(loss, kd, ce, kl, angle, hint.detach(), regularizer, weights)

    def _check_settings(self) -> None:
        """Checks the settings that no operator checks."""
        name = "AMTMLLoss"
        checks.one_of(name, "reduction", self.reduction, REDUCTIONS_OF_ALL)
        checks.number(name, "angle_weight", self.angle_weight, *checks.NOT_NEGATIVE)
        checks.number(name, "hint_weight", self.hint_weight, *checks.NOT_NEGATIVE)
        checks.number(name, "regularizer_weight", self.regularizer_weight, *checks.NOT_NEGATIVE)
        if self.gather_angle not in (False, True, "even"):
            raise ValueError(f"{name}: gather_angle must be False, True or 'even', got {self.gather_angle!r}")

    def _sources(self, features: Any, student: Tensor, labels: Tensor | None, teachers: int) -> tuple[Any, ...]:
        """What ``whole_loss`` makes the weights of: features, theta and v, or the weights of an adapter that has to be called."""
        adapter = self.adapter
        if not _is_plain(adapter):
            return None, None, None, self._weights(features, student, labels, teachers)
        check_adapter(features, adapter.theta, adapter.v, adapter.pool)
        _check_weights((features.shape[0], adapter.theta.shape[0]), student.shape[0], teachers)
        return features, adapter.theta, adapter.v, None

    def _fused(
        self,
        chosen: str,
        student: Tensor,
        teachers: list[Tensor],
        labels: Tensor | None,
        sources: tuple[Any, ...],
        divisor: int | Tensor | None,
    ) -> AMTMLOutput:
        """One node of the graph over the kernels."""
        plain = sources[3] is None
        loss, terms, weights = whole_loss.whole_loss(
            chosen,
            student,
            teachers,
            labels,
            sources,
            divisor,
            self._kd_options(divisor),
            max_pool=plain and self.adapter.pool == "max",
            regularizer_weight=self.regularizer_weight if plain else 0.0,
            angle_weight=self.angle_weight,
            delta=self.delta,
            angle_trains_weights=self.angle_trains_weights,
        )
        kd, ce, kl, angle, hint, regularizer = terms.unbind()
        if not plain:
            weights = sources[3].detach()
            if self.regularizer_weight != 0:
                term = self._regularizer()
                loss, regularizer = loss + times(term, self.regularizer_weight), term.detach()
        return AMTMLOutput(loss, kd, ce, kl, angle, hint, regularizer, weights)

    def _composed(
        self,
        student: Tensor,
        teachers: list[Tensor],
        labels: Tensor | None,
        weights: Tensor,
        divisor: int | Tensor | None,
        gather: bool,
    ) -> AMTMLOutput:
        """From the single operators: what the reference backend does, and what a gathered angle loss needs."""
        terms = multi_teacher_kd(student, teachers, weights, labels, self._kd_options(divisor))
        kd, ce, kl = terms.loss, terms.ce, terms.kl
        if divisor is not None:
            kd, ce, kl = (over_items(term, divisor) for term in (kd, ce, kl))
        loss = kd
        angle, hint, regularizer = kd.detach().new_zeros(3).unbind()
        if self.angle_weight != 0:
            row_mask = None if labels is None else labels != self.ignore_index
            angle = self._angle(terms.student_probs, terms.soft_targets, row_mask, gather)
            loss = loss + times(angle, self.angle_weight)
        if self.regularizer_weight != 0:
            regularizer = self._regularizer()
            loss = loss + times(regularizer, self.regularizer_weight)
        return AMTMLOutput(loss, *(t.detach() for t in (kd, ce, kl, angle, hint, regularizer, weights)))

    def _weights(self, features: Any, student: Tensor, labels: Tensor | None, teachers: int) -> Tensor:
        """[rows, T] from an adapter that is called; it may give [B, S, T]."""
        if labels is not None:
            features = _without_nan(features, labels == self.ignore_index)
        weights = checks.tensor("AMTMLLoss", "the adapter's weights", self.adapter(features))
        weights = weights.flatten(0, 1) if weights.dim() == 3 else weights
        _check_weights(tuple(weights.shape), student.shape[0], teachers)
        checks.same_device("AMTMLLoss", "the adapter's weights", weights, "student_logits", student)
        _check_not_negative(weights, labels, self.ignore_index)
        return weights

    def _check_regularizer(self) -> None:
        if not callable(getattr(self.adapter, "regularizer", None)):
            raise TypeError(
                "AMTMLLoss: adapter must have a regularizer() where regularizer_weight is not 0, "
                f"got {type(self.adapter).__name__} and {self.regularizer_weight}"
            )

    def _regularizer(self) -> Tensor:
        """The term of an adapter that is called. This is outside of its forward: under FSDP it adds up shards."""
        self._check_regularizer()  # another adapter may have been set since
        term = _scalar("the adapter's regularizer()", self.adapter.regularizer())
        return term.full_tensor() if hasattr(term, "full_tensor") else term

    def _kd_options(self, divisor: int | Tensor | None) -> KDOptions:
        reduction = self.reduction if divisor is None else "sum"
        return KDOptions(
            self.temperature, self.alpha, self.mode, reduction, True, self.ignore_index, self.label_smoothing
        )

    def _angle(self, student_probs: Tensor, soft_targets: Tensor, row_mask: Tensor | None, gather: bool) -> Tensor:
        if not self.angle_trains_weights:
            soft_targets = soft_targets.detach()
        if gather:
            even = self.gather_angle == "even"
            counts = [len(student_probs)] * dist.get_world_size() if even else _rows_everywhere(student_probs, row_mask)
            student_probs, soft_targets = (GatherRows.apply(x, counts) for x in (student_probs, soft_targets))
            if row_mask is not None:
                # As numbers: compiled code gathers bool as int64 (findings/compiled_gather_of_bool.sh).
                row_mask = GatherRows.apply(row_mask.to(torch.uint8), counts) != 0
        return angle(student_probs, soft_targets, row_mask, delta=self.delta)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, mode={self.mode!r}, angle_weight={self.angle_weight}, "
            f"hint_weight={self.hint_weight}, regularizer_weight={self.regularizer_weight}, reduction={self.reduction!r}"
        )


def _without_nan(features: Any, ignored: Tensor) -> Any:
    """Features [N, ...] or [B, S, ...], finite in the rows that count nothing: 0 * NaN is NaN in an adapter's gradients."""
    if not isinstance(features, Tensor):
        return features
    for leading in (1, 2):
        if features.dim() > leading and math.prod(features.shape[:leading]) == ignored.shape[0]:
            hide = ignored.reshape(*features.shape[:leading], *(1,) * (features.dim() - leading))
            return features.masked_fill(hide & ~features.isfinite(), 0)
    return features


def _scalar(name: str, value: Any) -> Tensor:
    """A term that a module of the caller's has made."""
    checks.tensor("AMTMLLoss", name, value)
    if value.dim() != 0:
        raise ValueError(f"AMTMLLoss: {name} must be a scalar, got {checks.shape(value)}")
    return value


def _check_weights(got: tuple[int, ...], rows: int, teachers: int) -> None:
    """The shape of an adapter's weights."""
    if got != (rows, teachers):
        wanted = f"[{rows}, {teachers}] for {rows} rows and {teachers} teachers"
        raise ValueError(f"AMTMLLoss: the adapter's weights must be {wanted}, got {list(got)}")


def _check_not_negative(weights: Tensor, labels: Tensor | None, ignore_index: int) -> None:
    """The values of an adapter's weights [N, T], in rows that count. NaN is left: it shows in the loss."""
    if not checks.values_are_free(weights):
        return
    bad = weights.detach() < 0
    if labels is not None:
        bad &= (labels != ignore_index).unsqueeze(1)
    if bad.any():
        got = float(weights.detach()[bad][0])
        raise ValueError(f"AMTMLLoss: the adapter's weights must be 0 or more, such as those of a softmax, got {got}")


def _is_plain(adapter: nn.Module) -> bool:
    """A TeacherAdapter whose parameters can be read in place of calling it: neither its class nor the instance has another
    ``forward`` or ``regularizer``, and no hook waits for its call."""
    return (
        type(adapter) is TeacherAdapter
        and _is_own(adapter, adapter.forward, TeacherAdapter.forward)
        and _is_own(adapter, adapter.regularizer, TeacherAdapter.regularizer)
        and not (adapter._forward_hooks or adapter._forward_pre_hooks)
        and not (adapter._backward_hooks or adapter._backward_pre_hooks)
        and not _has_any_global_hook()
    )


def _is_own(adapter: nn.Module, method: Any, of_class: Any) -> bool:
    """Asked of the method itself: what compiled code read in ``adapter.__dict__`` it does not look at again."""
    return getattr(method, "__self__", None) is adapter and getattr(method, "__func__", None) is of_class


class GatherRows(torch.autograd.Function):
    """All processes' rows, in rank order; the gradient is summed over the processes, each of which holds the whole loss."""

    @staticmethod
    def forward(ctx, rows: Tensor, counts: list[int]) -> Tensor:  # type: ignore[override]
        mine, most, rank = rows.shape[0], max(counts), dist.get_rank()
        ctx.rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        if mine < most:  # what is sent has one size
            rows = torch.cat([rows, rows.new_zeros(most - mine, *rows.shape[1:])])
        gathered = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in counts]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat([part[:count] for part, count in zip(gathered, counts)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad[ctx.rows], None


def _rows_everywhere(rows: Tensor, row_mask: Tensor | None) -> list[int]:
    """How many rows each process has. Where their classes or labels differ all raise together; otherwise they would wait for
    each other, or gather nonsense."""
    mine = torch.tensor([*rows.shape, row_mask is not None], dtype=torch.int64, device=rows.device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    found = torch.stack(gathered).tolist()
    if any(other[1:] != found[0][1:] for other in found):
        seen = "; ".join(f"{n} x {c}, {'with' if m else 'without'} labels" for n, c, m in found)
        raise ValueError(
            f"AMTMLLoss: with gather_angle, student_logits must have the same classes, and labels be given or not, on all "
            f"processes, got {seen}"
        )
    return [n for n, _, _ in found]
