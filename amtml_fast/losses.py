"""The operators as modules, for a training loop of your own. ``AMTMLLoss``, the whole objective, is in ``amtml_fast.amtml``."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amtml_fast import checks
from amtml_fast.functional import (
    angle_loss,
    dual_softmax,
    fused_linear_kd_loss,
    hint_loss,
    multi_teacher_kd_loss,
    rkd_distance_loss,
    teacher_weights,
    topk_kd_loss,
)
from amtml_fast.ops.teacher_weights import POOLS
from amtml_fast.terms import LinearTeacher, TopKTeacher, wide_dtype

MAPPINGS = ("best_high", "best_low", "random")


def parameter(start: Tensor) -> nn.Parameter:
    """A float32 parameter on torch's default device, with numbers drawn on the CPU: torch's defaults do not change them."""
    return nn.Parameter(start.to(torch.get_default_device()))


class TeacherAdapter(nn.Module):
    """The latent factors that weigh the teachers (Eq 4-6).

    Args:
        channels: d, channels of the student's last convolutional map.
        num_teachers: T.
        pool: ``"max"`` or ``"avg"`` over the map.
        init_scale: standard deviation of the normal initialization of ``theta`` [T, d] and ``v`` [d]; None: d ** -0.5,
            with which the scores start near 0 and the weights near uniform, but not at it (zero is a stationary point).
    """

    def __init__(self, channels: int, num_teachers: int, *, pool: str = "max", init_scale: float | None = None):
        super().__init__()
        for name, value in (("channels", channels), ("num_teachers", num_teachers)):
            checks.count("TeacherAdapter", name, value)
        checks.one_of("TeacherAdapter", "pool", pool, POOLS)
        if init_scale is not None:
            checks.number("TeacherAdapter", "init_scale", init_scale, *checks.NOT_NEGATIVE)
        self.pool, self.init_scale = pool, channels**-0.5 if init_scale is None else init_scale
        sizes = (num_teachers, channels), (channels,)
        drawn = [torch.randn(size, dtype=torch.float32, device="cpu") * self.init_scale for size in sizes]
        self.theta, self.v = map(parameter, drawn)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws ``theta`` and ``v`` anew, where they are: after ``to_empty()`` their memory holds anything."""
        for p in (self.theta, self.v):
            p.normal_().mul_(self.init_scale)

    def forward(self, features: Tensor) -> Tensor:
        """[N, d, H, W] or [N, d] -> weights [N, T]."""
        return teacher_weights(features, self.theta, self.v, pool=self.pool)

    def regularizer(self) -> Tensor:
        """``|v|^2 + |theta|^2``, unweighted, in float32 (float64 if a parameter is)."""
        wide = wide_dtype(self.theta, self.v)
        return self.v.to(wide).square().sum() + self.theta.to(wide).square().sum()

    def extra_repr(self) -> str:
        return f"channels={self.theta.shape[1]}, num_teachers={self.theta.shape[0]}, pool={self.pool!r}"


class _KDModule(nn.Module):
    """The keywords of a function, ``options``, which its module form keeps. Each is an attribute, too: a schedule sets
    ``loss.temperature``, and libraries set ``loss.reduction``."""

    options: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        return options[name] if name in options else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("options", {}):
            self.options[name] = value
        else:
            super().__setattr__(name, value)

    def _with_rows(self, alpha: Tensor | None, temperature: Tensor | None) -> dict[str, Any]:
        """The options, with the numbers of this batch's rows where they are given."""
        by_row = dict(alpha=alpha, temperature=temperature)
        return {**self.options, **{name: value for name, value in by_row.items() if value is not None}}

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())


class MultiTeacherKDLoss(_KDModule):
    """Module form of ``multi_teacher_kd_loss``: same keywords, same meaning. ``forward`` takes ``alpha`` and ``temperature`` of
    this batch, where they are one number a row."""

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.7,
        mode: str = "mixture",
        reduction: str = "batchmean",
        t2_scale: bool = True,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        divergence: str = "forward_kl",
        beta: float | None = None,
        teacher_temperature: float | Sequence[float] | None = None,
        return_stats: bool = False,
        process_group: Any = None,
    ):
        super().__init__()
        self.options = dict(
            temperature=temperature,
            alpha=alpha,
            mode=mode,
            reduction=reduction,
            t2_scale=t2_scale,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            divergence=divergence,
            beta=beta,
            teacher_temperature=teacher_temperature,
            return_stats=return_stats,
            process_group=process_group,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | Sequence[Tensor],
        teacher_weights: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        *,
        alpha: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Any:
        options = self.options
        if alpha is not None or temperature is not None:
            options = self._with_rows(alpha, temperature)
        return multi_teacher_kd_loss(
            student_logits, teacher_logits, teacher_weights, labels, num_items_in_batch=num_items_in_batch, **options
        )


class TopKKDLoss(_KDModule):
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
        divergence: str = "forward_kl",
        beta: float | None = None,
        support: str = "teacher",
        return_stats: bool = False,
        process_group: Any = None,
    ):
        super().__init__()
        self.options = dict(
            temperature=temperature,
            alpha=alpha,
            reduction=reduction,
            t2_scale=t2_scale,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            tail=tail,
            divergence=divergence,
            beta=beta,
            support=support,
            return_stats=return_stats,
            process_group=process_group,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_indices: Tensor | Sequence[Tensor],
        teacher_log_probs: Tensor | Sequence[Tensor],
        teacher_weights: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        return topk_kd_loss(
            student_logits,
            teacher_indices,
            teacher_log_probs,
            teacher_weights,
            labels,
            num_items_in_batch=num_items_in_batch,
            **self.options,
        )


class FusedLinearKDLoss(_KDModule):
    """Module form of ``fused_linear_kd_loss``: same keywords, same meaning. It holds no weights: ``forward`` takes the student's
    output layer, and ``alpha`` and ``temperature`` of this batch, where they are one number a row."""

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.7,
        mode: str = "mixture",
        reduction: str = "batchmean",
        t2_scale: bool = True,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        divergence: str = "forward_kl",
        beta: float | None = None,
        teacher_temperature: float | Sequence[float] | None = None,
        return_stats: bool = False,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        chunk_size: int | None = None,
        accumulate: str = "fp32",
        process_group: Any = None,
    ):
        super().__init__()
        self.options = dict(
            temperature=temperature,
            alpha=alpha,
            mode=mode,
            reduction=reduction,
            t2_scale=t2_scale,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            divergence=divergence,
            beta=beta,
            teacher_temperature=teacher_temperature,
            return_stats=return_stats,
            logit_scale=logit_scale,
            softcap=softcap,
            chunk_size=chunk_size,
            accumulate=accumulate,
            process_group=process_group,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teachers: Sequence[Tensor | LinearTeacher | TopKTeacher],
        teacher_weights: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_index: Tensor | None = None,
        alpha: Tensor | None = None,
        temperature: Tensor | None = None,
    ) -> Any:
        return fused_linear_kd_loss(
            student_hidden,
            student_weight,
            teachers,
            teacher_weights,
            labels,
            student_bias=student_bias,
            teacher_index=teacher_index,
            num_items_in_batch=num_items_in_batch,
            **self._with_rows(alpha, temperature),
        )


class _PairLoss(nn.Module):
    def __init__(self, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12):
        super().__init__()
        self.delta, self.reduction, self.eps = delta, reduction, eps

    def extra_repr(self) -> str:
        return f"delta={self.delta}, reduction={self.reduction!r}, eps={self.eps}"


class AngleLoss(_PairLoss):
    """Module form of ``angle_loss``."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return angle_loss(student, teacher, delta=self.delta, reduction=self.reduction, eps=self.eps)


class RKDDistanceLoss(_PairLoss):
    """Module form of ``rkd_distance_loss``."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return rkd_distance_loss(student, teacher, delta=self.delta, reduction=self.reduction, eps=self.eps)


class DualSoftmax(nn.Module):
    """Module form of ``dual_softmax``."""

    def __init__(self, dim1: int = -2, dim2: int = -1, mode: str = "sequential"):
        super().__init__()
        self.dim1, self.dim2, self.mode = dim1, dim2, mode

    def forward(self, scores: Tensor) -> Tensor:
        return dual_softmax(scores, self.dim1, self.dim2, mode=self.mode)

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
            dict teacher index -> group name, which alone may share groups or leave teachers out. It is not in the state dict:
            to go on with saved convolutions, give ``mapping=old.mapping``, for scores measured again may order teachers otherwise.
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
        _check_channels(student_channels, teacher_channels)
        self.mapping = _hint_mapping(list(student_channels), len(teacher_channels), mapping, teacher_scores)
        self.normalize = normalize
        self.transforms = nn.ParameterDict()  # teacher index -> [c_t, c_s]
        for teacher, group in self.mapping.items():
            weight = torch.empty(teacher_channels[teacher], student_channels[group], dtype=torch.float32, device="cpu")
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # as nn.Conv2d starts
            self.transforms[str(teacher)] = parameter(weight)
        self.num_teachers = len(teacher_channels)

    def reset_parameters(self) -> None:
        """Draws the ``F_t`` anew, where they are: after ``to_empty()`` their memory holds anything."""
        for weight in self.transforms.values():
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

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


def _check_channels(student_channels: Mapping[str, int], teacher_channels: Sequence[int]) -> None:
    name = "MultiGroupHintLoss"
    if not isinstance(student_channels, Mapping):
        got = type(student_channels).__name__
        raise TypeError(f"{name}: student_channels must be a dict group -> channels, got {got}")
    if not isinstance(teacher_channels, Sequence):
        raise TypeError(f"{name}: teacher_channels must be a list of channels, got {type(teacher_channels).__name__}")
    for group, channels in student_channels.items():
        checks.count(name, f"student_channels[{group!r}]", channels)
    for t, channels in enumerate(teacher_channels):
        checks.count(name, f"teacher_channels[{t}]", channels)


def _hint_mapping(
    groups: list[str], num_teachers: int, mapping: str | Mapping[int, str], scores: Sequence[float] | None
) -> dict[int, str]:
    """Teacher index -> group name."""
    name = "MultiGroupHintLoss"
    if not groups or num_teachers < 1:
        raise ValueError(
            f"{name}: student_channels and teacher_channels must not be empty, got {len(groups)} and {num_teachers}"
        )
    if not isinstance(mapping, (str, Mapping)):
        raise TypeError(f"{name}: mapping must be a name or a dict teacher -> group, got {mapping!r}")
    if not isinstance(mapping, str):
        _check_mapping(groups, num_teachers, mapping)
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
            raise ValueError(f'{name}: teacher_scores must be validation accuracies for mapping "{mapping}", got None')
        if len(scores) != num_teachers:
            raise ValueError(f"{name}: teacher_scores must have {num_teachers} values, got {len(scores)}")
        for t, score in enumerate(scores):
            if not hasattr(score, "__float__") or math.isnan(score):  # by which nothing can be sorted
                raise ValueError(f"{name}: teacher_scores[{t}] must be a number, got {score!r}")
        order = sorted(range(num_teachers), key=lambda t: scores[t], reverse=mapping == "best_low")
    if num_teachers == 1:
        return {0: groups[0 if mapping == "best_low" else -1]}
    step = (len(groups) - 1) / (num_teachers - 1)  # spread over the groups, ends included
    return dict(sorted((teacher, groups[round(k * step)]) for k, teacher in enumerate(order)))


def _check_mapping(groups: list[str], num_teachers: int, mapping: Mapping[int, str]) -> None:
    name = "MultiGroupHintLoss: mapping"
    for teacher, group in mapping.items():
        fits = isinstance(teacher, int) and not isinstance(teacher, bool) and teacher in range(num_teachers)
        if not fits or group not in groups:
            wanted = f"take a teacher in [0, {num_teachers}) to one of {groups}"
            raise ValueError(f"{name} must {wanted}, got {teacher!r}: {group!r}")
    if not mapping:
        raise ValueError(f"{name} must name at least one teacher, got an empty dict")
