"""What top-k teachers name: of rows [N, K] of entries, those of all teachers side by side, which count, and for whom."""

from typing import NamedTuple

import torch
from torch import Tensor

from amtml_fast.ops._base import kernels
from amtml_fast.ops._vocabulary import Vocabulary
from amtml_fast.reference import weighted
from amtml_fast.terms import KDOptions, wide_dtype

NOBODY = -(2**62)  # in the place of a class that the support leaves out


class TopkInputs(NamedTuple):
    """Checked rows, and what their teachers name."""

    student: Tensor  # [N, C]; in a split vocabulary the classes of this process
    indices: Tensor  # [N, K] int64; NOBODY where the support leaves one out
    log_probs: Tensor  # [N, K]
    sizes: list[int]  # of each teacher its k: K in all
    weights: Tensor | None  # [N, T], [1, T]
    labels: Tensor | None  # [N]
    options: KDOptions  # whose mode is the tail
    vocabulary: Vocabulary | None  # None: all classes are here

    @property
    def classes(self) -> int:
        """Of all processes together."""
        return self.student.shape[1] if self.vocabulary is None else self.vocabulary.classes

    @property
    def wide(self) -> torch.dtype:
        return wide_dtype(self.student, self.log_probs, self.weights)

    @property
    def values(self) -> tuple:
        """What ``_kd.check_values`` takes."""
        support = self.indices, self.sizes
        return "topk_kd_loss", self.labels, self.classes, self.options.ignore_index, self.weights, support

    def apart(self) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor | None, Tensor | None, KDOptions]:
        """What the reference takes: the teachers' entries in lists."""
        indices, log_probs = (list(x.split(self.sizes, 1)) for x in (self.indices, self.log_probs))
        return self.student, indices, log_probs, self.weights, self.labels, self.options


class Named(NamedTuple):
    """The entries of rows [N, K]."""

    classes: Tensor  # NOBODY where the support leaves one out
    own: Tensor  # whether an entry is the first of its class in its teacher; the others count nothing
    home: Tensor  # for these the column of the first entry of that class in the row, else K
    heads: Tensor  # whether it is that one: each class that is named, once
    p: Tensor  # float64: what its teacher gives the class, in all of its entries; 0 where it is not ``own``
    named: list[Tensor]  # of each teacher [N, K]: at a head, whether it names that class


def kept_entries(chosen: str, given: TopkInputs) -> Tensor:
    """Which entries are among the student's k largest; of equal logits the first classes are."""
    indices, sizes, vocabulary = given.indices, given.sizes, given.vocabulary
    z, most = given.student.detach(), max(sizes)
    largest = z.topk(min(most, z.shape[1]), dim=1).values
    if vocabulary is not None:
        largest = vocabulary.gathered(largest).movedim(0, 1).flatten(1).topk(most, dim=1).values.to(z.dtype)
    # Wide: on the CPU torch stacks no float16 under an autocast to bfloat16.
    bounds = torch.stack([largest[:, k - 1].to(wide_dtype(z)) for k in sizes], 1).to(z.dtype)
    # How many of the logits that equal the bound are among the k.
    equal = torch.stack([k - (largest[:, :k] > largest[:, k - 1 : k]).sum(1) for k in sizes], 1)
    mine, places = torch.ones_like(indices, dtype=torch.bool), indices.clamp(0, z.shape[1] - 1)
    if vocabulary is not None:  # less those that the processes before this one hold
        mine, places = vocabulary.here(indices)
        found = torch.stack([(z == bounds[:, t : t + 1]).sum(1) for t in range(len(sizes))], 1)
        equal = equal - vocabulary.gathered(found)[: vocabulary.rank].sum(0).long()
    last = (
        _last(z, bounds, equal) if chosen == "reference" else kernels(chosen).topk_bucket_last.default(z, bounds, equal)
    )
    last = last.masked_fill(equal <= 0, -1)
    out = []
    for t, place in enumerate(places.split(sizes, 1)):
        named, bound = z.gather(1, place), bounds[:, t : t + 1]
        out.append((named > bound) | ((named == bound) & (place <= last[:, t : t + 1])))
    kept = torch.cat(out, 1) & mine
    return kept if vocabulary is None else vocabulary.gathered(kept).amax(0) > 0


def _last(z: Tensor, bounds: Tensor, equal: Tensor) -> Tensor:
    """``topk_bucket_last`` in plain PyTorch."""
    before = [((z == bounds[:, t : t + 1]).cumsum(1) < equal[:, t : t + 1]).sum(1) for t in range(bounds.shape[1])]
    return torch.stack(before, 1).clamp(max=z.shape[1] - 1)


@torch.no_grad()
def named_entries(indices: Tensor, kept: Tensor | None, p: Tensor, sizes: list[int], valid: Tensor) -> Named:
    indices = indices.masked_fill(~valid.unsqueeze(1), 0)
    if kept is not None:
        indices = indices.masked_fill(~kept, NOBODY)
    entries = indices.shape[1]
    at = torch.ones_like(indices).cumsum(1) - 1  # each column's number
    in_order, order = indices.sort(dim=1, stable=True)  # so by teacher within a class
    teacher, start = torch.zeros_like(order), 0
    for k in sizes[:-1]:
        start += k
        teacher = teacher + (order >= start)
    of_class, of_teacher = (x[:, 1:] != x[:, :-1] for x in (in_order, teacher))
    first = torch.ones_like(indices[:, :1], dtype=torch.bool)

    def beginning(begins: Tensor) -> Tensor:
        """The column of the entry that stands first among its equals; back in the teachers' order."""
        place = at.masked_fill(~torch.cat([first, begins], 1), 0).cummax(1).values
        return torch.empty_like(order).scatter(1, order, order.gather(1, place))

    mine, home = beginning(of_class | of_teacher), beginning(of_class)
    own = (mine == at) & (indices != NOBODY)
    counted, sums = p if kept is None else p.masked_fill(~kept, 0), torch.zeros_like(p)
    if p.device.type == "cpu":
        p = sums.scatter_add(1, mine, counted)
    else:  # on a GPU index_put adds up in a fixed order, as scatter_add does on the CPU
        row = torch.ones_like(indices[:, :1]).cumsum(0) - 1
        p = sums.index_put((row, mine), counted, accumulate=True)
    home = home.masked_fill(~own, entries)
    heads = own & (home == at)
    return Named(indices, own, home, heads, p, to_heads(home, sizes, own))


def to_heads(home: Tensor, sizes: list[int], x: Tensor) -> list[Tensor]:
    """Of each teacher what its entries have, at the head of their class; 0 elsewhere."""
    entries = x.shape[1]
    if len(sizes) == 1:
        return [x.masked_fill(home == entries, 0)]
    parts = zip(x.split(sizes, 1), home.split(sizes, 1))
    return [x.new_zeros(len(x), entries + 1).scatter(1, to, part)[:, :entries] for part, to in parts]


def lost_entries(named: Named, gone: Tensor, used: Tensor, sizes: list[int]) -> Tensor:
    """Entries whose class some teacher with weight gives nothing, by name or in its bucket."""
    missing = to_heads(named.home, sizes, named.p == 0)
    at_heads = torch.zeros_like(named.own)
    for t, names in enumerate(named.named):
        at_heads = at_heads | torch.where(names, missing[t] & used[:, t : t + 1], gone[:, t : t + 1])
    return at_heads.gather(1, named.home.clamp(max=at_heads.shape[1] - 1))


def at_heads(named: Named, sizes: list[int], w: Tensor, share: Tensor) -> Tensor:
    """The mixture of the teachers at the heads; ``share``: what each gives a class that it does not name."""
    out = torch.zeros_like(named.p)
    for t, p in enumerate(to_heads(named.home, sizes, named.p)):
        out = out + weighted(w[:, t : t + 1], torch.where(named.named[t], p, share[:, t : t + 1]))
    return out


def by_teacher(x: Tensor, sizes: list[int]) -> Tensor:
    """[N, K] -> [N, T]: sums."""
    return torch.stack([part.sum(1) for part in x.split(sizes, 1)], 1)


def of_outcomes(x: Tensor, sizes: list[int]) -> Tensor:
    """The same of [N, K + T], of which the last T belong to the teachers' buckets."""
    entries = sum(sizes)
    return by_teacher(x[:, :entries], sizes) + x[:, entries:]
