"""The operators as functions: checks, then the chosen backend, then its autograd.Function.

Every function has a namesake in ``amtml_fast.reference``. Inputs may be float32, bfloat16, float16 or float64, in any
mixture and with any strides; sums, products and exponentials are made in float32 (float64 if an input is), and each
gradient comes back in its input's dtype.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amtml_fast import autograd, backend, checks, ops, reference  # noqa: F401  (ops: registers the schemas)
from amtml_fast.reference import KDTerms, wide_dtype

MODES = ("mixture", "sum")
REDUCTIONS = ("none", "sum", "mean", "batchmean")
ANGLE_REDUCTIONS = ("mean", "distinct", "sum", "none")
DISTANCE_REDUCTIONS = ("mean", "distinct", "sum")
TAILS = ("renormalize", "ignore", "uniform")
DUAL_MODES = ("sequential", "product")
LARGEST_FUSED_WEIGHT = 2**17  # of a hint: beyond it torch's convolution is faster, which cuts the weight up as well


def _needs_grad(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:  # a loop: any() over a generator takes twice as long
            if t is not None and t.requires_grad:
                return True
    return False


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
    checks.adapter_arguments("teacher_weights", features, theta, v, pool)
    chosen = backend.choose("teacher_weights", features, theta, v)
    if chosen == "reference":
        return reference.teacher_weights(features, theta, v, pool=pool)
    wide = wide_dtype(features, theta, v)
    needs_grad = _needs_grad(features, theta, v)
    return autograd.run(
        autograd.TeacherWeights, needs_grad, chosen, features, theta.to(wide), v.to(wide), pool == "max"
    )


def multi_teacher_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | Sequence[Tensor],
    teacher_weights: Tensor | None,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
    mode: str = "mixture",
    reduction: str = "batchmean",
    t2_scale: bool = True,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Weighted multi-teacher distillation loss (Eq 7-8)::

        q, p_t = softmax(student / temperature), softmax(teacher_t / temperature)
        kl = KL(sum_t w_t p_t || q)       # mode "mixture"
        kl = sum_t w_t KL(p_t || q)       # mode "sum"; same student gradient where the weights sum to 1
        loss = (1 - alpha) * cross_entropy(student, labels) + alpha * temperature**2 * kl
        loss = temperature**2 * kl        # without labels: alpha plays no part

    Args:
        student_logits: [N, C], or [B, S, C] taken as B * S rows.
        teacher_logits: T tensors shaped like ``student_logits``, read in place, or one [T, N, C] tensor. Teachers are
            frozen: one that requires grad is an error.
        teacher_weights: [N, T], [T] (the same for every row) or None (uniform); [B, S, T] or [B * S, T] with [B, S, C].
            Finite and not negative; need not sum to 1.
        labels: [N] or [B, S] integer classes, or None.
        temperature: > 0.
        alpha: share of the KL in [0, 1].
        reduction: ``"none"`` (one value a row, shaped like ``labels``), ``"sum"``, ``"batchmean"`` (divided by the rows
            that are not ignored) or ``"mean"`` (the KL divided by the number of classes too, as ``nn.KLDivLoss`` does).
        t2_scale: multiply the KL by ``temperature**2``.
        ignore_index: rows with this label count 0 in value, gradient and denominator.
        label_smoothing: of the cross-entropy, in [0, 1].
        num_items_in_batch: replaces the denominator of ``"batchmean"`` (gradient accumulation, data parallel): an int or
            a 0-d tensor of any dtype. It may be 0 where every row is ignored; the loss is 0 then.

    Returns:
        Scalar, or one value a row for ``"none"``; float32 (float64 if an input is).

    A logit of -inf is probability 0 with gradient 0. Gradients flow to ``student_logits`` and ``teacher_weights``.

    Raises:
        ValueError, TypeError, RuntimeError: an argument that does not fit; nothing is computed then.
    """
    name = "multi_teacher_kd_loss"
    rows, classes, teachers = checks.kd_arguments(
        name, student_logits, teacher_logits, teacher_weights, labels, ignore_index
    )
    checks.one_of(name, "reduction", reduction, REDUCTIONS)
    if num_items_in_batch is not None:
        checks.num_items(name, num_items_in_batch, reduction, labels)
    student, weights = student_logits, teacher_weights
    if weights is not None and weights.dim() != 2:
        weights = weights.reshape(-1, len(teachers))
    if student.dim() != 2:
        student, teachers = student.reshape(rows, classes), [t.reshape(rows, classes) for t in teachers]
        labels = None if labels is None else labels.reshape(rows)
    loss = _multi_teacher_kd(
        student,
        teachers,
        weights,
        labels,
        temperature=temperature,
        alpha=alpha,
        mode=mode,
        reduction=reduction if num_items_in_batch is None else "sum",
        t2_scale=t2_scale,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        need_terms=False,
    )
    if num_items_in_batch is not None:
        return reference.over_items(loss, num_items_in_batch)
    return loss.reshape(student_logits.shape[:-1]) if reduction == "none" else loss


def multi_teacher_kd(
    student: Tensor, teachers: Sequence[Tensor], weights: Tensor | None, labels: Tensor | None, **options: Any
) -> KDTerms:
    """``multi_teacher_kd_loss`` on checked rows [N, C], with its parts: what ``AMTMLLoss`` builds on. Not public."""
    return KDTerms(*_multi_teacher_kd(student, teachers, weights, labels, need_terms=True, **options))


def _multi_teacher_kd(
    student: Tensor,
    teachers: Sequence[Tensor],
    weights: Tensor | None,
    labels: Tensor | None,
    *,
    temperature: float,
    alpha: float,
    mode: str,
    reduction: str,
    t2_scale: bool,
    ignore_index: int,
    label_smoothing: float,
    need_terms: bool,
) -> Any:
    """The loss, or with ``need_terms`` what ``KDTerms`` holds, of which loss and probabilities are differentiable."""
    name = "multi_teacher_kd_loss"
    _check_kd(name, temperature, alpha, label_smoothing)
    checks.one_of(name, "mode", mode, MODES)
    chosen = backend.choose("multi_teacher_kd", student, weights, *teachers)
    if chosen != "cpp":  # whose kernel looks for itself
        _check_values(name, labels, student.shape[1], ignore_index, None if need_terms else weights)
    if chosen == "reference":
        terms = reference.multi_teacher_kd(
            student,
            list(teachers),
            weights,
            labels,
            temperature=temperature,
            alpha=alpha,
            mode=mode,
            reduction=reduction,
            t2_scale=t2_scale,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        return terms if need_terms else terms.loss
    wide = wide_dtype(student, *teachers, weights)
    if weights is not None:
        weights = weights if weights.dtype == wide else weights.to(wide)
        weights = weights if weights.shape[0] == student.shape[0] else weights.expand(student.shape[0], -1)
    settings = _kd_settings(
        temperature, alpha, mode, reduction, t2_scale, ignore_index, label_smoothing, labels is not None
    )
    needs = _needs_grad(student), _needs_grad(weights)
    labels = _as_long(labels)
    return _run(
        (name, labels, student.shape[1], ignore_index, None if need_terms else weights), autograd.MultiTeacherKD, any(needs),
        chosen, student, weights, labels, settings, needs, wide, need_terms, *teachers,
    )  # fmt: skip


def whole_loss(
    student: Tensor,
    teachers: Sequence[Tensor],
    labels: Tensor | None,
    sources: tuple[Tensor | None, ...],  # of the weights: features, theta, v, or the weights themselves
    divisor: int | Tensor | None,
    *,
    max_pool: bool,
    temperature: float,
    alpha: float,
    mode: str,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    angle_weight: float,
    delta: float,
    angle_trains_weights: bool,
    regularizer_weight: float,
) -> tuple[Tensor, ...]:
    """``AMTMLLoss`` without hints on checked rows, as one node of the graph: see ``autograd.WholeLoss``. Not public."""
    name = "AMTMLLoss"
    _check_kd(name, temperature, alpha, label_smoothing)
    checks.one_of(name, "mode", mode, MODES)
    checks.number(name, "delta", delta, 0, math.inf, above=True)
    kd = _kd_settings(temperature, alpha, mode, reduction, True, ignore_index, label_smoothing, labels is not None)
    needs = _needs_grad(student), _needs_grad(*sources)
    objective = autograd.Objective(
        kd,
        max_pool,
        float(angle_weight),
        float(delta),
        1e-12,
        angle_trains_weights,
        float(regularizer_weight),
        needs,
    )
    count = None
    if divisor is not None:
        given = reference.item_count(divisor, torch.float64)
        on_device = isinstance(given, Tensor) and given.device == student.device
        count = given if on_device else student.new_full((), float(given), dtype=torch.float64)  # no sync
    labels = _as_long(labels)
    return _run(
        (name, labels, student.shape[1], ignore_index, None), autograd.WholeLoss, any(needs),
        *sources, student, labels, count, objective, *teachers,
    )  # fmt: skip


def whole_loss_is_fused(student: Tensor, *others: Tensor | None) -> bool:
    """Whether the whole loss runs as one node on these tensors; else it is composed of the other operators."""
    return backend.runs("whole_loss", student, *others)


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
) -> Tensor:
    """``multi_teacher_kd_loss`` where each teacher gives only its k largest classes (Eq 7-8)::

        q = softmax(student / temperature)
        p_t(c) = exp(log_prob)            # for the classes that teacher t names; what the others have, ``tail`` says
        kl = KL(sum_t w_t p_t || q)
        loss = (1 - alpha) * cross_entropy(student, labels) + alpha * temperature**2 * kl
        loss = temperature**2 * kl        # without labels: alpha plays no part

    A row costs O(C + T k log(T k)), and no teacher is ever made dense. What a teacher stores, from its logits [N, C]::

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

    Returns:
        Scalar, or one value a row for ``"none"``; float32 (float64 if an input is).

    A student's logit of -inf is probability 0 with gradient 0. Gradients flow to ``student_logits`` and
    ``teacher_weights``. With all C classes given, every tail is ``multi_teacher_kd_loss``.

    Raises:
        ValueError, TypeError, RuntimeError: an argument that does not fit; nothing is computed then. On a GPU a class or
            label out of range stops the CUDA kernel; Triton looks only with TRITON_DEBUG=1, and makes the row NaN
            without.
    """
    name = "topk_kd_loss"
    rows, classes, given_indices, given_log_probs = checks.topk_arguments(
        name, student_logits, teacher_indices, teacher_log_probs, teacher_weights, labels, ignore_index
    )
    checks.one_of(name, "reduction", reduction, REDUCTIONS)
    checks.one_of(name, "tail", tail, TAILS)
    _check_kd(name, temperature, alpha, label_smoothing)
    if num_items_in_batch is not None:
        checks.num_items(name, num_items_in_batch, reduction, labels)
    student = student_logits.reshape(rows, classes)
    sizes = [index.shape[-1] for index in given_indices]
    # Side by side in one tensor: beside the student's rows they are small.
    indices = _side_by_side(given_indices, rows, torch.int64)
    log_probs = _side_by_side(given_log_probs, rows, wide_dtype(*given_log_probs))
    weights = None if teacher_weights is None else teacher_weights.reshape(-1, len(sizes))
    labels = None if labels is None else _as_long(labels.reshape(rows))
    chosen = backend.choose("topk_kd", student, weights, *given_log_probs)
    row_reduction = reduction if num_items_in_batch is None else "sum"
    values = (name, labels, classes, ignore_index, weights, (indices, sizes))
    if chosen != "cpp":  # whose kernel looks for itself
        _check_values(*values)
    if chosen == "reference":
        loss = reference.topk_kd(
            student,
            list(indices.split(sizes, 1)),
            list(log_probs.split(sizes, 1)),
            weights,
            labels,
            temperature=temperature,
            alpha=alpha,
            reduction=row_reduction,
            t2_scale=t2_scale,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            tail=tail,
        )
    else:
        wide = wide_dtype(student, log_probs, weights)
        weights = None if weights is None else weights.to(wide).expand(rows, -1)
        settings = _kd_settings(
            temperature, alpha, tail, row_reduction, t2_scale, ignore_index, label_smoothing, labels is not None
        )
        needs = _needs_grad(student), _needs_grad(weights)
        loss = _run(
            values, autograd.TopkKD, any(needs),
            chosen, student, weights, labels, indices, log_probs, sizes, settings, needs, wide,
        )  # fmt: skip
    if num_items_in_batch is not None:
        return reference.over_items(loss, num_items_in_batch)
    return loss.reshape(student_logits.shape[:-1]) if reduction == "none" else loss


def _side_by_side(tensors: list[Tensor], rows: int, dtype: torch.dtype) -> Tensor:
    """T x [..., k] as one [rows, sum of k] of this dtype: the tensor itself where there is one and it fits."""
    parts = [t.reshape(rows, t.shape[-1]).to(dtype) for t in tensors]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _check_kd(name: str, temperature: float, alpha: float, label_smoothing: float) -> None:
    checks.number(name, "temperature", temperature, 0, math.inf, above=True)
    checks.number(name, "alpha", alpha, 0, 1)
    checks.number(name, "label_smoothing", label_smoothing, 0, 1)


def _check_values(
    name: str,
    labels: Tensor | None,
    classes: int,
    ignore_index: int,
    weights: Tensor | None,
    support: tuple[Tensor, Sequence[int]] | None = None,
) -> None:
    """``support``: the classes that the teachers give, [N, K], and how many of them each does."""
    if labels is not None and checks.values_are_free(labels):
        checks.label_values(name, labels, classes, ignore_index)
    if weights is not None and checks.values_are_free(weights):
        checks.weight_values(name, weights)
    if support is not None and checks.values_are_free(support[0]):
        checks.index_values(name, *support, labels, classes, ignore_index)


def _run(values: tuple, function: Any, needs_grad: bool, *args: Any) -> Any:
    """``autograd.run``. The C++ kernels refuse a wrong value by a RuntimeError, before they write anything; here it
    becomes the ValueError that every backend raises. ``values``: what ``_check_values`` takes."""
    try:
        return autograd.run(function, needs_grad, *args)
    except RuntimeError:
        _check_values(*values)
        raise


def _as_long(labels: Tensor | None) -> Tensor | None:
    return labels if labels is None or labels.dtype == torch.int64 else labels.long()


def _kd_settings(
    temperature: float,
    alpha: float,
    mode: str,
    reduction: str,
    t2_scale: bool,
    ignore_index: int,
    label_smoothing: float,
    labelled: bool,
) -> tuple:
    """The scalars of ``multi_teacher_kd_fwd``, in its order."""
    ce_weight, kl_weight = (1.0 - alpha, float(alpha)) if labelled else (0.0, 1.0)
    kl_scale = float(temperature) ** 2 if t2_scale else 1.0
    return float(temperature), ce_weight, kl_weight, kl_scale, mode, reduction, ignore_index, float(label_smoothing)


def angle_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12
) -> Tensor:
    """Triplet angle loss (Eq 9-10) in O(N^2) memory::

        psi(i, j, k) = cosine of the angle at vertex j between x_i - x_j and x_k - x_j
        loss = sum_ijk huber_delta(psi_student - psi_teacher)

    Args:
        student, teacher: [N, C] rows, such as soft targets; widths may differ.
        delta: > 0, where the Huber loss turns linear.
        reduction: ``"mean"`` over N^3, ``"distinct"`` (the same sum over N (N-1) (N-2)), ``"sum"``, or ``"none"``: [N],
            per vertex j, its sum over N^2.
        eps: a pair closer than this is degenerate: its psi is 0, with gradient 0.

    Returns:
        Scalar or [N]; float32 (float64 if an input is). 0 where there is no triplet. Gradients flow to both sides.

    Raises:
        ValueError, TypeError: an argument that does not fit; nothing is computed then.
    """
    checks.two_sides("angle_loss", student, teacher)
    return angle(student, teacher, None, delta=delta, reduction=reduction, eps=eps)


def angle(
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,
    *,
    delta: float,
    reduction: str = "mean",
    eps: float = 1e-12,
) -> Tensor:
    """``angle_loss`` of the rows where ``row_mask`` [N] bool is true; the others take no part. Not public."""
    name = "angle_loss"
    checks.number(name, "delta", delta, 0, math.inf, above=True)
    checks.number(name, "eps", eps, 0, math.inf)
    checks.one_of(name, "reduction", reduction, ANGLE_REDUCTIONS)
    chosen = backend.choose("angle", student, teacher)
    if chosen == "reference":
        return reference.angle(student, teacher, row_mask, delta=delta, reduction=reduction, eps=eps)
    needs = _needs_grad(student), _needs_grad(teacher)
    return autograd.run(
        autograd.Angle, any(needs), chosen, student, teacher, row_mask, float(delta), float(eps), reduction, *needs
    )


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12
) -> Tensor:
    """Distance loss of Relational Knowledge Distillation (Park et al. 2019, Eq 4-6)::

        psi(i, j) = |x_i - x_j| / mean of |x_a - x_b| over all pairs a != b
        loss = sum_ij huber_delta(psi_student - psi_teacher)

    Args:
        student, teacher: [N, C] rows; widths may differ.
        delta: > 0, where the Huber loss turns linear.
        reduction: ``"mean"`` over N^2, ``"distinct"`` over N (N-1), or ``"sum"``.
        eps: a pair closer than this is degenerate: its psi is 0, with gradient 0, and it is left out of the mean.

    Returns:
        Scalar; float32 (float64 if an input is). 0 where there is no pair. Gradients flow to both sides.

    Raises:
        ValueError, TypeError: an argument that does not fit; nothing is computed then.
    """
    name = "rkd_distance_loss"
    checks.two_sides(name, student, teacher)
    checks.number(name, "delta", delta, 0, math.inf, above=True)
    checks.number(name, "eps", eps, 0, math.inf)
    checks.one_of(name, "reduction", reduction, DISTANCE_REDUCTIONS)
    chosen = backend.choose("distance", student, teacher)
    if chosen == "reference":
        return reference.rkd_distance_loss(student, teacher, delta=delta, reduction=reduction, eps=eps)
    needs = _needs_grad(student), _needs_grad(teacher)
    return autograd.run(
        autograd.Distance, any(needs), chosen, student, teacher, float(delta), float(eps), reduction, *needs
    )


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
    name = "hint_loss"
    for argument, value in (("student_map", student_map), ("teacher_map", teacher_map)):
        checks.tensor(name, argument, value)
        if value.dim() != 4 or 0 in value.shape[1:]:
            raise ValueError(f"{name}: {argument} must be [N, c, h, w] with c, h, w >= 1, got {checks.shape(value)}")
    if teacher_map.shape[0] != student_map.shape[0]:
        raise ValueError(
            f"{name}: teacher_map must have {student_map.shape[0]} examples like student_map, got {checks.shape(teacher_map)}"
        )
    checks.tensor(name, "weight", weight)
    if weight.shape != (teacher_map.shape[1], student_map.shape[1]):
        raise ValueError(
            f"{name}: weight must be [{teacher_map.shape[1]}, {student_map.shape[1]}] (teacher by student channels), "
            f"got {checks.shape(weight)}"
        )
    checks.same_device(name, "teacher_map", teacher_map, "student_map", student_map)
    checks.same_device(name, "weight", weight, "student_map", student_map)
    chosen = backend.choose("hint", student_map, teacher_map, weight)
    if chosen == "reference":
        return reference.hint_loss(student_map, teacher_map, weight, normalize=normalize)
    height, width = (min(s, t) for s, t in zip(student_map.shape[2:], teacher_map.shape[2:]))
    v, u = (_hint_pool(chosen, m, height, width, normalize) for m in (student_map, teacher_map))
    if chosen == "cpp" and weight.numel() <= LARGEST_FUSED_WEIGHT:
        needs = _needs_grad(v), _needs_grad(u), _needs_grad(weight)
        return autograd.run(autograd.Hint, any(needs), v, u, weight, needs)
    return hint_mse(reference.hint_conv(v, weight), u)


def hint_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of two tensors of one shape; 0 where they are empty. Not public."""
    chosen = backend.choose("hint", prediction, target)
    if chosen == "reference":
        return reference.hint_mse(prediction, target)
    needs_grad = _needs_grad(prediction, target)
    return autograd.run(autograd.HintMSE, needs_grad, chosen, prediction, target, needs_grad)


def _hint_pool(chosen: str, feature_map: Tensor, height: int, width: int, normalize: bool) -> Tensor:
    if not normalize and feature_map.shape[2:] == (height, width):
        return feature_map
    return autograd.run(autograd.HintPool, _needs_grad(feature_map), chosen, feature_map, height, width, normalize)


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
    name = "dual_softmax"
    checks.tensor(name, "scores", scores)
    dims = scores.dim()
    if dims < 2:
        raise ValueError(f"{name}: scores must have at least 2 dimensions, got {checks.shape(scores)}")
    for argument, dim in (("dim1", dim1), ("dim2", dim2)):
        if isinstance(dim, bool) or not isinstance(dim, int) or not -dims <= dim < dims:
            raise IndexError(f"{name}: {argument} must be in [{-dims}, {dims - 1}], got {dim!r}")
    if dim1 % dims == dim2 % dims:
        raise ValueError(f"{name}: dim1 and dim2 must differ, got {dim1} and {dim2} of {dims} dimensions")
    checks.one_of(name, "mode", mode, DUAL_MODES)
    chosen = backend.choose("dual_softmax", scores)
    if chosen == "reference":
        return reference.dual_softmax(scores, dim1, dim2, mode=mode)
    moved = scores.movedim((dim1, dim2), (-2, -1))
    matrices = moved.reshape(moved.shape[:-2].numel(), *moved.shape[-2:])
    out = autograd.run(autograd.DualSoftmax, _needs_grad(matrices), chosen, matrices, mode)
    return out.reshape(moved.shape).movedim((-2, -1), (dim1, dim2))
