"""The `amtml-fast` command. `backends` and `--version` work with torch and numpy alone; the others need the `train` extra."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .backend import backends_table
from .version import __version__

EXTRA = (
    "accelerate",
    "jinja2",
    "markupsafe",
    "matplotlib",
    "omegaconf",
    "PIL",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "tensorboard",
    "typer",
    "yaml",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command line (sys.argv without the program's name, if not given); exits with its status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words in (["backends"], ["--version"]):
        _say(backends_table() if words == ["backends"] else f"amtml-fast {__version__}")
        return
    if not getattr(sys.flags, "safe_path", False) and os.getcwd() not in sys.path:
        # A console script finds the working directory's modules as `python -m` does. Where that is a source folder of this package it
        # comes last, so that the processes of compare.workers find the installed package.
        sys.path.insert(len(sys.path) if os.path.isdir("amtml_fast") else 0, os.getcwd())
    try:
        from .train.commands import app

        app(args=words, prog_name="amtml-fast")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        print(f'amtml-fast: the package {error.name} is missing; pip install "amtml-fast[train]"', file=sys.stderr)
        raise SystemExit(1) from None


def _say(text: str) -> None:
    """Prints it, as far as the other end of a pipe reads."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
