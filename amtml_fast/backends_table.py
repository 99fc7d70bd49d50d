"""What `amtml-fast backends` prints. It needs torch and numpy alone."""

from __future__ import annotations

from .backend import backends


def backends_table() -> str:
    """amtml_fast.backends() as aligned text: operator, backend, yes or no, and why not."""
    rows = [("operator", "backend", "runs here", "why not")]
    rows += [(op, backend, "yes" if available else "no", why or "") for op, backend, available, why in backends()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
