"""The checks of ``fused_linear_kd_loss``: its hidden states, output layers and teachers."""

import math
from typing import Any

from torch import Tensor

from amtml_fast import checks
from amtml_fast.ops import _kd
from amtml_fast.ops._linear_chunks import NAME, TENSORS
from amtml_fast.ops._vocabulary import DTensors, Vocabulary
from amtml_fast.terms import LinearTeacher, TopKTeacher


def check_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teachers: Any, vocabulary: Vocabulary | None
) -> tuple[list[str], list[Tensor]]:
    """The kinds of the teachers and all their tensors, of arguments that fit."""
    checks.tensor(NAME, "student_hidden", hidden)
    if hidden.dim() not in (2, 3) or hidden.shape[-1] < 1:
        raise ValueError(f"{NAME}: student_hidden must be [N, H] or [B, S, H] with H >= 1, got {checks.shape(hidden)}")
    _check_layer("student_weight", weight, "student_bias", bias, hidden, hidden, None)
    if isinstance(teachers, (Tensor, LinearTeacher, TopKTeacher)) or not isinstance(teachers, (list, tuple)):
        wanted = "a list of teachers (LinearTeacher, TopKTeacher or a tensor of logits)"
        raise TypeError(f"{NAME}: teachers must be {wanted}, got {_described(teachers)}")
    if len(teachers) == 0:
        raise ValueError(f"{NAME}: teachers must hold at least one teacher, got none")
    kinds: list[str] = []
    flat: list[Tensor] = []
    for i, teacher in enumerate(teachers):
        name = f"teachers[{i}]"
        kind, given = _check_teacher(name, teacher, hidden, weight.shape[0], vocabulary)
        for x in given:
            _kd.check_frozen(NAME, name, x)
        kinds.append(kind)
        flat += given
    return kinds, flat


def _check_teacher(
    name: str, teacher: Any, hidden: Tensor, classes: int, vocabulary: Vocabulary | None
) -> tuple[str, list[Tensor]]:
    """Its kind and its tensors."""
    if isinstance(teacher, LinearTeacher):
        weight, bias = teacher.weight, teacher.bias
        _check_of_rows(f"{name}.hidden", teacher.hidden, "H_t", hidden)
        _check_layer(f"{name}.weight", weight, f"{name}.bias", bias, teacher.hidden, hidden, classes)
        return "linear" if bias is None else "linear_bias", [x for x in teacher if x is not None]
    if isinstance(teacher, TopKTeacher):
        checks.integers(NAME, f"{name}.indices", teacher.indices)
        _check_leading(f"{name}.indices", teacher.indices, "k", hidden)
        most = classes if vocabulary is None else vocabulary.classes
        if not 1 <= teacher.indices.shape[-1] <= most:
            wanted = f"k classes with 1 <= k <= {most}"
            raise ValueError(f"{NAME}: {name}.indices must have {wanted}, got {checks.shape(teacher.indices)}")
        checks.same_device(NAME, f"{name}.indices", teacher.indices, "student_hidden", hidden)
        _check_of_rows(f"{name}.log_probs", teacher.log_probs, "k", hidden)
        checks.same_shape(NAME, f"{name}.log_probs", teacher.log_probs, f"{name}.indices", teacher.indices)
        return "topk", list(teacher)
    if not isinstance(teacher, Tensor):
        wanted = "a LinearTeacher, a TopKTeacher or a tensor of logits"
        raise TypeError(f"{NAME}: {name} must be {wanted}, got {type(teacher).__name__}")
    _check_of_rows(name, teacher, "C", hidden)
    if teacher.shape[-1] != classes:
        _other_vocabulary(name, teacher, f"[..., {classes}]")
    return "logits", [teacher]


def of_rows(kinds: list[str], *, logits: bool = True) -> list[bool]:
    """Of the tensors of all teachers, which have a row for each of the student's; of teachers of logits, where it is asked."""
    rows = {"logits": [logits], "topk": [True, True], "linear": [True, False], "linear_bias": [True, False, False]}
    return [x for kind in kinds for x in rows[kind]]


def parts_of_teachers(parts: DTensors, teachers: Any) -> Any:
    """The teachers, with the classes of this process."""
    if not isinstance(teachers, (list, tuple)) or isinstance(teachers, (LinearTeacher, TopKTeacher)):
        return teachers  # the checks will refuse it
    out: list[Any] = []
    for i, teacher in enumerate(teachers):
        name = f"teachers[{i}]"
        if isinstance(teacher, LinearTeacher):
            layer = [parts.part(f"{name}.{x}", getattr(teacher, x), 0) for x in ("weight", "bias")]
            out.append(LinearTeacher(parts.whole(f"{name}.hidden", teacher.hidden), *layer))
        elif isinstance(teacher, TopKTeacher):
            out.append(TopKTeacher(*(parts.whole(name, x) for x in teacher)))
        else:
            out.append(parts.part(name, teacher, -1))
    return out


def _described(value: Any) -> str:
    return f"a tensor {checks.shape(value)}" if isinstance(value, Tensor) else f"{type(value).__name__}"


def _check_layer(
    name: str,
    weight: Tensor,
    bias_name: str,
    bias: Tensor | None,
    hidden: Tensor,
    student_hidden: Tensor,
    classes: int | None,
) -> None:
    """An output layer [C, H] that fits its hidden states, with the student's classes if given."""
    checks.tensor(NAME, name, weight)
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] < 1:
        wanted = f"[C, {width}] for hidden states {checks.shape(hidden)}"
        raise ValueError(f"{NAME}: {name} must be {wanted}, got {checks.shape(weight)}")
    if classes is not None and weight.shape[0] != classes:
        _other_vocabulary(name, weight, f"[{classes}, {width}]")
    checks.same_device(NAME, name, weight, "student_hidden", student_hidden)
    if bias is None:
        return
    checks.tensor(NAME, bias_name, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{NAME}: {bias_name} must be [{weight.shape[0]}] like {name}, got {checks.shape(bias)}")
    checks.same_device(NAME, bias_name, bias, "student_hidden", student_hidden)


def _other_vocabulary(name: str, value: Tensor, wanted: str) -> None:
    raise ValueError(
        f"{NAME}: {name} must be {wanted} with the classes of student_weight, got {checks.shape(value)}; fill up the shorter "
        "vocabulary (weight with zeros and bias with -inf, or logits with -inf)"
    )


def _check_of_rows(name: str, value: Tensor, last: str, hidden: Tensor) -> None:
    checks.tensor(NAME, name, value)
    _check_leading(name, value, last, hidden)
    checks.same_device(NAME, name, value, "student_hidden", hidden)


def _check_leading(name: str, value: Tensor, last: str, hidden: Tensor) -> None:
    leading = hidden.shape[:-1]
    fits = checks.is_any(value.shape[:-1], (leading, (math.prod(leading),)))
    if not fits or value.shape[-1] < 1:
        wanted = ", ".join(f"{n}" for n in leading)
        raise ValueError(f"{NAME}: {name} must be [{wanted}, {last}] like student_hidden, got {checks.shape(value)}")


def check_index(index: Tensor | None, weights: Tensor | None, like: Tensor) -> None:
    if index is None:
        return
    if weights is not None:
        raise ValueError(f"{NAME}: teacher_weights must be None with teacher_index, got {checks.shape(weights)}")
    checks.integers(NAME, "teacher_index", index)
    leading = like.shape[:-1]
    if not checks.is_any(index.shape, (leading, (math.prod(leading),))):
        wanted = f"{list(leading)} like student_hidden"
        raise ValueError(f"{NAME}: teacher_index must be {wanted}, got {checks.shape(index)}")
    checks.same_device(NAME, "teacher_index", index, "student_hidden", like)


def check_classes(
    kinds: list[str],
    flat: list[Tensor],
    labels: Tensor | None,
    index: Tensor | None,
    classes: int,
    ignore_index: int,
) -> None:
    """The values of integers, where looking costs no sync; in rows that count."""
    given = {}
    if index is not None:
        given["teacher_index"] = (index.unsqueeze(1), len(kinds))
    at = 0
    for t, kind in enumerate(kinds):
        if kind == "topk":
            given[f"teachers[{t}].indices"] = (flat[at].reshape(-1, flat[at].shape[-1]), classes)
        at += TENSORS[kind]
    for name, (values, most) in given.items():
        if not checks.values_are_free(values):
            continue
        bad = (values < 0) | (values >= most)
        if labels is not None:
            bad &= (labels != ignore_index).unsqueeze(1)
        if bad.any():
            row, column = bad.nonzero()[0].tolist()
            raise ValueError(f"{NAME}: {name} must be in [0, {most}), got {int(values[row, column])} in row {row}")
