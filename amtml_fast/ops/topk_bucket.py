"""``topk_kd_loss`` with the tail "bucket", and the statistics of all tails.

On the CPU one kernel makes the loss and its gradients. Elsewhere kernels sweep the student's row of C classes, and what the
teachers name, [N, K] entries of all teachers side by side, is a kernel between the sweep of forward and that of backward. The
statistics, too, are a sweep and a kernel behind it (``_topk_bucket_kernels``). In a split vocabulary, and for more entries than the
GPUs' kernels take, what is named is plain PyTorch (``_topk_bucket_plain``). What passes between the two: of every row the logarithm
of the sum over the classes that nobody names, and the logits that are named. From these come all probabilities, by sums and never by
differences.
"""

from typing import Any

import torch
from torch import Tensor

from amtml_fast import backend, reference
from amtml_fast.ops import _kd
from amtml_fast.ops._base import define, operator
from amtml_fast.ops._topk_bucket_kernels import kernel_stats, one_pass_loss, swept_loss
from amtml_fast.ops._topk_bucket_plain import plain_bucket, plain_tail
from amtml_fast.ops._topk_named import NOBODY, TopkInputs, kept_entries
from amtml_fast.terms import Divergence, KDStats

operator("topk_bucket")


def bucket_loss(given: TopkInputs, divergence: Divergence, support: str, *, need_stats: bool) -> tuple[Tensor, Any]:
    """The loss, and with ``need_stats`` the statistics."""
    chosen = _chosen(given, kernel_checks=given.vocabulary is None)
    if chosen == "reference" and given.vocabulary is None:
        return reference.topk_bucket(*given.apart(), divergence, support, need_stats=need_stats)
    kept = kept_entries(chosen, given) if support == "student" else None
    if given.vocabulary is not None or not _kernels_take(chosen, given.sizes):
        return plain_bucket(chosen, given, kept, divergence, need_stats=need_stats)
    supported = given if kept is None else given._replace(indices=given.indices.masked_fill(~kept, NOBODY))
    if chosen != "cpp":
        return swept_loss(chosen, supported, divergence, need_stats=need_stats)
    return one_pass_loss(given, kept, divergence), kernel_stats(chosen, supported) if need_stats else None


@torch.no_grad()
def topk_stats(given: TopkInputs) -> KDStats:
    """The statistics with another tail."""
    chosen = _chosen(given)
    if chosen == "reference":
        return reference.topk_kd(*given.apart(), need_stats=True)[1]
    if _kernels_take(chosen, given.sizes):
        return kernel_stats(chosen, given)
    return plain_tail(chosen, given, need_stats=True)[1]


def split_tail_loss(given: TopkInputs, *, need_stats: bool) -> tuple[Tensor, Any]:
    """The loss with another tail, whose classes are split among processes, and with ``need_stats`` the statistics."""
    return plain_tail(_chosen(given), given, need_stats=need_stats)


def _kernels_take(chosen: str, sizes: list[int]) -> bool:
    """Whether the backend's kernels of what is named take so many teachers and entries."""
    return chosen == "cpp" or (len(sizes) <= backend.MOST_TEACHERS and sum(sizes) <= backend.MOST_ENTRIES)


def _chosen(given: TopkInputs, *, kernel_checks: bool = False) -> str:
    """The backend. ``kernel_checks``: the C++ kernel gets what the caller gave, and checks values itself."""
    chosen = backend.choose("topk_bucket", given.student, given.weights, given.log_probs)
    if chosen != "cpp" or not kernel_checks:
        _kd.check_values(*given.values)
    return chosen


# --- the kernels of a sweep

_SETTINGS = "float temperature, int ignore_index, bool need_second, bool need_total, bool in_float64"


# Of every row, over the classes that are not among its indices: maximum m, log sum exp((z - m) / temperature), with
# need_second the same at temperature 1; the label's logit; with need_total the sum of all logits; and, with need_statistics,
# sum r log r of r = softmax(z / temperature), and the sum of z; of all classes the first with the largest logit. What is not asked
# for is 0, and so is an ignored row.
# -> [N, 8], logits at the indices [N, K]: float64
@define(
    "topk_bucket_fwd",
    f"(Tensor student, Tensor indices, Tensor? weights, Tensor? labels, {_SETTINGS}, bool need_statistics) -> (Tensor, Tensor)",
)
def _(student, indices, weights, labels, *settings):
    n, entries = indices.shape
    return student.new_empty(n, 8, dtype=torch.float64), student.new_empty(n, entries, dtype=torch.float64)


# From the gradients to these sums (not m and the logarithm, but that of the sum; the mean, not the sum) and to the logits at
# the indices, each class once, which have their part in no sum over classes but the mean
@define(
    "topk_bucket_bwd",
    f"(Tensor grad_sums, Tensor grad_z, Tensor student, Tensor indices, Tensor? labels, Tensor found, {_SETTINGS}) -> Tensor",
)
def _(grad_sums, grad_z, student, indices, labels, found, *settings):
    return student.new_empty(student.shape)


# Of every row and bound [N, T] the last class of the first `equal` [N, T] that have it as logit; C - 1 if there are fewer
@define("topk_bucket_last", "(Tensor student, Tensor bounds, Tensor equal) -> Tensor")
def _(student, bounds, equal):
    return torch.empty_like(equal)
