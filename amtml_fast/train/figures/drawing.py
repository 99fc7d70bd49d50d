"""What the pictures are made of: places in inches, headings, bars and labels at line ends."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from .numbers import Array, spread, two

BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00"
TEACHERS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILLION)
METHODS = ("#555555", BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)
INK, FAINT, OTHERS = "#222222", "#6b6b6b", "#c4c4c4"
LABEL_SIZE = 8.5  # points, of the labels at line ends
STYLE: Any = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "savefig.bbox": None,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a $ in a name is a $
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": "#999999",
    "ytick.color": "#999999",
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
}


def save(draw: Any, path: str | Path, *args: Any) -> None:
    """Write the Figure that draw(*args) builds, in this style, as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = draw(*args)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")


def panel(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes with its top left corner x, y inches from the figure's."""
    w, h = figure.get_size_inches()
    return figure.add_axes((x / w, 1 - (y + height) / h, width / w, height / h))


def at(figure: Figure, x: float, y: float) -> tuple[float, float]:
    w, h = figure.get_size_inches()
    return x / w, 1 - y / h


def headline(figure: Figure, text: str, below: str) -> None:
    size = min(11, 11 * 10 * figure.get_size_inches()[0] / len(text))  # about ten letters an inch fit at 11 points
    figure.text(*at(figure, 0.2, 0.14), text, fontsize=max(size, 8), weight="bold", va="top")
    figure.text(*at(figure, 0.2, 0.4), below, fontsize=8.5, color=FAINT, va="top")


def heading(axes: Axes, text: str, below: str) -> None:
    axes.annotate(
        text, (0, 1), (0, 18), "axes fraction", "offset points", fontsize=9.5, va="bottom", annotation_clip=False
    )
    axes.annotate(
        below, (0, 1), (0, 7), "axes fraction", "offset points", fontsize=8, color=FAINT, annotation_clip=False
    )


def above(axes: Axes, text: str, below: str, color: str) -> None:
    axes.annotate(
        text, (0, 1), (0, 15), "axes fraction", "offset points", fontsize=9, weight="bold", color=color, va="bottom"
    )
    axes.annotate(below, (0, 1), (0, 4), "axes fraction", "offset points", fontsize=8, color=FAINT, va="bottom")


def bars(axes: Axes, parts: Array, colors: Sequence[str], top: float, truth: int, names: Sequence[str] | None) -> None:
    """Horizontal bars of the classes, stacked from parts [K, classes]; the true one's value bold, tiny ones unnamed."""
    places, start = np.arange(parts.shape[1]), np.zeros(parts.shape[1])
    for part, color in zip(parts, colors, strict=True):
        axes.barh(places, part, left=start, height=0.72, color=color)
        start = start + part
    for place, value in zip(places, start, strict=True):
        if value >= 0.01 or place == truth:
            weight = "bold" if place == truth else "normal"
            axes.text(value + 0.03 * room(axes, top), place, two(value), va="center", fontsize=8, weight=weight)
    axes.set_yticks(places, names if names is not None else [""] * len(places), fontsize=8.5)
    if names is not None:
        axes.get_yticklabels()[truth].set_fontweight("bold")
    axes.set(xlim=(0, room(axes, top)), ylim=(len(places) - 0.45, -0.55), xticks=[])
    bare(axes)


def room(axes: Axes, top: float) -> float:
    """Where the x axis must end for a bar of length `top` to have its number beside it."""
    wide = size_inches(axes)[0]
    return top * wide / (wide - 0.36)


def size_inches(axes: Axes) -> tuple[float, float]:
    w, h = axes.get_figure(root=True).get_size_inches()  # type: ignore[union-attr]
    return axes.get_position().width * w, axes.get_position().height * h


def column_title(name: str, wide: float) -> str:
    return wrap(name, int((wide - 0.04) / 0.083), 3)


def first_row(titles: Sequence[str]) -> float:
    """Inches from the top of the figure to the first row of panels, below the highest column title."""
    return 0.98 + 0.155 * max(title.count("\n") + 1 for title in titles)


def bare(axes: Axes) -> None:
    axes.tick_params(length=0, pad=3)
    axes.spines[["bottom"]].set_visible(False)


def picture(axes: Axes, image: ArrayLike, below: str) -> None:
    """image [H, W] or [C, H, W], bytes or floats (those stretched to their own range), its pixels left square."""
    pixels = np.asarray(image)
    if pixels.ndim == 3:
        pixels = pixels[0] if len(pixels) == 1 else pixels[:3].transpose(1, 2, 0)
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (pixels - low) / (high - low or 1)
    axes.imshow(pixels, cmap="gray", interpolation="nearest", vmin=0, vmax=255 if pixels.dtype == np.uint8 else 1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.annotate(below, (0, 0), (0, -6), "axes fraction", "offset points", fontsize=9, weight="bold", va="top")


def epoch_axis(axes: Axes) -> None:
    axes.grid(axis="y")
    axes.margins(x=0.03)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel("epoch")


def starts_at(axes: Axes, unit: str) -> str:
    start = axes.get_ylim()[0]
    return f"axis starts at {start:.1f} {unit}" if start >= 1 else ""


def end_marker(i: int) -> dict[str, Any]:
    """How the i-th line is drawn to mark its last point."""
    return {"marker": "os^Dv"[i % 5], "markevery": [-1], "ms": 4.5}


def end_labels(axes: Axes, ends: Sequence[tuple[float, float, str, str]], left: float = 1.07) -> None:
    """Write each (x, y, text, color) right of the axes (at their fraction `left`), moved apart where they'd overlap."""
    if not ends:
        return
    axes.get_ylim()  # limits are set lazily: this makes them final before places are computed from them
    inches = size_inches(axes)[1]
    to_axes = axes.transData + axes.transAxes.inverted()
    wanted = [float(to_axes.transform((x, y))[1]) for x, y, _, _ in ends]
    heights = [label_inches(text) / inches for _, _, text, _ in ends]
    for (x, y, text, color), place in zip(ends, spread(wanted, heights), strict=True):
        axes.annotate(
            text,
            (x, y),
            (left, place),
            xycoords="data",
            textcoords="axes fraction",
            fontsize=LABEL_SIZE,
            linespacing=1.1,
            color=dark(color),
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
        )


def label_inches(text: str) -> float:
    """How much height end_labels gives a text."""
    return (1.22 * LABEL_SIZE * (text.count("\n") + 1) + 2) / 72


def floor(low: float) -> float:
    """Where an entropy axis starts: at 0, or nearer to 1 when every value is up there."""
    return max((start for start in (0, 0.5, 0.8, 0.9, 0.95, 0.99) if start < low - 0.1 * (1 - low)), default=0)


def teacher_color(t: int) -> str:
    return TEACHERS[t % len(TEACHERS)]


def dark(color: str) -> str:
    """The same hue, dark enough to read as text on white."""
    red, green, blue = to_rgb(color)
    return to_hex((0.72 * red, 0.72 * green, 0.72 * blue))


def wrap(text: str, width: int, lines: int | None = None) -> str:
    return "\n".join(textwrap.wrap(text, max(width, 4), max_lines=lines, placeholder="…")) or text


def text_inches(names: Sequence[str]) -> float:
    return 0.08 * max(map(len, names))
