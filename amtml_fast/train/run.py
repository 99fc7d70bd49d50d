"""A run's folder: what was asked (config.yaml), what happened (run.json, metrics.jsonl), and what it can resume from.

Every file appears whole or not at all: it is written beside its place, flushed to disk and renamed over it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

FORMAT = "amtml-fast checkpoint 2"
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

# Full, over quota, a file too large, or broken.
DISK = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO")}


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says which file and what to do."""


class DiskError(RunError):
    """A file that the disk does not take."""


class Diverged(RunError):
    """A loss that is no number any more; other runs are not concerned."""


class Run:
    """One run folder. Only the main process writes: the others are given `writes=False`."""

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        self.checkpoint = folder / "checkpoint.pt"
        self.metrics = folder / "metrics.jsonl"
        self.record = folder / "run.json"
        self.result = folder / "result.json"
        self.config = folder / "config.yaml"

    def exists(self) -> bool:
        return self.record.is_file()

    def finished(self) -> bool:
        return self.exists() and bool(self.read_record().get("finished"))

    def read_record(self) -> dict[str, Any]:
        return read_json(self.record)

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
            with open(self.metrics, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def cut_metrics(self, epochs: int) -> None:
        """Drops the rows after `epochs`: a run killed between metrics and checkpoint repeats that epoch."""
        if self.writes:
            rows = [row for row in self.read_metrics() if row["epoch"] <= epochs]
            write_atomic(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def read_metrics(self) -> list[dict[str, Any]]:
        """One dict per epoch; a last line cut short by a kill is left out."""
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines() if self.metrics.is_file() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

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
            raise RunError(f"{self.checkpoint}: format {FORMAT!r} wanted, got {found!r}. {advice}")
        return state

    def remove_unfinished(self) -> None:
        """Removes what a process that was killed while it wrote had not finished."""
        if self.writes:
            for path in self.folder.iterdir() if self.folder.is_dir() else []:
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes what an earlier run left here, and nothing that this library did not write."""
        if self.writes and self.folder.is_dir():
            self.remove_unfinished()
            files = [self.record, self.result, self.checkpoint, self.metrics, self.config]
            files += [*self.folder.glob("*.safetensors"), *self.folder.glob("tensorboard/**/events.out.tfevents.*")]
            for path in files:
                path.unlink(missing_ok=True)


def write_atomic(path: Path, *content: bytes | memoryview) -> None:
    """Writes a temporary file of these pieces beside `path`, flushes it to the disk and renames it over `path`.

    DiskError where the disk does not take it: what was at `path` stays whole.
    """
    try:
        _write_and_rename(path, *content)
    except OSError as error:
        if error.errno not in DISK:
            raise
        size, free = sum(memoryview(piece).nbytes for piece in content), shutil.disk_usage(path.parent).free
        raise DiskError(
            f"{path}: {error.strerror or error}: {size:,} bytes to write, {free:,} free on the disk. The file that was "
            "there before is whole; make room, and the same command goes on from it."
        ) from None


def _write_and_rename(path: Path, *content: bytes | memoryview) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it the permissions that open() would have.
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def differences(there: Any, here: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, there, here) for every leaf that differs between two nested dicts."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        found = []
        for name in dict.fromkeys([*here, *there]):
            inner = f"{key}.{name}" if key else str(name)
            found += differences(there.get(name), here.get(name), inner)
        return found
    return [] if there == here else [(key, there, here)]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk with the folder; some systems cannot open a folder."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(
            f"{path}: not readable as JSON ({error}); repair it or start the run over with --fresh"
        ) from None
    if not isinstance(value, dict):
        raise RunError(f"{path}: a JSON object wanted, got {type(value).__name__}")
    return value


def versions() -> dict[str, str]:
    import accelerate

    from .. import __version__

    return {
        "amtml_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "accelerate": str(accelerate.__version__),
        "platform": platform.platform(),
    }


def chosen_backends() -> dict[str, str]:
    """The backend that each operator runs on by default here: the first available one."""
    from .. import backends

    chosen: dict[str, str] = {}
    for op, backend, available, _ in backends():
        if available:
            chosen.setdefault(op, backend)
    return chosen


def git_commit() -> str | None:
    """Commit of the source tree that this code runs from (with -dirty), None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", "run.py"]
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            check=True,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
