"""A folder for one process at a time.

A system lock on a file in the folder; it is released when the process ends in any way. Without lock support (Windows, some
network drives) nothing is refused, and a warning says so.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from ..file_lock import flock

LOCK_FILE = ".lock"


class Lock:
    """The lock of one folder, which is made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / LOCK_FILE
        self.handle: int | None = None

    def take(self) -> bool | None:
        """As `flock`. The file then says who has it."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            taken = flock(handle)
            if taken is False:
                os.close(handle)
                return False
            if self._is(handle):
                break
            os.close(handle)  # it was removed by the process that had it, while we opened it
        self.handle = handle
        with suppress(OSError):  # a full disk does not matter here
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        return taken

    def _is(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.file))
        except FileNotFoundError:
            return False

    def holder(self) -> str:
        with suppress(OSError):
            return self.file.read_text() or "another process"
        return "another process"

    def release(self) -> None:
        """Leaves nothing behind: no file, and no folder that is still empty."""
        if self.handle is None:
            return
        with suppress(OSError):
            self.file.unlink()
        os.close(self.handle)
        self.handle = None
        with suppress(OSError):
            self.folder.rmdir()
