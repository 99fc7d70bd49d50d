"""A vocabulary that is split among the processes of a group: who holds which classes, and what they tell one another.

Process r of P holds the classes [r C / P, (r + 1) C / P) of all logits and output layers; all else is the same on all processes.
What they send one another is some numbers a row, never anything of size [N, C].
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from amtml_fast import checks

IGNORED = -1  # in the place of the label of a row that does not count
_PLAIN = (Tensor, torch.nn.Parameter)
NO_SECOND = (
    "the fused backends and a process_group have no second derivative; "
    'compute this part in one process under amtml_fast.use_backend("reference"), which has one'
)


class Vocabulary(NamedTuple):
    """The part of this process."""

    group: Any  # ProcessGroup
    rank: int
    parts: int  # processes
    size: int  # classes of each

    @property
    def classes(self) -> int:
        """Of all processes together."""
        return self.parts * self.size

    def gathered(self, x: Tensor) -> Tensor:
        """What each process has, in the order of ranks: [P, ...] float64."""
        x = x.detach().double().contiguous()
        out = x.new_empty(self.parts, *x.shape)
        if x.numel():
            dist.all_gather(list(out.unbind()), x, group=self.group)
        return out

    def summed_(self, x: Tensor) -> Tensor:
        """The sum over processes, in the place of x."""
        if x.numel():
            dist.all_reduce(x, group=self.group)
        return x

    def here(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these class numbers this process holds, and their places in its part; 0 for the others."""
        places = classes - self.rank * self.size
        mine = (places >= 0) & (places < self.size)
        return mine, places.masked_fill(~mine, 0)

    def labels_here(self, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """Labels for a kernel that sees this process's part: their places, 0 for those of other processes, and ``IGNORED``;
        and which rows have theirs here."""
        mine, places = self.here(labels)
        ignored = labels == ignore_index
        return places.masked_fill(ignored, IGNORED), mine & ~ignored

    def absent(self, classes: Tensor) -> Tensor:
        """Which of these class numbers no process holds. (On the CPU the checks have refused them.)"""
        return (classes < 0) | (classes >= self.classes)

    def first_largest(self, told: Tensor) -> Tensor:
        """From the largest value of each process and its place, [P, N, 2], the class [N]: of several largest the first."""
        values, places = told.unbind(2)
        rank = values.argmax(0, keepdim=True)
        return (rank * self.size + places.gather(0, rank).long()).squeeze(0)


def largest_here(x: Tensor) -> Tensor:
    """What each process tells for ``first_largest`` of its classes [N, C / P]: [N, 2] float64."""
    top = x.max(1)
    return torch.stack([top.values.double(), top.indices.double()], 1)


def vocabulary_of(function: str, process_group: Any, size: int) -> Vocabulary | None:
    """The part of a process that holds so many classes; None where no other process holds any."""
    if process_group is None:
        return None
    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        wanted = "a torch.distributed.ProcessGroup that this process belongs to, or None"
        raise TypeError(f"{function}: process_group must be {wanted}, got {type(process_group).__name__}")
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{function}: process_group must be None in compiled code, got a ProcessGroup; "
            "call it from a function under torch.compiler.disable"
        )
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        raise RuntimeError(f"{function}: process_group must be None under torch.func and in forward mode, got one")
    vocabulary = Vocabulary(process_group, process_group.rank(), process_group.size(), size)
    return None if vocabulary.parts == 1 else vocabulary


def check_alike(
    function: str,
    vocabulary: Vocabulary,
    rows: Tensor,  # [N, ...]
    settings: tuple,
    *,
    integers: Sequence[Tensor | None],
    floats: Sequence[Tensor | list[Tensor] | None],
) -> Tensor | None:
    """That all processes make the same call, with the same labels and hidden states: a ValueError on all of them. A GPU is not
    asked, for that would be a sync: there this is a NaN for the loss."""
    known = vocabulary.size, rows.shape[0], zlib.crc32(repr(settings).encode())
    told = [rows.new_full((), x, dtype=torch.float64) for x in known]
    told.append(_digest([x for x in integers if x is not None], rows))
    for xs in floats:  # so many numbers whatever is given, or processes that differ in it would wait for one another
        told += _mark([x for x in (xs if isinstance(xs, list) else [xs]) if x is not None and x.numel()], rows)
    of_all = vocabulary.gathered(torch.stack(told))
    other = of_all[:, :4] != of_all[:1, :4]
    sums, norms = of_all[:, 4::2], of_all[:1, 5::2]
    other = torch.cat([other, ((sums - sums[:1]).abs() > 0.05 * norms).any(1, keepdim=True)], 1).any(0)
    if not checks.values_are_free(rows):
        return of_all.new_zeros(()).masked_fill(other.any(), math.nan)
    names = (
        "number of classes",
        "number of rows",
        "settings",
        "labels or indices",
        "hidden states, weights or log-probabilities",
    )
    for i, (name, differs) in enumerate(zip(names, other.tolist())):
        if differs:
            got = f"{[int(x) for x in of_all[:, i]]} by rank" if i < 2 else "others"
            if name == "settings":
                got = f"others; process {vocabulary.rank} has {settings}"
            raise ValueError(f"{function}: process_group must have the same {name} on all processes, got {got}")
    return None


def _digest(integers: Sequence[Tensor], like: Tensor) -> Tensor:
    """A number that other integers, or these in another order, would hardly have."""
    out = like.new_zeros((), dtype=torch.int64)
    for x in integers:
        at = torch.arange(1, x.numel() + 1, dtype=torch.int64, device=x.device) * -7046029254386353131
        at = (at ^ (at >> 29)) * -4658895280553007687  # products that overflow are meant
        out = out * 31 + ((x.reshape(-1).long() + 1) * (at ^ (at >> 32))).sum()
    return (out & (2**52 - 1)).double()


def _mark(floats: Sequence[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """A number that other rows would hardly have, and what is large for its differences. NaN differs from nothing."""
    mark, norm = like.new_zeros(2, dtype=torch.float64).unbind()
    for x in floats:
        x = x.detach()
        x = x.unsqueeze(1) if x.dim() == 1 else x
        rows = x @ _waves(x, x.shape[1])
        own = torch.linalg.vector_norm(rows.double())
        mark, norm = (rows @ _waves(x, x.shape[0])).double() - 0.7 * mark, torch.hypot(norm, own)
    return mark, norm


def _waves(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=like.device).cos().to(like.dtype)


# --- DTensors


def splits(x: Any, dim: int) -> bool:
    """Whether x is a DTensor whose classes, its dimension ``dim``, are split among processes."""
    return _is_dtensor(x) and any(p.is_shard() and p.dim % x.dim() == dim % x.dim() for p in x.placements)


def replicated(x: Any) -> bool:
    """Whether x may be the same on all processes: it is no DTensor, or one that says so."""
    return not _is_dtensor(x) or all(p.is_replicate() for p in x.placements)


def _is_dtensor(x: Any) -> bool:
    if type(x) in _PLAIN or not isinstance(x, Tensor) or not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor  # late: it takes a while

    return isinstance(x, DTensor)


class DTensors:
    """Takes the DTensors of a call apart: those split among processes, and those that all have. Their gradients come back as
    DTensors of the same placement."""

    def __init__(self, function: str, process_group: Any, name: str, first: Any):
        self.function, self.name, self.mesh = function, name, first.device_mesh
        if process_group is not None:
            raise ValueError(f"{function}: process_group must be None where {name} is a DTensor, got one")
        if self.mesh.ndim != 1:
            raise ValueError(
                f"{function}: {name} must be on a device mesh of 1 dimension, got {self.mesh.ndim}; "
                "give the local parts, and the group of the dimension that splits classes as process_group"
            )
        self.group = self.mesh.get_group()
        ranks, order = dist.get_process_group_ranks(self.group), self.mesh.mesh.flatten().tolist()
        if ranks != order:
            wanted = f"on a mesh whose processes are in the order of its group, {ranks}"
            raise ValueError(f"{function}: {name} must be {wanted}, got {order}")

    def part(self, name: str, x: Any, dim: int) -> Any:
        """The classes of this process, of a tensor that has them in dimension ``dim``."""
        if x is None:
            return None
        from torch.distributed.tensor import Shard

        wanted = f"a DTensor with placement Shard({dim}) on the mesh of {self.name}"
        if not _is_dtensor(x):
            raise ValueError(f"{self.function}: {name} must be {wanted}, got {type(x).__name__}")
        placement = x.placements[0]
        exact = len(x.placements) == 1 and type(placement) is Shard and placement.dim % x.dim() == dim % x.dim()
        if not exact or x.device_mesh != self.mesh:
            raise ValueError(f"{self.function}: {name} must be {wanted}, got {x.placements} on {x.device_mesh}")
        if x.shape[dim] % self.mesh.size():
            wanted = f"a number of classes that {self.mesh.size()} processes share evenly (pad with -inf)"
            raise ValueError(f"{self.function}: {name} must have {wanted}, got {x.shape[dim]}")
        return x.to_local()

    def whole(self, name: str, x: Any) -> Any:
        """What is the same on all processes: a DTensor that says so, or anything else as it is."""
        if isinstance(x, (list, tuple)):
            return [self.whole(f"{name}[{i}]", y) for i, y in enumerate(x)]
        if not _is_dtensor(x):
            return x
        if x.device_mesh != self.mesh or not replicated(x):
            wanted = f"a plain tensor, or a DTensor with placement Replicate() on the mesh of {self.name}"
            raise ValueError(f"{self.function}: {name} must be {wanted}, got {x.placements} on {x.device_mesh}")
        return x.to_local(grad_placements=x.placements)

    def stacked(self, name: str, x: Any) -> Any:
        """``part`` of one tensor [T, N, C] or of each of a list."""
        if isinstance(x, (list, tuple)):
            return [self.part(f"{name}[{i}]", y, -1) for i, y in enumerate(x)]
        return self.part(name, x, -1)
