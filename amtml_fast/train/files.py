"""Files: written whole or not at all, read as JSON, and told from one another."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Full, over quota, a file too large, or broken.
DISK = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO")}


class RunError(RuntimeError):
    """A run folder that cannot be used as asked; the message says which file and what to do."""


class DiskError(RunError):
    """A file that the disk does not take."""


def write_atomic(path: Path, *content: bytes | memoryview) -> None:
    """Writes a temporary file of these pieces beside `path`, flushes it to the disk and renames it over `path`.

    DiskError where the disk does not take it: what was at `path` stays whole.
    """
    with room_for(path, sum(memoryview(piece).nbytes for piece in content)):
        _write_and_rename(path, *content)


def append(path: Path, line: str) -> None:
    """Adds a line to a text file, to the disk. DiskError where the disk does not take it: a part of it may be there."""
    with room_for(path, len(line.encode())), open(path, "a", encoding="utf-8") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def room_for(path: Path, size: int) -> Iterator[None]:
    """What the system says of a disk that is full, or broken, as a DiskError."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskError(
            f"{path}: {error.strerror or error}: {size:,} bytes to write, {free:,} free on the disk. What was there before is "
            "whole; make room, and the same command (without --fresh) goes on from it."
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
        raise RunError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(there: Any, here: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, there, here) for every leaf that differs between two nested dicts."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        found = []
        for name in dict.fromkeys([*here, *there]):
            inner = f"{key}.{name}" if key else str(name)
            found += differences(there.get(name), here.get(name), inner)
        return found
    return [] if there == here else [(key, there, here)]
