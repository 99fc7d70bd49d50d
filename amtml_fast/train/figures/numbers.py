"""Numbers before they are drawn: metrics as arrays, the largest classes, places for labels, and how a number is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Runs = Sequence[Sequence[Mapping[str, Any]]]  # the epochs of each seed, as metrics.jsonl has them
# Mean normalized entropy of the teacher weights beyond which they have stopped telling examples apart.
UNIFORM, ONE_HOT = 0.999, 0.01


def series(runs: Runs, key: str) -> Array:
    """[seeds, epochs] of a metric; NaN where a run is shorter or has none."""
    return stack([[epoch.get(key) for epoch in run] for run in runs])


def of_teachers(runs: Runs, key: str) -> list[Array]:
    """[seeds, epochs] of each teacher, of a metric that holds a number a teacher."""
    count = max((len(epoch[key]) for run in runs for epoch in run if key in epoch), default=0)
    return [stack([[epoch[key][t] if key in epoch else None for epoch in run] for run in runs]) for t in range(count)]


def stack(rows: Sequence[Sequence[Any]]) -> Array:
    out = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for i, row in enumerate(rows):
        out[i, : len(row)] = [np.nan if value is None or not np.isfinite(value) else value for value in row]
    return out


def last(values: Array) -> Array:
    """The last finite value of each run, [seeds with any]."""
    return np.array([run[np.isfinite(run)][-1] for run in values if np.isfinite(run).any()])


def finite(series: Mapping[str, Array]) -> Array:
    values = np.concatenate([v.ravel() for v in series.values()]) if series else np.empty(0)
    return values[np.isfinite(values)]


def top_classes(values: Array, k: int, truth: int) -> list[int]:
    """The k largest classes in falling order, the true one in the last place if it is not among them."""
    order = [int(c) for c in np.argsort(-values, kind="stable")[:k]]
    return order if truth in order else order[:-1] + [truth]


def spread(wanted: Sequence[float], heights: Sequence[float], low: float = -0.15, high: float = 1.03) -> list[float]:
    """Centers near the wanted ones (in least squares) so that boxes of these heights lie in [low, high], apart.

    Boxes that would are joined to a block at its members' mean place; where all do not fit, they leave at the top.
    """
    blocks: list[tuple[float, list[int]]] = []  # (bottom of the block, its boxes from below)

    def reach(boxes: Sequence[int]) -> float:
        return sum(heights[i] for i in boxes)

    for i in sorted(range(len(wanted)), key=lambda i: wanted[i]):
        bottom, boxes = wanted[i] - heights[i] / 2, [i]
        bottom = max(min(bottom, high - heights[i]), low)
        while blocks and blocks[-1][0] + reach(blocks[-1][1]) > bottom:
            below, under = blocks.pop()
            bottom = (len(under) * below + len(boxes) * (bottom - reach(under))) / (len(under) + len(boxes))
            boxes = under + boxes
            bottom = max(min(bottom, high - reach(boxes)), low)
        blocks.append((bottom, boxes))
    places = [0.0] * len(wanted)
    for bottom, boxes in blocks:
        for i in boxes:
            places[i] = bottom + heights[i] / 2
            bottom += heights[i]
    return places


def two(value: float) -> str:
    return f"{value:.2f}"


def fine(value: float) -> str:
    """An entropy: near 1 two decimals would hide whether the weights are equal."""
    return f"{value:.4f}" if value > 0.99 else f"{value:.2f}"


def short(name: str, size: int = 16) -> str:
    """The middle is cut, not the end: long class names tend to differ there."""
    return name if len(name) <= size else f"{name[: size - 7]}…{name[-6:]}"
