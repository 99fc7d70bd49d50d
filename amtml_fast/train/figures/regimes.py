"""Several comparisons side by side, one a regime: who is best where, and how much of what an oracle gains.

Pure: rows in, tables and a PNG file out. The oracle knows every label: it says how much there is to gain, and competes with nobody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from . import drawing, tables
from .drawing import BLUE, INK, OTHERS, VERMILLION
from .significance import LEVEL, paired_difference
from .tables import ORACLE, Blocks, Row, Table

ALONE, SINGLE = "student", "okd-"
BEST_SINGLE = "best single teacher"

Found = Mapping[str, Sequence[Row]]  # a regime's rows


def with_best_teacher(rows: Sequence[Row]) -> list[Row]:
    """The rows where OKD's, one a teacher, are the best of them."""
    single = [row for row in rows if row.method.startswith(SINGLE)]
    if not single:
        return list(rows)
    line = replace(tables.highest(single), method=SINGLE, label=BEST_SINGLE)
    return [line if row is single[0] else row for row in rows if row is single[0] or row not in single]


def accuracy_table(found: Found) -> Blocks:
    """Methods x regimes: the best of each column bold, and every other that a paired t-test finds level with it."""
    own = {regime: with_best_teacher(rows) for regime, rows in found.items()}
    labels = {row.method: row.label for rows in own.values() for row in rows}
    methods = [*(m for m in labels if m != ORACLE), *(m for m in labels if m == ORACLE)]
    lines = []
    for method in methods:
        cells = [labels[method]]
        for rows in own.values():
            row = one(rows, method)
            text = "-" if row is None else tables.accuracy(row)
            cells.append(tables.Bold(text) if row is not None and level_with_best(row, rows) else text)
        lines.append(cells)
    split = tables.split_of(next(iter(own.values()), []))
    caption = (
        f"{split} accuracy in percent, mean ± sample standard deviation over seeds. Bold: the best of each column, and what a paired "
        f"t-test over the seeds does not tell from it (p >= {LEVEL}); where the seeds leave nothing to test, the best alone. The "
        "best single teacher is the student that learns from it alone, with the highest mean here. The oracle takes, for each image, the teacher that is most certain of the true label: a reference, no method."
    )
    return [Table(("Method", *own), lines), caption]


def gain_table(found: Found, method: str) -> Blocks:
    """What the oracle gains over the student alone, how much of it this method gets, and whom it beats or falls behind."""
    lines = []
    for regime, rows in found.items():
        ours, alone, oracle = (one(rows, name) for name in (method, ALONE, ORACLE))
        if ours is None or alone is None or oracle is None:
            continue
        headroom, gain = oracle.mean - alone.mean, ours.mean - alone.mean
        others = [row for row in with_best_teacher(rows) if row.method not in (method, ORACLE)]
        tests = {row.label: paired_difference(ours, row) for row in others}
        told = {label: test.mean for label, test in tests.items() if test.p is not None and test.p < LEVEL}
        behind = [label for label, mean in told.items() if mean < 0]
        beaten = len(told) - len(behind)
        share = f"{100 * gain / headroom:.0f} %" if headroom > 0 else "-"
        lines.append(
            (
                regime,
                f"{100 * headroom:+.2f}",
                f"{100 * gain:+.2f}",
                share,
                f"{beaten} of {len(others)}",
                ", ".join(behind) or "none",
            )
        )
    if not lines:
        return []
    label = next(row.label for rows in found.values() for row in rows if row.method == method)
    header = (
        "Regime",
        "Oracle over the student alone",
        f"{label} over it",
        "Share",
        f"Methods beaten (p < {LEVEL})",
        f"Behind (p < {LEVEL})",
    )
    caption = (
        "Differences in points of accuracy. Each count is of single tests, the student alone among them: of twenty that compare "
        f"equals, one shows p < {LEVEL}."
    )
    return [Table(header, lines), caption]


def one(rows: Sequence[Row], method: str) -> Row | None:
    return next((row for row in rows if row.method == method), None)


def level_with_best(row: Row, rows: Sequence[Row]) -> bool:
    """Whether the row is the best that competes, or a test finds it level with the best."""
    if row.method == ORACLE or not math.isfinite(row.mean):
        return False
    best = tables.highest([other for other in rows if other.method != ORACLE])
    if row is best or tables.accuracy(row) == tables.accuracy(best):
        return True
    test = paired_difference(best, row)
    return test.p is not None and test.p >= LEVEL


def chart(found: Found, method: str, path: str | Path) -> None:
    """A line a regime: a dot a method at its mean, this method's in color, the student alone and the oracle as marks."""
    drawing.save(_chart, path, found, method)


def _chart(found: Found, method: str) -> Figure:
    own = {regime: with_best_teacher(rows) for regime, rows in found.items()}
    labels = {row.method: row.label for rows in own.values() for row in rows}
    step, left = 0.42, 0.35 + drawing.text_inches([*own])
    figure = Figure(figsize=(8, 1.0 + step * len(own) + 0.55))
    axes = drawing.panel(figure, left, 1.0, 8 - left - 0.3, step * len(own))
    for y, rows in enumerate(own.values()):
        for row in rows:
            if not math.isfinite(row.mean):
                continue
            x = 100 * row.mean
            if row.method == method:
                axes.scatter([x], [y], s=60, color=VERMILLION, zorder=5, lw=0)
            elif row.method in (ALONE, ORACLE):
                axes.plot([x, x], [y - 0.32, y + 0.32], color=INK if row.method == ALONE else BLUE, lw=2, zorder=4)
            else:
                axes.scatter([x], [y], s=34, color=OTHERS, zorder=3, lw=0.6, edgecolor="white")
    axes.set_yticks(range(len(own)), [*own], fontsize=8.5)
    split = tables.split_of(next(iter(own.values())))
    axes.set(ylim=(len(own) - 0.5, -0.5), xlabel=f"{split.lower()} accuracy (%), mean over seeds")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    best = sum(level_with_best(row, rows) for rows in own.values() for row in rows if row.method == method)
    where = "every regime" if best == len(own) else f"{best} of {len(own)} regimes"
    drawing.headline(
        figure,
        f"{labels[method]} is best, or level with the best, in {where}",
        f"red: {labels[method]}; gray: the other methods; black bar: the student alone; blue bar: an oracle",
    )
    return figure
