"""Argument checks shared by all operators: each raises before anything runs, and names the function and the argument.

Messages read ``function: argument must be ..., got ...``. Checks of values look only where that costs no device sync.
At a small batch the checks are a good part of what a loss costs: they look first, and put words together only for a message.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def shape(t: Tensor) -> list[int]:
    return list(t.shape)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor(function: str, name: str, value: object) -> Tensor:
    """A floating-point tensor of a dtype the kernels take."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{function}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    return value


def one_of(function: str, name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{function}: {name} must be one of {', '.join(allowed)}, got {value!r}")


def number(function: str, name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """A finite real in [low, high], or in (low, high] with ``above``."""
    if type(value) is float and low <= value <= high and value < math.inf and not (above and value == low):
        return
    wanted = f"a number in {'(' if above else '['}{low}, {high}{')' if math.isinf(high) else ']'}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be {wanted}, got {value!r}")
    if not low <= value <= high or value in (math.inf, -math.inf) or (above and value == low):  # NaN fails, too
        raise ValueError(f"{function}: {name} must be {wanted}, got {value}")


def same_device(function: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{function}: {name} must be on {like.device} like {like_name}, got {value.device}")


def same_shape(function: str, name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{function}: {name} must be {shape(like)} like {like_name}, got {shape(value)}")


def two_sides(function: str, student: Tensor, teacher: Tensor) -> None:
    """Rows of a relational loss."""
    tensor(function, "student", student)
    tensor(function, "teacher", teacher)
    if student.dim() != 2:
        raise ValueError(f"{function}: student must be [N, C], got {shape(student)}")
    if teacher.dim() != 2 or teacher.shape[0] != student.shape[0]:
        raise ValueError(f"{function}: teacher must be [{student.shape[0]}, C] like student, got {shape(teacher)}")
    same_device(function, "teacher", teacher, "student", student)


def adapter_arguments(function: str, features: Tensor, theta: Tensor, v: Tensor, pool: str) -> None:
    tensor(function, "features", features)
    if features.dim() not in (2, 4):
        raise ValueError(f"{function}: features must be [N, d, H, W] or [N, d], got {shape(features)}")
    if features.dim() == 4 and 0 in features.shape[2:]:
        raise ValueError(f"{function}: features must have at least one pixel, got {shape(features)}")
    channels = features.shape[1]
    tensor(function, "theta", theta)
    if theta.dim() != 2 or theta.shape[0] < 1 or theta.shape[1] != channels:
        raise ValueError(
            f"{function}: theta must be [T, {channels}] for features {shape(features)}, got {shape(theta)}"
        )
    tensor(function, "v", v)
    if v.shape != (channels,):
        raise ValueError(f"{function}: v must be [{channels}] like the columns of theta, got {shape(v)}")
    one_of(function, "pool", pool, ("max", "avg"))
    same_device(function, "theta", theta, "features", features)
    same_device(function, "v", v, "features", features)


def kd_arguments(
    function: str,
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    teacher_weights: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
) -> tuple[int, int, list[Tensor]]:
    """Rows, classes and the list of teachers of arguments that fit together."""
    _logits(function, student_logits)
    wanted_shape, device = student_logits.shape, student_logits.device
    teachers = _one_a_teacher(function, "teacher_logits", teacher_logits, student_logits, "[T, N, C]")
    for i, teacher in enumerate(teachers):
        if (
            isinstance(teacher, Tensor)
            and teacher.dtype in DTYPES
            and teacher.shape == wanted_shape
            and teacher.device == device
            and not teacher.requires_grad
        ):
            continue
        argument = f"teacher_logits[{i}]"
        tensor(function, argument, teacher)
        same_shape(function, argument, teacher, "student_logits", student_logits)
        same_device(function, argument, teacher, "student_logits", student_logits)
        _frozen(function, argument, teacher)
    rows, classes = _kd_rows(function, student_logits, len(teachers), teacher_weights, labels, ignore_index)
    return rows, classes, teachers


def topk_arguments(
    function: str,
    student_logits: Tensor,
    teacher_indices: Tensor | Sequence[Tensor],
    teacher_log_probs: Tensor | Sequence[Tensor],
    teacher_weights: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
) -> tuple[int, int, list[Tensor], list[Tensor]]:
    """Rows, classes, and of every teacher its classes and their log-probabilities."""
    _logits(function, student_logits)
    indices = _one_a_teacher(function, "teacher_indices", teacher_indices, student_logits, "[T, N, k]")
    log_probs = _one_a_teacher(function, "teacher_log_probs", teacher_log_probs, student_logits, "[T, N, k]")
    if len(indices) != len(log_probs):
        raise ValueError(
            f"{function}: teacher_log_probs must hold {len(indices)} teachers like teacher_indices, got {len(log_probs)}"
        )
    *leading, classes = student_logits.shape
    for t, (index, log_prob) in enumerate(zip(indices, log_probs)):
        name, of_probs = f"teacher_indices[{t}]", f"teacher_log_probs[{t}]"
        _integers(function, name, index)
        if list(index.shape[:-1]) != leading or not 1 <= index.shape[-1] <= classes:
            wanted = ", ".join(map(str, leading))
            raise ValueError(f"{function}: {name} must be [{wanted}, k] with 1 <= k <= {classes}, got {shape(index)}")
        same_device(function, name, index, "student_logits", student_logits)
        tensor(function, of_probs, log_prob)
        same_shape(function, of_probs, log_prob, name, index)
        same_device(function, of_probs, log_prob, "student_logits", student_logits)
        _frozen(function, of_probs, log_prob)
    rows, classes = _kd_rows(function, student_logits, len(indices), teacher_weights, labels, ignore_index)
    return rows, classes, indices, log_probs


def _logits(function: str, student_logits: Tensor) -> None:
    tensor(function, "student_logits", student_logits)
    if student_logits.dim() not in (2, 3) or student_logits.shape[-1] < 1:
        raise ValueError(
            f"{function}: student_logits must be [N, C] or [B, S, C] with C >= 1, got {shape(student_logits)}"
        )


def _one_a_teacher(
    function: str, name: str, value: Tensor | Sequence[Tensor], student_logits: Tensor, stacked: str
) -> list[Tensor]:
    """The tensors of the teachers, given as a list or in one tensor like ``stacked``."""
    if isinstance(value, Tensor):
        if value.dim() != student_logits.dim() + 1:
            raise ValueError(
                f"{function}: {name} must be a list of tensors or one {stacked} tensor, got {shape(value)}"
            )
        out = list(value.unbind(0))
    elif isinstance(value, (list, tuple)):
        out = list(value)
    else:
        raise TypeError(f"{function}: {name} must be a list of tensors, got {type(value).__name__}")
    if len(out) == 0:
        raise ValueError(f"{function}: {name} must hold at least one teacher, got none")
    return out


def _frozen(function: str, name: str, teacher: Tensor) -> None:
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{function}: {name} requires grad, but teachers are frozen here: pass it detached")


def _integers(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor) or value.dtype not in (torch.int64, torch.int32):
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{function}: {name} must be an int64 or int32 tensor, got {got}")


def _kd_rows(
    function: str,
    student_logits: Tensor,
    num_teachers: int,
    teacher_weights: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
) -> tuple[int, int]:
    """Rows and classes of a student whose weights and labels fit it."""
    wanted_shape = student_logits.shape
    classes = wanted_shape[-1]
    rows = student_logits.numel() // classes
    if teacher_weights is not None:
        tensor(function, "teacher_weights", teacher_weights)
        wanted = [(num_teachers,), (rows, num_teachers)]
        if len(wanted_shape) == 3:
            wanted.append((*wanted_shape[:2], num_teachers))
        if teacher_weights.shape not in wanted:
            raise ValueError(
                f"{function}: teacher_weights must be {' or '.join(str(list(w)) for w in wanted)} for {num_teachers} teachers, "
                f"got {shape(teacher_weights)}"
            )
        same_device(function, "teacher_weights", teacher_weights, "student_logits", student_logits)
    if labels is not None:
        _integers(function, "labels", labels)
        if labels.shape != wanted_shape[:-1]:
            raise ValueError(
                f"{function}: labels must be {list(wanted_shape[:-1])} like student_logits, got {shape(labels)}"
            )
        same_device(function, "labels", labels, "student_logits", student_logits)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{function}: ignore_index must be an int, got {ignore_index!r}")
    return rows, classes


def weights_shape(function: str, got: tuple[int, ...], rows: int, teachers: int) -> None:
    """The shape of an adapter's weights."""
    if got != (rows, teachers):
        raise ValueError(
            f"{function}: the adapter must give weights [{rows}, {teachers}] for {rows} rows and {teachers} teachers, "
            f"got {list(got)}"
        )


def num_items(function: str, num_items_in_batch: int | Tensor, reduction: str, labels: Tensor | None) -> None:
    if reduction != "batchmean":
        raise ValueError(f'{function}: num_items_in_batch goes with reduction "batchmean" only, got "{reduction}"')
    if isinstance(num_items_in_batch, Tensor):
        if num_items_in_batch.dim() != 0:
            raise ValueError(
                f"{function}: num_items_in_batch must be an int or a 0-d tensor, got {shape(num_items_in_batch)}"
            )
    elif isinstance(num_items_in_batch, bool) or not isinstance(num_items_in_batch, int):
        raise TypeError(f"{function}: num_items_in_batch must be an int or a 0-d tensor, got {num_items_in_batch!r}")
    elif num_items_in_batch < (1 if labels is None else 0):
        wanted = "positive without labels" if labels is None else "at least 0"
        raise ValueError(f"{function}: num_items_in_batch must be {wanted}, got {num_items_in_batch}")


def label_values(function: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Labels in [0, classes) or ignore_index. The C++ kernels look for themselves, before they write anything."""
    if labels.numel() == 0:
        return
    low, high = labels.aminmax()
    if low.item() >= 0 and high.item() < classes:
        return
    bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{function}: labels[{row}] must be in [0, {classes}) or ignore_index {ignore_index}, got {int(labels[row])}"
        )


def index_values(
    function: str, indices: Tensor, sizes: Sequence[int], labels: Tensor | None, classes: int, ignore_index: int
) -> None:
    """Classes in [0, classes), in rows that are not ignored: indices [N, sum of sizes]. Like the labels."""
    bad = (indices < 0) | (indices >= classes)
    if labels is not None:
        bad &= (labels != ignore_index).unsqueeze(1)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        teacher = next(t for t in range(len(sizes)) if column < sum(sizes[: t + 1]))
        raise ValueError(
            f"{function}: teacher_indices[{teacher}] must be in [0, {classes}), got {int(indices[row, column])} in row {row}"
        )


def weight_values(function: str, weights: Tensor) -> None:
    """Finite and not negative. Like the labels."""
    if weights.numel() == 0:
        return
    low, high = (float(x) for x in weights.detach().aminmax())
    if not (low >= 0 and high < math.inf):  # written so that NaN fails
        raise ValueError(f"{function}: teacher_weights must be finite and not negative, got values in [{low}, {high}]")


def values_are_free(t: Tensor) -> bool:
    """Whether reading the values of ``t`` costs no sync: a real CPU tensor outside of tracing and transforms."""
    return (
        not torch.compiler.is_compiling()
        and t.device.type == "cpu"
        and not torch._C._are_functorch_transforms_active()
        and type(t) in (Tensor, torch.nn.Parameter)
    )
