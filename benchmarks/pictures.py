"""The pictures of a report: how many times faster, the machine's limit, time and memory along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measured import FEWEST_BYTES, OURS, Results, bytes_text, ratio_text

COLORS = {"cpp": "#1b6ca8", "cuda": "#1b6ca8", "triton": "#3aa66b", "eager": "#b8b8b8", "compile": "#e08b3e"}


def beside_eager(results: Results) -> list[str]:
    return [g for g in results.groups() if results.best(g) and results.seconds(g, "eager")]


def pictures(results: Results, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.color": "#dddddd", "axes.axisbelow": True, "figure.dpi": 130})
    groups = beside_eager(results)
    for name, rows, draw in (
        ("speedup", groups, lambda: speedup_picture(results, groups)),
        ("roofline", groups, lambda: roofline_picture(results, groups)),
        ("scaling", results.groups(axis=True), lambda: scaling_picture(results)),
        ("memory", results.memory, lambda: memory_picture(results)),
    ):
        if not rows:
            continue
        figure = draw()
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png")
        plt.close(figure)


def speedup_picture(results: Results, groups: Sequence[str]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.42 * len(groups)))
    for row, group in enumerate(reversed(groups)):
        for shift, other in ((0.2, "eager"), (-0.2, "compile")):
            ratio = results.ratio(group, other, str(results.best(group)))
            if ratio:
                axes.barh(row + shift, ratio, 0.36, color=COLORS[other], label=f"vs {other}")
                axes.text(ratio * 1.05, row + shift, ratio_text(ratio).strip("*"), va="center", fontsize=7)
    axes.set_yticks(range(len(groups)), list(reversed(groups)))
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    plain_ticks(axes.xaxis, "{:g}x")
    axes.set_xlabel("times faster, forward + backward (left of 1: slower)")
    axes.grid(axis="y", visible=False)
    axes.legend(*each_once(axes), loc="lower right", frameon=False)
    return figure


def roofline_picture(results: Results, groups: Sequence[str]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    points = [(g, p, *results.rows[g, p, None]) for g in groups for p in results.providers(g) if p in (*OURS, "eager")]
    points = [point for point in points if "bytes" in point[3]]  # the loss from hidden states counts none
    dots = [(f["flops"] / f["bytes"], f["flops"] / t / 1e9, g, p) for g, p, t, f in points]
    if dots and results.limits:
        intensity = [x for x, *_ in dots]
        low, high = min(intensity) / 2, max(intensity) * 4
        by_bytes, by_flops = results.limits["bytes_per_s"], results.limits["flops_per_s"]
        roof = sorted({low, min(max(by_flops / by_bytes, low), high), high})
        axes.plot(roof, [min(x * by_bytes, by_flops) / 1e9 for x in roof], "k-", lw=1)
        for provider in dict.fromkeys(p for *_, p in dots):
            xs, ys = zip(*((x, y) for x, y, _, p in dots if p == provider))
            axes.scatter(xs, ys, color=COLORS.get(provider), label=provider, s=28, zorder=3)
        axes.set(xscale="log", yscale="log", xlabel="operations a byte that must move", ylabel="G operations / s")
        axes.set_title("the line: what the machine can do", fontsize=9)
        plain_ticks(axes.xaxis, "{:g}")
        plain_ticks(axes.yaxis, "{:g}")
        axes.legend(frameon=False)
        names_apart(axes, [(x, y, g.removesuffix(" float32") if p in OURS else "") for x, y, g, p in dots])
    return figure


def scaling_picture(results: Results) -> Any:
    """Of every axis the seconds above, and below them the memory where it was measured."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    lines = results.groups(axis=True)
    figure, grid = plt.subplots(2, max(1, len(lines)), figsize=(3.6 * max(1, len(lines)), 5.2), squeeze=False)
    for column, group in enumerate(lines):
        for provider in results.providers(group):
            line = results.line(group, provider)
            style = {"color": COLORS.get(provider), "marker": "o", "markersize": 3, "label": provider}
            grid[0][column].plot([v for v, *_ in line], [s for _, s, _ in line], **style)
            known = [(v, b / 1e6) for v, _, b in line if b and b >= FEWEST_BYTES]
            if known:
                grid[1][column].plot([v for v, _ in known], [b for _, b in known], **style)
        grid[0][column].set(title=group, xscale="log", yscale="log", ylabel="seconds")
        grid[1][column].set(xscale="log", yscale="log", ylabel="MB beside the inputs", xlabel=group.rpartition(" ")[2])
        values = sorted({v for p in results.providers(group) for v, *_ in results.line(group, p)})
        for row in grid:
            plain_ticks(row[column].xaxis, "{:,.0f}", _ticks(values))
            row[column].yaxis.set_minor_formatter(NullFormatter())
        grid[1][column].set_xlim(grid[0][column].get_xlim())
        if not grid[1][column].lines:
            grid[1][column].set_visible(False)
            grid[0][column].set_xlabel(group.rpartition(" ")[2])
        grid[0][column].legend(frameon=False)
    return figure


def memory_picture(results: Results) -> Any:
    import matplotlib.pyplot as plt

    held = list(dict.fromkeys(g for g, _ in results.memory))
    names = list(dict.fromkeys(p for _, p in results.memory))
    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.5 * len(held)))
    for row, group in enumerate(reversed(held)):
        for k, provider in enumerate(names):
            taken = results.memory.get((group, provider))
            if taken:
                at, height = row + 0.4 - 0.8 * (k + 0.5) / len(names), 0.72 / len(names)
                axes.barh(at, taken / 1e6, height, color=COLORS.get(provider), label=provider)
                axes.text(taken / 1e6 * 1.05, at, bytes_text(taken), va="center", fontsize=7)
    axes.set_yticks(range(len(held)), list(reversed(held)))
    axes.set(xscale="log", xlabel="MB beside the inputs, forward + backward")
    plain_ticks(axes.xaxis, "{:g}")
    axes.grid(axis="y", visible=False)
    axes.legend(*each_once(axes), frameon=False, ncols=max(1, len(names)), loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def plain_ticks(axis: Any, text: str, at: Sequence[float] | None = None) -> None:
    """Numbers as they are written, on a logarithmic axis; `at` these places alone."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    if at is not None:
        axis.set_major_locator(FixedLocator(list(at)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: text.format(x)))
    axis.set_minor_formatter(NullFormatter())


def _ticks(values: Sequence[float]) -> list[float]:
    """Those of a logarithmic axis whose numbers do not meet."""
    kept = list(values[:1])
    for value in values:
        if math.log(value / kept[-1]) > 0.2 * math.log(values[-1] / values[0]):
            kept.append(value)
    return kept


def each_once(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and names of a legend, where bars of one name are many."""
    once = dict(zip(*axes.get_legend_handles_labels()[::-1]))
    return [*once.values()], [*once]


def names_apart(axes: Any, dots: Sequence[tuple[float, float, str]]) -> None:
    """Each (x, y, name) with its name beside it, moved with a line back where it would lie on another name or dot."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    axes.figure.tight_layout()  # places are final from here on
    axes.figure.canvas.draw()
    renderer = axes.figure.canvas.get_renderer()
    inside = axes.get_window_extent()
    spots = [axes.transData.transform((x, y)) for x, y, _ in dots]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    taken += [text.get_window_extent() for text in axes.get_legend().get_texts()]
    places = [(away, 8 * up) for up in range(14) for up in (up, -up) for away in (6, -6)]
    back = {"arrowstyle": "-", "lw": 0.4, "color": "#888888", "shrinkA": 0, "shrinkB": 3}
    for x, y, name in sorted((dot for dot in dots if dot[2]), key=lambda dot: -dot[1]):
        text = axes.annotate(
            name, (x, y), (6, 0), textcoords="offset points", fontsize=6.5, va="center", arrowprops=back
        )
        for away, up in places:
            text.set_position((away + math.copysign(abs(up) / 4, away), up))
            text.set_horizontalalignment("left" if away > 0 else "right")
            text.update_positions(renderer)
            box = Text.get_window_extent(text)  # without the line back
            if inside.containsx(box.x0) and inside.containsx(box.x1) and not any(map(box.overlaps, taken)):
                break
        taken.append(box)
