"""The suite's JSON files read as one, and numbers as people read them.

A row that was timed in several turns is the median of their medians, and a ratio the median of the turns' ratios.
Several files of one machine are one: of groups that both have, the later file's count, so that every ratio is of one run.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OURS = ("cpp", "cuda", "triton")
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
