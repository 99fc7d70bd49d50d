"""The equations of AMTML-KD in plain PyTorch: the oracle of every test and the backend of last resort.

Equation numbers are those of Liu, Zhang, Wang, *Adaptive multi-teacher multi-level knowledge distillation* (2020);
see docs/method.md. Each function has the name, signature and meaning of its namesake in ``amtml_fast``, takes any
floating dtype (16-bit inputs are computed in float32), and can be differentiated any number of times. Arguments are
taken as already checked: the checks live in ``amtml_fast.ops``.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class KDOptions(NamedTuple):
    """The options of Eq 7-8 that ``multi_teacher_kd_loss`` explains."""

    temperature: float
    alpha: float
    mode: str  # "mixture" or "sum"; in topk_kd it holds the tail
    reduction: str
    t2_scale: bool
    ignore_index: int
    label_smoothing: float


class KDTerms(NamedTuple):
    """What one pass over the logits yields. ``kl`` includes ``temperature**2`` where that is asked for."""

    loss: Tensor
    ce: Tensor
    kl: Tensor
    student_probs: Tensor  # [rows, C] q of Eq 8
    soft_targets: Tensor  # [rows, C] p of Eq 7


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype that products, exponentials and sums are made in: float64 if any input is, else float32."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def over_items(total: Tensor, num_items_in_batch: int | Tensor) -> Tensor:
    """A sum over rows, divided by the count of the whole batch; 0 where both are 0."""
    return total / item_count(num_items_in_batch, total.dtype)


def item_count(num_items_in_batch: int | Tensor, dtype: torch.dtype) -> float | Tensor:
    """The divisor. A count of 0 becomes a tiny number: a sum of 0 then gives 0, and any other an absurdly large loss."""
    tiny = torch.finfo(torch.float32).tiny
    if isinstance(num_items_in_batch, Tensor):
        return num_items_in_batch.to(dtype).clamp(min=tiny)
    return num_items_in_batch if num_items_in_batch > 0 else tiny


def times(x: Tensor, factor: float) -> Tensor:
    """``x * factor``. (torch gives the product of a 0-d tensor and a Python float a float64 tangent.)"""
    return x * x.new_full((), factor)


def teacher_weights(features: Tensor, theta: Tensor, v: Tensor, *, pool: str = "max") -> Tensor:
    """Eq 4-6: ``softmax_t(v . (theta_t * pool(features)))``, [N, d, H, W] or [N, d] -> [N, T]."""
    dtype = wide_dtype(features, theta, v)
    b = features.to(dtype)
    if b.dim() == 4:
        flat = b.flatten(2)
        b = flat.max(-1).values if pool == "max" else flat.mean(-1)  # max(dim), not amax: a tie goes to the first
    gamma = (b.unsqueeze(1) * (theta.to(dtype) * v.to(dtype))).sum(-1)  # [N, T]; no matmul, which autocast would narrow
    return gamma.softmax(-1)


def multi_teacher_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | list[Tensor] | tuple[Tensor, ...],
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
    """Eq 7-8: ``(1 - alpha) * CE + alpha * temperature**2 * KL(sum_t w_t p_t || q)``."""
    row_reduction = "sum" if num_items_in_batch is not None else reduction
    terms = multi_teacher_kd(
        student_logits.reshape(-1, student_logits.shape[-1]),
        [t.reshape(-1, t.shape[-1]) for t in teacher_logits],
        None if teacher_weights is None else teacher_weights.reshape(-1, teacher_weights.shape[-1]),
        None if labels is None else labels.reshape(-1),
        KDOptions(temperature, alpha, mode, row_reduction, t2_scale, ignore_index, label_smoothing),
    )
    if num_items_in_batch is not None:
        return over_items(terms.loss, num_items_in_batch)
    return terms.loss.reshape(student_logits.shape[:-1]) if reduction == "none" else terms.loss


def multi_teacher_kd(
    student: Tensor,  # [N, C]
    teachers: list[Tensor],  # T x [N, C]
    weights: Tensor | None,  # [N, T], [1, T] or None (uniform)
    labels: Tensor | None,  # [N]
    options: KDOptions,
) -> KDTerms:
    """Eq 7-8 on rows, with all the parts. A term with weight 0 or probability 0 is 0, whatever it multiplies."""
    temperature = options.temperature
    dtype = wide_dtype(student, *teachers, weights)
    valid, z, w = _kd_rows(student, weights, len(teachers), labels, options.ignore_index, dtype)
    hide = ~valid.unsqueeze(1)
    log_q = (z / temperature).log_softmax(-1)
    log_p = [(t.to(dtype).masked_fill(hide, 0) / temperature).log_softmax(-1) for t in teachers]
    # Without weight a teacher counts nothing, even one that has no softmax.
    log_p = [p.masked_fill((w[:, t, None] == 0) & p.isnan(), -torch.inf) for t, p in enumerate(log_p)]
    mixture = torch.zeros_like(z)
    for t, p in enumerate(log_p):  # Eq 7: probabilities are mixed
        mixture = mixture + _weighted(w[:, t, None], p.exp())
    if options.mode == "mixture":
        kl = _mixture_kl(mixture, log_q)
    else:
        kl = torch.stack([_weighted(w[:, t], _kl_rows(p.exp(), p, log_q)) for t, p in enumerate(log_p)]).sum(0)
    kl = kl * (temperature**2 if options.t2_scale else 1)
    loss, ce, kl = _kd_reduced(z, kl, valid, labels, options)
    return KDTerms(loss, ce, kl, log_q.exp(), mixture)


def _kd_rows(
    student: Tensor,
    weights: Tensor | None,
    num_teachers: int,
    labels: Tensor | None,
    ignore_index: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows count, the student's logits [N, C] and the weights [N, T], 0 in a row that does not."""
    rows = student.shape[0]
    valid = student.new_ones(rows, dtype=torch.bool) if labels is None else labels != ignore_index
    hide = ~valid.unsqueeze(1)
    z = student.to(dtype).masked_fill(hide, 0)  # an ignored row gives 0 whatever it holds, NaN included
    z = z.masked_fill(z == -torch.inf, -torch.inf)  # same values, but no gradient flows into a masked class
    if weights is None:
        weights = z.new_full((1, num_teachers), 1 / num_teachers)
    return valid, z, weights.to(dtype).expand(rows, -1).masked_fill(hide, 0)


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    value = value.masked_fill((weight == 0) & ~value.isfinite(), 0)
    return (weight * value).masked_fill(value == 0, 0)  # or an infinite gradient would meet the 0


def _mixture_kl(mixture: Tensor, log_q: Tensor) -> Tensor:
    return _kl_rows(mixture, mixture.masked_fill(mixture == 0, 1).log(), log_q)


def _kd_reduced(
    z: Tensor,
    kl: Tensor,
    valid: Tensor,
    labels: Tensor | None,
    options: KDOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq 8 from its KL of every row: loss, ce and kl, reduced."""
    _, alpha, _, reduction, _, ignore_index, label_smoothing = options
    kl = kl.masked_fill(~valid, 0)
    if labels is None:
        ce = torch.zeros_like(kl)
    else:
        ce = F.cross_entropy(
            z, labels.long(), ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
        )

    if reduction != "none":
        count = z.new_ones(()) if reduction == "sum" else valid.sum().clamp(min=1).to(z.dtype)
        ce = ce.sum() / count
        kl = kl.sum() / (count * (z.shape[1] if reduction == "mean" else 1))
    if labels is None or alpha == 1:  # not 0 * ce: that is NaN where ce is infinite
        loss = kl if labels is None else times(kl, alpha)
    else:
        loss = times(ce, 1 - alpha)
        loss = loss if alpha == 0 else torch.add(loss, kl, alpha=alpha)
    return loss, ce, kl


def _kl_rows(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum_c p (log p - log q)`` where a class with p = 0 counts 0, in value and gradient."""
    empty = p == 0
    return (p * (log_p.masked_fill(empty, 0) - log_q.masked_fill(empty, 0))).sum(-1)


def topk_kd_loss(
    student_logits: Tensor,
    teacher_indices: Tensor | list[Tensor] | tuple[Tensor, ...],
    teacher_log_probs: Tensor | list[Tensor] | tuple[Tensor, ...],
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
    """Eq 7-8 where of ``softmax(teacher_t / temperature)`` only some classes are given. Dense: O(T N C) memory."""
    row_reduction = "sum" if num_items_in_batch is not None else reduction
    loss = topk_kd(
        student_logits.reshape(-1, student_logits.shape[-1]),
        [i.reshape(-1, i.shape[-1]) for i in teacher_indices],
        [p.reshape(-1, p.shape[-1]) for p in teacher_log_probs],
        None if teacher_weights is None else teacher_weights.reshape(-1, teacher_weights.shape[-1]),
        None if labels is None else labels.reshape(-1),
        KDOptions(temperature, alpha, tail, row_reduction, t2_scale, ignore_index, label_smoothing),
    )
    if num_items_in_batch is not None:
        return over_items(loss, num_items_in_batch)
    return loss.reshape(student_logits.shape[:-1]) if reduction == "none" else loss


def topk_kd(
    student: Tensor,  # [N, C]
    indices: list[Tensor],  # T x [N, k]
    log_probs: list[Tensor],  # T x [N, k]
    weights: Tensor | None,  # [N, T], [1, T] or None (uniform)
    labels: Tensor | None,  # [N]
    options: KDOptions,
) -> Tensor:
    """``topk_kd_loss`` on rows."""
    temperature, tail = options.temperature, options.mode
    dtype = wide_dtype(student, *log_probs, weights)
    valid, z, w = _kd_rows(student, weights, len(indices), labels, options.ignore_index, dtype)
    hide = ~valid.unsqueeze(1)
    mixture = torch.zeros_like(z)
    for t, (index, log_p) in enumerate(zip(indices, log_probs)):
        p = _dense_probs(index.long().masked_fill(hide, 0), log_p.to(dtype).masked_fill(hide, 0), z.shape[1], tail)
        mixture = mixture + _weighted(w[:, t, None], p)
    kl = _mixture_kl(mixture, (z / temperature).log_softmax(-1)) * (temperature**2 if options.t2_scale else 1)
    return _kd_reduced(z, kl, valid, labels, options)[0]


def _dense_probs(index: Tensor, log_p: Tensor, classes: int, tail: str) -> Tensor:
    """[N, k] classes and the logarithms of their probabilities -> [N, C] probabilities; a class named twice has both."""
    p = (log_p.log_softmax(-1) if tail == "renormalize" else log_p).exp()
    dense = p.new_zeros(len(p), classes).scatter_add(1, index, p)
    if tail != "uniform":
        return dense
    named = torch.zeros_like(dense, dtype=torch.bool).scatter(1, index, True)
    others = (~named).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(named, dense, (1 - dense.sum(-1, keepdim=True)).clamp(min=0) / others)


def angle_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12
) -> Tensor:
    """Eq 9-10 as written, every triplet: O(N^3) memory. student, teacher [N, C] -> scalar, or [N] for ``none``."""
    return angle(student, teacher, None, delta=delta, reduction=reduction, eps=eps)


def angle(
    student: Tensor,
    teacher: Tensor,
    row_mask: Tensor | None,  # [N] bool, False: the row takes no part
    *,
    delta: float,
    reduction: str,
    eps: float,
) -> Tensor:
    """``angle_loss`` over the rows where ``row_mask`` is true."""
    dtype = wide_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):  # autocast would run the inner products in 16 bits
        cosines = [_cosines(x.to(dtype), row_mask, eps) for x in (student, teacher)]
    per_vertex = F.huber_loss(cosines[0], cosines[1], delta=delta, reduction="none").sum((1, 2))  # [N]
    n = len(student) if row_mask is None else row_mask.sum()
    if reduction == "none":
        return per_vertex / _at_least_one(n**2)
    if reduction == "sum":
        return per_vertex.sum()
    if reduction == "mean":
        return per_vertex.sum() / _at_least_one(n**3)
    triplets = n * (n - 1) * (n - 2)  # of distinct rows; without one the loss is 0
    return per_vertex.sum() / _at_least_one(triplets) * (triplets > 0)


def _cosines(x: Tensor, row_mask: Tensor | None, eps: float) -> Tensor:
    """Eq 9: ``psi(i, j, k)`` as [j, i, k]. A degenerate pair (distance <= eps) has psi 0 and gradient 0."""
    if row_mask is not None:
        x = x.masked_fill(~row_mask.unsqueeze(1), 0)
    difference = x.unsqueeze(0) - x.unsqueeze(1)  # [j, i, C]
    squared = difference.square().sum(-1, keepdim=True)
    regular = ~(squared.double() <= eps * eps)  # NaN is not degenerate: it stays NaN
    if row_mask is not None:
        regular = regular & row_mask[:, None, None] & row_mask[None, :, None]
    length = squared.masked_fill(~regular, 1).masked_fill(squared.isinf(), torch.nan).sqrt()  # or edges of length 0
    edge = difference.masked_fill(~regular, 0) / length
    return torch.bmm(edge, edge.transpose(1, 2))


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12
) -> Tensor:
    """RKD's distance loss: distances over their mean, compared pair by pair. student, teacher [N, C] -> scalar."""
    dtype = wide_dtype(student, teacher)
    psi = [_normalized_distances(x.to(dtype), eps) for x in (student, teacher)]
    total = F.huber_loss(psi[0], psi[1], delta=delta, reduction="sum")
    n = len(student)
    return total / {"mean": max(n**2, 1), "distinct": max(n * (n - 1), 1), "sum": 1}[reduction]


def _normalized_distances(x: Tensor, eps: float) -> Tensor:
    """[N, N] distances over the mean of those that are not degenerate (<= eps), which are 0 with gradient 0."""
    squared = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
    regular = ~(squared.double() <= eps * eps)  # NaN is not degenerate: it stays NaN
    distance = squared.masked_fill(~regular, 1).sqrt().masked_fill(~regular, 0)
    mean = distance.sum() / _at_least_one(regular.sum())
    return distance / mean.masked_fill(~regular.any(), 1)


def hint_loss(student_map: Tensor, teacher_map: Tensor, weight: Tensor, *, normalize: bool = False) -> Tensor:
    """Eq 11 for one teacher: ``mean (u - F(v))^2`` with ``F`` the 1x1 convolution ``weight`` [c_t, c_s]."""
    size = [min(s, t) for s, t in zip(student_map.shape[2:], teacher_map.shape[2:])]
    v, u = (hint_pool(m, size[0], size[1], normalize) for m in (student_map, teacher_map))
    return hint_mse(hint_conv(v, weight), u)


def hint_pool(feature_map: Tensor, height: int, width: int, normalize: bool) -> Tensor:
    """L2-normalize over channels (if asked for), then average-pool to [N, c, height, width]."""
    wide = feature_map.to(wide_dtype(feature_map))
    if normalize:
        wide = F.normalize(wide, dim=1)
    return F.adaptive_avg_pool2d(wide, (height, width))


def hint_conv(pooled: Tensor, weight: Tensor) -> Tensor:
    """``F_t``: torch's own 1x1 convolution, in at least float32 (which autocast may narrow)."""
    dtype = wide_dtype(pooled, weight)
    return F.conv2d(pooled.to(dtype), weight.to(dtype)[:, :, None, None])


def hint_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in at least float32; 0 for an empty batch."""
    dtype = wide_dtype(prediction, target)
    return (prediction.to(dtype) - target.to(dtype)).square().sum() / max(prediction.numel(), 1)


def dual_softmax(scores: Tensor, dim1: int = -2, dim2: int = -1, *, mode: str = "sequential") -> Tensor:
    """Softmax along dim1, then of that along dim2 (``sequential``); or the product of the two (``product``)."""
    wide = scores.to(wide_dtype(scores))
    first = wide.softmax(dim1)
    out = first.softmax(dim2) if mode == "sequential" else first * wide.softmax(dim2)
    return out.to(scores.dtype)
