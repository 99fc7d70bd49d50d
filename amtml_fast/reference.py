"""The equations of AMTML-KD in plain PyTorch: the oracle of every test and the backend of last resort.

Equations are numbered as in docs/method.md, after Liu, Zhang, Wang, *Adaptive multi-teacher multi-level knowledge distillation*
(2020). Each function has the name, signature and meaning of its namesake in ``amtml_fast``, takes any
floating dtype (16-bit inputs are computed in float32), and can be differentiated any number of times. Arguments are
taken as already checked: the checks live in ``amtml_fast.ops``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from amtml_fast.terms import (
    Divergence,
    KDOptions,
    KDStats,
    KDTerms,
    LinearTeacher,
    TopKTeacher,
    connected,
    counted_rows,
    divergence_numbers,
    divergence_of,
    of_counted_rows,
    over_items,
    shaped_stats,
    times,
    wide_dtype,
    without_autocast,
)


def teacher_weights(features: Tensor, theta: Tensor, v: Tensor, *, pool: str = "max") -> Tensor:
    """Eq 4-6: ``softmax_t(v . (theta_t * pool(features)))``, [N, d, H, W] or [N, d] -> [N, T]."""
    dtype = wide_dtype(features, theta, v)
    b = features.to(dtype)
    if b.dim() == 4:
        flat = b.flatten(2)
        b = flat.max(-1).values if pool == "max" else flat.mean(-1)  # max(dim), not amax: a tie goes to the first
    gamma = (b.unsqueeze(1) * (theta.to(dtype) * v.to(dtype))).sum(-1)  # [N, T]; no matmul, which autocast would narrow
    return gamma.softmax(-1)


def _one_process(function: str, process_group: Any) -> None:
    if process_group is not None:
        raise NotImplementedError(
            f"reference.{function}: process_group must be None (the reference computes in one process), got one"
        )


def multi_teacher_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | list[Tensor] | tuple[Tensor, ...],
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
    """Eq 7-8: ``(1 - alpha) * CE + alpha * temperature**2 * D(p, q)``, where D is ``KL(sum_t w_t p_t || q)``."""
    _one_process("multi_teacher_kd_loss", process_group)
    leading = student_logits.shape[:-1]
    divergent = divergence_of(temperature, alpha, divergence, beta, teacher_temperature, len(teacher_logits))
    row_reduction = "sum" if num_items_in_batch is not None else reduction
    arguments = (
        student_logits.reshape(-1, student_logits.shape[-1]),
        [t.reshape(-1, t.shape[-1]) for t in teacher_logits],
        None if teacher_weights is None else teacher_weights.reshape(-1, teacher_weights.shape[-1]),
        None if labels is None else labels.reshape(-1),
        divergence_numbers(temperature, alpha, mode, row_reduction, t2_scale, ignore_index, label_smoothing),
    )
    if divergent.nothing_but_eq8(mode) and not return_stats:
        loss = multi_teacher_kd(*arguments).loss
    else:
        loss, stats = divergence_loss(*arguments, divergent, need_stats=return_stats)
    if num_items_in_batch is not None:
        loss = over_items(loss, num_items_in_batch)
    elif reduction == "none":
        loss = loss.reshape(leading)
    return (loss, shaped_stats(stats, leading)) if return_stats else loss


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
    log_p = with_weight([(t.to(dtype).masked_fill(hide, 0) / temperature).log_softmax(-1) for t in teachers], w)
    mixture = torch.zeros_like(z)
    for t, p in enumerate(log_p):  # Eq 7: probabilities are mixed
        mixture = mixture + weighted(w[:, t, None], p.exp())
    if options.mode == "mixture":
        kl = kl_of_probs(mixture, log_q)
    else:
        kl = torch.stack([weighted(w[:, t], kl_rows(p.exp(), p, log_q)) for t, p in enumerate(log_p)]).sum(0)
    kl = kl * (temperature**2 if options.t2_scale else 1)
    loss, ce, kl = _kd_reduced(z, w, kl, valid, labels, options)
    return KDTerms(loss, ce, kl, log_q.exp(), mixture)


def divergence_loss(
    student: Tensor,  # [N, C]
    teachers: list[Tensor],  # T x [N, C]
    weights: Tensor | None,  # [N, T], [1, T] or None (uniform)
    labels: Tensor | None,  # [N]
    options: KDOptions,
    divergence: Divergence,
    *,
    need_stats: bool,
) -> tuple[Tensor, Any]:
    """Eq 8 with any divergence D(p, q) in the place of its KL, on rows; and ``KDStats`` or None."""
    dtype = wide_dtype(student, *teachers, weights)
    valid, logits, w = _kd_rows(student, weights, len(teachers), labels, options.ignore_index, dtype)
    hide = ~valid.unsqueeze(1)
    compared = logits
    if divergence.alpha is not None:
        # A D that is infinite or NaN counts nothing where alpha is 0: no gradient goes through it, or it would meet the 0.
        holes = torch.stack([~x.isfinite().all(1) for x in (logits, *teachers)]).any(0)
        without = ((divergence.alpha == 0) & holes).unsqueeze(1)
        w, compared = (torch.where(without, x.detach(), x) for x in (w, logits))
    tau = logits.new_full((1, 1), options.temperature)
    if divergence.temperature is not None:
        tau = divergence.temperature.to(dtype).unsqueeze(1).masked_fill(hide, 1)  # [N, 1]
    of_teachers: Sequence[Any] = divergence.teacher_temperatures or (tau,) * len(teachers)
    scaled = [t.to(dtype).masked_fill(hide, 0) / by for t, by in zip(teachers, of_teachers)]
    log_p = with_weight([x.log_softmax(-1) for x in scaled], w)

    # What the student is compared with: weight, probabilities and their logarithms.
    mixture = w.new_ones(w.shape[0]), *mixed_probs(log_p, w)
    if options.mode == "mixture":
        targets = [mixture]
    elif options.mode == "logits":
        log_target = mixed_logits(scaled, w).log_softmax(-1)
        targets = [(mixture[0], log_target.exp(), log_target)]
    else:
        targets = [(w[:, t], p.exp(), p) for t, p in enumerate(log_p)]

    z = compared / tau
    if divergence.name == "reverse_kl":  # a class that no target has makes it infinite, and gets no gradient
        z = torch.where(lost_classes(targets, z), z.detach(), z)
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    each = [divergence_rows(divergence, p, log, q, log_q) for _, p, log in targets]
    distance = each[0]
    if options.mode == "sum":
        distance = torch.stack([weighted(weight, d) for (weight, _, _), d in zip(targets, each)]).sum(0)
    if options.t2_scale:
        distance = distance * tau.square().squeeze(1)
    loss = _kd_reduced(logits, w, distance, valid, labels, options, divergence.alpha)[0]

    if not need_stats:
        return loss, None
    _, target, log = mixture if options.mode == "sum" else targets[0]
    stats = KDStats(
        entropy_rows(q, log_q),
        entropy_rows(target, log),
        torch.stack([kl_rows(p.exp(), p, log_q) for p in log_p], 1),
        (w.sum(1) > 0).to(dtype),
        (q.argmax(1) == target.argmax(1)).to(dtype),
    )
    return loss, of_counted_rows(stats, valid)


def divergence_rows(divergence: Divergence, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor) -> Tensor:
    """D(p, q) of each row, [..., C]. A class without probability counts 0."""
    name, beta = divergence.name, divergence.beta
    if name == "forward_kl":
        return kl_rows(p, log_p, log_q)
    if name == "reverse_kl":
        lost = (log_p == -torch.inf) & (q != 0)
        infinite = torch.zeros_like(q[..., 0]).masked_fill(lost.any(-1), torch.inf)
        return kl_rows(q.masked_fill(lost, 0), log_q, log_p) + infinite
    if name == "tvd":
        difference = p - q
        # The sign of NaN is 0 to torch, and so would be the gradient of abs().
        sign = difference.sign().masked_fill(difference.isnan(), torch.nan)
        return (difference * sign).sum(-1) / 2
    share = 1 - beta if name == "skew_reverse_kl" else beta
    m = share * p + (1 - share) * q
    log_m = log_or_0(m)
    if name == "skew_kl":
        return kl_rows(p, log_p, log_m)
    if name == "skew_reverse_kl":
        return kl_rows(q, log_q, log_m)
    return beta * kl_rows(p, log_p, log_m) + (1 - beta) * kl_rows(q, log_q, log_m)


def lost_classes(targets: list[tuple[Tensor, Tensor, Tensor]], z: Tensor) -> Tensor:
    """Classes [N, C] that the student has, and one of its targets has not."""
    lost = torch.stack([(weight != 0).unsqueeze(1) & (log == -torch.inf) for weight, _, log in targets])
    return lost.any(0) & (z != -torch.inf)


def mixed_probs(log_p: list[Tensor], w: Tensor) -> tuple[Tensor, Tensor]:
    """``sum_t w_t p_t``, and its logarithm: a number even where the probabilities are too small for one."""
    used = torch.stack([p.masked_fill(w[:, t, None] == 0, -torch.inf) for t, p in enumerate(log_p)])
    most = used.detach().amax(0)
    most = most.masked_fill(most == -torch.inf, 0)
    shares = [weighted(w[:, t, None], torch.stack([p.exp(), (p - most).exp()])) for t, p in enumerate(log_p)]
    mixture, share = torch.stack(shares).sum(0)
    none = share == 0
    return mixture, (most + log_or_0(share)).masked_fill(none, -torch.inf)


def mixed_logits(scaled: list[Tensor], w: Tensor) -> Tensor:
    """``sum_t w_t z_t / tau_t``; -inf where a teacher with weight has it."""
    masked, mixed = torch.zeros_like(scaled[0], dtype=torch.bool), torch.zeros_like(scaled[0])
    for t, x in enumerate(scaled):
        weight, out = w[:, t, None], x == -torch.inf
        masked = masked | (out & (weight != 0))
        mixed = mixed + weighted(weight, x.masked_fill(out, 0))
    return mixed.masked_fill(masked & ~mixed.isnan(), -torch.inf)


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
    valid = counted_rows(student, rows, labels, ignore_index)
    hide = ~valid.unsqueeze(1)
    z = student.to(dtype).masked_fill(hide, 0)  # an ignored row gives 0 whatever it holds, NaN included
    z = z.masked_fill(z == -torch.inf, -torch.inf)  # same values, but no gradient flows into a masked class
    if weights is None:
        weights = z.new_full((1, num_teachers), 1 / num_teachers)
    return valid, z, weights.to(dtype).expand(rows, -1).masked_fill(hide, 0)


def with_weight(log_p: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """Without weight a teacher counts nothing, even one that has no softmax."""
    return [p.masked_fill((w[:, t, None] == 0) & p.isnan(), -torch.inf) for t, p in enumerate(log_p)]


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    value = value.masked_fill((weight == 0) & ~value.isfinite(), 0)
    return (weight * value).masked_fill(value == 0, 0)  # or an infinite gradient would meet the 0


def _kd_reduced(
    z: Tensor,
    w: Tensor,
    kl: Tensor,
    valid: Tensor,
    labels: Tensor | None,
    options: KDOptions,
    alphas: Tensor | None = None,  # [N]: one a row
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq 8 from its KL of every row: loss, ce and kl, reduced."""
    if labels is None:
        ce = None
    else:
        ce = F.cross_entropy(
            z,
            labels.long(),
            ignore_index=options.ignore_index,
            label_smoothing=options.label_smoothing,
            reduction="none",
        )
    loss, ce, kl = reduced(ce, kl, valid, z.shape[1], options, alphas)
    if labels is not None and options.alpha == 0:
        loss = connected(loss, w)
    return loss, ce, kl


def reduced(
    ce: Tensor | None,
    kl: Tensor,
    valid: Tensor,
    classes: int,
    options: KDOptions,
    alphas: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ce and kl of Eq 8, reduced, from both terms of every row; ``ce`` is None without labels."""
    alpha, reduction, labeled = options.alpha, options.reduction, ce is not None
    kl = kl.masked_fill(~valid, 0)
    if ce is None:
        ce = torch.zeros_like(kl)
    if alphas is not None:  # the rest then adds them up
        alphas = alphas.to(kl.dtype).masked_fill(~valid, 0)
        shares = 1 - alphas, alphas
        ce, kl = (by * x.masked_fill((by == 0) & ~x.isfinite(), 0) for by, x in zip(shares, (ce, kl)))

    if reduction != "none":
        count = kl.new_ones(()) if reduction == "sum" else valid.sum().clamp(min=1).to(kl.dtype)
        ce = ce.sum() / count
        kl = kl.sum() / (count * (classes if reduction == "mean" else 1))
    if alphas is not None:
        loss = ce + kl
    elif not labeled or alpha == 1:  # not 0 * ce: that is NaN where ce is infinite
        loss = times(kl, alpha) if labeled else kl
    else:
        loss = times(ce, 1 - alpha)
        loss = loss if alpha == 0 else torch.add(loss, kl, alpha=alpha)
    return loss, ce, kl


def kl_rows(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum_c p (log p - log q)`` where a class with p = 0 counts 0, in value and gradient."""
    empty = p == 0
    return (p * (log_p.masked_fill(empty, 0) - log_q.masked_fill(empty, 0))).sum(-1)


def kl_of_probs(p: Tensor, log_q: Tensor) -> Tensor:
    """``kl_rows`` of probabilities whose logarithms are not at hand."""
    return kl_rows(p, log_or_0(p), log_q)


def entropy_rows(p: Tensor, log_p: Tensor) -> Tensor:
    return -kl_rows(p, log_p, torch.zeros_like(p))


def log_or_0(p: Tensor) -> Tensor:
    """The logarithm; 0, without a gradient, where p is 0."""
    return p.masked_fill(p == 0, 1).log()


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
    divergence: str = "forward_kl",
    beta: float | None = None,
    support: str = "teacher",
    return_stats: bool = False,
    process_group: Any = None,
) -> Any:
    """Eq 7-8 where of ``softmax(teacher_t / temperature)`` only some classes are given. Dense: O(T N C) memory."""
    _one_process("topk_kd_loss", process_group)
    row_reduction = "sum" if num_items_in_batch is not None else reduction
    arguments = (
        student_logits.reshape(-1, student_logits.shape[-1]),
        [i.reshape(-1, i.shape[-1]) for i in teacher_indices],
        [p.reshape(-1, p.shape[-1]) for p in teacher_log_probs],
        None if teacher_weights is None else teacher_weights.reshape(-1, teacher_weights.shape[-1]),
        None if labels is None else labels.reshape(-1),
        KDOptions(temperature, alpha, tail, row_reduction, t2_scale, ignore_index, label_smoothing),
    )
    if tail == "bucket":
        chosen = divergence_of(temperature, alpha, divergence, beta, None, len(teacher_indices))
        loss, stats = topk_bucket(*arguments, chosen, support, need_stats=return_stats)
    else:
        loss, stats = topk_kd(*arguments, need_stats=return_stats)
    if num_items_in_batch is not None:
        loss = over_items(loss, num_items_in_batch)
    elif reduction == "none":
        loss = loss.reshape(student_logits.shape[:-1])
    return (loss, shaped_stats(stats, student_logits.shape[:-1])) if return_stats else loss


def topk_kd(
    student: Tensor,  # [N, C]
    indices: list[Tensor],  # T x [N, k]
    log_probs: list[Tensor],  # T x [N, k]
    weights: Tensor | None,  # [N, T], [1, T] or None (uniform)
    labels: Tensor | None,  # [N]
    options: KDOptions,
    *,
    need_stats: bool,
) -> tuple[Tensor, Any]:
    """``topk_kd_loss`` on rows, but for the tail "bucket"; and ``KDStats`` or None."""
    temperature, tail = options.temperature, options.mode
    dtype = wide_dtype(student, *log_probs, weights)
    valid, z, w = _kd_rows(student, weights, len(indices), labels, options.ignore_index, dtype)
    hide = ~valid.unsqueeze(1)
    mixture = torch.zeros_like(z)
    given = []
    for t, (index, log_p) in enumerate(zip(indices, log_probs)):
        hidden = index.long().masked_fill(hide, 0), log_p.to(dtype).masked_fill(hide, 0)
        given.append(_dense_probs(*hidden, z.shape[1], tail))
        mixture = mixture + weighted(w[:, t, None], given[t])
    log_q = (z / temperature).log_softmax(-1)
    kl = kl_of_probs(mixture, log_q) * (temperature**2 if options.t2_scale else 1)
    loss = _kd_reduced(z, w, kl, valid, labels, options)[0]
    if not need_stats:
        return loss, None
    kls = [kl_of_probs(p, log_q) for p in given]
    return loss, _topk_stats(log_q, mixture, kls, [p.to(dtype).exp().sum(-1) for p in log_probs], w, valid)


def topk_bucket(
    student: Tensor,  # [N, C]
    indices: list[Tensor],  # T x [N, k]
    log_probs: list[Tensor],  # T x [N, k]
    weights: Tensor | None,  # [N, T], [1, T] or None (uniform)
    labels: Tensor | None,  # [N]
    options: KDOptions,
    divergence: Divergence,
    support: str,
    *,
    need_stats: bool,
) -> tuple[Tensor, Any]:
    """``topk_kd_loss`` with the tail "bucket": ``sum_t w_t D`` over the classes that teacher t names and one for all others."""
    dtype = wide_dtype(student, *log_probs, weights)
    valid, logits, w = _kd_rows(student, weights, len(indices), labels, options.ignore_index, dtype)
    hide = ~valid.unsqueeze(1)
    z = logits / options.temperature
    order = z.sort(dim=-1, descending=True, stable=True).indices.argsort(-1) if support == "student" else None
    outcomes, masses, lost = [], [], torch.zeros_like(z, dtype=torch.bool)
    for t, (index, log_p) in enumerate(zip(indices, log_probs)):
        index, log_p = index.long().masked_fill(hide, 0), log_p.to(dtype).masked_fill(hide, 0)
        dead = (w[:, t] == 0) & ~(log_p.exp().sum(-1) < torch.inf)  # 0 * NaN is 0
        log_p = log_p.masked_fill(dead.unsqueeze(1), -torch.inf)
        given = _dense_probs(index, log_p, z.shape[1], "ignore")
        named = torch.zeros_like(lost).scatter(1, index, True)
        if order is not None:
            named = named & (order < index.shape[1])
        p = given.masked_fill(~named, 0)
        # What is not given, without the digits that 1 - sum would lose, and what is given of other classes.
        rest = (-torch.expm1(log_p.double().logsumexp(-1))).clamp(min=0).to(dtype) + given.masked_fill(named, 0).sum(-1)
        rest = rest.masked_fill(named.all(-1), 0)
        p = torch.cat([p, rest.unsqueeze(1)], 1)
        outcomes.append((p, log_or_0(p).masked_fill(p == 0, -torch.inf), named))
        masses.append(p[:, :-1].sum(-1))
        gone = torch.where(named, p[:, :-1] == 0, (rest == 0).unsqueeze(1)) & (z != -torch.inf)
        lost = lost | (gone & (w[:, t, None] != 0))
    if divergence.name == "reverse_kl":  # an outcome that the teacher has not makes it infinite, and gets no gradient
        z = torch.where(lost, z.detach(), z)
    log_q = z.log_softmax(-1)
    each, kls = [], []
    for p, log_p, named in outcomes:
        others = log_q.masked_fill(named, -torch.inf)
        none = (others == -torch.inf).all(-1, keepdim=True)
        rest = others.masked_fill(none, 0).logsumexp(-1, keepdim=True).masked_fill(none, -torch.inf)
        own = torch.cat([log_q.masked_fill(~named, -torch.inf), rest], 1)
        each.append(divergence_rows(divergence, p, log_p, own.exp(), own))
        kls.append(kl_rows(p, log_p, own))
    distance = torch.stack([weighted(w[:, t], d) for t, d in enumerate(each)]).sum(0)
    if options.t2_scale:
        distance = distance * options.temperature**2
    loss = _kd_reduced(logits, w, distance, valid, labels, options)[0]
    if not need_stats:
        return loss, None
    target = torch.stack([weighted(w[:, t, None], p) for t, (p, _, _) in enumerate(outcomes)]).sum(0)
    return loss, _topk_stats(log_q, target, kls, masses, w, valid)


def _topk_stats(
    log_q: Tensor, target: Tensor, kls: list[Tensor], masses: list[Tensor], w: Tensor, valid: Tensor
) -> KDStats:
    """``KDStats`` of teachers that give some classes: [N, C] or, with what they do not give, [N, C + 1] probabilities."""
    stats = KDStats(
        entropy_rows(log_q.exp(), log_q),
        entropy_rows(target, log_or_0(target)),
        torch.stack(kls, 1),
        _weighted_mean(w, masses),
        (log_q.argmax(1) == target[:, : log_q.shape[1]].argmax(1)).to(log_q.dtype),
    )
    return of_counted_rows(stats, valid)


def _weighted_mean(w: Tensor, values: list[Tensor]) -> Tensor:
    """[N or 1, T], T x [N] -> [N]; 0 without weight."""
    total = w.sum(1)
    return torch.stack([weighted(w[:, t], x) for t, x in enumerate(values)]).sum(0) / total.masked_fill(total == 0, 1)


def _dense_probs(index: Tensor, log_p: Tensor, classes: int, tail: str) -> Tensor:
    """[N, k] classes and the logarithms of their probabilities -> [N, C] probabilities; a class named twice has both."""
    p = (log_p.log_softmax(-1) if tail == "renormalize" else log_p).exp()
    dense = p.new_zeros(p.shape[0], classes).scatter_add(1, index, p)
    if tail != "uniform":
        return dense
    named = torch.zeros_like(dense, dtype=torch.bool).scatter(1, index, True)
    others = (~named).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(named, dense, (1 - dense.sum(-1, keepdim=True)).clamp(min=0) / others)


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
    """Eq 7-8 from hidden states and output layers: makes all logits, and then ``multi_teacher_kd_loss`` of them."""
    _one_process("fused_linear_kd_loss", process_group)
    rows, leading = math.prod(student_hidden.shape[:-1]), student_hidden.shape[:-1]
    dtype = wide_dtype(student_hidden, student_weight, student_bias, *flat_teachers(teachers), teacher_weights)
    labels = None if labels is None else labels.reshape(rows)
    valid = counted_rows(student_hidden, rows, labels, ignore_index)

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        hidden = hidden.reshape(rows, hidden.shape[-1]).to(dtype).masked_fill(~valid.unsqueeze(1), 0)
        with without_autocast(hidden):
            x = F.linear(hidden, weight.to(dtype))  # which quantized weights have, too
        x = x if bias is None else x + bias.to(dtype)
        x = x if logit_scale == 1 else x * logit_scale
        return x if softcap is None else torch.where(x == -torch.inf, x, softcap * (x / softcap).tanh())

    of_teachers = (temperature,) * len(teachers) if teacher_temperature is None else teacher_temperature
    taus = of_teachers if isinstance(of_teachers, Sequence) else (of_teachers,) * len(teachers)
    dense = []
    for teacher, tau in zip(teachers, taus):
        if isinstance(teacher, LinearTeacher):
            dense.append(logits(*teacher))
        elif isinstance(teacher, TopKTeacher):
            index, log_probs = (x.reshape(rows, x.shape[-1]).masked_fill(~valid.unsqueeze(1), 0) for x in teacher)
            made = dense_log_probs(index.long(), log_probs.to(dtype), student_weight.shape[0])
            dense.append(made * (tau.reshape(rows, 1).to(dtype) if isinstance(tau, Tensor) else tau))
        else:
            dense.append(teacher.reshape(rows, teacher.shape[-1]))
    weights = None if teacher_weights is None else teacher_weights.reshape(-1, len(teachers))
    chosen = None
    if teacher_index is not None:
        count = torch.arange(len(teachers), dtype=torch.int64, device=teacher_index.device)
        chosen = teacher_index.reshape(rows, 1) == count
        weights = chosen.to(dtype)
    out = multi_teacher_kd_loss(
        logits(student_hidden, student_weight, student_bias), dense, weights, labels,
        temperature=temperature, alpha=alpha, mode=mode, reduction=reduction, t2_scale=t2_scale, ignore_index=ignore_index,
        label_smoothing=label_smoothing, num_items_in_batch=num_items_in_batch, divergence=divergence, beta=beta,
        teacher_temperature=teacher_temperature, return_stats=return_stats,
    )  # fmt: skip
    loss, stats = out if return_stats else (out, None)
    if reduction == "none":
        loss = loss.reshape(leading)
    if stats is None:
        return loss
    return loss, shaped_stats(linear_stats(stats, teachers, weights, chosen), leading)


def flat_teachers(teachers: Sequence[Tensor | LinearTeacher | TopKTeacher]) -> list[Tensor]:
    """Their tensors one after another, without the classes of top-k teachers and biases that are not there."""
    out: list[Tensor] = []
    for teacher in teachers:
        if isinstance(teacher, Tensor):
            out.append(teacher)
        elif isinstance(teacher, TopKTeacher):
            out.append(teacher.log_probs)
        else:
            out += [x for x in teacher if x is not None]
    return out


def dense_log_probs(index: Tensor, log_probs: Tensor, classes: int) -> Tensor:
    """[N, k] classes and the logarithms of their probabilities -> [N, C], -inf where there is none; named twice: both."""
    most = log_probs.new_full((index.shape[0], classes), -torch.inf).scatter_reduce(1, index, log_probs, "amax")
    share = (log_probs - most.gather(1, index)).masked_fill(log_probs == -torch.inf, -torch.inf).exp()
    return torch.zeros_like(most).scatter_add(1, index, share).log() + most


def linear_stats(
    stats: KDStats,
    teachers: Sequence[Tensor | LinearTeacher | TopKTeacher],
    weights: Tensor | None,
    chosen: Tensor | None,  # [N, T] bool
) -> KDStats:
    """Statistics [N] of the dense teachers, with the mass that top-k teachers give, and no KL of a teacher that is not asked."""
    if chosen is not None:
        stats = stats._replace(teacher_kl=stats.teacher_kl.masked_fill(~chosen, 0))
    if not any(isinstance(teacher, TopKTeacher) for teacher in teachers):
        return stats
    kept = stats.retained_mass
    mass = [
        t.log_probs.detach().reshape(kept.shape[0], t.log_probs.shape[-1]).to(kept.dtype).exp().sum(1)
        if isinstance(t, TopKTeacher)
        else torch.ones_like(kept)
        for t in teachers
    ]
    w = kept.new_ones(1, len(teachers)) if weights is None else weights.detach().to(kept.dtype)
    return stats._replace(retained_mass=_weighted_mean(w, mass).masked_fill(kept == 0, 0))


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
    with without_autocast(student):  # autocast would run the inner products in 16 bits
        cosines = [_cosines(x.to(dtype), row_mask, eps) for x in (student, teacher)]
    per_vertex = _huber(cosines[0] - cosines[1], delta).sum((1, 2))  # [N]
    n = student.shape[0] if row_mask is None else row_mask.sum()
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


def _huber(difference: Tensor, delta: float) -> Tensor:
    """The Huber loss of each element. (The gradient of torch's own has no derivative in forward mode.)"""
    clamped = difference.clamp(-delta, delta)
    return clamped * (difference - 0.5 * clamped)


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


def rkd_distance_loss(
    student: Tensor, teacher: Tensor, *, delta: float = 1.0, reduction: str = "mean", eps: float = 1e-12
) -> Tensor:
    """RKD's distance loss: distances over their mean, compared pair by pair. student, teacher [N, C] -> scalar."""
    dtype = wide_dtype(student, teacher)
    psi = [_normalized_distances(x.to(dtype), eps) for x in (student, teacher)]
    total = _huber(psi[0] - psi[1], delta).sum()
    n = student.shape[0]
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
    wide = wide_dtype(student_map, teacher_map, weight)
    v, u = (hint_pool(m.to(wide), size[0], size[1], normalize) for m in (student_map, teacher_map))
    return hint_mse(hint_conv(v, weight), u)


def hint_pool(feature_map: Tensor, height: int, width: int, normalize: bool) -> Tensor:
    """L2-normalize over channels (if asked for), then average-pool to [N, c, height, width]."""
    wide = feature_map.to(wide_dtype(feature_map))
    if normalize:
        wide = F.normalize(wide, dim=1)
    return F.adaptive_avg_pool2d(wide, (height, width))


def hint_conv(pooled: Tensor, weight: Tensor) -> Tensor:
    """``F_t``: torch's own 1x1 convolution, in at least float32."""
    dtype = wide_dtype(pooled, weight)
    with without_autocast(pooled):  # autocast would run it in 16 bits
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
