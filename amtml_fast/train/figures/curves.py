"""Pictures of the training and of the teacher weights, as PNG files: numbers in, files out.

Explicit Figure objects only (no pyplot, so no global state and no display). Places are given in inches from the top
left corner: at 8 inches and 150 dpi a picture is 1200 px wide and its smallest text still reads at 800 px. Colors are
Okabe and Ito's, which color-blind readers can tell apart; lines and bars carry their names beside them instead of a
legend. Titles say what the numbers show. Arrays may be numpy arrays or CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import ArrayLike

from . import drawing, numbers
from .drawing import FAINT, INK, METHODS, OTHERS
from .numbers import ONE_HOT, UNIFORM, Array, Runs
from .tables import ORACLE

Histories = Mapping[str, Runs]  # by label
CROWD = 4  # of more curves the names do not fit beside both panels


# --- the four pictures ------------------------------------------------------------------------------------------------


def curves(histories: Histories, path: str | Path) -> None:
    """Training loss and validation accuracy per epoch: the mean over seeds as a line, their range as a band.

    Of more than seven methods the seven that end highest are named, the others are gray.
    """
    drawing.save(_curves, path, histories)


def soft_targets(
    image: ArrayLike,
    class_names: Sequence[str],
    teacher_probs: ArrayLike,
    weights: ArrayLike,
    label: int,
    path: str | Path,
    teacher_names: Sequence[str],
) -> None:
    """The paper's Figure 1: one image, each teacher's soft target, and their equal and adaptive mixtures (Eq 7).

    image [H, W] or [C, H, W]; teacher_probs [T, C], tempered by the caller; weights [T]; label the true class. A
    mixture's bar is stacked from the teachers' shares, in their colors. Of more than 12 classes the 10 largest are
    shown, the true one always among them. Raises ValueError where shapes disagree.
    """
    drawing.save(_soft_targets, path, image, class_names, teacher_probs, weights, label, teacher_names)


def weights_gallery(
    images: Sequence[ArrayLike] | ArrayLike,
    class_names: Sequence[str],
    teacher_probs: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    path: str | Path,
    teacher_names: Sequence[str],
) -> None:
    """The paper's Figure 4: a row an image with its teachers' soft targets, their weights and the adaptive mixture.

    images [n, H, W] or [n, C, H, W]; teacher_probs [n, T, C], tempered by the caller; weights [n, T]; labels [n]. Each
    row shows the mixture's four largest classes, the true one always among them. Raises ValueError where shapes
    disagree.
    """
    drawing.save(_weights_gallery, path, images, class_names, teacher_probs, weights, labels, teacher_names)


def entropy(histories: Histories, path: str | Path, teacher_names: Sequence[str] | None = None) -> None:
    """Normalized entropy of the teacher weights per epoch, a line a seed, and of each teacher the mean weight and the
    share of the examples on which it has the largest weight.

    A method without teacher weights (no `entropy` in its epochs) is left out; ValueError if none is left.
    """
    drawing.save(_entropy, path, histories, teacher_names)


# --- training curves --------------------------------------------------------------------------------------------------


def _curves(histories: Histories) -> Figure:
    seeds = max((len(runs) for runs in histories.values()), default=0)
    accuracies = {label: 100 * numbers.series(runs, "val_accuracy") for label, runs in histories.items()}
    losses = {label: numbers.series(runs, "loss") for label, runs in histories.items()}
    if not any(np.isfinite(values).any() for values in (*losses.values(), *accuracies.values())):
        raise ValueError("curves: histories must hold epochs with 'loss' or 'val_accuracy', found none")
    crowded = len(histories) > CROWD  # then the names stand at the right panel only, one below the other
    shown = _highest(accuracies, len(METHODS))
    room = sum(drawing.label_inches(_beside(label, 0.0)) for label in shown) / 1.15 if crowded else 0.0
    high = max(2.15, room)
    figure = Figure(figsize=(8, 1.7 + high))
    loss = drawing.panel(figure, 0.62, 1.13, 2.0 if crowded else 2.25, high)
    accuracy = drawing.panel(figure, 3.2 if crowded else 4.62, 1.13, 2.35 if crowded else 2.25, high)

    values = numbers.finite(losses)
    if values.size and values.min() > 0 and values.max() > 8 * values.min():
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_locator(NullLocator())
    _lines(loss, losses, shown, None if crowded else lambda label, _: drawing.wrap(label, 13))
    drawing.heading(loss, "Training loss", "each method's own objective" if len(losses) > 1 else "")

    late = numbers.finite({label: v[:, v.shape[1] // 4 :] for label, v in accuracies.items()})
    if late.size:  # the first epochs may leave the axis below, so that the differences at the end can be seen
        margin = max(0.12 * (late.max() - late.min()), 0.2)
        accuracy.set_ylim(max(late.min() - margin, 0), min(late.max() + margin, 100.4))
    _lines(
        accuracy, accuracies, shown, _beside if crowded else lambda label, v: f"{drawing.wrap(label, 13)}\n{v:.1f} %"
    )
    drawing.heading(accuracy, "Validation accuracy (%)", drawing.starts_at(accuracy, "%"))

    spread = f"line: mean of {seeds} seeds, band: their range" if seeds > 1 else "one seed"
    others = len(histories) - len(shown)
    note = f"; gray: {others} other method{'s that end' if others > 1 else ' that ends'} lower" if others else ""
    drawing.headline(figure, _curves_finding(accuracies), spread + note)
    return figure


def _highest(accuracies: Mapping[str, Array], most: int) -> list[str]:
    """The labels that end highest, in their given order; one without an accuracy comes last."""
    ends = {label: numbers.last(values) for label, values in accuracies.items()}
    ranked = sorted(ends, key=lambda label: -ends[label].mean() if ends[label].size else 1.0)[:most]
    return [label for label in accuracies if label in ranked]


def _beside(label: str, last: float) -> str:
    return drawing.wrap(f"{numbers.short(label, 44)} {last:.1f}\N{NO-BREAK SPACE}%", 27)


def _curves_finding(accuracies: Mapping[str, Array]) -> str:
    """What the right panel shows, in words: who ends highest, and whether the seeds' ranges tell it from the next."""
    last = {label: numbers.last(values) for label, values in accuracies.items()}
    told = [label for label in last if label != ORACLE] or [*last]  # what competes
    ranked = sorted((label for label in told if last[label].size), key=lambda label: -last[label].mean())
    if not ranked:
        return "Training loss per epoch"
    first, best = numbers.short(ranked[0], 30), last[ranked[0]]
    text = f"{first} ends at {best.mean():.1f} % validation accuracy"
    if len(ranked) == 1:
        return text
    second, other = numbers.short(ranked[1], 30), last[ranked[1]]
    if f"{best.mean():.1f}" == f"{other.mean():.1f}":
        return f"{text}, level with {second}"
    if best.size > 1 and best.min() <= other.max():
        return f"{first} ends highest ({best.mean():.1f} %), but within the seeds' range of {second}"
    return f"{text}, {best.mean() - other.mean():.1f} points above {second}"


def _lines(
    axes: Axes, series: Mapping[str, Array], shown: Sequence[str], text: Callable[[str, float], str] | None
) -> None:
    """Mean line and range band of each [seeds, epochs] array, with text(label, last mean) at the line's end.

    Those not shown by name are thin and gray, without a band.
    """
    ends = []
    for label, values in series.items():
        epochs = np.arange(1, values.shape[1] + 1)
        keep = np.isfinite(values).any(axis=0)
        if not keep.any():
            continue
        epochs, values = epochs[keep], values[:, keep]
        mean = np.nanmean(values, axis=0)
        if label not in shown:
            axes.plot(epochs, mean, color=OTHERS, lw=0.9, zorder=1.5)
            continue
        i = list(shown).index(label)
        color = METHODS[i % len(METHODS)]
        band: Any = {"color": color, "alpha": 0.18 if len(shown) <= CROWD else 0.09, "lw": 0}
        axes.fill_between(epochs, np.nanmin(values, axis=0), np.nanmax(values, axis=0), **band)
        axes.plot(epochs, mean, color=color, lw=1.8, **drawing.end_marker(i))
        if text is not None:
            ends.append((float(epochs[-1]), float(mean[-1]), text(label, mean[-1]), color))
    drawing.epoch_axis(axes)
    drawing.end_labels(axes, ends)


# --- soft targets -----------------------------------------------------------------------------------------------------


def _soft_targets(
    image: ArrayLike,
    class_names: Sequence[str],
    teacher_probs: ArrayLike,
    weights: ArrayLike,
    label: int,
    teacher_names: Sequence[str],
) -> Figure:
    probs, shares = np.asarray(teacher_probs, float), np.asarray(weights, float)  # [T, C], [T]
    count, label = len(teacher_names), int(label)
    _check_shapes("soft_targets", probs.shape, (count, len(class_names)), shares.shape, (count,))
    equal, adaptive = probs / count, probs * shares[:, None]  # each teacher's share of a mixture, [T, C]
    order = list(range(len(class_names)))
    if len(order) > 12:
        order = numbers.top_classes(np.maximum(probs.max(0), adaptive.sum(0)), 10, label)
    names = [numbers.short(class_names[c]) for c in order]

    heads = [(name, f"weight {numbers.two(shares[t])}") for t, name in enumerate(teacher_names)]
    heads += [("Equal mixture", f"weights {numbers.two(1 / count)}"), ("Adaptive mixture", "weights as left")]
    left, gap, high = 1.72 + drawing.text_inches(names), 0.14, 0.24 * len(order)
    wide = max(0.85, (7.85 - left - gap * (count + 1)) / (count + 2))
    titles = [drawing.column_title(name, wide + gap) for name, _ in heads]
    first = drawing.first_row(titles)
    figure = Figure(figsize=(left + (count + 2) * (wide + gap) + 0.15 - gap, first + max(high, 1.9) + 0.32))
    drawing.picture(
        drawing.panel(figure, 0.2, first, 1.3, 1.3), image, drawing.wrap(numbers.short(class_names[label], 28), 16)
    )
    top = max(probs.max(), adaptive.sum(0).max())
    for i, (title, (_, below)) in enumerate(zip(titles, heads, strict=True)):
        axes = drawing.panel(figure, left + i * (wide + gap), first, wide, high)
        if i < count:
            parts, colors, ink = probs[i : i + 1], [drawing.teacher_color(i)], drawing.dark(drawing.teacher_color(i))
        else:
            parts, ink = (equal, adaptive)[i - count], drawing.dark(INK)
            colors = [drawing.teacher_color(t) for t in range(count)]
        drawing.bars(axes, parts[:, order], colors, top, order.index(label), names if i == 0 else None)
        drawing.above(axes, title, below, ink)
    figure.text(
        *drawing.at(figure, left, first + high + 0.17), "probability, one scale for all", fontsize=8.5, color=FAINT
    )
    got, plain = numbers.two(adaptive.sum(0)[label]), numbers.two(equal.sum(0)[label])
    if got == plain:
        finding = f"Both mixtures give the true class {got}"
    else:
        finding = f"The adaptive mixture gives the true class {got}, the equal one {plain}"
    drawing.headline(
        figure, finding, "soft targets of one image; mixtures are stacked from the teachers' shares; true class in bold"
    )
    return figure


def _check_shapes(
    name: str, probs: tuple[int, ...], want: tuple[int, ...], weights: tuple[int, ...], want_w: tuple[int, ...]
) -> None:
    if probs != want:
        raise ValueError(f"{name}: teacher_probs must be {list(want)} (teachers by classes last), got {list(probs)}")
    if weights != want_w:
        raise ValueError(f"{name}: weights must be {list(want_w)}, got {list(weights)}")


# --- gallery of weights -----------------------------------------------------------------------------------------------


def _weights_gallery(
    images: Sequence[ArrayLike] | ArrayLike,
    class_names: Sequence[str],
    teacher_probs: ArrayLike,
    weights: ArrayLike,
    labels: ArrayLike,
    teacher_names: Sequence[str],
) -> Figure:
    probs, shares = np.asarray(teacher_probs, float), np.asarray(weights, float)  # [n, T, C], [n, T]
    pictures, truth = np.asarray(images), [int(label) for label in np.asarray(labels)]
    n, count = len(truth), len(teacher_names)
    _check_shapes("weights_gallery", probs.shape, (n, count, len(class_names)), shares.shape, (n, count))
    if not n or len(pictures) != n:
        raise ValueError(
            f"weights_gallery: images must be as many as labels and at least one, got {len(pictures)} and {n}"
        )
    mixture = probs * shares[:, :, None]  # [n, T, C]
    orders = [numbers.top_classes(mixture[i].sum(0), 4, truth[i]) for i in range(n)]
    names = [[numbers.short(class_names[c]) for c in order] for order in orders]

    tags, gap, row, high = 0.24, 0.14, 1.0, 0.84  # tags: room for "T1" beside the bars of the weights
    left = 1.2 + max(map(drawing.text_inches, names))
    wide = max(0.85, (7.85 - tags - left - gap * (count + 1)) / (count + 2))
    heads = [(name, f"T{t + 1}") for t, name in enumerate(teacher_names)]
    heads += [("Weights on this image", "per teacher"), ("Adaptive mixture", "weighted sum")]
    titles = [drawing.column_title(name, wide + gap) for name, _ in heads]
    first = drawing.first_row(titles)
    figure = Figure(figsize=(left + tags + (count + 2) * (wide + gap) + 0.15 - gap, first + n * row))
    top = max(probs.max(), mixture.sum(1).max())
    colors = [drawing.teacher_color(t) for t in range(count)]
    for i, order in enumerate(orders):
        y, true = first + i * row, order.index(truth[i])
        drawing.picture(drawing.panel(figure, 0.2, y, high, high), pictures[i], "")
        for column, (title, (_, below)) in enumerate(zip(titles, heads, strict=True)):
            shift = tags if column >= count else 0
            axes = drawing.panel(figure, left + shift + column * (wide + gap), y, wide, high)
            if column < count:
                parts = probs[i][column : column + 1, order]
                drawing.bars(axes, parts, colors[column : column + 1], top, true, names[i] if column == 0 else None)
            elif column == count:
                _weight_bars(axes, shares[i], colors)
            else:
                drawing.bars(axes, mixture[i][:, order], colors, top, true, None)
            if i == 0:
                drawing.above(axes, title, below, drawing.dark(colors[column] if column < count else INK))
    drawing.headline(
        figure,
        _gallery_finding(shares, teacher_names),
        "probabilities of each image's top classes, one scale for all; true class in bold; mixture stacked by teacher",
    )
    return figure


def _gallery_finding(shares: Array, teacher_names: Sequence[str]) -> str:
    n, count = shares.shape
    if np.abs(shares - 1 / count).max() < 0.01:
        return f"The teachers weigh the same on every image ({numbers.two(1 / count)} each)"
    wins = np.bincount(shares.argmax(1), minlength=count)
    led = [f"T{t + 1} on {wins[t]}" for t in range(count) if wins[t]]
    if len(led) == 1:
        first = int(wins.argmax())
        return f"Largest weight: T{first + 1} ({numbers.short(teacher_names[first], 28)})" + (
            f", on all {n} images" if n > 1 else ""
        )
    return f"The heaviest teacher changes with the image: {', '.join(led)} of {n}"


def _weight_bars(axes: Axes, shares: Array, colors: Sequence[str]) -> None:
    places = [float(t) for t in range(len(shares))]
    axes.barh(places, shares, height=0.68, color=colors)
    for place, share in zip(places, shares, strict=True):
        axes.text(share + 0.03 * drawing.room(axes, 1), place, numbers.two(share), va="center", fontsize=8)
    axes.set_yticks(places, [f"T{t + 1}" for t in range(len(shares))], fontsize=8)
    axes.set(xlim=(0, drawing.room(axes, 1)), ylim=(len(shares) - 0.4, -0.6), xticks=[])
    drawing.bare(axes)


# --- entropy ----------------------------------------------------------------------------------------------------------


def _entropy(histories: Histories, teacher_names: Sequence[str] | None) -> Figure:
    series = {label: numbers.series(runs, "entropy") for label, runs in histories.items()}
    series = {label: values for label, values in series.items() if np.isfinite(values).any()}
    if not series:
        raise ValueError(f"entropy: no epoch with an 'entropy' in the histories of {list(histories)}")
    figure = Figure(figsize=(8, 0.67 + 3.05 * len(series)))
    for i, (label, values) in enumerate(series.items()):
        y, runs = 1.17 + 3.05 * i, histories[label]
        axes = drawing.panel(figure, 0.62, y, 1.5, 2.0)
        _entropy_lines(axes, values)
        drawing.heading(axes, f"Entropy, {numbers.short(label, 24)}", _entropy_scale(axes))
        axes = drawing.panel(figure, 3.4, y, 1.3, 2.0)
        _teacher_lines(axes, runs, "weight_mean", None)
        drawing.heading(axes, "Mean weight", f"dashed: equal; {'one seed' if len(runs) == 1 else 'band: seeds'}")
        axes = drawing.panel(figure, 5.55, y, 1.3, 2.0)
        _teacher_lines(axes, runs, "weight_won", teacher_names or ())
        drawing.heading(axes, "Largest weight", "on this share of the examples")
    drawing.headline(
        figure, _entropy_finding(series), "entropy per image, normalized to [0, 1], averaged over the epoch"
    )
    return figure


def _entropy_lines(axes: Axes, values: Array) -> None:
    ends = []
    for seed, run in enumerate(values):
        keep = np.isfinite(run)
        if keep.any():
            epochs, color, last = np.flatnonzero(keep) + 1, METHODS[(seed + 1) % len(METHODS)], run[keep][-1]
            axes.plot(epochs, run[keep], color=color, lw=1.6, clip_on=False, **drawing.end_marker(seed))
            ends.append((float(epochs[-1]), float(last), f"run {seed + 1}: {numbers.fine(last)}", color))
    axes.set_ylim(drawing.floor(float(np.nanmin(values))), 1)
    drawing.epoch_axis(axes)
    drawing.end_labels(axes, ends)


def _entropy_finding(series: Mapping[str, Array]) -> str:
    """Which of uniform, one-hot or between the last epoch shows."""
    last = np.concatenate([numbers.last(values) for values in series.values()])
    low, high = numbers.fine(last.min()), numbers.fine(last.max())
    said = low if low == high else f"{low} to {high}"
    if last.min() > UNIFORM:
        return f"The weights collapsed to equal: last entropy above {UNIFORM}"
    if last.max() < ONE_HOT:
        return f"The weights collapsed to one teacher an image: last entropy below {ONE_HOT}"
    near = ", close to equal" if last.min() > 0.9 else ", close to one teacher an image" if last.max() < 0.1 else ""
    return f"The teacher weights end at entropy {said}{near}"


def _entropy_scale(axes: Axes) -> str:
    start = axes.get_ylim()[0]
    return "1 = all equal, " + (f"axis starts at {start:g}" if start else "0 = one teacher an image")


def _teacher_lines(axes: Axes, runs: Runs, key: str, teacher_names: Sequence[str] | None) -> None:
    """A line a teacher of a metric that holds one number a teacher, its value and name (None: no name) at its end."""
    teachers = numbers.of_teachers(runs, key)
    ends, highest = [], 0.0
    for t, values in enumerate(teachers):
        keep, color = np.isfinite(values).any(axis=0), drawing.teacher_color(t)
        epochs, values = np.flatnonzero(keep) + 1, values[:, keep]
        mean = np.nanmean(values, axis=0)
        highest = max(highest, float(np.nanmax(values)))
        axes.fill_between(epochs, np.nanmin(values, axis=0), np.nanmax(values, axis=0), color=color, alpha=0.2, lw=0)
        axes.plot(epochs, mean, color=color, lw=1.8, **drawing.end_marker(t))
        text = numbers.two(mean[-1])
        if teacher_names is not None:
            text = f"{drawing.wrap(teacher_names[t] if teacher_names else f'teacher {t + 1}', 13, 2)}\n{text}"
        ends.append((float(epochs[-1]), float(mean[-1]), text, color))
    if teachers:
        axes.set_ylim(0, min(1.12 * highest, 1.02) or 1)
        axes.axhline(1 / len(teachers), color=FAINT, lw=0.9, ls=(0, (4, 3)), zorder=1)
    drawing.epoch_axis(axes)
    drawing.end_labels(axes, ends)
