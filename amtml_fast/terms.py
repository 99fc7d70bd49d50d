"""What the distillation losses take and give, by name, and the arithmetic around their equations: dtypes, counts, statistics.

The reference and the fused operators share it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtml_fast import checks


class KDOptions(NamedTuple):
    """The options of Eq 7-8 that ``multi_teacher_kd_loss`` explains."""

    temperature: float
    alpha: float
    mode: str  # "mixture", "sum" or, with a Divergence, "logits"; in topk_kd it holds the tail
    reduction: str
    t2_scale: bool
    ignore_index: int
    label_smoothing: float


class Divergence(NamedTuple):
    """How ``divergence_loss`` differs from Eq 8; the defaults are Eq 8 itself."""

    name: str = "forward_kl"
    beta: float = 0.0
    teacher_temperatures: tuple[float, ...] = ()  # one for each teacher; (): the student's
    alpha: Tensor | None = None  # [N], in the place of KDOptions.alpha
    temperature: Tensor | None = None  # [N], in the place of KDOptions.temperature

    def nothing_but_eq8(self, mode: str) -> bool:
        own = self.teacher_temperatures or self.alpha is not None or self.temperature is not None
        return self.name == "forward_kl" and mode != "logits" and not own

    def in_dtype(self, dtype: torch.dtype) -> "Divergence":
        """With the numbers of rows in this dtype, that of the loss."""
        alpha, temperature = (None if x is None else x.to(dtype) for x in (self.alpha, self.temperature))
        return self._replace(alpha=alpha, temperature=temperature)


class KDStats(NamedTuple):
    """Numbers of each row beside a distillation loss, detached: [N] (or [B, S], as the student has it), 0 in an ignored row.

    With q and p_t the softmax of student and teachers at their temperatures, and p what ``mode`` makes of the teachers (for
    ``"sum"`` their mixture). Entropies and divergences are in nats, without ``temperature**2``.
    """

    student_entropy: Tensor  # of q
    target_entropy: Tensor  # of p
    teacher_kl: Tensor  # KL(p_t || q), [N, T]
    retained_mass: Tensor  # of the teachers, in the classes that are given: 1 where all are
    agreement: Tensor  # 1 where q and p are largest at the same class, else 0


class LinearTeacher(NamedTuple):
    """A teacher of ``fused_linear_kd_loss`` by its last hidden states and its output layer: logits ``hidden @ weight.T + bias``."""

    hidden: Tensor  # [N, H_t], or [B, S, H_t]
    weight: Tensor  # [C, H_t]
    bias: Tensor | None = None  # [C]; -inf at a class that the teacher has not


class TopKTeacher(NamedTuple):
    """A teacher of ``fused_linear_kd_loss`` by its k largest classes, as ``topk_kd_loss`` takes them with tail "renormalize"."""

    indices: Tensor  # [N, k], or [B, S, k], int64 or int32
    log_probs: Tensor  # of the same shape: their log-probabilities, made at the temperature of the loss


class KDTerms(NamedTuple):
    """What one pass over the logits yields. ``kl`` includes ``temperature**2`` where that is asked for."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    student_probs: Tensor  # [rows, C] q of Eq 8
    soft_targets: Tensor  # [rows, C] p of Eq 7


DEFAULT_BETA = {"jsd": 0.5, "skew_kl": 0.1, "skew_reverse_kl": 0.1}  # of the divergences that have one


def divergence_of(
    temperature: float | Tensor,
    alpha: float | Tensor,
    divergence: str,
    beta: float | None,
    teacher_temperature: float | Sequence[float] | None,
    num_teachers: int,
) -> Divergence:
    """The keywords of ``multi_teacher_kd_loss`` with their defaults filled in."""
    of_teachers = () if teacher_temperature is None else teacher_temperature
    if not isinstance(of_teachers, Sequence):
        of_teachers = (of_teachers,) * num_teachers
    return Divergence(
        divergence,
        float(DEFAULT_BETA.get(divergence, 0.0) if beta is None else beta),
        tuple(map(float, of_teachers)),
        alpha.reshape(-1) if isinstance(alpha, Tensor) else None,
        temperature.reshape(-1) if isinstance(temperature, Tensor) else None,
    )


def divergence_numbers(temperature: float | Tensor, alpha: float | Tensor, *others: Any) -> KDOptions:
    """``KDOptions``, with 1 for a temperature or alpha of every row: those are in ``Divergence``."""
    shared = [1.0 if isinstance(x, Tensor) else x for x in (temperature, alpha)]
    return KDOptions(shared[0], shared[1], *others)


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that products, exponentials and sums are made in: float64 if any input is, else float32."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def without_autocast(like: Tensor) -> AbstractContextManager:
    """A context in which torch narrows no product on the device of ``like``. Meta tensors have no autocast to turn off."""
    return nullcontext() if like.is_meta else torch.autocast(like.device.type, enabled=False)


def over_items(total: Tensor, num_items_in_batch: int | Tensor) -> Tensor:
    """A sum over rows, divided by the count of the whole batch; 0 where both are 0."""
    return total / item_count(num_items_in_batch, total.dtype)


def item_count(num_items_in_batch: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The divisor. A count of 0 becomes a tiny number: a sum of 0 then gives 0, and any other an absurdly large loss, where
    `check_num_items` could not look."""
    tiny = torch.finfo(torch.float32).tiny
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.to(dtype).clamp(min=tiny)
    return num_items_in_batch if num_items_in_batch > 0 else tiny


def times(x: Tensor, factor: float) -> Tensor:
    """``x * factor``. (torch gives the product of a 0-d tensor and a Python float a float64 tangent.)"""
    return x * x.new_full((), factor)


def counted_rows(like: Tensor, rows: int, labels: Tensor | None, ignore_index: int) -> Tensor:
    """Which rows count, [N] on the device of ``like``: those whose label is not ignored, or all without labels."""
    return like.new_ones(rows, dtype=torch.bool) if labels is None else labels != ignore_index


def spread(function: str, name: str, value: Tensor, size: Sequence[int]) -> Tensor:
    """``value`` broadcast to ``size``, made wide first: the gradients of what it stands for are summed before they are rounded."""
    checks.tensor(function, name, value)
    if value.dim() > len(size) or any(v not in (1, s) for v, s in zip(reversed(value.shape), reversed(size))):
        raise ValueError(f"{function}: {name} must be {list(size)} or broadcast to it, got {checks.shape(value)}")
    return value.to(wide_dtype(value)).expand(*size)


def connected(loss: Tensor, *inputs: Tensor | None) -> Tensor:
    """The loss, with a gradient of exactly 0 to inputs that count nothing in it."""
    for x in inputs:
        if x is not None and x.requires_grad:
            if hasattr(x, "to_local") and not hasattr(loss, "to_local"):
                x = x.to_local()  # a parameter is this process' shard where FSDP has not gathered it
            loss = loss + x.masked_fill(torch.ones_like(x, dtype=torch.bool), 0).sum().to(loss.dtype)
    return loss


def weighed(loss: Tensor, weight: float) -> Tensor:
    """``loss * weight``. A loss of weight 0 is 0, infinite or not, and its gradients are."""
    return times(loss, weight) if weight != 0 else connected(loss.new_zeros(()), loss)


def shaped_stats(stats: KDStats, leading: Sequence[int]) -> KDStats:
    """The numbers of rows in the shape of the student's logits."""
    return KDStats(*(x.reshape(*leading, *x.shape[1:]) for x in stats))


def of_counted_rows(stats: KDStats, valid: Tensor) -> KDStats:
    """Detached, and 0 in rows that do not count."""
    ignored = ~valid
    return KDStats(*(x.detach().masked_fill(ignored.unsqueeze(1) if x.dim() == 2 else ignored, 0) for x in stats))
