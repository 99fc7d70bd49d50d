"""Tables and pictures from the suite's JSON files.

    python benchmarks/report.py RESULTS.json...                 # Markdown on the terminal
    python benchmarks/report.py RESULTS.json... --out FOLDER     # report.md and PNGs in the folder
    python benchmarks/report.py RESULTS.json... --readme README.md   # the block between its markers
    python benchmarks/report.py --compare BEFORE.json AFTER.json [--most 0.25]

A row that was timed in several turns is the median of their medians, and a ratio the median of the turns' ratios.
Several files of one machine are one report: of groups that both have, the later file's count, so that every ratio is of one run.
--compare divides every time by that of eager PyTorch in the same file, a step's by that of the published loop, and exits with 1 if that
ratio grew by more than the given share anywhere, or if AFTER lacks a row of ours whose divisor it has.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: written by benchmarks/report.py -->", "<!-- end of figures -->"
OURS = ("cpp", "cuda", "triton")
PAPER = "a loop as published"  # the other rows of a training step are the trainer's
FEWEST_BYTES = 1e5  # less is pages of the system, not what was asked for


@dataclass
class Results:
    """Everything that the files hold. rows: (group, provider, axis value or None) -> median seconds and facts, among them the
    median seconds of its ``turns``."""

    rows: dict[tuple[str, str, Any], tuple[float, dict]] = field(default_factory=dict)
    memory: dict[tuple[str, str], int] = field(default_factory=dict)
    not_run: dict[tuple[str, str], str] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    commit: str = ""
    files: int = 0

    def leave_out(self, groups: set[str], memory: set[str]) -> None:
        """What a later file has measured anew. A value of an axis that was not run is named after its group."""
        of_axis = tuple(f"{group}, " for group in groups)
        self.rows = {key: row for key, row in self.rows.items() if key[0] not in groups}
        own = {key for key in self.not_run if key[0] in groups or key[0].startswith(of_axis)}
        self.not_run = {key: why for key, why in self.not_run.items() if key not in own}
        self.memory = {key: taken for key, taken in self.memory.items() if key[0] not in memory}

    def groups(self, *, axis: bool = False) -> list[str]:
        return list(dict.fromkeys(g for (g, _, value) in self.rows if (value is not None) == axis))

    def providers(self, group: str) -> list[str]:
        return list(dict.fromkeys(p for (g, p, _) in self.rows if g == group))

    def seconds(self, group: str, provider: str) -> float | None:
        return self.rows.get((group, provider, None), (None,))[0]

    def ratio(self, group: str, slow: str, fast: str, value: Any = None) -> float | None:
        """The seconds of ``slow`` over those of ``fast``: the median of the turns' ratios."""
        if (group, slow, value) not in self.rows or (group, fast, value) not in self.rows:
            return None
        (slow_seconds, of_slow), (fast_seconds, of_fast) = self.rows[group, slow, value], self.rows[group, fast, value]
        if len(of_slow["turns"]) != len(of_fast["turns"]):
            return slow_seconds / fast_seconds
        return statistics.median(s / f for s, f in zip(of_slow["turns"], of_fast["turns"]))

    def line(self, group: str, provider: str) -> list[tuple[float, float, int | None]]:
        """(axis value, seconds, bytes), sorted."""
        found = [(v, s, f.get("extra_bytes")) for (g, p, v), (s, f) in self.rows.items() if (g, p) == (group, provider)]
        return sorted(found)

    def best(self, group: str) -> str | None:
        """The fastest of ours."""
        ours = [p for p in self.providers(group) if p in OURS]
        return min(ours, key=lambda p: self.rows[group, p, None][0], default=None)

    def share(self, group: str, provider: str) -> tuple[float, str] | None:
        """How much of the machine's limit, and which limit binds."""
        seconds, facts = self.rows[group, provider, None]
        limits = facts["limits"]
        if "bytes" not in facts or not limits:
            return None
        by_bytes = facts["bytes"] / limits["bytes_per_s"] / seconds
        by_flops = facts["flops"] / limits["flops_per_s"] / seconds
        return max((by_bytes, "bytes"), (by_flops, "flops"))


def load(paths: Sequence[str | Path]) -> Results:
    """ValueError where the files are of different machines."""
    results = Results()
    for path in paths:
        data = json.loads(Path(path).read_text())
        limits, machine = data.get("limits", {}), data.get("machine", {})
        if results.files and _place(machine) != _place(results.machine):
            raise ValueError(
                f"results: all files must be of one machine, got {_place(results.machine)} and in {path} {_place(machine)}"
            )
        results.leave_out(
            {row["group"] for row in data["benchmarks"]}, {row["group"] for row in data.get("memory", ())}
        )
        turns: dict[tuple[str, str, Any], list[dict]] = {}
        for row in data["benchmarks"]:
            facts = row["extra_info"]
            turns.setdefault((row["group"], facts["provider"], facts.get("value")), []).append(row)
        for key, rows in turns.items():
            seconds = [row["stats"]["median"] for row in rows]
            facts = rows[0]["extra_info"] | {"limits": limits, "turns": seconds}
            first = rows[0]["stats"]
            facts["once"] = len(rows) == 1 and first.get("rounds") == 1
            if len(rows) > 1:
                facts["between"] = (max(seconds) - min(seconds)) / statistics.median(seconds)
            elif "iqr" in first and first.get("rounds", 0) >= 5:
                facts["spread"] = first["iqr"] / first["median"]
            results.rows[key] = (statistics.median(seconds), facts)
        for row in data.get("memory", ()):
            if row["bytes"] is not None:
                results.memory[row["group"], row["provider"]] = row["bytes"]
        results.not_run |= {(row["group"], row["provider"]): row["reason"] for row in data.get("not_run", ())}
        results.limits, results.machine, results.files = limits, machine, results.files + 1
        commit = data["commit_info"]
        named = commit["id"][:7] + (" with changes" if commit["dirty"] else "")
        if named not in results.commit.split(", "):
            results.commit += f"{', ' if results.commit else ''}{named}"
    return results


def _place(machine: dict[str, Any]) -> dict[str, Any]:
    return {key: machine.get(key) for key in ("name", "device", "threads", "torch")}


# --- numbers as people read them


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def bytes_text(count: float | None) -> str:
    if count is None:
        return ""
    if count < FEWEST_BYTES:
        return "< 0.1 MB"
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} kB"


def ratio_text(ratio: float | None) -> str:
    """Bold below 1."""
    if ratio is None:
        return ""
    if ratio < 1:
        return f"**{ratio:.2f}x**"
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# --- tables


def head(results: Results) -> str:
    machine, limits = results.machine, results.limits
    where = f"{machine.get('name', 'unknown machine')}, "
    where += "one GPU" if machine.get("device") == "cuda" else f"{machine.get('threads', '?')} threads"
    text = f"{where}, PyTorch {machine.get('torch', '?').partition('+')[0]}, commit {results.commit}; medians."
    if limits:
        run = "the same run" if results.files == 1 else "the last run"
        text += f" In {run}, a copy moved {limits['bytes_per_s'] / 1e9:,.1f} GB/s and a float32 matrix product made "
        text += f"{limits['flops_per_s'] / 1e9:,.0f} GFLOP/s."
    for name, what in (("spread", "Interquartile range:"), ("between", "The turns of a row differ by")):
        found = sorted(facts[name] for _, facts in results.rows.values() if name in facts)
        if found:
            text += f" {what} {found[len(found) // 2]:.0%} of the median (typical), {found[-1]:.0%} (worst row)."
    once = sum(facts["once"] for _, facts in results.rows.values())
    return text + (f" Long ones, {once} of {len(results.rows)} rows, were timed once." if once else "")


def operators(results: Results) -> str:
    rows = []
    for group in operator_groups(results):
        ours = str(results.best(group))
        mine = results.rows[group, ours, None][0]
        others = [f"{p} {time_text(seconds)}" for p, seconds in peers(results, group).items()]
        share = results.share(group, ours)
        rows.append([
            group, f"{time_text(mine)} ({ours})", *(_time_or_reason(results, group, p) for p in ("eager", "compile")),
            "; ".join(others), *ratios(results, group),
            f"{share[0]:.0%} ({share[1]})" if share else "",
        ])  # fmt: skip
    header = ["ours", "eager", "torch.compile", "others", "vs eager", "vs torch.compile", "of the limit"]
    return markdown_table(["forward + backward", *header], rows)


def operator_groups(results: Results) -> list[str]:
    """The rows of operators that ours ran."""
    best = {group: results.best(group) for group in results.groups()}
    return [group for group, ours in best.items() if ours and "op" in results.rows[group, ours, None][1]]


def peers(results: Results, group: str) -> dict[str, float]:
    """Other libraries and their seconds."""
    names = [p for p in results.providers(group) if p not in (*OURS, "eager", "compile")]
    return {p: results.rows[group, p, None][0] for p in names}


def ratios(results: Results, group: str) -> list[str]:
    """How many times faster ours is than eager and than torch.compile."""
    mine = str(results.best(group))
    return [ratio_text(results.ratio(group, p, mine)) for p in ("eager", "compile")]


def _time_or_reason(results: Results, group: str, provider: str) -> str:
    seconds = results.seconds(group, provider)
    return time_text(seconds) if seconds is not None else results.not_run.get((group, provider), "")


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y over log x, by least squares over the larger half of the points."""
    upper = [(math.log(x), math.log(y)) for x, y in points[len(points) // 2 :] if y > 0]
    if len(upper) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(upper) for column in zip(*upper))
    across = sum((x - mean_x) ** 2 for x, _ in upper)
    return sum((x - mean_x) * (y - mean_y) for x, y in upper) / across if across else None


def scaling(results: Results) -> str:
    parts = []
    for group in results.groups(axis=True):
        axis, providers = group.rpartition(" ")[2], results.providers(group)
        lines = {p: {v: (s, b) for v, s, b in results.line(group, p)} for p in providers}
        rows = []
        for value in sorted({v for line in lines.values() for v in line}):
            cells = [f"{axis} = {value:,}"]
            for p in providers:
                seconds, taken = lines[p].get(value, (None, None))
                reason = results.not_run.get((f"{group}, {axis} = {value}", p), "")
                cells += [time_text(seconds) or reason, bytes_text(taken)]
            rows.append(cells)
        fitted = ["grows like"]
        for p in providers:
            line = results.line(group, p)
            for points in ([(v, s) for v, s, _ in line], [(v, b) for v, _, b in line if b]):
                power = exponent(points)
                fitted.append("" if power is None else f"{axis}^{power:.2f}")
        header = [group, *(x for p in providers for x in (p, "memory"))]
        parts.append(markdown_table(header, [*rows, fitted]))
    return "\n\n".join(parts)


PARTS = ("data", "teachers", "student", "losses", "optimizer")


def steps(results: Results) -> str:
    """A row for each way to make a step, with the shares of those parts that were measured."""
    groups = [group for group in results.groups() if group.startswith("step")]
    measured = {key[:2]: part_shares(row[1]) for key, row in results.rows.items() if key[0] in groups}
    shown = [part for part in PARTS if any(part in shares for shares in measured.values())]
    rows = []
    for group in groups:
        for provider in [*results.providers(group), *(p for g, p in results.not_run if g == group)]:
            seconds, facts = results.rows.get((group, provider, None), (None, {}))
            if seconds is None:
                rows.append([group, provider, results.not_run[group, provider], *[""] * (1 + len(shown))])
                continue
            shares = measured[group, provider]
            cells = [f"{shares[part]:.1%}" if part in shares else "" for part in shown]
            faster = ratio_text(results.ratio(group, PAPER, provider))
            rows.append([group, provider, f"{facts['images'] / seconds:,.1f}", faster, *cells])
    return markdown_table(["training step", "by", "images/s", "vs published loop", *shown], rows)


def part_shares(facts: dict) -> dict[str, float]:
    """Part of a step -> its share of the step."""
    parts = facts.get("parts", {})
    return {part: share / sum(parts.values()) for part, share in parts.items()}


def memory(results: Results) -> str:
    groups = list(dict.fromkeys(g for g, _ in results.memory))
    providers = list(dict.fromkeys(p for _, p in results.memory))
    rows = [[g, *(bytes_text(results.memory.get((g, p))) for p in providers)] for g in groups]
    return markdown_table(["memory beside the inputs", *providers], rows)


def triplets(results: Results) -> str:
    rows = []
    for group in results.groups():
        for provider in results.providers(group):
            seconds, facts = results.rows[group, provider, None]
            if "triplets" in facts:
                rows.append([group, provider, time_text(seconds), f"{facts['triplets'] / seconds / 1e9:.2f} G"])
    return markdown_table(["case", "provider", "time", "triplets a second"], rows)


def overhead(results: Results) -> str:
    rows = [[p, time_text(s)] for (_, p, _), (s, facts) in results.rows.items() if "overhead" in facts]
    return markdown_table(["Python and dispatch of AMTMLLoss at N = 128", "time"], rows)


def linear(results: Results) -> str:
    """The loss from hidden states, its peers, and its matrix products alone."""
    rows = []
    for group in (g for g in results.groups() if g.startswith("fused_linear_kd")):
        for provider in results.providers(group):
            seconds, facts = results.rows[group, provider, None]
            share = results.ratio(group, provider, "products")
            of_products = "" if share is None else f"{share:.2f}"
            rows.append([group, provider, time_text(seconds), of_products, bytes_text(facts.get("extra_bytes"))])
    return markdown_table(["from hidden states", "by", "time", "of its products", "memory beside the inputs"], rows)


def report(results: Results) -> str:
    """What was timed: sections without a row are left out, and so are their pictures."""
    parts = ["# Benchmarks", head(results), "Forward and backward together. Bold: slower than the baseline."]
    for title, table, *images in (
        ("Operators", operators(results), *(("speedup", "roofline") if beside_eager(results) else ())),
        ("Memory", memory(results), "memory"),
        ("Growth", scaling(results), "scaling"),
        ("Angle loss", triplets(results)),
        ("From hidden states", linear(results)),
        ("Overhead", overhead(results)),
        ("Training step", steps(results)),
    ):
        if table.count("\n") > 1:
            parts += [f"## {title}", table, *(f"![{image}]({image}.png)" for image in images)]
    return "\n\n".join(parts) + "\n"


def readme(results: Results, folder: str) -> str:
    """What the README says about speed, whole: of each operator the largest size in float32."""
    largest: dict[str, str] = {}
    for group in operator_groups(results):
        if not group.endswith(" float32"):
            continue
        op = results.rows[group, str(results.best(group)), None][1]["op"]
        if op not in largest or _eager(results, group) > _eager(results, largest[op]):
            largest[op] = group
    rows = []
    for group in largest.values():
        mine = str(results.best(group))
        others = [f"{p} {ratio_text(results.ratio(group, p, mine))}" for p in peers(results, group)]
        rows.append([group, time_text(results.seconds(group, mine)), *ratios(results, group), "; ".join(others)])
    return "\n\n".join([
        head(results),
        markdown_table(["forward + backward", "ours", "vs eager", "vs torch.compile", "vs others"], rows),
        "Eager, and what torch.compile compiles, is `amtml_fast/reference.py`: plain PyTorch that minds masks, ignored rows and "
        "zeros. A short form is `benchmarks/short_forms.py`: the few lines that one writes without a library, and that handle none of these.",
        f"![Speed-up of every operator over eager PyTorch and torch.compile]({folder}/speedup.png)",
        f"[The whole report]({folder}/report.md): all sizes, memory, growth with N, C and T, rooflines.",
    ])  # fmt: skip


def _eager(results: Results, group: str) -> float:
    return results.seconds(group, "eager") or math.inf


# --- pictures


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


# --- two commits


def compare(before: Results, after: Results, most: float) -> tuple[str, bool]:
    """A table of ours over eager, or over the published loop, in both, and whether nothing lost more than ``most`` or is missing.
    Rows whose divisor only one file has are left out."""
    rows, fine = [], True
    for group, provider, value in before.rows:
        a_step = group.startswith("step")
        plain = PAPER if a_step else "eager"
        ours = provider != PAPER if a_step else provider in OURS
        if not ours or any((group, plain, value) not in run.rows for run in (before, after)):
            continue
        old, new = (run.ratio(group, plain, provider, value) for run in (before, after))
        ratio, change, kept = "-", "MISSING", False
        if old and new:
            lost = old / new - 1
            kept = lost <= most
            ratio, change = ratio_text(new), f"{lost:+.0%}" + ("" if kept else " LOST")
        fine &= kept
        case = group if value is None else f"{group}, {value}"
        rows.append([case, provider, ratio_text(old), ratio, change])
    header = ["case", "provider", f"{before.commit}: vs plain", f"{after.commit}: vs plain", "time against plain"]
    return markdown_table(header, rows), fine


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, help="folder for report.md and the pictures")
    parser.add_argument("--readme", type=Path, help="file whose block between the markers is replaced")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--most", type=float, default=0.25, help="share that a case may lose (default 0.25)")
    options = parser.parse_args(arguments)
    wanted = [*options.results, *(options.compare or ())]
    if not wanted:
        parser.error("name at least one JSON file of results")
    for path in wanted:
        if not path.is_file():
            parser.error(f"{path}: there is no such file; `make bench` writes one")
    if options.compare:
        before, after = load(options.compare[:1]), load(options.compare[1:])
        table, fine = compare(before, after, options.most)
        if table.count("\n") == 1:
            lacking = "row of ours, with eager or the published loop,"
            parser.error(f"{options.compare[1]}: it has no {lacking} that {options.compare[0]} has, too")
        print(table)
        return 0 if fine else 1
    try:
        results = load(options.results)
    except ValueError as error:
        parser.error(str(error))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").write_text(report(results))
        pictures(results, options.out)
        print(f"Written: {options.out}/report.md and its pictures")
    if options.readme:
        page = options.readme.read_text()
        if page.count(BEGIN) != 1 or page.count(END) != 1:
            parser.error(f"{options.readme}: the lines {BEGIN!r} and {END!r} wanted, once each")
        folder = (options.out or options.results[-1].parent).resolve().relative_to(options.readme.resolve().parent)
        above, rest = page.split(BEGIN)
        options.readme.write_text(f"{above}{BEGIN}\n{readme(results, folder.as_posix())}\n{END}{rest.split(END)[1]}")
    if not options.out and not options.readme:
        print(report(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
