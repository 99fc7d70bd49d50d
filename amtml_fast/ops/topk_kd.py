"""``multi_teacher_kd_loss`` where each teacher gives only its k largest classes (Eq 7-8)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, checks, reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import (
    asked,
    define,
    first_order,
    kernels,
    needs_grad,
    operator,
    save,
    save_grads,
    saved,
    scaled_rows,
)
from amtml_fast.ops._topk_named import TopkInputs
from amtml_fast.ops._vocabulary import DTensors, Vocabulary, check_alike, splits, vocabulary_of
from amtml_fast.ops.divergence import check_divergence
from amtml_fast.ops.topk_bucket import bucket_loss, split_tail_loss, topk_stats
from amtml_fast.terms import KDOptions, divergence_of, shaped_stats, wide_dtype

TAILS = ("renormalize", "ignore", "uniform", "bucket")

operator("topk_kd")


def topk_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor | Sequence[Tensor],
    teacher_log_probs: Tensor | Sequence[Tensor],
    teacher_weights: Tensor | None,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
    reduction: str = "batchmean",
    t2_scale: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items_in_batch: int | Tensor | None = None,
    tail: str = "renormalize",
    divergence: str = "forward_kl",
    beta: float | None = None,
    support: str = "teacher",
    return_stats: bool = False,
    process_group: Any = None,
) -> Any:
    """``multi_teacher_kd_loss`` where each teacher gives only its k largest classes (Eq 7-8)::

        q = softmax(student / temperature)
        p_t(c) = exp(log_prob)            # for the classes that teacher t names; ``tail`` sets the rest
        kl = KL(sum_t w_t p_t || q)
        loss = (1 - alpha) * cross_entropy(student, labels) + alpha * temperature**2 * kl
        loss = temperature**2 * kl        # without labels: alpha plays no part

    A row costs O(C + T^2 k), on a GPU a sort of its T k entries as well (CUDA) or their comparison with one another (Triton), and no
    dense teacher is built. To make what a teacher stores from its logits [N, C]::

        top = (teacher_logits / temperature).log_softmax(-1).topk(k)
        log_probs, indices = top.values, top.indices

    Args:
        student_logits: [N, C], or [B, S, C] taken as B * S rows.
        teacher_indices: T tensors [N, k] (or [B, S, k]) of int64 or int32 classes, or one [T, N, k] tensor; k may differ
            between teachers. A class that a row of one teacher names twice has the sum of both probabilities.
        teacher_log_probs: natural logarithms of their probabilities, of the same shapes. They must have been made **at
            this temperature**: log-probabilities stored at temperature 1 go with ``temperature=1``. -inf is probability
            0. Teachers are frozen: one that requires grad is an error.
        teacher_weights: [N, T], [T] (the same for every row) or None (uniform); [B, S, T] or [B * S, T] with [B, S, C].
            Finite and not negative; need not sum to 1.
        labels: [N] or [B, S] integer classes, or None.
        temperature: > 0.
        alpha, reduction, t2_scale, ignore_index, label_smoothing, num_items_in_batch: as in ``multi_teacher_kd_loss``.
        tail: what a teacher gives to the classes that it does not name.

            - ``"renormalize"``: nothing; its probabilities are divided by their sum.
            - ``"ignore"``: nothing; they count as given. With P the mass of the mixture, the value is
              ``sum_c p_c (log p_c - log q_c)`` all the same, at least P log P, which may be below 0; the gradient to the
              student's logits is ``temperature * (P q - p)``.
            - ``"uniform"``: ``max(1 - sum, 0)``, the same share for each.
            - ``"bucket"``: ``1 - sum``, to all of them together, which are one class more, on the student's side too. The loss is
              ``sum_t w_t D(p_t, q)`` over the k + 1 classes of each teacher. Exact: no digits are lost however small the
              student's share is.
        divergence, beta: as in ``multi_teacher_kd_loss``; other than ``"forward_kl"`` with ``tail="bucket"`` only.
        support: ``"student"``, with ``tail="bucket"``: of a teacher's k classes only those among the student's own k largest have
            a class of their own, the others go to the bucket, as recipes for the reverse KL do it. ``"teacher"``: all k.
        return_stats: return ``(loss, KDStats)``. ``retained_mass`` is the teachers' mass in the classes that are given (and, with
            ``support="student"``, kept), and ``teacher_kl`` the KL of what ``tail`` makes of each teacher.
        process_group: as in ``multi_teacher_kd_loss``, with logits [N, C / P]. ``teacher_indices`` are numbers in [0, C), the same
            on all processes, as is all else. A DTensor of logits, ``Shard(-1)`` on a mesh of 1 dimension, needs no group.

    Returns:
        Scalar, or one value a row for ``"none"``; float32 (float64 if an input is).

    A student's logit of -inf is probability 0 with gradient 0. Gradients flow to ``student_logits`` and
    ``teacher_weights``. With all C classes given, every tail gives what ``multi_teacher_kd_loss`` gives (``"bucket"``: with ``mode="sum"``).

    Raises:
        ValueError, TypeError, RuntimeError: an argument that does not fit; nothing is computed then. On a GPU a class or
            label out of range stops the CUDA kernel; Triton looks only with TRITON_DEBUG=1, and makes the row NaN
            without.
    """
    name = "topk_kd_loss"
    if splits(student_logits, -1):
        parts = DTensors(name, process_group, "student_logits", student_logits)
        student_logits, process_group = parts.part("student_logits", student_logits, -1), parts.group
        teacher_indices = parts.whole("teacher_indices", teacher_indices)
        teacher_log_probs = parts.whole("teacher_log_probs", teacher_log_probs)
        teacher_weights, labels = parts.whole("teacher_weights", teacher_weights), parts.whole("labels", labels)
        num_items_in_batch = parts.whole("num_items_in_batch", num_items_in_batch)
    _kd.check_logits(name, student_logits)
    vocabulary = vocabulary_of(name, process_group, student_logits.shape[-1])
    rows, classes, given_indices, given_log_probs = _check_arguments(
        name, student_logits, teacher_indices, teacher_log_probs, teacher_weights, labels, ignore_index, vocabulary
    )
    checks.one_of(name, "reduction", reduction, _kd.REDUCTIONS)
    checks.one_of(name, "tail", tail, TAILS)
    checks.one_of(name, "support", support, ("teacher", "student"))
    check_divergence(name, divergence, beta)
    if tail != "bucket":
        for argument, value, wanted in (("divergence", divergence, "forward_kl"), ("support", support, "teacher")):
            if value != wanted:
                raise ValueError(
                    f'{name}: {argument} must be "{wanted}" with tail "{tail}" (not "bucket"), got "{value}"'
                )
    _kd.check_numbers(name, temperature, alpha, label_smoothing)
    if num_items_in_batch is not None:
        _kd.check_num_items(name, num_items_in_batch, reduction, labels, ignore_index)
    student = student_logits.reshape(rows, classes)
    sizes = [index.shape[-1] for index in given_indices]
    # Side by side in one tensor: beside the student's rows they are small.
    indices = _side_by_side(given_indices, rows, torch.int64)
    log_probs = _side_by_side(given_log_probs, rows, wide_dtype(*given_log_probs))
    weights = None if teacher_weights is None else teacher_weights.reshape(-1, len(sizes))
    labels = None if labels is None else _kd.as_long(labels.reshape(rows))
    row_reduction = reduction if num_items_in_batch is None else "sum"
    options = KDOptions(temperature, alpha, tail, row_reduction, t2_scale, ignore_index, label_smoothing)
    given = TopkInputs(student, indices, log_probs, sizes, weights, labels, options, vocabulary)
    doubt = None
    if vocabulary is not None:
        needs = needs_grad(student), needs_grad(weights)
        settings = options, divergence, beta, support, sizes, student.dtype, log_probs.dtype, return_stats, needs
        doubt = check_alike(
            name, vocabulary, student, settings, integers=[labels, indices], floats=[log_probs, weights]
        )
    if tail == "bucket":
        compared = divergence_of(temperature, alpha, divergence, beta, None, len(sizes))
        loss, stats = bucket_loss(given, compared, support, need_stats=return_stats)
    elif vocabulary is not None:
        loss, stats = split_tail_loss(given, need_stats=return_stats)
    else:
        loss, stats = topk_loss(given), topk_stats(given) if return_stats else None
    loss = loss if doubt is None else loss + doubt.to(loss.dtype)
    loss = _kd.per_item(loss, student_logits, labels, reduction, ignore_index, num_items_in_batch)
    return (loss, shaped_stats(stats, student_logits.shape[:-1])) if return_stats else loss


def topk_loss(given: TopkInputs) -> Tensor:
    """The loss, but for the tail "bucket" and a split vocabulary."""
    student, indices, log_probs, sizes, weights, labels, options, _ = given
    values = given.values
    chosen = backend.choose("topk_kd", student, weights, log_probs, teachers=len(sizes), entries=sum(sizes))
    if chosen != "cpp":  # the C++ kernel checks values itself
        _kd.check_values(*values)
    if chosen == "reference":
        return reference.topk_kd(*given.apart(), need_stats=False)[0]
    wide = given.wide
    weights = None if weights is None else weights.to(wide).expand(student.shape[0], -1)
    settings, needs = _kd.settings(options, labels is not None), (needs_grad(student), needs_grad(weights))
    return _kd.run(
        values, TopkKD, any(needs), student, weights, (chosen, labels, indices, log_probs, sizes, settings, needs, wide)
    )


def _side_by_side(tensors: list[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    """T x [..., k] as one [rows, sum of k] of this dtype: the tensor itself where there is one and it fits."""
    parts = [t.reshape(rows, t.shape[-1]).to(dtype) for t in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _check_arguments(
    function: str,
    student_logits: Tensor,
    teacher_indices: Tensor | Sequence[Tensor],
    teacher_log_probs: Tensor | Sequence[Tensor],
    teacher_weights: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    vocabulary: Vocabulary | None,
) -> tuple[int, int, list[Tensor], list[Tensor]]:
    """Rows, classes, and of every teacher its classes and their log-probabilities."""
    indices = _kd.one_a_teacher(function, "teacher_indices", teacher_indices, student_logits, "k")
    log_probs = _kd.one_a_teacher(function, "teacher_log_probs", teacher_log_probs, student_logits, "k")
    if len(indices) != len(log_probs):
        raise ValueError(
            f"{function}: teacher_log_probs must hold {len(indices)} teachers like teacher_indices, got {len(log_probs)}"
        )
    *leading, classes = student_logits.shape
    classes = classes if vocabulary is None else vocabulary.classes
    for t, (index, log_prob) in enumerate(zip(indices, log_probs)):
        name, of_probs = f"teacher_indices[{t}]", f"teacher_log_probs[{t}]"
        checks.integers(function, name, index)
        if list(index.shape[:-1]) != leading or not 1 <= index.shape[-1] <= classes:
            wanted = ", ".join(f"{n}" for n in leading)
            raise ValueError(
                f"{function}: {name} must be [{wanted}, k] with 1 <= k <= {classes}, got {checks.shape(index)}"
            )
        checks.same_device(function, name, index, "student_logits", student_logits)
        checks.tensor(function, of_probs, log_prob)
        checks.same_shape(function, of_probs, log_prob, name, index)
        checks.same_device(function, of_probs, log_prob, "student_logits", student_logits)
        _kd.check_frozen(function, of_probs, log_prob)
    rows, classes = _kd.check_rows(function, student_logits, len(indices), teacher_weights, labels, ignore_index)
    return rows, classes, indices, log_probs


class TopkKD(torch.autograd.Function):
    """The loss. ``needs``: a gradient to the student, and to the weights; ``wide``: the dtype of sums."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, weights: Tensor | None, rest: tuple) -> Tensor:
        backend, labels, indices, log_probs, sizes, settings, needs, wide = rest
        ctx.in_forward, ctx.sizes, ctx.settings, ctx.needs = student.dtype == wide, sizes, settings, needs
        now = needs if ctx.in_forward else (False, False)
        loss, stats, *grads = kernels(backend).topk_kd_fwd.default(
            student, indices, log_probs, sizes, weights, labels, *settings, *now
        )
        ctx.backend = backend
        if ctx.in_forward:
            save_grads(ctx, grads, (student, weights), needs)
        else:
            save(ctx, student, indices, log_probs, weights, labels, stats)
        return loss

    @staticmethod
    @first_order("topk_kd_loss")
    def backward(ctx: Any, grad_loss: Tensor) -> tuple:
        if ctx.in_forward:
            return *scaled_rows(ctx, grad_loss), None
        student, indices, log_probs, weights, labels, stats = saved(ctx)
        grads = kernels(ctx.backend).topk_kd_bwd.default(
            grad_loss, student, indices, log_probs, ctx.sizes, weights, labels, stats, *ctx.settings, *ctx.needs
        )
        return *map(asked, grads, ctx.needs), None


# All teachers' entries of a row side by side: indices (int64) and log_probs [N, K], of teacher t the next sizes[t].
# loss (scalar, or [N] for "none"), stats [N, 3], grad_student, grad_weights
@define(
    "topk_kd_fwd",
    "(Tensor student, Tensor indices, Tensor log_probs, int[] sizes, Tensor? weights, Tensor? labels, "
    f"{_kd.TOPK_SETTINGS}, bool need_student_grad, bool need_weights_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _(student, indices, log_probs, sizes, weights, labels, *settings):
    reduction = settings[5]
    wide, n = wide_dtype(student, log_probs, weights), student.shape[0]
    return (
        student.new_empty((n,) if reduction == "none" else (), dtype=wide),
        student.new_empty(n, 3, dtype=wide),
        *_kd.fake_grads(student, len(sizes), wide, wide, settings[-2:]),
    )


@define(
    "topk_kd_bwd",
    "(Tensor grad_loss, Tensor student, Tensor indices, Tensor log_probs, int[] sizes, Tensor? weights, "
    f"Tensor? labels, Tensor stats, {_kd.TOPK_SETTINGS}, bool need_student_grad, bool need_weights_grad) "
    "-> (Tensor, Tensor)",
)
def _(grad_loss, student, indices, log_probs, sizes, weights, labels, stats, *settings):
    return _kd.fake_grads(student, len(sizes), student.dtype, stats.dtype, settings[-2:])
