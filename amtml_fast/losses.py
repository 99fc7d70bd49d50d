"""The losses as modules, for a training loop of your own. ``AMTMLLoss`` is the whole objective, Eq 3."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from amtml_fast import checks, functional, reference
from amtml_fast.functional import angle_loss, hint_loss, multi_teacher_kd_loss, teacher_weights

MAPPINGS = ("best_high", "best_low", "random")


def parameter(start: Tensor) -> nn.Parameter:
    """float32 and drawn on the CPU, whatever torch's defaults are: they say where it is put, not what it holds."""
    return nn.Parameter(start.to(torch.get_default_device()))


class TeacherAdapter(nn.Module):
    """The latent factors that weigh the teachers (Eq 4-6).

    Args:
        channels: d, channels of the student's last convolutional map.
        num_teachers: T.
        pool: ``"max"`` or ``"avg"`` over the map.
        init_scale: standard deviation of the normal initialisation of ``theta`` [T, d] and ``v`` [d]; None: d ** -0.5,
            with which the scores start near 0 and the weights near uniform, but not at it (zero is a stationary point).
    """

    def __init__(self, channels: int, num_teachers: int, *, pool: str = "max", init_scale: float | None = None):
        super().__init__()
        for name, value in (("channels", channels), ("num_teachers", num_teachers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TeacherAdapter: {name} must be an int >= 1, got {value!r}")
        checks.one_of("TeacherAdapter", "pool", pool, ("max", "avg"))
        if init_scale is not None:
            checks.number("TeacherAdapter", "init_scale", init_scale, 0, math.inf)
        scale = channels**-0.5 if init_scale is None else init_scale
        self.pool = pool
        self.theta = parameter(torch.randn(num_teachers, channels, dtype=torch.float32, device="cpu") * scale)
        self.v = parameter(torch.randn(channels, dtype=torch.float32, device="cpu") * scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, d, H, W] or [N, d] -> weights [N, T]."""
        return teacher_weights(features, self.theta, self.v, pool=self.pool)

    def regularizer(self) -> Tensor:
        """``|v|^2 + |theta|^2``, unweighted, in float32 (float64 if a parameter is)."""
        wide = reference.wide_dtype(self.theta, self.v)
        return self.v.to(wide).square().sum() + self.theta.to(wide).square().sum()

    def extra_repr(self) -> str:
        return f"channels={self.theta.shape[1]}, num_teachers={self.theta.shape[0]}, pool={self.pool!r}"


class MultiTeacherKDLoss(nn.Module):
    """Module form of ``multi_teacher_kd_loss``: same keywords, same meaning."""

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.7,
        mode: str = "mixture",
        reduction: str = "batchmean",
        t2_scale: bool = True,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.options: dict[str, Any] = dict(
            temperature=temperature,
            alpha=alpha,
            mode=mode,
            reduction=reduction,
            t2_scale=t2_scale,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        teacher_weights: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        return multi_teacher_kd_loss(
            student_logits,
            teacher_logits,
            teacher_weights,
            labels,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class TopKKDLoss(nn.Module):
    """Module form of ``topk_kd_loss``: same keywords, same meaning."""

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.7,
        reduction: str = "batchmean",
        t2_scale: bool = True,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        tail: str = "renormalize",
    ):
        super().__init__()
        self.options: dict[str, Any] = dict(
            temperature=temperature,
            alpha=alpha,
            reduction=reduction,
            t2_scale=t2_scale,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            tail=tail,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_indices: Tensor | Sequence[Tensor],
        teacher_log_probs: Tensor | Sequence[Tensor],
        teacher_weights: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        return functional.topk_kd_loss(
            student_logits,
            teacher_indices,
            teacher_log_probs,
            teacher_weights,
            labels,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class AngleLoss(nn.Module):
    """Module form of ``angle_loss``."""

    def __init__(self, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12):
        super().__init__()
        self.delta, self.reduction, self.eps = delta, reduction, eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return angle_loss(student, teacher, delta=self.delta, reduction=self.reduction, eps=self.eps)

    def extra_repr(self) -> str:
        return f"delta={self.delta}, reduction={self.reduction!r}, eps={self.eps}"


class RKDDistanceLoss(nn.Module):
    """Module form of ``rkd_distance_loss``."""

    def __init__(self, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12):
        super().__init__()
        self.delta, self.reduction, self.eps = delta, reduction, eps

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.rkd_distance_loss(student, teacher, delta=self.delta, reduction=self.reduction, eps=self.eps)

    def extra_repr(self) -> str:
        return f"delta={self.delta}, reduction={self.reduction!r}, eps={self.eps}"


class DualSoftmax(nn.Module):
    """Module form of ``dual_softmax``."""

    def __init__(self, dim1: int = -2, dim2: int = -1, mode: str = "sequential"):
        super().__init__()
        self.dim1, self.dim2, self.mode = dim1, dim2, mode

    def forward(self, scores: Tensor) -> Tensor:
        return functional.dual_softmax(scores, self.dim1, self.dim2, mode=self.mode)

    def extra_repr(self) -> str:
        return f"dim1={self.dim1}, dim2={self.dim2}, mode={self.mode!r}"


class MultiGroupHintLoss(nn.Module):
    """Each teacher's last feature map guides one group of student layers (Eq 11)::

        loss = sum_t mean( (u_t - F_t(v_f(t)))**2 )

    Holds the 1x1 convolutions ``F_t``, which are trained with the student.

    Args:
        student_channels: group name -> channels of the group's map, from the lowest group to the highest.
        teacher_channels: channels of each teacher's map, T of them.
        mapping: f. ``"best_high"`` sorts the teachers by ``teacher_scores`` and gives the weakest the lowest group and
            the best the highest; ``"best_low"`` the other way round; ``"random"`` draws from torch's generator; or a
            dict teacher index -> group name, which alone may share groups or leave teachers out.
        teacher_scores: validation accuracy of each teacher.
        normalize: divide each map by its L2 norm over channels first.
    """

    def __init__(
        self,
        student_channels: Mapping[str, int],
        teacher_channels: Sequence[int],
        *,
        mapping: str | Mapping[int, str] = "best_high",
        teacher_scores: Sequence[float] | None = None,
        normalize: bool = False,
    ):
        super().__init__()
        self.mapping = _hint_mapping(list(student_channels), len(teacher_channels), mapping, teacher_scores)
        self.normalize = normalize
        self.transforms = nn.ParameterDict()  # teacher index -> [c_t, c_s]
        for teacher, group in self.mapping.items():
            weight = torch.empty(teacher_channels[teacher], student_channels[group], dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Conv2d starts
            self.transforms[str(teacher)] = parameter(weight)
        self.num_teachers = len(teacher_channels)

    def forward(self, student_maps: Mapping[str, Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
        """Group name -> [N, c, h, w] and T teacher maps [N, c_t, H, W] -> scalar."""
        if len(teacher_maps) != self.num_teachers:
            raise ValueError(
                f"MultiGroupHintLoss: teacher_maps must hold {self.num_teachers} maps, got {len(teacher_maps)}"
            )
        missing = [group for group in self.mapping.values() if group not in student_maps]
        if missing:
            raise ValueError(f"MultiGroupHintLoss: student_maps must hold {missing[0]!r}, got {list(student_maps)}")
        losses = [
            hint_loss(student_maps[group], teacher_maps[t], self.transforms[str(t)], normalize=self.normalize)
            for t, group in self.mapping.items()
        ]
        return sum(losses[1:], start=losses[0])

    def extra_repr(self) -> str:
        return f"mapping={self.mapping}, normalize={self.normalize}"


def _hint_mapping(
    groups: list[str], num_teachers: int, mapping: str | Mapping[int, str], scores: Sequence[float] | None
) -> dict[int, str]:
    """Teacher index -> group name."""
    name = "MultiGroupHintLoss"
    if not groups or num_teachers < 1:
        raise ValueError(f"{name}: needs at least one group and one teacher, got {len(groups)} and {num_teachers}")
    if not isinstance(mapping, (str, Mapping)):
        raise TypeError(f"{name}: mapping must be a name or a dict teacher -> group, got {mapping!r}")
    if not isinstance(mapping, str):
        for teacher, group in mapping.items():
            if (
                isinstance(teacher, bool)
                or not isinstance(teacher, int)
                or teacher not in range(num_teachers)
                or group not in groups
            ):
                raise ValueError(
                    f"{name}: mapping must take a teacher in [0, {num_teachers}) to one of {groups}, "
                    f"got {teacher!r}: {group!r}"
                )
        if not mapping:
            raise ValueError(f"{name}: mapping must name at least one teacher, got an empty dict")
        return dict(sorted(mapping.items()))
    checks.one_of(name, "mapping", mapping, MAPPINGS)
    if len(groups) < num_teachers:
        raise ValueError(
            f"{name}: student_channels must have at least {num_teachers} groups for {num_teachers} teachers, got {groups}; "
            "an explicit mapping may share groups"
        )
    if mapping == "random":
        order = torch.randperm(num_teachers, dtype=torch.int64, device="cpu").tolist()
    else:
        if scores is None:
            raise ValueError(f'{name}: mapping "{mapping}" needs teacher_scores (validation accuracies), got None')
        if len(scores) != num_teachers:
            raise ValueError(f"{name}: teacher_scores must have {num_teachers} values, got {len(scores)}")
        order = sorted(range(num_teachers), key=lambda t: scores[t], reverse=mapping == "best_low")
    step = (len(groups) - 1) / max(num_teachers - 1, 1)  # spread over the groups, ends included
    places = (
        [round(k * step) for k in range(num_teachers)] if num_teachers > 1 else [-1 if mapping != "best_low" else 0]
    )
    return dict(sorted((teacher, groups[place]) for teacher, place in zip(order, places)))


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

    Give its parameters (the adapter's and the hints') to the optimiser together with the student's.

    Args:
        adapter: ``TeacherAdapter``, or any module from features to weights [N, T] with a ``regularizer()``.
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
        checks.one_of(name, "reduction", reduction, functional.REDUCTIONS[1:])
        checks.one_of(name, "mode", mode, functional.MODES)
        checks.number(name, "temperature", temperature, 0, math.inf, above=True)
        checks.number(name, "alpha", alpha, 0, 1)
        checks.number(name, "delta", delta, 0, math.inf, above=True)
        checks.number(name, "label_smoothing", label_smoothing, 0, 1)
        for argument, weight in (
            ("angle_weight", angle_weight),
            ("hint_weight", hint_weight),
            ("regularizer_weight", regularizer_weight),
        ):
            checks.number(name, argument, weight, 0, math.inf)
        if gather_angle not in (False, True, "even"):
            raise ValueError(f"{name}: gather_angle must be False, True or 'even', got {gather_angle!r}")
        self.adapter: Any = adapter
        self.hints: Any = hints
        self.temperature, self.alpha, self.mode, self.reduction = temperature, alpha, mode, reduction
        self.angle_weight, self.hint_weight, self.regularizer_weight = angle_weight, hint_weight, regularizer_weight
        self.delta, self.angle_trains_weights, self.gather_angle = delta, angle_trains_weights, gather_angle
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing

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
        gather = (
            bool(self.gather_angle)
            and self.angle_weight != 0
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_world_size() > 1
        )
        rows, classes, teachers = checks.kd_arguments(
            name, student_logits, teacher_logits, None, labels, self.ignore_index
        )
        if num_items_in_batch is not None:
            checks.num_items(name, num_items_in_batch, self.reduction, labels)
        student = student_logits
        if student.dim() != 2:
            student, teachers = student.reshape(rows, classes), [t.reshape(rows, classes) for t in teachers]
            labels = None if labels is None else labels.reshape(rows)
        if not gather and functional.whole_loss_is_fused(
            student, *teachers, features if isinstance(features, Tensor) else None
        ):
            out = self._fused(student, teachers, labels, features, num_items_in_batch)
        else:
            out = self._composed(student, teachers, labels, features, num_items_in_batch, gather)
        if self.hints is None:
            return out
        hint = self.hints(student_maps, teacher_maps)
        loss, kd, ce, kl, angle, _, regularizer, weights = out  # no _replace: torch.compile 2.11 cannot trace it
        return AMTMLOutput(
            torch.add(loss, hint, alpha=self.hint_weight), kd, ce, kl, angle, hint.detach(), regularizer, weights
        )

    def _fused(
        self,
        student: Tensor,
        teachers: list[Tensor],
        labels: Tensor | None,
        features: Tensor,
        divisor: int | Tensor | None,
    ) -> AMTMLOutput:
        """One node of the graph over the kernels."""
        adapter = self.adapter
        plain = _is_plain(adapter)
        if plain:
            theta, v = adapter.theta, adapter.v
            checks.adapter_arguments("teacher_weights", features, theta, v, adapter.pool)
            checks.weights_shape("AMTMLLoss", (features.shape[0], theta.shape[0]), student.shape[0], len(teachers))
            sources: tuple[Any, ...] = (features, theta, v, None)
        else:
            sources = (None, None, None, self._weights(features, student, len(teachers)))
        loss, terms, weights = functional.whole_loss(
            student,
            teachers,
            labels,
            sources,
            divisor,
            max_pool=plain and adapter.pool == "max",
            regularizer_weight=self.regularizer_weight if plain else 0.0,
            angle_weight=self.angle_weight,
            delta=self.delta,
            angle_trains_weights=self.angle_trains_weights,
            **self._kd_options(divisor),
        )
        kd, ce, kl, angle, hint, regularizer = terms.unbind()
        if not plain:
            weights = sources[3].detach()
            if self.regularizer_weight != 0:
                term = self._regularizer()
                loss, regularizer = torch.add(loss, term, alpha=self.regularizer_weight), term.detach()
        return AMTMLOutput(loss, kd, ce, kl, angle, hint, regularizer, weights)

    def _composed(
        self,
        student: Tensor,
        teachers: list[Tensor],
        labels: Tensor | None,
        features: Tensor,
        divisor: int | Tensor | None,
        gather: bool,
    ) -> AMTMLOutput:
        """From the single operators: what the reference backend does, and what a gathered angle loss needs."""
        weights = self._weights(features, student, len(teachers))
        terms = functional.multi_teacher_kd(
            student, teachers, weights, labels, t2_scale=True, **self._kd_options(divisor)
        )  # fmt: skip
        kd, ce, kl = terms.loss, terms.ce, terms.kl
        if divisor is not None:
            kd, ce, kl = (reference.over_items(term, divisor) for term in (kd, ce, kl))
        loss = kd
        angle, hint, regularizer = kd.detach().new_zeros(3).unbind()
        if self.angle_weight != 0:
            row_mask = None if labels is None else labels != self.ignore_index
            angle = self._angle(terms.student_probs, terms.soft_targets, row_mask, gather)
            loss = torch.add(loss, angle, alpha=self.angle_weight)
        if self.regularizer_weight != 0:
            regularizer = self._regularizer()
            loss = torch.add(loss, regularizer, alpha=self.regularizer_weight)
        return AMTMLOutput(loss, *(t.detach() for t in (kd, ce, kl, angle, hint, regularizer, weights)))

    def _weights(self, features: Tensor, student: Tensor, teachers: int) -> Tensor:
        """[rows, T] from an adapter that is called; it may give [B, S, T]."""
        weights = checks.tensor("AMTMLLoss", "the adapter's weights", self.adapter(features))
        weights = weights.flatten(0, 1) if weights.dim() == 3 else weights
        checks.weights_shape("AMTMLLoss", tuple(weights.shape), student.shape[0], teachers)
        checks.same_device("AMTMLLoss", "the adapter's weights", weights, "student_logits", student)
        return weights

    def _regularizer(self) -> Tensor:
        """Of an adapter that is called. One that FSDP has sharded adds up shards here, outside of its forward."""
        term = self.adapter.regularizer()
        return term.full_tensor() if hasattr(term, "full_tensor") else term

    def _kd_options(self, divisor: int | Tensor | None) -> dict[str, Any]:
        return dict(
            temperature=self.temperature,
            alpha=self.alpha,
            mode=self.mode,
            reduction=self.reduction if divisor is None else "sum",
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def _angle(self, student_probs: Tensor, soft_targets: Tensor, row_mask: Tensor | None, gather: bool) -> Tensor:
        if not self.angle_trains_weights:
            soft_targets = soft_targets.detach()
        if gather:
            even = self.gather_angle == "even"
            counts = [len(student_probs)] * dist.get_world_size() if even else _rows_everywhere(student_probs, row_mask)
            student_probs, soft_targets = (_GatherRows.apply(x, counts) for x in (student_probs, soft_targets))
            row_mask = None if row_mask is None else _GatherRows.apply(row_mask, counts)
        return functional.angle(student_probs, soft_targets, row_mask, delta=self.delta)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, alpha={self.alpha}, mode={self.mode!r}, angle_weight={self.angle_weight}, "
            f"hint_weight={self.hint_weight}, regularizer_weight={self.regularizer_weight}, reduction={self.reduction!r}"
        )


def _is_plain(adapter: nn.Module) -> bool:
    """A TeacherAdapter whose parameters can be read in place of calling it: neither its class nor the instance has another
    ``forward`` or ``regularizer``, and no hook waits for its call."""
    own = adapter.__dict__
    return (
        type(adapter) is TeacherAdapter
        and not ("forward" in own or "regularizer" in own)
        and not (adapter._forward_hooks or adapter._forward_pre_hooks)
        and not (adapter._backward_hooks or adapter._backward_pre_hooks)
        and not _has_any_global_hook()
    )


class _GatherRows(torch.autograd.Function):
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
            f"AMTMLLoss: gather_angle needs the same classes on every process, and labels or none, got {seen}"
        )
    return [n for n, _, _ in found]
