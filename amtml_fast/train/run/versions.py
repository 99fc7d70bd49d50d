"""What a run was made by: versions, backends and the commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import accelerate
import torch

from ... import __version__, backends


def versions() -> dict[str, str]:
    return {
        "amtml_fast": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "accelerate": str(accelerate.__version__),
        "platform": platform.platform(),
    }


def chosen_backends() -> dict[str, str]:
    """The backend that each operator runs on by default here: the first available one."""
    chosen: dict[str, str] = {}
    for op, backend, available, _ in backends():
        if available:
            chosen.setdefault(op, backend)
    return chosen


def git_commit() -> str | None:
    """Commit of the source tree that this code runs from (with -dirty), None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name]
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
