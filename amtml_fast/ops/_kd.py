"""What the distillation losses share (Eq 7-8): their options, and the checks of rows, labels and weights.

The options are a ``KDOptions``; ``SETTINGS`` is what the kernels take of them.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amtml_fast import checks
from amtml_fast.ops import _base
from amtml_fast.terms import KDOptions, KDStats, over_items

REDUCTIONS = ("none", "sum", "mean", "batchmean")

# In a schema. (An operator that writes into its arguments needs another name for mode: torch.compile keeps that one for itself.)
SETTINGS = (
    "float temperature, float ce_weight, float kl_weight, float kl_scale, str mode, str reduction, "
    "int ignore_index, float label_smoothing"
)
TOPK_SETTINGS = SETTINGS.replace("mode", "tail")


def settings(options: KDOptions, labeled: bool) -> tuple:
    """The values of ``SETTINGS``."""
    temperature, alpha, mode, reduction, t2_scale, ignore_index, label_smoothing = options
    ce_weight, kl_weight = term_weights(alpha, labeled)
    kl_scale = float(temperature) ** 2 if t2_scale else 1.0
    return float(temperature), ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, float(label_smoothing)


def term_weights(alpha: float, labeled: bool) -> tuple[float, float]:
    """Of the cross-entropy and of the KL."""
    return (1.0 - alpha, float(alpha)) if labeled else (0.0, 1.0)


# --- checks of shapes and options


def check_numbers(function: str, temperature: float, alpha: float, label_smoothing: float) -> None:
    checks.number(function, "temperature", temperature, *checks.POSITIVE)
    checks.number(function, "alpha", alpha, 0, 1)
    checks.number(function, "label_smoothing", label_smoothing, 0, 1)


def check_logits(function: str, student_logits: Tensor) -> None:
    checks.tensor(function, "student_logits", student_logits)
    if student_logits.dim() not in (2, 3) or student_logits.shape[-1] < 1:
        wanted = "[N, C] or [B, S, C] with C >= 1"
        raise ValueError(f"{function}: student_logits must be {wanted}, got {checks.shape(student_logits)}")


def one_a_teacher(
    function: str, name: str, value: Tensor | Sequence[Tensor], student_logits: Tensor, last: str
) -> list[Tensor]:
    """One tensor per teacher, from a list or from one tensor; ``last``: the name of its last dimension."""
    if isinstance(value, (list, tuple)):
        out = list(value)
    elif isinstance(value, Tensor) and value.dim() == student_logits.dim() + 1:
        out = list(value.unbind(0))
    else:
        rows = "N" if student_logits.dim() == 2 else "B, S"
        wanted = f"{function}: {name} must be a list of tensors or one [T, {rows}, {last}] tensor"
        if isinstance(value, Tensor):
            raise ValueError(f"{wanted}, got {checks.shape(value)}")
        raise TypeError(f"{wanted}, got {type(value).__name__}")
    if len(out) == 0:
        raise ValueError(f"{function}: {name} must hold at least one teacher, got none")
    return out


def check_frozen(function: str, name: str, teacher: Tensor) -> None:
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{function}: {name} must be detached (teachers are frozen here), got one that requires grad")


def check_rows(
    function: str,
    student_logits: Tensor,
    num_teachers: int,
    teacher_weights: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    student_name: str = "student_logits",
) -> tuple[int, int]:
    """Rows and classes of a student whose weights and labels fit it."""
    wanted_shape = student_logits.shape
    classes = wanted_shape[-1]
    rows = student_logits.numel() // classes
    if teacher_weights is not None:
        checks.tensor(function, "teacher_weights", teacher_weights)
        allowed = [(num_teachers,), (rows, num_teachers)]
        if len(wanted_shape) == 3:
            allowed.append((*wanted_shape[:2], num_teachers))
        if not checks.is_any(teacher_weights.shape, allowed):
            wanted = f"{' or '.join(f'{list(w)}' for w in allowed)} for {num_teachers} teachers"
            raise ValueError(f"{function}: teacher_weights must be {wanted}, got {checks.shape(teacher_weights)}")
        checks.same_device(function, "teacher_weights", teacher_weights, student_name, student_logits)
    if labels is not None:
        checks.integers(function, "labels", labels)
        if labels.shape != wanted_shape[:-1]:
            wanted = f"{list(wanted_shape[:-1])} like {student_name}"
            raise ValueError(f"{function}: labels must be {wanted}, got {checks.shape(labels)}")
        checks.same_device(function, "labels", labels, student_name, student_logits)
    checks.ignore_index(function, ignore_index)
    return rows, classes


def check_num_items(
    function: str, num_items_in_batch: int | Tensor, reduction: str, labels: Tensor | None, ignore_index: int
) -> None:
    """The values of tensors only where looking costs no sync."""
    name = f"{function}: num_items_in_batch"
    count: float | Tensor = num_items_in_batch
    least = 1 if labels is None else 0
    if reduction != "batchmean":
        raise ValueError(f'{name} must be None with a reduction other than "batchmean", got reduction "{reduction}"')
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.dim() != 0:
            raise ValueError(f"{name} must be an int or a 0-d tensor, got {checks.shape(num_items_in_batch)}")
        if num_items_in_batch.is_complex():
            raise TypeError(f"{name} must be an int or a 0-d tensor of real numbers, got {num_items_in_batch.dtype}")
        if not checks.values_are_free(num_items_in_batch):
            return
        count = num_items_in_batch.item()
        if not 0 <= count < math.inf:  # NaN fails, too
            raise ValueError(f"{name} must be finite and not negative, got {count}")
    elif isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, int):
        raise TypeError(f"{name} must be an int or a 0-d tensor, got {num_items_in_batch!r}")
    elif not least <= num_items_in_batch < checks.INT64:
        wanted = f"in [{least}, 2**63){' without labels' if labels is None else ''}"
        raise ValueError(f"{name} must be {wanted}, got {num_items_in_batch}")
    if count != 0:
        return
    if labels is None:
        raise ValueError(f"{name} must be above 0 without labels, got {count}")
    if checks.values_are_free(labels) and (counted := int((labels.long() != ignore_index).sum())):
        raise ValueError(f"{name} must be above 0 where a label is not ignored, got {count} with {counted} such labels")


# --- checks of values: only where looking costs no device sync. The C++ kernels check values themselves.


def check_values(
    function: str,
    labels: Tensor | None,
    classes: int,
    ignore_index: int,
    weights: Tensor | None,
    support: tuple[Tensor, Sequence[int]] | None = None,
) -> None:
    """``support``: the classes that the teachers give, [N, K], and how many of them each does."""
    if labels is not None and checks.values_are_free(labels):
        check_labels(function, labels, classes, ignore_index)
    if weights is not None and checks.values_are_free(weights):
        _check_weights(function, weights, labels, ignore_index)
    if support is not None and checks.values_are_free(support[0]):
        _check_support(function, *support, labels, classes, ignore_index)


def check_labels(function: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    if labels.numel() == 0:
        return
    low, high = labels.aminmax()
    if low.item() >= 0 and high.item() < classes:
        return
    bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        wanted = f"in [0, {classes}) or ignore_index {ignore_index}"
        raise ValueError(f"{function}: labels[{row}] must be {wanted}, got {int(labels[row])}")


def _check_weights(function: str, weights: Tensor, labels: Tensor | None, ignore_index: int) -> None:
    """A row that is ignored may hold anything."""
    if weights.numel() == 0:
        return
    low, high = (float(x) for x in weights.detach().aminmax())
    if low >= 0 and high < math.inf:  # false of NaN
        return
    bad = ~((weights >= 0) & (weights < math.inf))
    if labels is not None and bad.dim() == 2 and len(bad) == len(labels):
        bad &= (labels != ignore_index).unsqueeze(1)
    if bad.any():
        got = float(weights[bad][0])
        raise ValueError(f"{function}: teacher_weights must be finite and not negative, got {got}")


def _check_support(
    function: str, indices: Tensor, sizes: Sequence[int], labels: Tensor | None, classes: int, ignore_index: int
) -> None:
    """Classes in [0, classes), in rows that are not ignored: indices [N, sum of sizes]."""
    bad = (indices < 0) | (indices >= classes)
    if labels is not None:
        bad &= (labels != ignore_index).unsqueeze(1)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        teacher = next(t for t in range(len(sizes)) if column < sum(sizes[: t + 1]))
        name, got = f"{function}: teacher_indices[{teacher}]", int(indices[row, column])
        raise ValueError(f"{name} must be in [0, {classes}), got {got} in row {row}")


# --- calls


def run(
    values: tuple,
    function: type[torch.autograd.Function],
    with_grad: bool,
    *args: Any,
    check: Callable[..., None] = check_values,
) -> Any:
    """``_base.run``. The C++ kernels raise RuntimeError for a bad value before writing anything; this turns it into the
    ValueError of the other backends. ``values``: what ``check`` takes."""
    try:
        return _base.run(function, with_grad, *args)
    except RuntimeError:
        with contextlib.suppress(RuntimeError):  # where the values cannot be read, the first error is the one to see
            check(*values)
        raise


def as_long(labels: Tensor | None) -> Tensor | None:
    """What kernels take; and torch cuts the number that narrower ones are compared with, ``ignore_index``, to their bits."""
    return labels if labels is None or labels.dtype == torch.int64 else labels.long()


def per_item(
    loss: Tensor,
    student_logits: Tensor,
    labels: Tensor | None,
    reduction: str,
    ignore_index: int,
    num_items_in_batch: int | Tensor | None,
) -> Tensor:
    """The loss of rows as the caller asked for it; with ``num_items_in_batch`` it is their sum."""
    if num_items_in_batch is not None:
        return over_items(loss, num_items_in_batch)
    if reduction != "none":
        return loss
    if labels is not None and loss.requires_grad:
        # What comes back to an ignored row may be NaN (of a mean over no rows): times a gradient of 0 it would be NaN, too.
        loss = loss.masked_fill(labels == ignore_index, 0)
    return loss.reshape(student_logits.shape[:-1])


def named_stats(stats: Tensor) -> KDStats:
    """Statistics of rows as the kernels give them, [N, 4 + T], by name."""
    return KDStats(stats[:, 0], stats[:, 1], stats[:, 4:], stats[:, 2], stats[:, 3])


def fake_grads(
    student: Tensor, num_teachers: int, made: torch.dtype, wide: torch.dtype, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """For fakes: the gradients to the student, in the dtype ``made``, to the weights and, where ``needs`` has a third, to alpha."""
    n = student.shape[0]
    outputs = (student.shape, made), ((n, num_teachers), wide), ((n,), wide)
    return tuple(_base.empty(student, needed, shape, dtype) for needed, (shape, dtype) in zip(needs, outputs))
