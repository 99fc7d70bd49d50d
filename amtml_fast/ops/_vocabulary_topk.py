"""The sums of ``topk_bucket`` where the classes of the student are split among processes.

Each process sweeps its own classes for the sums over those that nobody names, and has the logits that are named of its own. One
gather joins them. With the joined sums the backward kernel makes the gradient to this process's logits.
"""

from typing import Any

import torch
from torch import Tensor

from amtml_fast.ops._vocabulary import Vocabulary

_BYTES = 2**26  # of a block of rows


def absent_classes(
    vocabulary: Vocabulary, classes: Tensor, labels: Tensor | None, ignore_index: int, nobody: int
) -> Tensor:
    """[N, K + 1], which of these classes, and of the labels, no process has."""
    absent = vocabulary.absent(classes) & (classes != nobody)
    if labels is None:
        return torch.nn.functional.pad(absent, (0, 1))
    ignored = labels == ignore_index
    of_label = vocabulary.absent(labels) & ~ignored
    return torch.cat([absent & ~ignored.unsqueeze(1), of_label.unsqueeze(1)], 1)


def joined(
    vocabulary: Vocabulary, found: Tensor, z: Tensor, mine: Tensor | None, absent: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """What ``topk_bucket_fwd`` gives, [N, 8] and [N, K], of all classes, from that of this process's, but for the largest class.
    ``mine``: the rows whose label is here; ``absent``: what becomes NaN."""
    if mine is not None:
        found = torch.cat([found[:, :3], found[:, 3:4].masked_fill(~mine.unsqueeze(1), 0), found[:, 4:]], 1)
    told = vocabulary.gathered(torch.cat([found[:, :7], z], 1))
    parts, z = told[:, :, :7].unbind(2), told[:, :, 7:].amax(0)
    tops, logs, logs_1, of_label, total, entropy, below = parts
    # A part that has none of these classes gives the maximum 0.
    top = tops.masked_fill(logs == -torch.inf, -torch.inf).amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    each = (tops - top) / temperature + logs
    log_sum = each.logsumexp(0)
    log_share = each - log_sum
    entropy = (log_share.exp() * (entropy + log_share)).masked_fill(each == -torch.inf, 0).sum(0)
    sums = [
        top, log_sum, (tops - top + logs_1).logsumexp(0), of_label.sum(0).masked_fill(absent[:, -1], torch.nan), total.sum(0),
        entropy, below.sum(0), torch.zeros_like(top),
    ]  # fmt: skip
    return torch.stack(sums, 1), z.masked_fill(absent[:, :-1], torch.nan)


def grads_here(vocabulary: Vocabulary, of_sums: Tensor, of_z: Tensor, mine: Tensor | None) -> tuple[Tensor, Tensor]:
    """What ``topk_bucket_bwd`` takes, for this process's classes, from the gradients to ``sums`` [N, 5] and named logits."""
    at_1, of_label, of_mean, of_below = of_sums[:, 1], of_sums[:, 2], of_sums[:, 3], of_sums[:, 4]
    if mine is not None:
        of_label = of_label.masked_fill(~mine, 0)
    # A constant for every class: what comes to the sum over those that nobody names is taken off the others.
    of_mean = of_mean / vocabulary.parts + of_below * vocabulary.size
    return torch.stack([of_sums[:, 0], at_1, of_label, of_mean], 1), of_z - of_below.unsqueeze(1)


# --- the kernels in plain PyTorch, where there are none: their comments are in topk_bucket.py


def plain_sweep(
    student: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    labels: Tensor | None,
    temperature: float,
    ignore_index: int,
    need_second: bool,
    need_total: bool,
    in_float64: bool,
    need_statistics: bool,
) -> tuple[Tensor, Tensor]:
    found, named = [], []
    for y, index, label, _ in _blocks(student, indices, labels, ignore_index, in_float64):
        named.append(y.gather(1, index.clamp(min=0)).masked_fill(index < 0, -torch.inf).double())
        apart = _named_classes(y, index)
        others = y.masked_fill(apart, -torch.inf)
        top = others.amax(1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0)
        x = (others - top) / temperature
        log_sum = x.exp().sum(1, keepdim=True).log()
        zero = torch.zeros_like(log_sum)
        second = (others - top).exp().sum(1, keepdim=True).log() if need_second else zero
        of_label = zero if label is None else y.gather(1, label.clamp(min=0).unsqueeze(1))
        total = y.sum(1, keepdim=True) if need_total else zero
        entropy = below = largest = zero
        if need_statistics:
            r = (x - log_sum).exp()
            entropy = (r * (x - log_sum)).masked_fill(r == 0, 0).sum(1, keepdim=True)
            below, largest = y.masked_fill(apart, 0).sum(1, keepdim=True), y.argmax(1, keepdim=True)
        numbers = top, log_sum, second, of_label, total, entropy, below, largest
        found.append(torch.cat([x.double() for x in numbers], 1))
    return torch.cat(found), torch.cat(named)


def plain_gradient(
    grad_sums: Tensor,
    grad_z: Tensor,
    student: Tensor,
    indices: Tensor,
    labels: Tensor | None,
    found: Tensor,
    temperature: float,
    ignore_index: int,
    need_second: bool,
    need_total: bool,
    in_float64: bool,
) -> Tensor:
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    for y, index, label, rows in _blocks(student, indices, labels, ignore_index, in_float64):
        a, b, of_label, mean = (x.unsqueeze(1).to(y.dtype) for x in grad_sums[rows].unbind(1))
        top, log_sum, second = (x.unsqueeze(1).to(y.dtype) for x in found[rows, :3].unbind(1))
        mean = mean / y.shape[1]
        x = (y - top).clamp(max=0)  # what is named may be above it
        none = log_sum == -torch.inf
        grad = a / temperature * (x / temperature - log_sum.masked_fill(none, torch.inf)).exp() + mean
        if need_second:
            grad = grad + b * (x - second.masked_fill(none, torch.inf)).exp()
        nowhere = index.masked_fill(index < 0, y.shape[1])
        grad = torch.nn.functional.pad(grad, (0, 1)).scatter(1, nowhere, grad_z[rows].to(y.dtype) + mean)[:, :-1]
        if label is not None:
            grad = grad.scatter_add(1, label.clamp(min=0).unsqueeze(1), of_label)
        out[rows] = grad.masked_fill(y == -torch.inf, 0)
    return out


def _named_classes(y: Tensor, index: Tensor) -> Tensor:
    apart = torch.zeros(len(y), y.shape[1] + 1, dtype=torch.bool, device=y.device)
    return apart.scatter(1, index.masked_fill(index < 0, y.shape[1]), True)[:, :-1]


def _blocks(student: Tensor, indices: Tensor, labels: Tensor | None, ignore_index: int, in_float64: bool) -> Any:
    """Some rows at a time: logits, 0 in a row that does not count, classes, labels, and where they are."""
    rows, classes = student.shape
    step = max(_BYTES // (8 * classes), 1)
    for start in range(0, max(rows, 1), step):
        some = slice(start, start + step)
        y = student[some].to(torch.float64 if in_float64 else torch.float32)
        label = None if labels is None else labels[some]
        if label is not None:
            y = y.masked_fill((label == ignore_index).unsqueeze(1), 0)
        yield y, indices[some], label, some
