"""How much each teacher counts for each example (Eq 4-6)."""

from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops._base import asked, define, empty, first_order, kernels, needs_grad, operator, run, save, saved
from amtml_fast.terms import wide_dtype

POOLS = ("max", "avg")

operator("teacher_weights")


def teacher_weights(features: Tensor, theta: Tensor, v: Tensor, *, pool: str = "max") -> Tensor:
    """How much each teacher counts for each example (Eq 4-6)::

        b = maxpool(features)                          # [N, d]
        weights = softmax_t( sum_d v * theta_t * b )   # [N, T]

    Args:
        features: [N, d, H, W] last convolutional map of the student, or [N, d] already pooled.
        theta: [T, d] latent factors of the teachers.
        v: [d] global weights of the factors.
        pool: ``"max"`` or ``"avg"`` over H x W. On a tie the gradient goes to the first maximum.

    Returns:
        [N, T] weights that sum to 1 over the teachers, in float32 (float64 if an input is).

    Raises:
        ValueError, TypeError: a shape, dtype, device or ``pool`` that does not fit.
    """
    check_adapter(features, theta, v, pool)
    chosen = backend.choose("teacher_weights", features, theta, v)
    if chosen == "reference":
        return reference.teacher_weights(features, theta, v, pool=pool)
    wide = wide_dtype(features, theta, v)
    return run(
        TeacherWeights, needs_grad(features, theta, v), chosen, features, theta.to(wide), v.to(wide), pool == "max"
    )


def check_adapter(features: Tensor, theta: Tensor, v: Tensor, pool: str) -> None:
    function = "teacher_weights"
    checks.tensor(function, "features", features)
    if features.dim() not in (2, 4):
        raise ValueError(f"{function}: features must be [N, d, H, W] or [N, d], got {checks.shape(features)}")
    if features.dim() == 4 and 0 in features.shape[2:]:
        raise ValueError(f"{function}: features must have at least one pixel, got {checks.shape(features)}")
    channels = features.shape[1]
    checks.tensor(function, "theta", theta)
    if theta.dim() != 2 or theta.shape[0] < 1 or theta.shape[1] != channels:
        raise ValueError(
            f"{function}: theta must be [T, {channels}] for features {checks.shape(features)}, got {checks.shape(theta)}"
        )
    checks.tensor(function, "v", v)
    if v.shape != (channels,):
        raise ValueError(f"{function}: v must be [{channels}] like the columns of theta, got {checks.shape(v)}")
    checks.one_of(function, "pool", pool, POOLS)
    checks.same_device(function, "theta", theta, "features", features)
    checks.same_device(function, "v", v, "features", features)


class TeacherWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, features: Tensor, theta: Tensor, v: Tensor, max_pool: bool) -> Tensor:
        weights, pooled, index = kernels(backend).teacher_weights_fwd.default(features, theta, v, max_pool)
        save(ctx, features, theta, v, pooled, index)
        ctx.max_pool, ctx.backend = max_pool, backend
        return weights

    @staticmethod
    @first_order("teacher_weights")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        _, need_features, need_theta, need_v, _ = ctx.needs_input_grad
        grads = kernels(ctx.backend).teacher_weights_bwd.default(
            grad, *saved(ctx), ctx.max_pool, need_features, need_theta or need_v
        )
        return None, asked(grads[0], need_features), asked(grads[1], need_theta), asked(grads[2], need_v), None


# weights [N, T], pooled [N, d], index [N, d] int32 position of the maximum in its plane
@define("teacher_weights_fwd", "(Tensor features, Tensor theta, Tensor v, bool max_pool) -> (Tensor, Tensor, Tensor)")
def _(features, theta, v, max_pool):
    n, d, wide = features.shape[0], features.shape[1], wide_dtype(features, theta)
    index = empty(features, max_pool, (n, d), torch.int32)
    return features.new_empty(n, theta.shape[0], dtype=wide), features.new_empty(n, d, dtype=wide), index


@define(
    "teacher_weights_bwd",
    "(Tensor grad, Tensor features, Tensor theta, Tensor v, Tensor pooled, Tensor index, bool max_pool, "
    "bool need_features, bool need_parameters) -> (Tensor, Tensor, Tensor)",
)
def _(grad, features, theta, v, pooled, index, max_pool, need_features, need_parameters):
    return (
        torch.empty_like(features) if need_features else features.new_empty(0),
        empty(theta, need_parameters, theta.shape, theta.dtype),
        empty(v, need_parameters, v.shape, v.dtype),
    )
