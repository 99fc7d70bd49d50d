"""Tables and pictures from the suite's JSON files.

    python -m benchmarks.report RESULTS.json...                  # Markdown on the terminal
    python -m benchmarks.report RESULTS.json... --out FOLDER     # report.md and PNGs in the folder
    python -m benchmarks.report RESULTS.json... --readme README.md   # the block between its markers
    python -m benchmarks.report --compare BEFORE.json AFTER.json [--most 0.25]

--compare divides every time by that of eager PyTorch in the same file, a step's by that of the published loop, and exits with 1 if that
ratio grew by more than the given share anywhere, or if AFTER lacks a row of ours whose divisor it has.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from .measured import OURS, Results, bytes_text, load, ratio_text, time_text
from .pictures import beside_eager, pictures

BEGIN, END = "<!-- figures: written by benchmarks/report.py -->", "<!-- end of figures -->"
PAPER = "a loop as published"  # the other rows of a training step are the trainer's


# --- tables


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


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
