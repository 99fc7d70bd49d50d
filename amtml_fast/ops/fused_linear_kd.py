"""``multi_teacher_kd_loss`` from hidden states and output layers: no logits [N, C] are ever held.

For a chunk of rows a product makes the logits, the row kernels of ``multi_teacher_kd``, ``divergence`` or ``topk_kd`` make the loss
and its gradient to them, and two products make of it gradients to the hidden states and the weight. The products are torch's; on the
CPU, in float32, those of csrc/cpu/fused_linear_kd.cpp. Value and gradients come from one pass; backward multiplies them by the incoming gradient.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import (
    define,
    first_order,
    in_dtypes,
    kernels,
    may_overwrite_saved,
    needs_grad,
    operator,
    run,
    save,
    save_grads,
    saved,
    saved_tensors,
    scaled,
)
from amtml_fast.ops._linear_checks import check_classes, check_index, check_tensors, of_rows, parts_of_teachers
from amtml_fast.ops._linear_chunks import NAME, Call, Settings
from amtml_fast.ops._vocabulary import DTensors, replicated, splits, vocabulary_of
from amtml_fast.ops._vocabulary_linear import split_linear_loss
from amtml_fast.ops.divergence import check_options, check_values, row_numbers
from amtml_fast.terms import (
    Divergence,
    KDOptions,
    LinearTeacher,
    TopKTeacher,
    divergence_numbers,
    divergence_of,
    shaped_stats,
    wide_dtype,
)

operator("fused_linear_kd")  # on the row kernels of each backend

ACCUMULATE = ("fp32", "bf16")


def fused_linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teachers: Sequence[Tensor | LinearTeacher | TopKTeacher],
    teacher_weights: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_index: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_size: int | None = None,
    accumulate: str = "fp32",
    temperature: float | Tensor = 4.0,
    alpha: float | Tensor = 0.7,
    mode: str = "mixture",
    reduction: str = "batchmean",
    t2_scale: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items_in_batch: int | Tensor | None = None,
    divergence: str = "forward_kl",
    beta: float | None = None,
    teacher_temperature: float | Sequence[float] | None = None,
    return_stats: bool = False,
    process_group: Any = None,
) -> Any:
    """``multi_teacher_kd_loss`` (Eq 7-8) from hidden states and output layers, whose logits are never held all at once::

        student = cap(logit_scale * (student_hidden @ student_weight.T + student_bias))
        teacher_t = cap(logit_scale * (hidden_t @ weight_t.T + bias_t))    # a LinearTeacher
        cap(x) = softcap * tanh(x / softcap), -inf where x is              # x itself without softcap
        loss = multi_teacher_kd_loss(student, teachers, teacher_weights, labels, ...)

    The work is done in chunks of rows. Beside the gradients it takes memory for (2 + T) chunks of logits.

    Args:
        student_hidden: [N, H], or [B, S, H] taken as B * S rows.
        student_weight: [C, H], the output layer; it may be tied to an embedding.
        teachers: a list of T teachers, of any mixture of kinds. All are frozen: a tensor that requires grad is an error.

            - ``LinearTeacher(hidden [N, H_t], weight [C, H_t], bias [C] or None)``. H_t is the teacher's own.
            - a tensor of logits [N, C], read in place. ``logit_scale`` and ``softcap`` do not change it.
            - ``TopKTeacher(indices [N, k], log_probs [N, k])``, made **at this temperature**: ``topk_kd_loss`` with tail
              "renormalize". ``teacher_temperature`` plays no part for it.

            [B, S, ...] where the student has it. Vocabularies are one: fill up a shorter one with rows of zeros in the weight
            and a bias of -inf (or logits of -inf).
        teacher_weights: [N, T], [T] (the same for every row) or None (uniform); [B, S, T] or [B * S, T] with [B, S, H].
        labels: [N] or [B, S] integer classes, or None.
        student_bias: [C] or None.
        teacher_index: [N] or [B, S] int64: row i learns from this teacher alone, with weight 1; not with ``teacher_weights``.
            Of each teacher only the products of its own rows are made.
        logit_scale: > 0.
        softcap: > 0, or None.
        chunk_size: rows at a time; None chooses by the shapes. The result does not depend on it, but for rounding.
        accumulate: ``"fp32"``, or ``"bf16"``: the sum over chunks of the gradient to ``student_weight`` is held in bfloat16. That
            saves half of its memory, and rounds once a chunk.
        temperature, alpha, mode, reduction, t2_scale, ignore_index, label_smoothing, num_items_in_batch, divergence, beta,
            teacher_temperature, return_stats: as in ``multi_teacher_kd_loss``.
        process_group: as in ``multi_teacher_kd_loss``, with output layers and biases of the r-th part of the classes, [C / P, H] and
            [C / P], and logits of teachers [N, C / P]. Hidden states and top-k teachers, with classes in [0, C), are the same on
            all processes. The gradient to ``student_hidden`` is the whole one, summed over the processes: no more is to be summed.
            DTensors of the layers, ``Shard(0)`` on a mesh of 1 dimension, need no group.

    Returns:
        Scalar, or one value a row for ``"none"``; float32 (float64 if an input is). With ``return_stats`` also ``KDStats``: with
        ``teacher_index``, ``teacher_kl`` is 0 for the teachers that a row does not learn from.

    Gradients flow to ``student_hidden``, ``student_weight``, ``student_bias``, ``teacher_weights`` and ``alpha``. Value and
    gradients are made in one forward pass; with ``reduction="none"`` backward makes the products again.

    Logits are float32 (float64 if an input is) for every dtype of the inputs, under autocast, too. On a GPU 16-bit hidden states
    and weight of the same dtype are multiplied as they are, and the gradient of the logits is rounded to that dtype before its
    products; where the two differ, both are converted. On the CPU all products are of the logits' dtype.

    On the CPU an ignored row costs nothing. On a GPU it costs as much as another, because to count them would be a sync; with
    ``teacher_index`` there is one sync a call, which counts both.

    Raises:
        ValueError, TypeError, RuntimeError: an argument that does not fit; nothing is computed then. On a GPU the values of
            ``teacher_index`` are, a label out of range stops the CUDA kernel or makes its row NaN (Triton), and those of weights,
            ``temperature`` and ``alpha`` are not looked at.
    """
    if splits(student_weight, 0) and replicated(student_hidden):
        parts = DTensors(NAME, process_group, "student_weight", student_weight)
        student_hidden = parts.whole("student_hidden", student_hidden)
        teacher_weights = parts.whole("teacher_weights", teacher_weights)
        labels = parts.whole("labels", labels)
        teacher_index = parts.whole("teacher_index", teacher_index)
        temperature = parts.whole("temperature", temperature)
        alpha = parts.whole("alpha", alpha)
        num_items_in_batch = parts.whole("num_items_in_batch", num_items_in_batch)
        student_weight = parts.part("student_weight", student_weight, 0)
        student_bias = parts.part("student_bias", student_bias, 0)
        teachers, process_group = parts_of_teachers(parts, teachers), parts.group
    part = student_weight.shape[0] if isinstance(student_weight, Tensor) and student_weight.dim() == 2 else 0
    vocabulary = vocabulary_of(NAME, process_group, part)
    kinds, flat = check_tensors(student_hidden, student_weight, student_bias, teachers, vocabulary)
    classes = part if vocabulary is None else vocabulary.classes
    leading = student_hidden.shape[:-1]
    rows = math.prod(leading)
    like = student_hidden.detach().new_empty(()).expand(*leading, classes)  # what the logits would be like
    _kd.check_rows(NAME, like, len(kinds), teacher_weights, labels, ignore_index, "student_hidden")
    check_index(teacher_index, teacher_weights, like)
    checks.one_of(NAME, "reduction", reduction, _kd.REDUCTIONS)
    checks.one_of(NAME, "accumulate", accumulate, ACCUMULATE)
    checks.number(NAME, "logit_scale", logit_scale, *checks.POSITIVE)
    if softcap is not None:
        checks.number(NAME, "softcap", softcap, *checks.POSITIVE)
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int)):
        raise TypeError(f"{NAME}: chunk_size must be an int >= 1 or None, got {chunk_size!r}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{NAME}: chunk_size must be an int >= 1 or None, got {chunk_size}")
    if num_items_in_batch is not None:
        _kd.check_num_items(NAME, num_items_in_batch, reduction, labels, ignore_index)
    check_options(NAME, temperature, alpha, mode, label_smoothing, divergence, beta, teacher_temperature, len(kinds))
    temperature, alpha = row_numbers(NAME, like, temperature, alpha, labels, "student_hidden")

    more = divergence_of(temperature, alpha, divergence, beta, teacher_temperature, len(kinds))
    weights = None if teacher_weights is None else teacher_weights.reshape(-1, len(kinds))
    labels, index = (None if x is None else _kd.as_long(x.reshape(rows)) for x in (labels, teacher_index))
    check_values(NAME, labels, ignore_index, more, classes, weights)
    check_classes(kinds, flat, labels, index, classes, ignore_index)
    floating = [x for x in flat if x.is_floating_point()]
    wide = wide_dtype(student_hidden, student_weight, student_bias, weights, *floating)
    more = more.in_dtype(wide)
    numbers = divergence_numbers(temperature, alpha, mode, reduction, t2_scale, ignore_index, label_smoothing)
    row_kernel, at_once = _row_kernel(kinds, numbers, more, index, return_stats), 1 if index is not None else len(kinds)
    ks = [0]  # of teachers whose entries a row kernel takes
    if row_kernel == "topk_kd" and vocabulary is None:
        ks = [x.shape[-1] for x in flat if not x.is_floating_point()]
    chosen = backend.choose(
        "fused_linear_kd", student_hidden, student_weight, student_bias, weights, more.alpha, *flat,
        teachers=at_once, entries=max(ks) if at_once == 1 else sum(ks),
    )  # fmt: skip
    if chosen == "reference" and vocabulary is None:
        return reference.fused_linear_kd_loss(
            student_hidden, student_weight, teachers, teacher_weights, labels,
            student_bias=student_bias, teacher_index=teacher_index, logit_scale=logit_scale, softcap=softcap,
            temperature=temperature, alpha=alpha, mode=mode, reduction=reduction, t2_scale=t2_scale,
            ignore_index=ignore_index, label_smoothing=label_smoothing, num_items_in_batch=num_items_in_batch,
            divergence=divergence, beta=beta, teacher_temperature=teacher_temperature, return_stats=return_stats,
        )  # fmt: skip

    hidden = student_hidden.reshape(rows, student_hidden.shape[-1])
    weights = None if weights is None else weights.to(wide).expand(rows, -1)
    alphas, temperatures = more.alpha, more.temperature
    flat = [x.reshape(rows, x.shape[-1]) if row_wise else x for x, row_wise in zip(flat, of_rows(kinds))]
    row_reduction = reduction if num_items_in_batch is None else "sum"
    ce_weight, kl_weight = _kd.term_weights(numbers.alpha, labels is not None)
    settings = Settings(
        chosen, row_kernel, more.name, more.beta, mode,
        list(more.teacher_temperatures), float(numbers.temperature), t2_scale, ce_weight, kl_weight, row_reduction,
        ignore_index, float(label_smoothing), float(logit_scale), float(softcap or 0), min(chunk_size or 0, checks.INT64 - 1), accumulate == "bf16",
    )  # fmt: skip
    if vocabulary is None:
        inputs = hidden, student_weight, student_bias, weights, alphas
        needs = tuple(needs_grad(x) for x in inputs)
        out = run(
            FusedLinearKD, any(needs), *inputs, labels, index, temperatures, kinds, settings, needs, return_stats, *flat
        )
        loss, stats = (out[0], _kd.named_stats(out[1])) if return_stats else (out, None)
    else:
        loss, stats = split_linear_loss(
            vocabulary, hidden, student_weight, student_bias, weights, labels, index, temperatures, flat, kinds, settings,
            numbers._replace(reduction=row_reduction), more, wide, need_stats=return_stats,
        )  # fmt: skip
    loss = _kd.per_item(loss, like, labels, reduction, ignore_index, num_items_in_batch)
    if stats is None:
        return loss
    routed = None
    if index is not None:
        routed = index.unsqueeze(1) == torch.arange(len(kinds), dtype=index.dtype, device=index.device)
        weights = routed.to(wide)
    return loss, shaped_stats(reference.linear_stats(stats, teachers, weights, routed), leading)


# --- the call


def _row_kernel(
    kinds: list[str], options: KDOptions, divergence: Divergence, index: Tensor | None, need_stats: bool
) -> str:
    """The operator whose kernels take the chunks: the most special one that can."""
    if need_stats or divergence.name != "forward_kl" or options.mode == "logits":
        return "divergence"
    if divergence.alpha is not None or divergence.temperature is not None:
        return "divergence"
    if all(kind == "topk" for kind in kinds) and (options.mode == "mixture" or index is not None):
        return "topk_kd"
    return "divergence" if divergence.teacher_temperatures else "multi_teacher_kd"


class FusedLinearKD(torch.autograd.Function):
    """The loss, or with ``need_stats`` the loss and the statistics [N, 4 + T], which are not differentiable.

    ``needs``: a gradient to the hidden states, the weight, the bias, the teachers' weights and alpha.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        alphas: Tensor | None,
        labels: Tensor | None,
        index: Tensor | None,
        temperatures: Tensor | None,
        kinds: list[str],
        settings: Settings,
        needs: tuple[bool, ...],
        need_stats: bool,
        *teachers: Tensor,
    ) -> Any:
        ctx.in_forward, ctx.needs = settings.reduction != "none", needs
        now = needs if ctx.in_forward else (False,) * len(needs)
        inputs = hidden, weight, bias, weights, alphas
        loss, *grads, stats = torch.ops.amtml.fused_linear_kd_fwd.default(
            *inputs, labels, index, temperatures, teachers, kinds, *settings, *now, need_stats
        )
        ctx.set_materialize_grads(False)
        ctx.kinds, ctx.settings, ctx.backend = kinds, settings, settings.backend
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        if ctx.in_forward:
            save_grads(ctx, grads, inputs, needs)
        else:
            save(ctx, *inputs, labels, index, temperatures, *teachers)
        if not need_stats:
            return loss
        ctx.mark_non_differentiable(stats)
        return loss, stats

    @staticmethod
    @first_order(NAME)
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple:
        fixed = (None,) * (len(ctx.needs_input_grad) - 5)
        if grad_loss is None:
            return (None,) * 5 + fixed
        if ctx.in_forward:
            grads = _times(ctx, saved_tensors(ctx)[:5], grad_loss)
        else:
            kept = saved(ctx)  # once: a checkpoint gives each tensor but once
            *inputs, labels, index, temperatures = kept[:8]
            grads = torch.ops.amtml.fused_linear_kd_bwd.default(
                grad_loss, *inputs, labels, index, temperatures, kept[8:], ctx.kinds, *ctx.settings, *ctx.needs
            )
        return *in_dtypes(ctx, grads), *fixed


def _times(ctx: Any, grads: Sequence[Tensor | None], by: Tensor) -> list[Any]:
    """Gradients that forward has saved, times that of the loss."""
    if ctx.backend == "cpp" or not may_overwrite_saved(ctx):
        return scaled(ctx, grads, by)
    for g in grads:
        if g is not None and g.dtype == torch.float32:  # reads nothing where the loss has a gradient of 1
            kernels(ctx.backend).scale_rows_.default(g, by)
        elif g is not None:
            g.mul_(by)
    return list(grads)


# --- the raw ops

_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? weights, Tensor? alphas, Tensor? labels, Tensor? index, "
    "Tensor? temperatures, Tensor[] teachers, str[] kinds, str backend, str row_kernel, str divergence, float beta, str mode, "
    "float[] teacher_temperatures, float temperature, bool t2_scale, float ce_weight, float kl_weight, str reduction, "
    "int ignore_index, float label_smoothing, float logit_scale, float softcap, int chunk_size, bool narrow_sum, "
    "bool need_hidden_grad, bool need_weight_grad, bool need_bias_grad, bool need_weights_grad, bool need_alpha_grad"
)
# loss (scalar, or [N] for "none"), the five gradients, statistics [N, 4 + T]
_FORWARD = f"({_INPUTS}, bool need_statistics) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_BACKWARD = f"(Tensor grad_loss, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"


def _forward(*args: Any) -> tuple[Tensor, ...]:
    return Call(None, *args).run()


def _backward(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = Call(grad_loss, *args, False)
    grads = call.run()[1:6]
    return tuple(g.to(x.dtype) if x is not None else g for g, x in zip(grads, call.inputs))


def _fake_forward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(Call(None, *args).outputs())


def _fake_backward(grad_loss: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = Call(grad_loss, *args, False)
    grads = call.outputs()[1:6]
    return tuple(torch.empty_like(g, dtype=x.dtype) if x is not None else g for g, x in zip(grads, call.inputs))


def _define() -> None:
    """In Python on every device: their schemas are not among those that a backend implements."""
    parts = (
        ("fused_linear_kd_fwd", _FORWARD, _forward, _fake_forward),
        ("fused_linear_kd_bwd", _BACKWARD, _backward, _fake_backward),
    )
    for name, schema, function, fake in parts:
        torch.library.define(f"amtml::{name}", schema)
        torch.library.register_fake(f"amtml::{name}", fake)
        for key in ("CPU", "CUDA", "XPU"):
            torch.library.impl(f"amtml::{name}", key)(function)


_define()

# The products of a chunk of rows on the CPU, float32, written into ``out``; the weight and the hidden states may be 16-bit.
# They beat torch's there, which at a hundred rows take twice as long as with all rows at once.


@define(
    "fused_linear_kd_logits_",
    "(Tensor(a!) out, Tensor hidden, Tensor weight, Tensor? bias, float scale) -> ()",
    triton=None,
    gpu=False,
)
def _(*_): ...


@define(
    "fused_linear_kd_grad_hidden_",
    "(Tensor(a!) out, Tensor grad, Tensor weight, float scale) -> ()",
    triton=None,
    gpu=False,
)
def _(*_): ...


@define(
    "fused_linear_kd_grad_weight_",
    "(Tensor(a!) out, Tensor grad, Tensor hidden, float scale, bool add) -> ()",
    triton=None,
    gpu=False,
)
def _(*_): ...
