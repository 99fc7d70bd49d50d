"""Softmax over two dimensions of a score matrix."""

import math
from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops._base import define, first_order, kernels, needs_grad, operator, run, save, saved
from amtml_fast.terms import wide_dtype

MODES = ("sequential", "product")

operator("dual_softmax")


def dual_softmax(scores: Tensor, dim1: int = -2, dim2: int = -1, *, mode: str = "sequential") -> Tensor:
    """Softmax over two dimensions of a score matrix, such as the matches between two sets::

        softmax(softmax(scores, dim1), dim2)                # mode "sequential"
        softmax(scores, dim1) * softmax(scores, dim2)       # mode "product"

    Args:
        scores: at least two dimensions; dim1 and dim2 differ.

    Returns:
        Same shape and dtype as ``scores``.

    Raises:
        ValueError, TypeError, IndexError: an argument that does not fit; nothing is computed then.
    """
    _check_arguments("dual_softmax", scores, dim1, dim2, mode)
    chosen = backend.choose("dual_softmax", scores)
    if chosen == "reference":
        return reference.dual_softmax(scores, dim1, dim2, mode=mode)
    last = dim1 % scores.dim() == scores.dim() - 2 and dim2 % scores.dim() == scores.dim() - 1
    moved = scores if last else scores.movedim((dim1, dim2), (-2, -1))
    out = run(DualSoftmax, needs_grad(moved), chosen, moved, mode)
    return out if last else out.movedim((-2, -1), (dim1, dim2))


def _check_arguments(function: str, scores: Tensor, dim1: int, dim2: int, mode: str) -> None:
    checks.tensor(function, "scores", scores)
    dims = scores.dim()
    if dims < 2:
        raise ValueError(f"{function}: scores must have at least 2 dimensions, got {checks.shape(scores)}")
    for argument, dim in (("dim1", dim1), ("dim2", dim2)):
        if isinstance(dim, bool) or not isinstance(dim, int) or not -dims <= dim < dims:
            raise IndexError(f"{function}: {argument} must be in [{-dims}, {dims - 1}], got {dim!r}")
    if dim1 % dims == dim2 % dims:
        raise ValueError(f"{function}: dim1 and dim2 must differ, got {dim1} and {dim2} of {dims} dimensions")
    checks.one_of(function, "mode", mode, MODES)


class DualSoftmax(torch.autograd.Function):
    """Over the last two dimensions. Kernels take [B, R, K]; views made here, and not before, are no nodes of the graph.
    (The result is no view: a Function's may not be written to.)"""

    @staticmethod
    def forward(ctx: Any, backend: str, scores: Tensor, mode: str) -> Tensor:
        out, first, row_stats = kernels(backend).dual_softmax_fwd.default(_matrices(scores), mode)
        save(ctx, scores, first, row_stats)
        ctx.mode, ctx.backend = mode, backend
        return out if scores.dim() == 3 else torch.ops.aten._unsafe_view.default(out, scores.shape)

    @staticmethod
    @first_order("dual_softmax")
    def backward(ctx: Any, grad: Tensor) -> tuple:
        scores, first, row_stats = saved(ctx)
        grad_scores = kernels(ctx.backend).dual_softmax_bwd.default(
            _matrices(grad), _matrices(scores), first, row_stats, ctx.mode
        )
        return None, grad_scores.view(scores.shape), None


def _matrices(t: Tensor) -> Tensor:
    return t if t.dim() == 3 else t.reshape(math.prod(t.shape[:-2]), *t.shape[-2:])


# scores [B, R, K]. result; the softmax over R, in the wide dtype; maxima and sums of the softmax over K [B, R, 2]
@define("dual_softmax_fwd", "(Tensor scores, str mode) -> (Tensor, Tensor, Tensor)")
def _(scores, mode):
    b, r, k = scores.shape
    wide = wide_dtype(scores)
    return scores.new_empty(b, r, k), scores.new_empty(b, r, k, dtype=wide), scores.new_empty(b, r, 2, dtype=wide)


@define("dual_softmax_bwd", "(Tensor grad, Tensor scores, Tensor first, Tensor row_stats, str mode) -> Tensor")
def _(grad, scores, first, row_stats, mode):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)
