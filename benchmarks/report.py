"""Turn a pytest-benchmark JSON into Markdown tables: ``python benchmarks/table.py results.json``."""

import json
import sys
from collections import defaultdict


def main(path: str) -> None:
    with open(path) as file:
        data = json.load(file)
    cpu = data["machine_info"]["cpu"]
    commit = data["commit_info"]["id"][:7] + (" with changes" if data["commit_info"]["dirty"] else "")
    groups: dict[str, dict] = defaultdict(dict)
    for case in data["benchmarks"]:
        groups[case["group"]][case["extra_info"]["provider"]] = (case["stats"]["median"], case["extra_info"])
    threads = data["benchmarks"][0]["extra_info"]["threads"]
    print(
        f"{cpu.get('brand_raw', 'unknown CPU')}, {threads} threads, commit {commit}; medians, forward and backward.\n"
    )
    bandwidth = None
    if "limit" in groups:
        seconds, info = groups.pop("limit")["copy"]
        bandwidth = info["bytes"] / seconds
        print(f"Copy bandwidth: {bandwidth / 1e9:.1f} GB/s.\n")
    print("| case | fused | eager | compile | vs eager | vs compile | share of copy bandwidth |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, providers in groups.items():
        if "cpp" not in providers:
            continue
        (ours, info), others = providers["cpp"], [providers.get(p, (None,))[0] for p in ("eager", "compile")]
        times = [_milliseconds(t) for t in (ours, *others)]
        ratios = ["" if t is None else f"{t / ours:.1f}x" for t in others]
        share = f"{info['bytes'] / ours / bandwidth:.0%}" if bandwidth and "bytes" in info else ""
        print("|", " | ".join([name, *times, *ratios, share]), "|")
    print("\n| case | time | triplets a second |\n|---|---:|---:|")
    for name, providers in groups.items():
        for provider, (seconds, info) in providers.items():
            if "cpp" not in providers:
                rate = f"{info['triplets'] / seconds / 1e9:.2f} G" if "triplets" in info else ""
                print(f"| {name}: {provider} | {_milliseconds(seconds)} | {rate} |")


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g} ms"


if __name__ == "__main__":
    main(sys.argv[1])
