"""A run's folder: what was asked (config.yaml), what happened (run.json, metrics.jsonl), and what it can resume from.

Every file appears whole or not at all: it is written beside its place, flushed to disk and renamed over it.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ..files import RunError, append, read_json, write_atomic
from ..lock import Lock
from ..progress import Display
from . import processes

FORMAT = "amtml-fast checkpoint 2"
# Of the keys of every run.json those that others ask for.
RECORDED = {"method": str, "label": str, "student": str, "seed": int, "epochs": int, "recipe": dict}
MOST_EPOCHS = 10**6
MEASURED = {"val_accuracy": float, "test_accuracy": float}  # the keys of result.json
WEIGHTS = ("student.safetensors", "model.safetensors", "objective.safetensors")
# What torch.load raises for files that are cut short, of another format, or would run code (weights_only refuses).
UNREADABLE = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    OSError,
    ImportError,
    pickle.PickleError,
)

# What _write_and_rename writes before it renames.
_TEMPORARY = re.compile(r"\..+\.(pt|json|jsonl|yaml|safetensors)\.[a-z0-9_]{8}")


class Diverged(RunError):
    """The loss or the logits became NaN or infinite; other runs continue."""


class Run:
    """One run folder. Only the main process writes: the others are given `writes=False`."""

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.checkpoint = folder / "checkpoint.pt"
        self.metrics = folder / "metrics.jsonl"
        self.record = folder / "run.json"
        self.result = folder / "result.json"
        self.config = folder / "config.yaml"
        self.mark = folder / ".start-over"

    def exists(self) -> bool:
        return self.record.is_file()

    def finished(self) -> bool:
        return self.exists() and not self.outdated() and bool(self.read_record().get("finished"))

    def outdated(self) -> bool:
        """Whether what is here is to be started over, by --fresh of a command that did not come to it."""
        return self.mark.is_file()

    def start_over(self) -> None:
        """Makes it `outdated`, until `clear`."""
        if self.writes:
            self.mark.touch()

    def read_record(self) -> dict[str, Any]:
        return _read(self.record, RECORDED)

    def read_result(self) -> dict[str, Any]:
        return _read(self.result, MEASURED)

    def start(self, config_yaml: str, record: Mapping[str, Any]) -> None:
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.config, config_yaml.encode())
            self.write_record(record)

    def write_record(self, record: Mapping[str, Any]) -> None:
        self.write_json(self.record, record)

    def write_json(self, path: Path, value: Any) -> None:
        if self.writes:
            write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())

    def write_tensors(self, name: str, state: Mapping[str, Tensor]) -> None:
        """A plain state dict as safetensors: loads into the bare model without this library."""
        if self.writes:
            # clone: safetensors refuses tensors that share memory (tied weights).
            whole = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
            write_atomic(self.folder / name, safetensors_bytes(whole, metadata={"format": "pt"}))

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        if self.writes:
            append(self.metrics, json.dumps(row) + "\n")

    def cut_metrics(self, epochs: int) -> list[int]:
        """Drops the rows after `epochs`: a run killed between metrics and checkpoint repeats that epoch. Returns the epochs
        before that have no row which can be read."""
        rows = {row["epoch"]: row for row in self.read_metrics() if row["epoch"] <= epochs and len(row) > 1}
        if self.writes:
            write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())
        return [epoch for epoch in range(1, epochs + 1) if epoch not in rows]

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per epoch up to the last one that can be read; an epoch before it that cannot has its number alone."""
        rows: dict[int, dict[str, Any]] = {}
        text = self.metrics.read_text(encoding="utf-8", errors="replace") if self.metrics.is_file() else ""
        for line in text.splitlines():
            with suppress(ValueError, KeyError, TypeError):  # cut short by a kill, or damaged
                row = json.loads(line)
                if type(row["epoch"]) is int and 0 < row["epoch"] <= MOST_EPOCHS:  # a damaged number may be any
                    rows[row["epoch"]] = row
        return [rows.get(epoch, {"epoch": epoch}) for epoch in range(1, max(rows, default=0) + 1)]

    def lost_epochs(self) -> list[int]:
        """Those of `read_metrics` that have their number alone."""
        return [row["epoch"] for row in self.read_metrics() if len(row) == 1]

    def save_checkpoint(self, state: Mapping[str, Any]) -> None:
        if self.writes:
            buffer = io.BytesIO()
            torch.save({"format": FORMAT, **state}, buffer)
            write_atomic(self.checkpoint, buffer.getvalue())

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint, tensors on the CPU; None if there is none. RunError for a file that is not one."""
        if not self.checkpoint.is_file():
            return None
        advice = "The file is left as it is; put a good copy in its place, or start the run over with --fresh."
        try:
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"{self.checkpoint}: not a readable checkpoint (truncated or foreign): {reason}. {advice}"
            ) from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            found = state.get("format") if isinstance(state, dict) else type(state).__name__
            raise RunError(f"{self.checkpoint} must have format {FORMAT!r}, got {found!r}. {advice}")
        return state

    def remove_unfinished(self) -> None:
        """Removes what a process that was killed while it wrote had not finished."""
        if self.writes:
            for path in self.folder.iterdir() if self.folder.is_dir() else []:
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes what an earlier run left here, and nothing that this library did not write. The checkpoint goes first and
        the record and the mark last: whoever is stopped in between leaves nothing to go on from under another recipe."""
        if self.writes and self.folder.is_dir():
            self.remove_unfinished()
            files = [self.checkpoint, self.result, self.metrics, self.config]
            files += [self.folder / name for name in WEIGHTS]
            files += [*self.folder.glob("tensorboard/**/events.out.tfevents.*"), self.record, self.mark]
            for path in files:
                path.unlink(missing_ok=True)


def _read(path: Path, keys: Mapping[str, type]) -> dict[str, Any]:
    """A run's JSON that has these keys, of these types."""
    found = read_json(path)
    for key, kind in keys.items():
        if type(found.get(key)) is not kind:
            got = f"{key}={found[key]!r}" if key in found else ", ".join(found) or "nothing"
            wanted = "repair it or start the run over with --fresh"
            raise RunError(f"{path} must hold {key!r} of a run ({kind.__name__}), got {got}; {wanted}")
    return found


def some(epochs: Sequence[int]) -> str:
    """The first of them, for a message."""
    more = f" and {len(epochs) - 3} more" if len(epochs) > 3 else ""
    return ", ".join(map(str, epochs[:3])) + more


@contextmanager
def alone(folder: Path, accelerator: Accelerator, display: Display) -> Iterator[None]:
    """Until the end of the block no other command writes in the folder. RunError, on every process of this one, where
    another one does already."""
    lock = Lock(folder)
    taken = lock.take() if accelerator.is_main_process else True
    if processes.anyone(accelerator, taken is False):
        lock.release()
        raise RunError(
            f"{folder}: {lock.holder()} is at work there. Wait until it has ended, or give this one a place of its own with "
            "name=... or out=..."
        )
    if taken is None:
        display.warn(f"{folder}: no locks on this file system: nothing keeps another process from writing there, too")
    try:
        yield
    finally:
        lock.release()
