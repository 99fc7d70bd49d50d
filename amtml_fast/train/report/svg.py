"""Small charts as inline SVG. Colors are classes of the page's style sheet, so that a chart follows light, dark and
print. Every chart carries its words for those who do not see it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from ..figures.numbers import Array, spread

WIDE, HIGH = 320, 190  # a chart with names at the ends of its lines
SMALL = (210, 132)  # one of many
POINTS = 120  # of a line: more than a chart has places for would only make the page heavy
COLORS = tuple(f"c{i}" for i in range(1, 9))
DECADES = 1e4  # of a logarithmic axis; what is smaller lies at its foot
LETTER = 5.7  # width of an average letter of the charts' type
LINE = 13.0  # and its line height


class Line(NamedTuple):
    name: str  # at its end; "" for none
    values: Array  # [runs, epochs]
    color: str


class Mark(NamedTuple):
    """A dashed line across at y, with words."""

    y: float
    text: str


class Axes:
    """Where epochs and values lie in a chart."""

    def __init__(
        self, size: tuple[float, float], epochs: int, limits: tuple[float, float], right: float, log: bool = False
    ) -> None:
        self.size, self.epochs, self.limits, self.log = size, epochs, limits, log
        self.left, self.top, self.right, self.bottom = 36.0, 10.0, size[0] - right, size[1] - 20

    def x(self, epoch: float) -> float:
        if self.epochs == 1:
            return (self.left + self.right) / 2
        return self.left + (self.right - self.left) * (epoch - 1) / (self.epochs - 1)

    def y(self, value: float) -> float:
        low, high = self.limits
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, low))
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    def frame(self) -> Markup:
        """Grid and numbers."""
        at = log_ticks(*self.limits) if self.log else ticks(*self.limits, 4)
        parts = []
        for value in at:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{self.left:g} {y:.1f}H{self.right:g}"/>')
            parts.append(
                f'<text class="tick" x="{self.left - 5:g}" y="{y + 3.6:.1f}" text-anchor="end">{value:g}</text>'
            )
        for epoch in sorted({1, *(round(e) for e in ticks(1, self.epochs, 4) if e == round(e) >= 1), self.epochs}):
            near = self.epochs > epoch and self.x(self.epochs) - self.x(epoch) < 16
            if not near:
                parts.append(
                    f'<text class="tick" x="{self.x(epoch):.1f}" y="{self.bottom + 14:g}" text-anchor="middle">{epoch}</text>'
                )
        return Markup("".join(parts))

    def mark(self, mark: Mark) -> Markup:
        y = self.y(mark.y)
        text = y + 12 if y < self.top + 12 else y - 4
        line = Markup('<path class="mark" d="M{:g} {:.1f}H{:g}"/>').format(self.left, y, self.right)
        return line + Markup('<text class="tick on" x="{:g}" y="{:.1f}">{}</text>').format(
            self.left + 4, text, mark.text
        )

    def path(self, values: Array) -> str:
        """The d of a line through a run's finite values [epochs]."""
        keep = few(np.flatnonzero(np.isfinite(values) & ((values > 0) | (not self.log))))
        return "M" + "L".join(f"{self.x(i + 1):.1f} {self.y(values[i]):.1f}" for i in keep) if len(keep) else ""

    def band(self, values: Array) -> str:
        """The d of the area between the lowest and the highest run."""
        if self.log:
            values = np.where(values > 0, values, np.nan)
        keep = few(np.flatnonzero(np.isfinite(values).any(0)))
        if len(values) < 2 or not len(keep):
            return ""
        low, high = np.nanmin(values[:, keep], 0), np.nanmax(values[:, keep], 0)
        there = [f"{self.x(i + 1):.1f} {self.y(v):.1f}" for i, v in zip(keep, high, strict=True)]
        back = [f"{self.x(i + 1):.1f} {self.y(v):.1f}" for i, v in zip(keep, low, strict=True)]
        return f"M{'L'.join([*there, *back[::-1]])}Z"


def few(positions: Array) -> Array:
    """At most POINTS of them, evenly, the last one among them."""
    if len(positions) <= POINTS:
        return positions
    return positions[np.linspace(0, len(positions) - 1, POINTS).round().astype(int)]


def mean(values: Array) -> Array:
    """Over the runs that have a finite value, [epochs]; NaN where none has."""
    known = np.isfinite(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)


def lines(
    series: Sequence[Line],
    words: str,
    *,
    size: tuple[float, float] = (WIDE, HIGH),
    limits: tuple[float, float] | None = None,
    log: bool = False,
    marks: Sequence[Mark] = (),
    behind: str = "",
    digits: int | None = 2,
    thin: bool = False,
) -> Markup:
    """A line for the mean of each series over its runs, with its name and last value at the end.

    The runs are a band, or thin lines if `thin`. behind: the id of a <g> that is drawn below. words: for screen readers.
    """
    epochs = max((line.values.shape[1] for line in series), default=1)
    limits = limits or around([line.values for line in series], log)
    ends = [
        (line, i, m[i]) for line in series for m in [mean(line.values)] for i in np.flatnonzero(np.isfinite(m))[-1:]
    ]
    tags = [f"{line.name} {number(value, digits)}".strip() for line, _, value in ends]
    right = 12 + LETTER * max(map(len, tags), default=0)
    axes = Axes(size, epochs, limits, right, log)
    parts = [axes.frame()]
    if behind:
        parts.append(Markup('<use href="#{}"/>').format(behind))
    for line in series:
        if thin and len(line.values) > 1:
            parts += [
                Markup('<path class="thin {}" d="{}"/>').format(line.color, axes.path(run)) for run in line.values
            ]
        elif d := axes.band(line.values):
            parts.append(Markup('<path class="band {}" d="{}"/>').format(line.color, d))
    for line in series:
        parts.append(Markup('<path class="line {}" d="{}"/>').format(line.color, axes.path(mean(line.values))))
    parts += [axes.mark(mark) for mark in marks]
    spots = [axes.y(value) for _, _, value in ends]
    room = max(axes.bottom + 4, len(ends) * LINE + axes.top - 6)
    for (line, i, _), y, place, tag in zip(
        ends, spots, spread(spots, [LINE] * len(ends), axes.top - 6, room), tags, strict=True
    ):
        x, out = axes.x(i + 1), axes.right
        parts.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(line.color, x, y))
        parts.append(
            Markup('<path class="lead {}" d="M{:.1f} {:.1f}L{:g} {:.1f}"/>').format(
                line.color, x + 3, y, out + 7, place
            )
        )
        parts.append(Markup('<text x="{:g}" y="{:.1f}">{}</text>').format(out + 9, place + 3.8, tag))
    return wrap(Markup("").join(parts), words, size[0], max(size[1], room + 2))


def reliability(series: Sequence[Line], words: str) -> Markup:
    """How often right (up), by how sure (across), both from 0 to 1: a curve's values [runs, bins] stand in the middle of their
    bins; on the dashed diagonal one is as sure as one may be."""
    size, left, top = (WIDE, 200.0), 36.0, 10.0
    wide, high = size[0] - left - 90, size[1] - top - 32

    def point(sure: float, right: float) -> str:
        return f"{left + wide * sure:.1f} {top + high * (1 - right):.1f}"

    parts = [Markup(f'<path class="mark" d="M{point(0, 0)}L{point(1, 1)}"/>')]
    for value in (0, 0.25, 0.5, 0.75, 1):
        y = top + high * (1 - value)
        parts.append(Markup(f'<path class="grid" d="M{left:g} {y:.1f}h{wide:g}"/>'))
        parts.append(
            Markup(f'<text class="tick" x="{left - 5:g}" y="{y + 3.6:.1f}" text-anchor="end">{value:g}</text>')
        )
        x = left + wide * value
        parts.append(
            Markup(f'<text class="tick" x="{x:.1f}" y="{top + high + 14:g}" text-anchor="middle">{value:g}</text>')
        )
    for i, line in enumerate(series):
        values = mean(line.values)
        known = np.flatnonzero(np.isfinite(values))
        points = [point((k + 0.5) / len(values), values[k]) for k in known]
        parts.append(
            Markup('<path class="line {}" d="{}"/>').format(line.color, "M" + "L".join(points) if points else "")
        )
        parts += [
            Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.6"/>').format(line.color, *each.split())
            for each in points
        ]
        y = top + 14 + i * LINE * 1.2
        parts.append(Markup('<path class="line {}" d="M{:g} {:g}h12"/>').format(line.color, left + wide + 8, y - 3.6))
        parts.append(Markup('<text x="{:g}" y="{:g}">{}</text>').format(left + wide + 24, y, line.name))
    return wrap(Markup("").join(parts), words, *size)


def background(
    series: Sequence[Array], name: str, size: tuple[float, float], limits: tuple[float, float], digits: int
) -> Markup:
    """The mean lines of all [runs, epochs], drawn once as <g id=name>, for `lines` of one unnamed line to stand on."""
    epochs = max((values.shape[1] for values in series), default=1)
    widest = max((len(number(v, digits)) for values in series for v in mean(values) if math.isfinite(v)), default=0)
    axes = Axes(size, epochs, limits, 12 + LETTER * widest)
    paths = Markup("").join(Markup('<path class="other" d="{}"/>').format(axes.path(mean(values))) for values in series)
    return Markup('<svg width="0" height="0" aria-hidden="true" class="hidden"><g id="{}">{}</g></svg>').format(
        name, paths
    )


def strip(values: Sequence[float], low: float, high: float) -> Markup:
    """A dot a seed and a bar at their mean, between low and high; the numbers stand beside it in the table."""
    known = [value for value in values if math.isfinite(value)]
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return 6 + 138 * (value - low) / span

    dots = "".join(f'<circle cx="{x(value):.1f}" cy="9" r="3.4"/>' for value in known)
    middle = x(sum(known) / len(known)) if known else 0.0
    bar = f'<path class="mean" d="M{middle:.1f} 2V16"/>' if len(known) == len(values) and known else ""
    return Markup(
        '<svg class="strip" viewBox="0 0 150 18" width="150" height="18" aria-hidden="true">'
        f'<path class="grid" d="M6 9H144"/><g class="seeds">{dots}</g>{bar}</svg>'
    )


def stacked(parts: Mapping[str, float], longest: float) -> Markup:
    """A bar of parts by their color class, as long as its share of the longest."""
    x, out = 0.0, []
    for color, value in parts.items():
        wide = 100 * value / (longest or 1)
        out.append(f'<rect class="{color}" x="{x:.2f}" y="0" width="{max(wide, 0):.2f}" height="10"/>')
        x += wide
    return Markup(
        f'<svg class="stack" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{"".join(out)}</svg>'
    )


def wrap(body: Markup, words: str, wide: float, high: float) -> Markup:
    start = Markup('<svg class="chart" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">')
    return start.format(wide, high, words) + body + Markup("</svg>")


def number(value: float, digits: int | None) -> str:
    """With so many decimals; None: three significant digits."""
    return f"{value:.3g}" if digits is None else f"{value:.{digits}f}"


def around(values: Sequence[Array], log: bool = False) -> tuple[float, float]:
    """The limits of an axis for all finite values, with a little room."""
    flat = np.concatenate([v[np.isfinite(v)].ravel() for v in values]) if values else np.empty(0)
    flat = flat[flat > 0] if log else flat
    if not flat.size:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(flat.min()), float(flat.max())
    if log:
        return max(low, high / DECADES) / 1.2, high * 1.2
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    unit = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * unit for m in (1, 2, 5, 10) if span / (m * unit) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high], or the powers alone where these are enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [(m, round(m * 10.0**k, 12)) for k in powers for m in (1, 2, 5) if low <= m * 10.0**k <= high]
    alone = [value for m, value in every if m == 1]
    return alone if len(alone) > 2 else [value for _, value in every]
