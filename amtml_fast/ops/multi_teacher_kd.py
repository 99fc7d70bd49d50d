"""Weighted multi-teacher distillation loss (Eq 7-8)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import (
    asked,
    define,
    empty,
    first_order,
    kernels,
    may_overwrite_saved,
    needs_grad,
    operator,
    save,
    save_grads,
    saved,
    scaled_rows,
)
from amtml_fast.ops._vocabulary import DTensors, splits, vocabulary_of
from amtml_fast.ops._vocabulary_rows import split_loss
from amtml_fast.ops.divergence import ALL_MODES, check_options, divergence_loss, row_numbers
from amtml_fast.terms import KDOptions, KDTerms, divergence_numbers, divergence_of, shaped_stats, wide_dtype

MODES = ("mixture", "sum")  # of Eq 7-8

operator("multi_teacher_kd")


def multi_teacher_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    teacher_weights: Tensor | None,
    labels: Tensor | None = None,
    *,
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
    """Weighted multi-teacher distillation loss (Eq 7-8), with any of six divergences D(p, q)::

        q, p_t = softmax(student / temperature), softmax(teacher_t / teacher_temperature_t)
        D = D(sum_t w_t p_t, q)                             # mode "mixture": Eq 7
        D = sum_t w_t D(p_t, q)                             # mode "sum"
        D = D(softmax(sum_t w_t teacher_t / teacher_temperature_t), q)    # mode "logits"
        loss = (1 - alpha) * cross_entropy(student, labels) + alpha * temperature**2 * D
        loss = temperature**2 * D         # without labels: alpha plays no part

    Args:
        student_logits: [N, C], or [B, S, C] taken as B * S rows. Pixels of maps [B, C, H, W] are the rows
            ``maps.movedim(1, -1).flatten(0, 2)``.
        teacher_logits: T tensors shaped like ``student_logits``, read in place, or one [T, N, C] tensor. Teachers are
            frozen: one that requires grad is an error. Pad the shorter of two vocabularies with -inf.
        teacher_weights: [N, T], [T] (the same for every row) or None (uniform); [B, S, T] or [B * S, T] with [B, S, C].
            Finite and not negative; need not sum to 1. "jsd" and the skewed divergences are divergences only where they
            do, or in mode "logits".
        labels: [N] or [B, S] integer classes, or None.
        temperature: > 0; or a tensor, one for each row, [N] or [B, S], or [] for all, which gets no gradient.
        alpha: share of D in [0, 1]; or, with labels, a tensor, one for each row, [N] or [B, S], or [] for all, whose gradient is
            exact.
        mode: how teachers are combined, see above. ``"mixture"`` and ``"sum"`` have the same student gradient for
            ``"forward_kl"`` where the weights sum to 1.
        reduction: ``"none"`` (one value a row, shaped like ``labels``), ``"sum"``, ``"batchmean"`` (divided by the rows
            that are not ignored) or ``"mean"`` (D divided by the number of classes too, as ``nn.KLDivLoss`` does).
        t2_scale: multiply D by ``temperature**2``.
        ignore_index: rows with this label count 0 in value, gradient and denominator.
        label_smoothing: of the cross-entropy, in [0, 1].
        num_items_in_batch: replaces the denominator of ``"batchmean"`` (gradient accumulation, data parallel): an int or
            a 0-d tensor of any dtype. It may be 0 where every row is ignored; the loss is 0 then. Where rows count, 0 is an
            error; on a GPU and in compiled code, which do not look at values, the loss is then 1e36 or more, or inf.
        divergence: D(p, q), with KL(a || b) = sum_c a_c log(a_c / b_c) and ``b`` for ``beta``:

            - ``"forward_kl"``: KL(p || q), Eq 8. ``"reverse_kl"``: KL(q || p).
            - ``"jsd"``: b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q.
            - ``"skew_kl"``: KL(p || b p + (1 - b) q). ``"skew_reverse_kl"``: KL(q || (1 - b) p + b q).
            - ``"tvd"``: half of sum_c |p_c - q_c|; gradient 0 where they are equal to the last bit.
        beta: between 0 and 1, both excluded. None: 0.5 for ``"jsd"``, 0.1 for the skewed ones; the others have none.
        teacher_temperature: of all teachers, or T numbers; None: ``temperature``. Its square scales nothing.
        return_stats: return ``(loss, KDStats)``: entropies, each teacher's KL and more for every row, detached.
        process_group: a ``torch.distributed.ProcessGroup`` of P processes that share the classes: the r-th gives logits
            [N, C / P] of student and teachers, of the r-th part of the classes. All else is the same on all processes, labels are
            numbers in [0, C), and each process gets the whole loss and calls backward with the same gradient. Its logits get
            their gradient, weights and alpha the whole one. DTensors of logits, ``Shard(-1)`` on a mesh of 1 dimension, need
            no group. See docs/method.md for what runs on kernels.

    Returns:
        Scalar, or one value a row for ``"none"``; float32 (float64 if an input is).

    A logit of -inf is probability 0 with gradient 0. Where only the student has a class, ``"reverse_kl"`` is +inf, with
    gradient 0 at that class. Gradients flow to ``student_logits``, ``teacher_weights`` and ``alpha``.

    Raises:
        ValueError, TypeError, RuntimeError: an argument that does not fit; nothing is computed then. On a GPU a
            label out of range stops the CUDA kernel or makes its row NaN (Triton); the values of weights, ``temperature`` and
            ``alpha`` are not looked at.
    """
    name = "multi_teacher_kd_loss"
    if splits(student_logits, -1):
        parts = DTensors(name, process_group, "student_logits", student_logits)
        of_rows = teacher_weights, labels, temperature, alpha, num_items_in_batch
        names = "teacher_weights", "labels", "temperature", "alpha", "num_items_in_batch"
        teacher_weights, labels, temperature, alpha, num_items_in_batch = map(parts.whole, names, of_rows)
        student_logits = parts.part("student_logits", student_logits, -1)
        teacher_logits = parts.stacked("teacher_logits", teacher_logits)
        process_group = parts.group
    rows, classes, teachers = check_arguments(
        name, student_logits, teacher_logits, teacher_weights, labels, ignore_index
    )
    labels = _kd.as_long(labels)
    vocabulary = vocabulary_of(name, process_group, classes)
    checks.one_of(name, "mode", mode, ALL_MODES)
    checks.one_of(name, "reduction", reduction, _kd.REDUCTIONS)
    if num_items_in_batch is not None:
        _kd.check_num_items(name, num_items_in_batch, reduction, labels, ignore_index)
    student, weights = student_logits, teacher_weights
    if weights is not None and weights.dim() != 2:
        weights = weights.reshape(-1, len(teachers))
    if student.dim() != 2:
        student, teachers = student.reshape(rows, classes), [t.reshape(rows, classes) for t in teachers]
        labels = None if labels is None else labels.reshape(rows)
    row_reduction = reduction if num_items_in_batch is None else "sum"
    eq8 = divergence == "forward_kl" and mode != "logits" and beta is None and teacher_temperature is None
    eq8 = eq8 and vocabulary is None
    if eq8 and not (return_stats or isinstance(temperature, Tensor) or isinstance(alpha, Tensor)):
        options = KDOptions(temperature, alpha, mode, row_reduction, t2_scale, ignore_index, label_smoothing)
        loss = _of_rows(student, teachers, weights, labels, options, need_terms=False)
        return _kd.per_item(loss, student_logits, labels, reduction, ignore_index, num_items_in_batch)
    check_options(name, temperature, alpha, mode, label_smoothing, divergence, beta, teacher_temperature, len(teachers))
    temperature, alpha = row_numbers(name, student_logits, temperature, alpha, labels)
    options = divergence_numbers(temperature, alpha, mode, row_reduction, t2_scale, ignore_index, label_smoothing)
    more = divergence_of(temperature, alpha, divergence, beta, teacher_temperature, len(teachers))
    given = student, teachers, weights, labels, options, more
    if vocabulary is None:
        loss, stats = divergence_loss(*given, need_stats=return_stats)
    else:
        loss, stats = split_loss(name, vocabulary, *given, need_stats=return_stats)
    loss = _kd.per_item(loss, student_logits, labels, reduction, ignore_index, num_items_in_batch)
    return (loss, shaped_stats(stats, student_logits.shape[:-1])) if return_stats else loss


def multi_teacher_kd(
    student: Tensor, teachers: Sequence[Tensor], weights: Tensor | None, labels: Tensor | None, options: KDOptions
) -> KDTerms:
    """``multi_teacher_kd_loss`` on checked rows [N, C], with its parts. For ``AMTMLLoss``."""
    checks.one_of("multi_teacher_kd_loss", "mode", options.mode, MODES)
    return KDTerms(*_of_rows(student, teachers, weights, labels, options, need_terms=True))


def check_arguments(
    function: str,
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    teacher_weights: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
) -> tuple[int, int, list[Tensor]]:
    """Rows, classes and the list of teachers of arguments that fit together."""
    _kd.check_logits(function, student_logits)
    wanted_shape, device = student_logits.shape, student_logits.device
    teachers = _kd.one_a_teacher(function, "teacher_logits", teacher_logits, student_logits, "C")
    for i, teacher in enumerate(teachers):
        if (
            isinstance(teacher, Tensor)
            and teacher.dtype in checks.DTYPES
            and teacher.layout is torch.strided
            and teacher.shape == wanted_shape
            and teacher.device == device
            and not teacher.requires_grad
        ):
            continue
        argument = f"teacher_logits[{i}]"
        checks.tensor(function, argument, teacher)
        checks.same_shape(function, argument, teacher, "student_logits", student_logits)
        checks.same_device(function, argument, teacher, "student_logits", student_logits)
        _kd.check_frozen(function, argument, teacher)
    rows, classes = _kd.check_rows(function, student_logits, len(teachers), teacher_weights, labels, ignore_index)
    return rows, classes, teachers


def _of_rows(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    options: KDOptions,
    *,
    need_terms: bool,
) -> Any:
    """The loss; with ``need_terms`` all of ``KDTerms``, whose loss and probabilities are differentiable."""
    name = "multi_teacher_kd_loss"
    _kd.check_numbers(name, options.temperature, options.alpha, options.label_smoothing)
    chosen = backend.choose("multi_teacher_kd", student, weights, *teachers, teachers=len(teachers))
    # Of the weights as they were given: those of all rows are looked at where every row is ignored, too.
    values = name, labels, student.shape[1], options.ignore_index, None if need_terms else weights
    if chosen != "cpp":  # the C++ kernel checks values itself
        _kd.check_values(*values)
    if chosen == "reference":
        terms = reference.multi_teacher_kd(student, list(teachers), weights, labels, options)
        return terms if need_terms else terms.loss
    wide = wide_dtype(student, *teachers, weights)
    if weights is not None:
        weights = weights if weights.dtype == wide else weights.to(wide)
        weights = weights if weights.shape[0] == student.shape[0] else weights.expand(student.shape[0], -1)
    settings, needs = _kd.settings(options, labels is not None), (needs_grad(student), needs_grad(weights))
    return _kd.run(
        values, MultiTeacherKD, any(needs), student, weights,
        (chosen, labels, settings, needs, wide, need_terms, teachers),
    )  # fmt: skip


class MultiTeacherKD(torch.autograd.Function):
    """Returns the loss, or with ``need_terms`` what ``KDTerms`` holds: ce and kl are not differentiable, the rest is.

    ``needs``: a gradient to the student, and to the weights; ``wide``: the dtype of sums.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, weights: Tensor | None, rest: tuple) -> Any:
        # What gets no gradient comes as one argument: autograd takes its time for each.
        backend, labels, settings, needs, wide, need_terms, teachers = rest
        # With probabilities given out, backward has to add what comes back through them: it recomputes the rest too.
        rounded = student.dtype == torch.bfloat16 and wide == torch.float32
        in_forward = (student.dtype == wide or rounded) and not need_terms
        now = needs if in_forward else (False, False)
        out = kernels(backend).multi_teacher_kd_fwd.default(
            student, teachers, weights, labels, *settings, *now, need_terms
        )
        loss, ce, kl, student_probs, soft_targets, stats, grad_student, grad_weights = out
        ctx.in_forward, ctx.settings, ctx.needs, ctx.loss_shape = in_forward, settings, needs, loss.shape
        ctx.backend, ctx.rounded = backend, rounded
        ctx.set_materialize_grads(False)
        if in_forward and rounded:
            save(ctx, grad_student, grad_weights, student, weights, labels, stats, *teachers)
        elif in_forward:
            save_grads(ctx, (grad_student, grad_weights), (student, weights), needs)
        else:
            save(ctx, student, weights, labels, stats, *teachers)
        if not need_terms:
            return loss
        ctx.mark_non_differentiable(ce, kl)
        return loss, ce, kl, student_probs, soft_targets

    @staticmethod
    @first_order("multi_teacher_kd_loss")
    def backward(ctx: Any, grad_loss: Tensor | None, *grads: Tensor | None) -> tuple:
        if ctx.in_forward:
            if grad_loss is None:
                return None, None, None
            made = _rescaled(ctx, grad_loss) if ctx.rounded else scaled_rows(ctx, grad_loss)
            return *map(asked, made, ctx.needs), None
        need_student, need_weights = ctx.needs
        student, weights, labels, stats, *teachers = saved(ctx)
        if grad_loss is None:
            grad_loss = stats.new_zeros(ctx.loss_shape)
        through_probs = grads[2:4] or (None, None)
        grad_student, grad_weights = kernels(ctx.backend).multi_teacher_kd_bwd.default(
            grad_loss, *through_probs, student, teachers, weights, labels, stats, *ctx.settings, *ctx.needs
        )
        return asked(grad_student, need_student), asked(grad_weights, need_weights), None


def _rescaled(ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """The bfloat16 gradients of ``MultiTeacherKD`` that forward has made, for this gradient of the loss."""
    kept = saved(ctx)  # once: a checkpoint gives each tensor but once
    *grads, student, weights, labels, stats = kept[:6]
    if not may_overwrite_saved(ctx):
        grads = [g.clone() for g in grads]
    kernels(ctx.backend).multi_teacher_kd_rescale_.default(
        *grads, grad_loss, student, kept[6:], weights, labels, stats, *ctx.settings
    )
    return grads


# loss, ce, kl (scalars, or [N] for "none"), student_probs and soft_targets [N, C], stats [N, 3 + 2T], grad_student,
# grad_weights
@define(
    "multi_teacher_kd_fwd",
    f"(Tensor student, Tensor[] teachers, Tensor? weights, Tensor? labels, {_kd.SETTINGS}, bool need_student_grad, "
    "bool need_weights_grad, bool need_probs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _(student, teachers, weights, labels, *settings):
    reduction, needs, need_probs = settings[5], settings[-3:-1], settings[-1]
    wide = wide_dtype(student, *teachers, weights)
    n, c = student.shape
    value = [student.new_empty((n,) if reduction == "none" else (), dtype=wide) for _ in range(3)]
    probs = [empty(student, need_probs, (n, c), wide) for _ in range(2)]
    stats = student.new_empty(n, 3 + 2 * len(teachers), dtype=wide)
    made = torch.bfloat16 if needs[0] and student.dtype == torch.bfloat16 else wide
    return *value, *probs, stats, *_kd.fake_grads(student, len(teachers), made, wide, needs)


@define(
    "multi_teacher_kd_bwd",
    "(Tensor grad_loss, Tensor? grad_probs, Tensor? grad_targets, Tensor student, Tensor[] teachers, Tensor? weights, "
    f"Tensor? labels, Tensor stats, {_kd.SETTINGS}, bool need_student_grad, bool need_weights_grad) "
    "-> (Tensor, Tensor)",
)
def _(grad_loss, grad_probs, grad_targets, student, teachers, weights, labels, stats, *settings):
    return _kd.fake_grads(student, len(teachers), student.dtype, stats.dtype, settings[-2:])


# Rescales, in place, the gradients that forward made for an incoming gradient of 1 (bfloat16 student, and weights) to
# grad_loss.
@define(
    "multi_teacher_kd_rescale_",
    "(Tensor(a!) grad_student, Tensor(b!) grad_weights, Tensor grad_loss, Tensor student, Tensor[] teachers, "
    f"Tensor? weights, Tensor? labels, Tensor stats, {_kd.SETTINGS.replace('mode', 'kl_of')}) -> ()",
)
def _(*_): ...
