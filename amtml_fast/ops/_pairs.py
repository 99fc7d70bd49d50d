"""What the losses over pairs and triplets of rows share: angle and distance."""

from typing import Any

from torch import Tensor

from amtml_fast import checks
from amtml_fast.ops._base import asked, empty, in_dtypes, saved, scaled
from amtml_fast.terms import wide_dtype


def check_sides(function: str, student: Tensor, teacher: Tensor) -> None:
    checks.tensor(function, "student", student)
    checks.tensor(function, "teacher", teacher)
    if student.dim() != 2:
        raise ValueError(f"{function}: student must be [N, C], got {checks.shape(student)}")
    if teacher.dim() != 2 or teacher.shape[0] != student.shape[0]:
        wanted = f"[{student.shape[0]}, C] like student"
        raise ValueError(f"{function}: teacher must be {wanted}, got {checks.shape(teacher)}")
    checks.same_device(function, "teacher", teacher, "student", student)


def scaled_sides(ctx: Any, grad_loss: Tensor) -> list[Tensor | None]:
    """The gradients to both sides that forward has saved, for this gradient of the loss."""
    return in_dtypes(ctx, scaled(ctx, map(asked, saved(ctx), ctx.needs), grad_loss))


def fake_grads(student: Tensor, teacher: Tensor, need_student: bool, need_teacher: bool) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(student, teacher)
    return empty(student, need_student, student.shape, wide), empty(teacher, need_teacher, teacher.shape, wide)
