"""Hint loss of one teacher (Eq 11): pooling, 1x1 convolution and squared error."""

from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops._base import (
    asked,
    define,
    empty,
    first_order,
    in_dtypes,
    kernels,
    needs_grad,
    operator,
    run,
    save,
    saved,
    scaled,
)
from amtml_fast.terms import wide_dtype

LARGEST_FUSED_WEIGHT = 2**17  # beyond it torch's convolution is faster, which cuts the weight up as well

operator("hint")


def hint_loss(student_map: Tensor, teacher_map: Tensor, weight: Tensor, *, normalize: bool = False) -> Tensor:
    """Hint loss of one teacher (Eq 11)::

        u, v = teacher_map, student_map      # each divided by its L2 norm over channels, with ``normalize``
        u, v = both average-pooled to the smaller height and width
        loss = mean( (u - conv1x1(v, weight))**2 )

    Args:
        student_map: [N, c_s, h, w]; teacher_map: [N, c_t, H, W].
        weight: [c_t, c_s], the 1x1 convolution that is trained with the student.

    Returns:
        Scalar; float32 (float64 if an input is), 0 for N = 0. Gradients flow to all three.

    Raises:
        ValueError, TypeError: an argument that does not fit; nothing is computed then.
    """
    _check_arguments("hint_loss", student_map, teacher_map, weight)
    chosen = backend.choose("hint", student_map, teacher_map, weight)
    if chosen == "reference":
        return reference.hint_loss(student_map, teacher_map, weight, normalize=normalize)
    if wide_dtype(student_map, teacher_map, weight) == torch.float64:  # of one of them: all are
        student_map, teacher_map, weight = (x.double() for x in (student_map, teacher_map, weight))
    height, width = (min(s, t) for s, t in zip(student_map.shape[2:], teacher_map.shape[2:]))
    v, u = (hint_pool(chosen, m, height, width, normalize) for m in (student_map, teacher_map))
    if chosen == "cpp" and weight.numel() <= LARGEST_FUSED_WEIGHT:
        needs = needs_grad(v), needs_grad(u), needs_grad(weight)
        return run(Hint, any(needs), v, u, weight, needs)
    return hint_mse(reference.hint_conv(v, weight), u)


def _check_arguments(function: str, student_map: Tensor, teacher_map: Tensor, weight: Tensor) -> None:
    for argument, value in (("student_map", student_map), ("teacher_map", teacher_map)):
        checks.tensor(function, argument, value)
        if value.dim() != 4 or 0 in value.shape[1:]:
            wanted = "[N, c, h, w] with c, h, w >= 1"
            raise ValueError(f"{function}: {argument} must be {wanted}, got {checks.shape(value)}")
    if teacher_map.shape[0] != student_map.shape[0]:
        wanted = f"{student_map.shape[0]} examples like student_map"
        raise ValueError(f"{function}: teacher_map must have {wanted}, got {checks.shape(teacher_map)}")
    checks.tensor(function, "weight", weight)
    if weight.shape != (teacher_map.shape[1], student_map.shape[1]):
        wanted = f"[{teacher_map.shape[1]}, {student_map.shape[1]}] (teacher by student channels)"
        raise ValueError(f"{function}: weight must be {wanted}, got {checks.shape(weight)}")
    checks.same_device(function, "teacher_map", teacher_map, "student_map", student_map)
    checks.same_device(function, "weight", weight, "student_map", student_map)


def hint_pool(chosen: str, feature_map: Tensor, height: int, width: int, normalize: bool) -> Tensor:
    """One side, pooled to this size, by the chosen backend."""
    if not normalize and feature_map.shape[2:] == (height, width):
        return feature_map
    return run(HintPool, needs_grad(feature_map), chosen, feature_map, height, width, normalize)


def hint_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of two tensors of one shape; 0 where they are empty."""
    chosen = backend.choose("hint", prediction, target)
    if chosen == "reference":
        return reference.hint_mse(prediction, target)
    needed = needs_grad(prediction, target)
    return run(HintMSE, needed, chosen, prediction, target, needed)


class HintPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, feature_map: Tensor, height: int, width: int, normalize: bool) -> Tensor:
        pooled, norms = kernels(backend).hint_pool_fwd.default(feature_map, height, width, normalize)
        save(ctx, feature_map, norms)
        ctx.normalize, ctx.backend = normalize, backend
        return pooled

    @staticmethod
    @first_order("hint_loss")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        grad = kernels(ctx.backend).hint_pool_bwd.default(grad, *saved(ctx), ctx.normalize)
        return None, grad, None, None, None


class Hint(torch.autograd.Function):
    """On maps of the same height and width; ``needs``: a gradient to student, teacher and weight. On the CPU alone."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]) -> Tensor:
        loss, *grads = kernels("cpp").hint_fwd.default(student, teacher, weight, *needs)
        ctx.needs, ctx.dtypes = needs, (student.dtype, teacher.dtype, weight.dtype)
        save(ctx, *grads, student, teacher, weight)
        return loss

    @staticmethod
    @first_order("hint_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        grads = scaled(ctx, map(asked, saved(ctx), ctx.needs), grad_loss)
        return *in_dtypes(ctx, grads), None


class HintMSE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, prediction: Tensor, target: Tensor, need_grad: bool) -> Tensor:
        loss, difference = kernels(backend).hint_mse_fwd.default(prediction, target, need_grad)
        save(ctx, difference, prediction, target)
        ctx.dtypes = prediction.dtype, target.dtype
        return loss

    @staticmethod
    @first_order("hint_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        difference, *_ = saved(ctx)
        (grad,) = scaled(ctx, [difference], grad_loss)
        _, need_prediction, need_target, _ = ctx.needs_input_grad
        return (
            None,
            grad.to(ctx.dtypes[0]) if need_prediction else None,
            grad.neg().to(ctx.dtypes[1]) if need_target else None,
            None,
        )


# pooled [N, c, height, width], norms [N, H, W] (if normalized)
@define("hint_pool_fwd", "(Tensor feature_map, int height, int width, bool normalize) -> (Tensor, Tensor)")
def _(feature_map, height, width, normalize):
    n, c, h, w = feature_map.shape
    wide = wide_dtype(feature_map)
    return feature_map.new_empty(n, c, height, width, dtype=wide), empty(feature_map, normalize, (n, h, w), wide)


@define("hint_pool_bwd", "(Tensor grad, Tensor feature_map, Tensor norms, bool normalize) -> Tensor")
def _(grad, feature_map, norms, normalize):
    return torch.empty_like(feature_map, memory_format=_map_layout(feature_map))


# loss of maps of the same height and width, and its gradients. On GPUs the convolution is torch's, and hint_mse_fwd follows.
@define(
    "hint_fwd",
    "(Tensor student, Tensor teacher, Tensor weight, bool need_student_grad, bool need_teacher_grad, "
    "bool need_weight_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    triton=None,
    gpu=False,
)
def _(student, teacher, weight, *needs):
    inputs = student, teacher, weight
    wide, layouts = wide_dtype(*inputs), (_map_layout(student), _map_layout(teacher), torch.contiguous_format)
    grads = (
        torch.empty_like(t, dtype=wide, memory_format=layout) if needed else student.new_empty(0, dtype=wide)
        for t, needed, layout in zip(inputs, needs, layouts)
    )
    return student.new_empty((), dtype=wide), *grads


def _map_layout(feature_map: Tensor) -> torch.memory_format:
    """Of a gradient to it: on the CPU its own."""
    last = feature_map.device.type == "cpu" and feature_map.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not feature_map.is_contiguous() else torch.contiguous_format


# loss, d loss / d prediction = -d loss / d target
@define("hint_mse_fwd", "(Tensor prediction, Tensor target, bool need_grad) -> (Tensor, Tensor)")
def _(prediction, target, need_grad):
    wide = wide_dtype(prediction, target)
    return prediction.new_empty((), dtype=wide), empty(prediction, need_grad, prediction.shape, wide)
