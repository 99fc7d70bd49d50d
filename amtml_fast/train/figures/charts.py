"""Charts of the table's rows, as PNG files: accuracy by the number of teachers, and every seed's accuracy.

Places, colors and type as in curves.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from . import drawing, numbers
from .drawing import BLUE, GREEN, INK, ORANGE, PURPLE, SKY, VERMILLION
from .tables import ORACLE, Row, accuracy, count_of, names, split_of, teacher_counts, unique

BARS = (BLUE, ORANGE, GREEN, VERMILLION, SKY, PURPLE, "#8a8a8a", "#F0E442")
LEGEND_ROW, LEGEND_WIDE = 0.19, 7.6  # inches


def number_of_teachers(rows: Sequence[Row], path: str | Path) -> None:
    """The paper's Figure 3: a group of bars for each number of teachers, a bar a method; one panel a student.

    A method without teachers is a dashed line. A method with one number of teachers, which shows no trend, is left out;
    of more methods than fit (eight, with up to five groups) the best are shown. The picture says both. Raises
    ValueError where no method of a student has two numbers of teachers.
    """
    drawing.save(_number_of_teachers, path, rows)


def accuracies(rows: Sequence[Row], path: str | Path) -> None:
    """The main table as a picture: a dot for every seed and a bar for their mean, the best mean at the top."""
    drawing.save(_accuracies, path, rows)


# --- number of teachers -----------------------------------------------------------------------------------------------


def _number_of_teachers(rows: Sequence[Row]) -> Figure:
    panels = {student: _several(rows, student) for student in unique(row.student for row in rows)}
    panels = {student: own for student, own in panels.items() if teacher_counts(own)}
    if not panels:
        found = [count_of(count) for count in teacher_counts(rows)]
        raise ValueError(f"number_of_teachers: rows must hold a method with two numbers of teachers, got {found}")
    drawn = [row for own in panels.values() for row in own]
    methods = _shown(drawn, groups=max(len(teacher_counts(own)) for own in panels.values()))
    colors = dict(zip(methods, reversed(BARS[: len(methods)]), strict=True))  # the last, often one's own, is blue

    entries = _legend_rows({methods[method]: colors[method] for method in methods})
    left_out = len({row.method for row in drawn if row.teachers is not None}) - len(methods)
    first, high = 0.72 + LEGEND_ROW * len(entries) + 0.52, 2.1
    figure = Figure(figsize=(8, first + (high + 0.95) * len(panels) - 0.48))
    _legend(drawing.panel(figure, 0.2, 0.72, LEGEND_WIDE, LEGEND_ROW * len(entries)), entries)
    wide = 6.05 if any(row.teachers is None for row in drawn) else 7.18
    for i, (student, own) in enumerate(panels.items()):
        axes = drawing.panel(figure, 0.62, first + (high + 0.95) * i, wide, high)
        start = _groups(axes, own, colors)
        notes = ["axis starts at 0" if start == 0 else f"axis starts at {start:g} %"]
        notes += ["dashed: without teachers"] if any(row.teachers is None for row in own) else []
        notes += [f"the best {len(methods)} of {len(methods) + left_out} methods"] if left_out else []
        of = f", student {student} ({own[0].parameters:,} parameters)" if student else ""
        drawing.heading(axes, f"{split_of(rows)} accuracy (%){of}", "; ".join(notes))
    rest = any(row not in drawn for row in rows if row.student in panels)
    note = "; methods with one number of teachers are left out" if rest else ""
    drawing.headline(figure, _groups_finding(panels), _spread(drawn) + note)
    return figure


def _several(rows: Sequence[Row], student: str) -> list[Row]:
    """A student's rows without teachers, and those of the methods that ran with several numbers of them."""
    own = [row for row in rows if row.student == student]
    ran = {row.method: teacher_counts([other for other in own if other.method == row.method]) for row in own}
    return [row for row in own if row.teachers is None or len(ran[row.method]) > 1]


def _shown(rows: Sequence[Row], groups: int) -> dict[str, str]:
    """method -> label of those with teachers, in their order; where not all fit, the ones with the best single mean."""
    own = [row for row in rows if row.teachers is not None]
    best: dict[str, float] = {}
    for row in own:
        mean = row.mean if math.isfinite(row.mean) else -1.0
        best[row.method] = max(best.get(row.method, -1.0), mean)
    most = max(1, min(len(BARS), int(0.84 * 6.05 / groups / 0.125)))  # a bar's number, turned, is 0.12 inches wide
    kept = sorted(best, key=lambda method: -best[method])[:most]
    return {row.method: row.label for row in own if row.method in kept}


def _groups(axes: Axes, rows: Sequence[Row], colors: dict[str, str]) -> float:
    """The bars of one student; returns where its axis starts."""
    counts = teacher_counts(rows)
    start, high = _limits(rows)
    wide, tall = drawing.size_inches(axes)
    inches = min(0.84 * wide / len(counts) / len(colors), 0.62)  # of one bar with its gap
    flat = inches >= 0.44
    for row in rows:
        if row.teachers is None or row.method not in colors:
            continue
        place = list(colors).index(row.method) - (len(colors) - 1) / 2
        x = counts.index(row.teachers) + place * inches * len(counts) / wide
        value, spread = 100 * row.mean, 100 * (row.std or 0.0)
        if math.isfinite(value):
            axes.bar(x, value, width=0.86 * inches * len(counts) / wide, color=colors[row.method])
            if row.std is not None:
                axes.errorbar(x, value, spread, color=INK, lw=0.9, capsize=2)
        top = value + spread if math.isfinite(value) else start
        text = f"{value:.2f}" if math.isfinite(value) else "nan"
        above: Any = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(text, (x, top), fontsize=8, rotation=0 if flat else 90, **above)
    room = 0.24 if flat else 0.52  # inches above the highest bar, for its number
    axes.set(xlim=(-0.5, len(counts) - 0.5), ylim=(start, start + (high - start) * tall / (tall - room)))
    axes.set_yticks([tick for tick in axes.get_yticks() if start <= tick <= min(high + 0.01, 100)])
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xlabel("number of teachers")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    _baselines(axes, [row for row in rows if row.teachers is None])
    return start


def _baselines(axes: Axes, rows: Sequence[Row]) -> None:
    ends = []
    for row in rows:
        if math.isfinite(row.mean):
            axes.axhline(100 * row.mean, color=INK, lw=0.9, ls=(0, (4, 3)), zorder=1.5)
            text = f"{drawing.wrap(row.label, 14, 2)}\n{100 * row.mean:.2f}"
            ends.append((axes.get_xlim()[1], 100 * row.mean, text, INK))
    drawing.end_labels(axes, ends, left=1.03)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Where the axis starts, a round number that leaves the lowest bar a body, and the highest end of an error bar."""
    ends = [100 * (row.mean + sign * (row.std or 0.0)) for row in rows for sign in (-1, 1) if math.isfinite(row.mean)]
    if not ends:
        return 0.0, 100.0
    low, high = min(ends), max(ends)
    span = max(high - low, 0.2)
    step = next((step for step in (0.1, 0.5, 1, 2, 5) if span <= 8 * step), 10)
    start = math.floor((low - 0.3 * span) / step) * step
    return (0.0 if start < 0.25 * high else round(start, 1)), high


def _legend_rows(colors: dict[str, str]) -> list[list[tuple[float, str, str]]]:
    """Lines of (inches from the left, name, color), broken where the next name would not fit."""
    lines: list[list[tuple[float, str, str]]] = [[]]
    x = 0.0
    for label, color in colors.items():
        name = numbers.short(label, 40)
        needs = 0.2 + TextPath((0, 0), name, size=8.5).get_extents().width / 72 + 0.22
        if lines[-1] and x + needs > LEGEND_WIDE + 0.22:
            lines.append([])
            x = 0.0
        lines[-1].append((x, name, color))
        x += needs
    return lines


def _legend(axes: Axes, lines: Sequence[Sequence[tuple[float, str, str]]]) -> None:
    wide, tall = drawing.size_inches(axes)
    axes.set(xlim=(0, wide), ylim=(tall, 0), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    for i, line in enumerate(lines):
        y = LEGEND_ROW * (i + 0.5)
        for x, name, color in line:
            axes.add_patch(Rectangle((x, y - 0.055), 0.13, 0.11, color=color, lw=0))
            axes.text(x + 0.2, y, name, fontsize=8.5, va="center")


def _groups_finding(panels: dict[str, list[Row]]) -> str:
    """Who is highest in how many of the groups, and in how many by more than the seeds' standard deviations."""
    groups = [
        [row for row in own if row.teachers in (count, None) and math.isfinite(row.mean) and row.method != ORACLE]
        for own in panels.values()
        for count in teacher_counts(own)
    ]
    wins, clear = Counter[str](), Counter[str]()
    for group in groups:
        ranked = sorted(group, key=lambda row: -row.mean)
        if len(ranked) > 1 and f"{100 * ranked[0].mean:.2f}" != f"{100 * ranked[1].mean:.2f}":
            first, second = ranked[:2]
            wins[first.label] += 1
            clear[first.label] += first.mean - second.mean > max(first.std or 0.0, second.std or 0.0)
    ahead = wins.most_common(2)
    if not ahead:
        return "Accuracy by the number of teachers"
    if len(ahead) == 2 and ahead[0][1] == ahead[1][1]:
        return "The best method changes with the number of teachers"
    (label, count), n = ahead[0], len(groups)
    often = "with every number of teachers" if count == n else f"in {count} of {n} groups"
    if any(row.std is None for group in groups for row in group):
        return f"{numbers.short(label, 31)} is highest {often}"
    of = "" if clear[label] == count else f" in {clear[label] or 'none'} of {count}"
    return f"{numbers.short(label, 31)} is highest {often}, beyond the seeds' spread{of}"


def _spread(rows: Sequence[Row]) -> str:
    seeds = sorted({len(row.accuracies) for row in rows})
    if seeds == [1]:
        return "one seed: no spread"
    said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"mean over {said} seeds; error bar: their standard deviation"


# --- every seed -------------------------------------------------------------------------------------------------------


def _accuracies(rows: Sequence[Row]) -> Figure:
    if not rows:
        raise ValueError("accuracies: rows must hold at least one, got none")
    known = [math.isfinite(row.mean) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (not known[i], -rows[i].mean if known[i] else 0.0))
    told = [i for i in order if rows[i].method != ORACLE] or order  # what competes
    named = names(rows)
    labels = [drawing.wrap(named[i], 34, 2) for i in order]
    step = 0.12 + 0.14 * max(label.count("\n") + 1 for label in labels)
    left = 0.3 + drawing.text_inches([line for label in labels for line in label.split("\n")])
    figure = Figure(figsize=(8, 0.75 + step * len(rows) + 0.55))
    axes = drawing.panel(figure, left, 0.75, 8 - left - 1.25, step * len(rows))
    for y, i in enumerate(order):
        row, color = rows[i], VERMILLION if i == told[0] else BLUE
        seeds = [100 * value for value in row.accuracies if math.isfinite(value)]
        axes.scatter(seeds, [y] * len(seeds), s=26, color=color, alpha=0.55, lw=0, zorder=3)
        if known[i] and len(seeds) > 1:
            axes.plot([100 * row.mean] * 2, [y - 0.3, y + 0.3], color=INK, lw=1.8, zorder=4)
        axes.annotate(accuracy(row), (1.02, y), xycoords=("axes fraction", "data"), fontsize=8.5, va="center_baseline")
    axes.set_yticks(range(len(rows)), labels, fontsize=8.5, linespacing=1.05)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel=f"{split_of(rows).lower()} accuracy (%)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.margins(x=0.04)
    drawing.headline(figure, _accuracies_finding([rows[i] for i in told], [named[i] for i in told]), _dots(rows))
    return figure


def _dots(rows: Sequence[Row]) -> str:
    if all(len(row.accuracies) == 1 for row in rows):
        return "one seed: no spread"
    return "a dot a seed, a bar at their mean; at the right mean ± sample standard deviation"


def _accuracies_finding(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Of rows sorted by their means: who is highest, and whether the seeds' ranges tell it from the next."""
    if not math.isfinite(rows[0].mean):
        return "Every method has a run that diverged"
    first, best = numbers.short(labels[0], 31), rows[0]
    if len(rows) == 1 or not math.isfinite(rows[1].mean):
        return f"{first} reaches {100 * best.mean:.2f} % on the {best.split} set"
    second, other = numbers.short(labels[1], 31), rows[1]
    if f"{100 * best.mean:.2f}" == f"{100 * other.mean:.2f}":
        return f"{first} and {second} are level ({100 * best.mean:.2f} %)"
    if len(best.accuracies) > 1 and min(best.accuracies) <= max(other.accuracies):
        return f"{first} has the highest mean, within the seeds' range of {second}"
    return f"{first} is highest, {100 * (best.mean - other.mean):.2f} points above {second}"
