"""The loss of ``topk_kd_loss`` with the tail "bucket" by kernels alone: on the CPU in one pass over the row, on GPUs with a kernel
between the two sweeps of the row. And the statistics of all tails, from a sweep."""

from typing import Any

import torch
from torch import Tensor

from amtml_fast.ops import _kd
from amtml_fast.ops._base import (
    asked,
    define,
    first_order,
    kernels,
    needs_grad,
    run,
    save,
    save_grads,
    saved,
    scaled_rows,
)
from amtml_fast.ops._topk_named import TopkInputs
from amtml_fast.terms import Divergence, KDOptions, KDStats, wide_dtype


def sweep_settings(options: KDOptions, labeled: bool) -> tuple:
    """What `topk_bucket_fwd` and `topk_bucket_bwd` take of the options, but for ``in_float64``."""
    labeled = labeled and options.alpha != 1
    return (
        float(options.temperature), options.ignore_index, labeled and options.temperature != 1,
        labeled and options.label_smoothing != 0,
    )  # fmt: skip


# --- the CPU's


def one_pass_loss(given: TopkInputs, kept: Tensor | None, divergence: Divergence) -> Tensor:
    """``kept``: the entries that are not of the bucket; None: all."""
    student, indices, log_probs, sizes, weights, labels, options, _ = given
    wide = given.wide
    weights = None if weights is None else weights.to(wide).expand(len(student), -1)
    needs = needs_grad(student), needs_grad(weights)
    settings = *_kd.settings(options, labels is not None), divergence.name, divergence.beta
    return _kd.run(
        given.values, TopkBucketLoss, any(needs), student, weights,
        (labels, indices, kept, log_probs, sizes, settings, needs, wide),
    )  # fmt: skip


class TopkBucketLoss(torch.autograd.Function):
    """The loss. ``needs``: a gradient to the student, and to the weights; ``wide``: the dtype of sums."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weights: Tensor | None, rest: tuple) -> Tensor:
        labels, indices, kept, log_probs, sizes, settings, needs, wide = rest
        ctx.backend, ctx.in_forward, ctx.needs = "cpp", student.dtype == wide, needs
        ctx.sizes, ctx.settings = sizes, settings
        now = needs if ctx.in_forward else (False, False)
        loss, *grads = kernels("cpp").topk_bucket_loss.default(
            None, student, indices, kept, log_probs, sizes, weights, labels, *settings, *now
        )
        if ctx.in_forward:
            save_grads(ctx, grads, (student, weights), needs)
        else:
            save(ctx, student, indices, kept, log_probs, weights, labels)
        return loss

    @staticmethod
    @first_order("topk_kd_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        if ctx.in_forward:
            return *scaled_rows(ctx, grad_loss), None
        student, indices, kept, log_probs, weights, labels = saved(ctx)
        _, *grads = kernels("cpp").topk_bucket_loss.default(
            grad_loss, student, indices, kept, log_probs, ctx.sizes, weights, labels, *ctx.settings, *ctx.needs
        )
        return *map(asked, grads, ctx.needs), None


# All teachers' entries of a row side by side, [N, K]; those that are not kept are of the bucket. grad_loss: what comes back to the
# loss; None: 1
# loss (scalar, or [N] for "none"), grad_student, grad_weights
@define(
    "topk_bucket_loss",
    "(Tensor? grad_loss, Tensor student, Tensor indices, Tensor? kept, Tensor log_probs, int[] sizes, Tensor? weights, Tensor? labels, "
    f"{_kd.TOPK_SETTINGS}, str divergence, float beta, bool need_student_grad, bool need_weights_grad) "
    "-> (Tensor, Tensor, Tensor)",
    triton=None,
    gpu=False,
)
def _(grad_loss, student, indices, kept, log_probs, sizes, weights, labels, *settings):
    reduction, n = settings[5], student.shape[0]
    wide = wide_dtype(student, log_probs, weights)
    return (
        student.new_empty((n,) if reduction == "none" else (), dtype=wide),
        *_kd.fake_grads(student, len(sizes), student.dtype, wide, settings[-2:]),
    )


# --- the GPUs'


def swept_loss(
    chosen: str, given: TopkInputs, divergence: Divergence, *, need_stats: bool
) -> tuple[Tensor, KDStats | None]:
    """The loss on a GPU, and with ``need_stats`` the statistics. Indices of NOBODY are of the bucket."""
    student, indices, log_probs, sizes, weights, labels, options, _ = given
    weights = None if weights is None else weights.float().expand(len(student), -1)
    needs = needs_grad(student), needs_grad(weights)
    settings = *_kd.settings(options, labels is not None), divergence.name, divergence.beta
    of_sweep = *sweep_settings(options, labels is not None), False
    loss, stats = run(
        TopkBucketRows, any(needs), student, weights,
        (chosen, labels, indices, log_probs.float(), sizes, settings, of_sweep, needs, need_stats),
    )  # fmt: skip
    return loss, _kd.named_stats(stats) if need_stats else None


class TopkBucketRows(torch.autograd.Function):
    """The loss, and with ``need_stats`` what ``topk_bucket_stats`` gives. ``needs``: a gradient to the student, and to the
    weights."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weights: Tensor | None, rest: tuple) -> tuple[Tensor, Tensor]:
        backend, labels, indices, log_probs, sizes, settings, of_sweep, needs, need_stats = rest
        ctx.backend, ctx.of_sweep, ctx.needs = backend, of_sweep, needs
        raw: Any = kernels(backend)
        found, z = raw.topk_bucket_fwd.default(student, indices, None, labels, *of_sweep, need_stats)
        given = log_probs, sizes, weights, labels
        loss, *made = raw.topk_bucket_rows.default(found, z, student, indices, *given, *settings)
        stats = found.new_empty(0)
        if need_stats:
            temperature, ignore_index = of_sweep[:2]
            stats = raw.topk_bucket_stats.default(
                found, z, indices, *given, student.shape[1], temperature, ignore_index, "bucket", False
            )
        ctx.mark_non_differentiable(stats)
        save(ctx, student, weights, labels, found, *made)
        return loss, stats

    @staticmethod
    @first_order("topk_kd_loss")
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple:
        student, _, labels, found, of_sums, of_z, heads, of_weights = saved(ctx)
        by, grad = grad_loss.unsqueeze(-1), None
        if ctx.needs[0]:
            grad = kernels(ctx.backend).topk_bucket_bwd.default(
                of_sums * by, of_z * by, student, heads, labels, found, *ctx.of_sweep
            )
        return grad, of_weights * by if ctx.needs[1] else None, None


# The loss of what `topk_bucket_fwd` finds, and its gradients to that, as `topk_bucket_bwd` takes them. Indices of NOBODY are of the
# bucket; heads has each class once, and NOBODY elsewhere.
# loss (scalar, or [N] for "none"), grad_sums [N, 4] and grad_z [N, K] in float64, heads [N, K], grad_weights [N, T]
@define(
    "topk_bucket_rows",
    "(Tensor found, Tensor z, Tensor student, Tensor indices, Tensor log_probs, int[] sizes, Tensor? weights, Tensor? labels, "
    f"{_kd.TOPK_SETTINGS}, str divergence, float beta) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton="topk_bucket_rows",
    cpu=False,
)
def _(found, z, student, indices, log_probs, sizes, weights, labels, *settings):
    n = student.shape[0]
    return (
        log_probs.new_empty((n,) if settings[5] == "none" else ()),
        found.new_empty(n, 4),
        torch.empty_like(z, memory_format=torch.contiguous_format),
        torch.empty_like(indices, memory_format=torch.contiguous_format),
        log_probs.new_empty(n, len(sizes)),
    )


# --- statistics


@torch.no_grad()
def kernel_stats(chosen: str, given: TopkInputs) -> KDStats:
    """Those of all tails. Indices of NOBODY are of the bucket."""
    student, indices, log_probs, sizes, weights, labels, options, _ = given
    wide = given.wide
    weights = None if weights is None else weights.to(wide).expand(len(student), -1)
    temperature, ignore_index, in_float64 = float(options.temperature), options.ignore_index, wide == torch.float64
    raw: Any = kernels(chosen)
    found, z = raw.topk_bucket_fwd.default(
        student, indices, None, labels, temperature, ignore_index, False, False, in_float64, True
    )
    return _kd.named_stats(
        raw.topk_bucket_stats.default(
            found, z, indices, log_probs.to(wide), sizes, weights, labels, student.shape[1], temperature, ignore_index,
            options.mode, in_float64,
        )
    )  # fmt: skip


# From what `topk_bucket_fwd` finds, of every row: the entropies of student and target, what the teachers retain, whether both are
# largest at the same class, and each teacher's KL
# [N, 4 + T], in float32 or float64
@define(
    "topk_bucket_stats",
    "(Tensor found, Tensor z, Tensor indices, Tensor log_probs, int[] sizes, Tensor? weights, Tensor? labels, int classes, "
    "float temperature, int ignore_index, str tail, bool in_float64) -> Tensor",
    triton="topk_bucket_stats",
)
def _(found, z, indices, log_probs, sizes, weights, labels, classes, temperature, ignore_index, tail, in_float64):
    return found.new_empty(len(found), 4 + len(sizes), dtype=torch.float64 if in_float64 else torch.float32)
