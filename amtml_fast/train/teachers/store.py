"""Outputs of frozen teachers, kept on the disk: made once, then mapped by every student, seed, method and process.

A `Store` holds one output of one teacher (its logits, or its hint map) for every training image in one version:

    <root>/<teacher>-<logits|hint>-<16 hex digits of the key's SHA-256>/
        key.json                    everything that decides what is in here
        shard-00000.safetensors     rows 0 to r - 1, in the split's order; each shard names the key and its rows
        .lock                       held by the process that writes

A shard appears whole or not at all, so a killed writer leaves whole shards, and the next one makes the others. Files
that do not match the key are refused with their name and left in place. Opening checks each shard's header and size; it
computes no checksum, which would mean reading all bytes, so disk corruption is not detected.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...file_lock import flock
from ..files import DiskError, RunError, differences, write_atomic
from ..lock import LOCK_FILE

FORMAT = "amtml-fast teacher cache 1"
SHARD_BYTES = 2**28
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32", torch.int16: "I16"}  # safetensors' own
Parts = dict[str, Tensor]


class CacheError(RunError):
    """Kept outputs that cannot be used; the message says which file, what was wanted and found, and what to do."""


@dataclass(frozen=True)
class Storage:
    """How an output [N, ...] is kept: float32, float16 (to 2^-11 of each value), or of logits the k largest.

    Those are kept as log-probabilities at temperature 1 in float16, with their classes, and the logarithm of the mass of
    the other classes in float32. They come back as log-probabilities [N, C], the mass spread evenly over those others:
    at temperature 1 the logarithms of the k largest and of the total of the rest are right to 2^-11; at another
    temperature the even share is tempered as well.
    """

    kind: str | int = "float32"

    def parts(self, shape: Sequence[int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Data type and shape of what is kept for each row of an output of this shape, the widest type first."""
        if not isinstance(self.kind, int):
            return {"values": (getattr(torch, self.kind), tuple(shape))}
        index = torch.int16 if shape[0] <= 2**15 else torch.int32
        kept = {"rest": (torch.float32, ()), "index": (index, (self.kind,)), "values": (torch.float16, (self.kind,))}
        return dict(sorted(kept.items(), key=lambda item: -item[1][0].itemsize))  # each part starts at its alignment

    def row_bytes(self, shape: Sequence[int]) -> int:
        return sum(dtype.itemsize * math.prod(rest) for dtype, rest in self.parts(shape).values())

    def encode(self, output: Tensor) -> Parts:
        """[N, ...] float32 -> what is kept of it."""
        kept = self.parts(output.shape[1:])
        if not isinstance(self.kind, int):
            return {"values": output.to(kept["values"][0])}
        logs = output.log_softmax(1)
        values, index = logs.topk(self.kind, 1)
        rest = logs.scatter(1, index, -torch.inf).logsumexp(1)
        return {"rest": rest, "index": index.to(kept["index"][0]), "values": values.half()}

    def decode(self, parts: Parts, shape: Sequence[int]) -> Tensor:
        """What is kept -> [N, *shape] float32."""
        values = parts["values"].float()
        if not isinstance(self.kind, int):
            return values
        even = parts["rest"] - math.log(shape[0] - self.kind)
        return even.unsqueeze(1).repeat(1, shape[0]).scatter_(1, parts["index"].long(), values)

    def through(self, output: Tensor) -> Tensor:
        """What `output` would be if it were kept and looked up: a student is taught the same without the files."""
        return output if self.kind == "float32" else self.decode(self.encode(output), output.shape[1:])


class Store:
    """One output of one teacher for every training image in one version, `rows(index)` after `open()`."""

    def __init__(
        self,
        root: Path,
        name: str,
        key: Mapping[str, Any],
        *,
        rows: int,
        shape: Sequence[int],
        storage: Storage,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.shape, self.storage, self.length = tuple(shape), storage, rows
        self.per_shard = max(1, shard_bytes // storage.row_bytes(shape))
        layout = {"rows": rows, "shape": list(shape), "storage": storage.kind, "rows_per_shard": self.per_shard}
        self.key = json.loads(json.dumps({"format": FORMAT, **key, **layout}))  # as it comes back from key.json
        self.hash = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        self.folder = root / f"{name}-{self.hash[:16]}"
        self.key_file = self.folder / "key.json"
        self.count = -(-rows // self.per_shard)
        self.shards: list[Parts] = []
        self.wanted: set[int] = set()  # by a writer: shards that are not there
        self.waiting: dict[int, list[Parts]] = {}  # of a writer: rows of shards that are not full yet

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05}.safetensors"

    def span(self, number: int) -> tuple[int, int]:
        """First row of a shard, and the one after its last."""
        return number * self.per_shard, min(self.length, (number + 1) * self.per_shard)

    def missing(self) -> set[int]:
        return {number for number in range(self.count) if not self.path(number).is_file()}

    def nbytes(self, shards: set[int] | None = None) -> int:
        """Bytes of these shards, or of all."""
        rows = (last - first for first, last in map(self.span, range(self.count) if shards is None else shards))
        return sum(rows) * self.storage.row_bytes(self.shape)

    # --- reading ------------------------------------------------------------------------------------------------------

    def open(self) -> bool:
        """Maps the shards, each checked first; False if some are not there yet. CacheError for what does not fit."""
        self._check_key()
        if self.missing() or not self.key_file.is_file():
            return False
        self.shards = [self._map(number) for number in range(self.count)]
        return True

    def to(self, device: torch.device) -> None:
        """Copies the whole of it to a device, for lookups there."""
        names = self.storage.parts(self.shape)
        self.shards = [{name: torch.cat([shard[name].to(device) for shard in self.shards]) for name in names}]

    def rows(self, index: Tensor, on_host: Tensor | None = None) -> Tensor:
        """The output's rows `index` [n], float32 [n, *shape] on the device of `index`. on_host: the index on the CPU, which
        is fetched from the device if it is needed and not given."""
        here = next(iter(self.shards[0].values())).device
        found = self._gather(index.to(here) if on_host is None or here == index.device else on_host)
        if here != index.device:  # pinned, so that the copy does not wait for the device
            pin = index.device.type == "cuda"
            found = {k: (x.pin_memory() if pin else x).to(index.device, non_blocking=pin) for k, x in found.items()}
        return self.storage.decode(found, self.shape)

    def _gather(self, index: Tensor) -> Parts:
        if len(self.shards) == 1:
            return {name: part[index] for name, part in self.shards[0].items()}
        number = index // self.per_shard
        out = {name: part.new_empty(len(index), *part.shape[1:]) for name, part in self.shards[0].items()}
        for each in number.unique().tolist():
            places = (number == each).nonzero().squeeze(1)
            inside = index[places] - each * self.per_shard
            for name, part in self.shards[each].items():
                out[name][places] = part[inside]
        return out

    def _check_key(self) -> None:
        if not self.key_file.is_file():
            return
        try:
            there = json.loads(self.key_file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise self._refused(self.key_file, f"not readable as JSON ({error})") from None
        if different := differences(there, self.key):
            shown = "; ".join(f"{key} must be {here!r}, got {there!r}" for key, there, here in different[:3])
            raise self._refused(self.key_file, f"outputs of something else ({shown})")

    def _map(self, number: int) -> Parts:
        """A shard's tensors, backed by the file. Only its header is read."""
        path, (first, last) = self.path(number), self.span(number)
        try:
            with safe_open(path, "pt", device="cpu") as file:
                said = file.metadata() or {}
                for name, wanted in self._metadata(number).items():
                    if said.get(name) != wanted:
                        raise self._refused(path, f"{name} must be {wanted}, got {said.get(name)}")
                kinds = self.storage.parts(self.shape)
                wanted_kinds = {name: (NAMES[dtype], [last - first, *rest]) for name, (dtype, rest) in kinds.items()}
                slices = {name: file.get_slice(name) for name in sorted(file.keys())}
                found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
                if found != wanted_kinds:
                    raise self._refused(path, f"tensors must be {wanted_kinds}, got {found}")
                return {name: file.get_tensor(name) for name in kinds}
        except (SafetensorError, OSError) as error:
            whole = self.storage.row_bytes(self.shape) * (last - first)
            size = path.stat().st_size if path.is_file() else 0
            what = f"it must be a whole safetensors file with {whole} bytes of rows, got {size} bytes"
            raise self._refused(path, f"{what} ({error})") from None

    def _metadata(self, number: int) -> dict[str, str]:
        first, last = self.span(number)
        return {"key": self.hash, "rows": f"{first}:{last}"}

    def _refused(self, path: Path, why: str) -> CacheError:
        return CacheError(
            f"{path}: not used: {why}. Delete the folder {self.folder} to have it made again; it is left as it is."
        )

    # --- writing, under `locked` --------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Makes the folder ready for what is missing, and removes what a killed writer had not finished."""
        self._check_key()
        for unfinished in (*self.folder.glob(".key.json.*"), *self.folder.glob(".shard-*")):
            with suppress(OSError):  # Windows does not delete what another writer has open
                unfinished.unlink()
        self.wanted, self.waiting = self.missing(), {}
        for number in range(self.count):
            if number not in self.wanted:
                self._map(number)
        if not self.key_file.is_file():
            self._write(self.key_file, (json.dumps(self.key, indent=2) + "\n").encode())

    def wants(self, first: int, last: int) -> bool:
        return any(number in self.wanted for number in self._touched(first, last))

    def add(self, first: int, output: Tensor) -> None:
        """Takes the rows from `first` on; they come in order. A shard is written with its last row."""
        kept = {name: part.cpu().contiguous() for name, part in self.storage.encode(output).items()}
        if not torch.isfinite(kept["values"]).all() and torch.isfinite(output).all():
            raise CacheError(
                f"{self.folder}: values must be below 65504 for float16, got {output.abs().max().item():g}"
            )
        last = first + len(output)
        for number in self._touched(first, last):
            if number in self.wanted:
                start, end = self.span(number)
                inside = slice(max(start, first) - first, min(end, last) - first)
                pieces = self.waiting.setdefault(number, [])
                pieces.append({name: part[inside] for name, part in kept.items()})
                if end <= last:
                    self._write_shard(number, self.waiting.pop(number))

    def _touched(self, first: int, last: int) -> range:
        return range(first // self.per_shard, -(-last // self.per_shard))

    def _write_shard(self, number: int, pieces: Sequence[Parts]) -> None:
        """The file format is written out here, so that no second copy of the rows is made."""
        first, last = self.span(number)
        header: dict[str, Any] = {"__metadata__": self._metadata(number)}
        offset, content = 0, []
        for name, (dtype, rest) in self.storage.parts(self.shape).items():
            end = offset + dtype.itemsize * math.prod(rest) * (last - first)
            header[name] = {"dtype": NAMES[dtype], "shape": [last - first, *rest], "data_offsets": [offset, end]}
            content += [piece[name].numpy().data for piece in pieces]
            offset = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._write(self.path(number), struct.pack("<Q", len(text)), text, *content)
        self.wanted.discard(number)

    def _write(self, path: Path, *content: bytes | memoryview) -> None:
        for last in (False, False, True):
            try:
                return write_atomic(path, *content)
            except FileNotFoundError:
                # A writer that our lock does not reach (on another machine) took the file for a killed writer's.
                if last:
                    raise
            except DiskError:
                raise no_room(self.folder, self.nbytes(self.missing()), "files that are whole are kept") from None


def no_room(folder: Path, wanted: int, advice: str) -> CacheError:
    free = free_disk(folder)
    return CacheError(
        f"{folder}: no room for the teachers' outputs: {wanted:,} bytes needed, {free:,} free; {advice}. Make room, or "
        "set cache.folder to another disk, cache.logits or cache.hints to float16, cache.hints=never or cache.teachers=never."
    )


def free_disk(folder: Path) -> int:
    """Free bytes where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


@contextmanager
def locked(store: Store) -> Iterator[bool]:
    """True if only this process may write inside the block. The system releases the lock of a dead process. Without file
    locks it is always True: two writers then do the same work, and the last identical file wins."""
    store.folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(store.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        yield flock(handle) is not False
    finally:
        os.close(handle)
