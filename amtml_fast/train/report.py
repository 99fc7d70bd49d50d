"""Tables of a comparison: a rich table for the terminal, Markdown, CSV. Pictures are in figures.py, offered here too.

Pure: numbers in, text out; nothing of the training code is imported. Accuracies come in as fractions and are shown in
percent as mean ± sample standard deviation (ddof = 1) over the seeds; one seed has no deviation. The best mean among
the students is bold, and so is every other one that prints the same two decimals. Teachers are listed for scale and
never compete.
"""

from __future__ import annotations

import csv as csvlib
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from .figures import curves, entropy, soft_targets, weights_gallery

__all__ = [
    "Difference",
    "Row",
    "csv",
    "curves",
    "entropy",
    "markdown",
    "paired_difference",
    "records",
    "soft_targets",
    "table",
    "weights_gallery",
]

HEADER = ("Model", "Parameters", "Test accuracy (%)", "Seeds", "s / epoch")
FIELDS = (
    "role",
    "method",
    "label",
    "parameters",
    "seeds",
    "accuracy_mean",
    "accuracy_std",
    "seconds_per_epoch",
    "accuracies",
)


@dataclass
class Row:
    """One line of the table: a method (or a teacher) over its seeds.

    accuracies: fractions in [0, 1], one a seed, the same seed order in every row. seconds_per_epoch: None where nothing
    was trained (a teacher read from a file). Raises ValueError for no accuracies, or for percent.
    """

    method: str
    label: str
    parameters: int
    accuracies: list[float]
    seconds_per_epoch: float | None = None

    def __post_init__(self) -> None:
        self.accuracies = [float(a) for a in self.accuracies]
        if not self.accuracies:
            raise ValueError(f"Row {self.label!r}: accuracies must hold one fraction a seed, got none")
        for accuracy in self.accuracies:
            if accuracy < 0 or accuracy > 1:  # NaN passes: a diverged run is shown as nan, not hidden
                raise ValueError(f"Row {self.label!r}: accuracies must be fractions in [0, 1], got {accuracy}")

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation, or None for a single seed."""
        return _std(self.accuracies)


class Difference(NamedTuple):
    """Mean and sample standard deviation (None for one seed) of a - b over n seeds, as fractions."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {100 * self.std:.2f}"
        return f"{100 * self.mean:+.2f}{spread} points"


def paired_difference(a: Row, b: Row) -> Difference:
    """a - b seed by seed, so that what a seed does to both cancels. ValueError where the numbers of seeds differ."""
    if len(a.accuracies) != len(b.accuracies):
        want = f"{len(a.accuracies)} seeds like {a.label!r}"
        raise ValueError(f"paired_difference: {b.label!r} must have {want}, got {len(b.accuracies)}")
    gaps = [x - y for x, y in zip(a.accuracies, b.accuracies, strict=True)]
    return Difference(statistics.fmean(gaps), _std(gaps), len(gaps))


def table(rows: Sequence[Row], teachers: Sequence[Row] = (), *, title: str | None = None) -> Table:
    """The comparison as a rich table: teachers above the line, methods below it."""
    out = Table(title=title, title_justify="left", caption=_caption(rows), caption_justify="left")
    for i, name in enumerate(HEADER):
        # Left for the accuracy too: with and without a deviation, the decimal points stay below each other.
        out.add_column(name, justify="left" if i in (0, 2) else "right", overflow="fold")
    for row in teachers:
        # Text, not str: a label with [brackets] is no markup.
        out.add_row(*(Text(cell, style="dim") for cell in _cells(row)))
    if teachers:
        out.add_section()
    best = _best(rows)
    for row in rows:
        name, parameters, accuracy, *rest = _cells(row)
        style = "bold" if _printed(row) == best else ""
        out.add_row(
            Text(name, style=style), Text(parameters), Text(accuracy, style=style), *(Text(cell) for cell in rest)
        )
    return out


def markdown(rows: Sequence[Row], teachers: Sequence[Row] = ()) -> str:
    """The comparison as a Markdown table with its caption below, ending in a newline."""
    best = _best(rows)
    lines = [_line(HEADER), "|:---|---:|---:|---:|---:|"]
    lines += [_line((f"teacher: {name}", *rest)) for name, *rest in map(_cells, teachers)]
    for row in rows:
        name, parameters, accuracy, *rest = _cells(row)
        lines.append(_line((name, parameters, f"**{accuracy}**" if _printed(row) == best else accuracy, *rest)))
    return "\n".join(lines) + f"\n\n{_caption(rows)}\n"


def csv(rows: Sequence[Row], teachers: Sequence[Row] = ()) -> str:
    """The comparison as CSV (fractions at full precision; `accuracies` holds every seed's, separated by spaces)."""
    out = io.StringIO()
    writer = csvlib.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for record in records(rows, teachers):
        writer.writerow({**record, "accuracies": " ".join(map(repr, record["accuracies"]))})
    return out.getvalue()


def records(rows: Sequence[Row], teachers: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """The comparison as plain dicts, ready for JSON; `role` tells teachers from students."""
    roles = [("teacher", row) for row in teachers] + [("student", row) for row in rows]
    return [
        {
            "role": role,
            "method": row.method,
            "label": row.label,
            "parameters": row.parameters,
            "seeds": len(row.accuracies),
            "accuracy_mean": row.mean,
            "accuracy_std": row.std,
            "seconds_per_epoch": row.seconds_per_epoch,
            "accuracies": row.accuracies,
        }
        for role, row in roles
    ]


def _cells(row: Row) -> tuple[str, ...]:
    accuracy = f"{100 * row.mean:.2f}" + ("" if row.std is None else f" ± {100 * row.std:.2f}")
    seconds = "-" if row.seconds_per_epoch is None else f"{row.seconds_per_epoch:,.2f}"
    return row.label, f"{row.parameters:,}", accuracy, str(len(row.accuracies)), seconds


def _std(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    # statistics.stdev raises on NaN in some Python versions; a diverged run must not take the table down.
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _printed(row: Row) -> str:
    return f"{100 * row.mean:.2f}"


def _best(rows: Sequence[Row]) -> str | None:
    """The best mean as it is printed, so that equal-looking means are bold together; None if there is none."""
    finite = [row for row in rows if math.isfinite(row.mean)]
    return _printed(max(finite, key=lambda row: row.mean)) if finite else None


def _caption(rows: Sequence[Row]) -> str:
    if all(len(row.accuracies) == 1 for row in rows):
        return "Best student in bold. One seed: no spread."
    return "Mean ± sample standard deviation over seeds; best student in bold."


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
