"""The benchmark suite runs, untimed, on one case of every operator; its report says what the JSON says."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from amtml_fast.backend import Choice
from amtml_fast.testing import CASES, tensors
from benchmarks import report, tune
from benchmarks.workloads import WORKLOADS

pytest.importorskip("pytest_benchmark")
pytest.importorskip("matplotlib")

from pictures import drawn, unreadable

ROOT = Path(__file__).parents[1]


def result(group, provider, seconds, **facts):
    return {"group": group, "stats": {"median": seconds}, "extra_info": {"provider": provider, **facts}}


PARTS = {"data": 0.05, "teachers": 0.2, "student": 0.15, "losses": 0.075, "optimizer": 0.025}


def write(path, scale=1.0, commit="a" * 40):
    op = {"op": "angle", "bytes": 1e6, "flops": 1e9}
    rows = [
        result("angle 128x100 float32", "cpp", 1e-3 * scale, **op),
        result("angle 128x100 float32", "eager", 4e-2, **op),
        result("angle 128x100 float32", "compile", 5e-4, **op),
        *(
            result("angle against N", p, s * (n / 64) ** k, axis="N", value=n, extra_bytes=n**k, flops=1.0, bytes=1.0)
            for n in (64, 128, 256, 512)
            for p, s, k in (("cpp", 1e-4 * scale, 2), ("eager", 1e-2, 3))
        ),
        result("fused_linear_kd 8x4x9x1 float32", "cpp", 6e-3 * scale, extra_bytes=2_000_000),
        result("fused_linear_kd 8x4x9x1 float32", "products", 5e-3),
        result("step, small", "the trainer", 0.5, images=64, parts=PARTS),
        result("step, small", "a loop as published", 1.0, images=64),
    ]
    path.write_text(
        json.dumps(
            {
                "benchmarks": rows,
                "memory": [{"group": "angle 128x100 float32", "provider": "cpp", "bytes": 3_000_000}],
                "not_run": [
                    {"group": "angle against N, N = 512", "provider": "eager", "reason": "would take about 99 GB"}
                ],
                "limits": {"bytes_per_s": 1e10, "flops_per_s": 4e12},
                "machine": {"name": "A processor", "device": "cpu", "threads": 2, "torch": "2.13.0+cpu"},
                "commit_info": {"id": commit, "dirty": False},
            }
        )
    )
    return path


@contextmanager
def changed(path):
    """The file's content, to be changed."""
    data = json.loads(path.read_text())
    yield data
    path.write_text(json.dumps(data))


def suite(*options):
    """The short run of the operators, with these options."""
    command = [sys.executable, "-m", "pytest", "benchmarks/test_ops.py", "-q", "-m", "quick"]
    # pytest-benchmark times nothing where it takes itself for a worker of pytest-xdist.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [*command, "-p", "no:xdist", "-p", "no:cacheprovider", *options],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


def test_every_operator_runs_in_the_suite():
    quick = [w for w in WORKLOADS if w.quick]
    assert {w.op for w in quick} >= set(CASES)
    run = suite("-k", "cpp", "--benchmark-disable")
    assert run.returncode == 0 and f"{len(quick)} passed" in run.stdout, run.stdout[-3000:]


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if w.quick], ids=lambda w: w.name)
def test_every_row_of_a_workload_counts(workload):
    """An ignored row is work that the kernels leave out and the others do."""
    whole = [x for x in tensors(workload.task().args) if not x.is_floating_point()]
    assert all((x >= 0).all() for x in whole)


def test_tables_hold_what_was_measured_and_what_was_not(tmp_path):
    text = report.report(report.load([write(tmp_path / "a.json")]))
    (row,) = [line for line in text.splitlines() if line.startswith("| angle 128x100 float32 | 1 ms")]
    assert "| 40 ms | 500 µs |" in row and "| 40x | **0.50x** | 25% (flops) |" in row  # slower: bold
    assert "N^2.00 | N^2.00 | N^3.00 | N^3.00" in text
    assert "A processor, 2 threads, PyTorch 2.13.0, commit aaaaaaa" in text and "10.0 GB/s" in text
    assert "| step, small | the trainer | 128.0 | 2.0x | 10.0% | 40.0% | 30.0% | 15.0% | 5.0% |" in text
    assert "| angle 128x100 float32 | 3 MB |" in text
    assert "| fused_linear_kd 8x4x9x1 float32 | cpp | 6 ms | 1.20 | 2 MB |" in text


def test_a_row_that_was_not_run_says_why(tmp_path):
    path = write(tmp_path / "a.json")
    with changed(path) as data:
        data["benchmarks"] = [
            row
            for row in data["benchmarks"]
            if (row["extra_info"]["provider"], row["extra_info"].get("value")) != ("eager", 512)
        ]
    assert "| N = 512 | 6.4 ms | 262 kB | would take about 99 GB |  |" in report.report(report.load([path]))


def test_a_ratio_is_the_median_of_those_of_the_turns(tmp_path):
    """While the first turn was timed the machine was at half its speed, and got fast between the two of the last one."""
    path, group = write(tmp_path / "a.json"), "angle 128x100 float32"
    turns = {"cpp": (2e-3, 1e-3, 2e-3), "eager": (8e-2, 4e-2, 4e-2)}
    with changed(path) as data:
        data["benchmarks"] = [
            result(group, p, s, op="angle", bytes=1e6, flops=1e9, turn=t) for p in turns for t, s in enumerate(turns[p])
        ]
    found = report.load([path])
    assert found.seconds(group, "cpp") == 2e-3 and found.seconds(group, "eager") == 4e-2
    assert report.ratios(found, group) == ["40x", ""]
    assert "The turns of a row differ by 100% of the median (typical), 100% (worst row)." in report.head(found)
    assert "timed once" not in report.head(found)


def test_providers_are_timed_in_turn(tmp_path):
    chosen = "(dual_softmax or hint) and not test_memory and (cpp or eager)"
    run = suite("-k", chosen, f"--benchmark-json={tmp_path / 'a.json'}")
    assert run.returncode == 0, run.stdout[-3000:]
    rows = [row["extra_info"] for row in json.loads((tmp_path / "a.json").read_text())["benchmarks"]]
    seen = [(row["op"], row["turn"], row["provider"]) for row in rows]
    assert seen == [(op, t, p) for op in ("hint", "dual_softmax") for t in range(3) for p in ("cpp", "eager")]
    found = report.load([tmp_path / "a.json"])
    assert len(found.rows["dual_softmax 512x512 float32", "cpp", None][1]["turns"]) == 3


def test_of_several_files_the_last_counts(tmp_path):
    paths = [write(tmp_path / "a.json"), write(tmp_path / "b.json", scale=3)]
    assert report.load(paths).seconds("angle 128x100 float32", "cpp") == pytest.approx(3e-3)


def test_ratios_are_of_one_run(tmp_path):
    """A later file without eager: no ratio of ours in one run to eager in another, and no reason from the earlier one."""
    paths = [write(tmp_path / "a.json"), write(tmp_path / "b.json", scale=3)]
    with changed(paths[1]) as data:
        data["benchmarks"] = [row for row in data["benchmarks"] if row["extra_info"]["provider"] != "eager"]
        data["limits"], data["not_run"] = {"bytes_per_s": 2e10, "flops_per_s": 1e12}, []
    found = report.load(paths)
    assert found.seconds("angle 128x100 float32", "eager") is None and not found.not_run
    assert report.ratios(found, "angle 128x100 float32") == ["", "**0.17x**"]
    with changed(paths[1]) as data:
        data["benchmarks"] = [row for row in data["benchmarks"] if row["group"].startswith("step")]
    found = report.load(paths)
    assert found.share("angle 128x100 float32", "cpp") == (0.25, "flops")  # of the machine as it was in that run
    assert "In the last run, a copy moved 20.0 GB/s" in report.head(found)


def test_files_of_several_machines_are_no_report(tmp_path, capsys):
    paths = [write(tmp_path / "a.json"), write(tmp_path / "b.json")]
    with changed(paths[1]) as data:
        data["machine"]["name"] = "Another processor"
    with pytest.raises(SystemExit):
        report.main([str(path) for path in paths])
    assert "all files must be of one machine, got" in capsys.readouterr().err


def test_pictures_and_the_readme_are_written(tmp_path):
    path, page = write(tmp_path / "a.json"), tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nwhat was said\n{report.END}\nafter\n")
    assert report.main([str(path), "--out", str(tmp_path / "out"), "--readme", str(page)]) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "report.md", "speedup.png", "roofline.png", "scaling.png", "memory.png",
    }  # fmt: skip
    text = page.read_text()
    assert (
        text.startswith("before\n")
        and text.endswith("after\n")
        and "what was said" not in text
        and "out/speedup.png" in text
    )
    page.write_text("no markers")
    with pytest.raises(SystemExit):
        report.main([str(path), "--readme", str(page)])


def test_no_words_of_a_picture_overlap(tmp_path, monkeypatch):
    results = report.load([ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "results.json"])
    figures = drawn(monkeypatch)
    report.pictures(results, tmp_path)
    assert [unreadable(figure) for figure in figures] == [[]] * 4
    roof, growth = figures[1:3]
    assert {text.get_text() for text in roof.axes[0].texts} >= {"angle 256x100", "kl 128x1000", "hint 128x16x16x64x8"}
    assert growth.axes[2].get_xlabel() == "T" and not growth.axes[5].get_visible()  # no memory was measured there


def test_a_legend_names_what_the_last_row_has_not(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json")
    with changed(path) as data:
        data["benchmarks"] += [
            dict(row, group="angle 999x100 float32") for row in data["benchmarks"][:2]
        ]  # not compiled
    figures = drawn(monkeypatch)
    report.pictures(report.load([path]), tmp_path)
    assert [text.get_text() for text in figures[0].axes[0].get_legend().get_texts()] == ["vs eager", "vs compile"]


def test_what_was_not_timed_has_no_section_and_no_picture(tmp_path):
    results = report.load([write(tmp_path / "a.json")])
    everything = report.report(results)
    assert "## Memory" in everything and "## Growth" in everything
    results.memory.clear()
    results.rows = {key: row for key, row in results.rows.items() if key[2] is None}
    text = report.report(results)
    report.pictures(results, tmp_path)
    assert "## Operators" in text and "## Memory" not in text and "## Growth" not in text
    assert (
        {path.stem for path in tmp_path.glob("*.png")}
        == {"speedup", "roofline"}
        == {*re.findall(r"\((\w+)\.png\)", text)}
    )


def test_a_roofline_leaves_out_what_has_no_count_of_bytes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.json")
    with changed(path) as data:
        data["benchmarks"].append(result("fused_linear_kd 8x4x9x1 float32", "eager", 9e-3, flops=1e6))
    figures = drawn(monkeypatch)
    report.pictures(report.load([path]), tmp_path)
    named = [{text.get_text() for text in (*f.axes[0].texts, *f.axes[0].get_yticklabels())} for f in figures[:2]]
    assert "fused_linear_kd 8x4x9x1 float32" in named[0] and "fused_linear_kd 8x4x9x1" not in named[1]


def test_compare_goes_by_ratios_and_fails_on_a_loss(tmp_path, capsys):
    before, after = write(tmp_path / "a.json"), write(tmp_path / "b.json", scale=1.5, commit="b" * 40)
    assert report.main(["--compare", str(before), str(after)]) == 1
    assert "+50% LOST" in capsys.readouterr().out
    assert report.main(["--compare", str(before), str(after), "--most", "0.6"]) == 0
    assert report.main(["--compare", str(after), str(before)]) == 0


def test_compare_sees_a_slower_training_step(tmp_path, capsys):
    before, after = write(tmp_path / "a.json"), write(tmp_path / "b.json")
    with changed(after) as data:
        next(row for row in data["benchmarks"] if row["extra_info"]["provider"] == "the trainer")["stats"]["median"] = (
            0.75
        )
    assert report.main(["--compare", str(before), str(after)]) == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "LOST" in line]
    assert row == "| step, small | the trainer | 2.0x | 1.3x | +50% LOST |"


def test_compare_of_nothing_is_no_success(tmp_path, capsys):
    before, after = write(tmp_path / "a.json"), write(tmp_path / "b.json")
    with changed(after) as data:
        divisors = "eager", "a loop as published"
        data["benchmarks"] = [row for row in data["benchmarks"] if row["extra_info"]["provider"] not in divisors]
    with pytest.raises(SystemExit):
        report.main(["--compare", str(before), str(after)])
    assert "b.json: it has no row of ours, with eager or the published loop, that" in capsys.readouterr().err


def test_compare_fails_where_a_row_of_ours_is_missing(tmp_path, capsys):
    before, after = write(tmp_path / "a.json"), write(tmp_path / "b.json")
    with changed(after) as data:
        ours = next(row for row in data["benchmarks"] if row["extra_info"]["provider"] == "cpp")
        data["benchmarks"].remove(ours)
    assert report.main(["--compare", str(before), str(after)]) == 1
    row = next(line for line in capsys.readouterr().out.splitlines() if "MISSING" in line)
    assert ours["group"] in row and "cpp" in row
    assert report.main(["--compare", str(after), str(before)]) == 0  # what is new is not compared


def test_a_row_that_was_timed_once_is_no_median(tmp_path):
    path = write(tmp_path / "a.json")
    assert "timed once" not in report.head(report.load([path]))
    with changed(path) as data:
        data["benchmarks"][0]["stats"]["rounds"] = 1
    assert f"Long ones, 1 of {len(data['benchmarks'])} rows, were timed once." in report.head(report.load([path]))


def test_a_missing_file_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "none.json")])
    assert "none.json: there is no such file" in capsys.readouterr().err


RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores"


@pytest.mark.skipif(not RESULTS.is_dir(), reason="a source distribution has no results")
def test_what_the_readme_says_about_speed_comes_from_the_committed_results():
    page = (ROOT / "README.md").read_text()
    said = page.split(report.BEGIN)[1].split(report.END)[0].strip()
    assert said == report.readme(report.load(sorted(RESULTS.glob("*.json"))), RESULTS.relative_to(ROOT).as_posix())


def test_what_the_readme_says_of_a_gpu_comes_from_the_committed_results():
    rows = json.loads((ROOT / "benchmarks/results/nvidia-h200/operators-7814c9d.json").read_text())["rows"]
    found = {(row["case"], row["provider"]): row for row in rows}
    cases = {
        "KL + CE, bf16, 4096 x 128256, T = 3": "kd bf16 4096x128256 T=3",
        "KL + CE, bf16, 4096 x 32000, T = 3": "kd bf16 4096x32000 T=3",
        "KL, bf16, 4096 x 128256, T = 1": "kd bf16 4096x128256 T=1, no labels, tau=1",
        "KL + CE, float32, 4096 x 128256, T = 3": "kd fp32 4096x128256 T=3",
        "KL from the 64 largest of 128256, bf16, T = 3": "topk bf16 4096x128256 k=64 T=3",
        "the whole loss, N = 128, C = 100, T = 3": "whole loss 128x100 T=3",
    }
    said = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (ROOT / "README.md").read_text().splitlines()]
    for name, case in cases.items():
        ours = found[case, "cuda"]
        cells = [name, f"{1e3 * ours['seconds']:.2f} ms"]
        for other in ("eager", "compile", "liger"):
            row = found.get((case, other))
            cells.append(report.ratio_text(row and row["seconds"] / ours["seconds"]))
        cells.append(f"{100 * ours['share_of_copy']:.0f} %" if "share_of_copy" in ours else "")
        assert cells in said


def test_the_readme_names_the_peers_that_compute_the_same(tmp_path):
    """Eager is the reference, which minds more than a user's own line would: what such a line takes stands beside it."""
    path = write(tmp_path / "a.json")
    with changed(path) as data:
        data["benchmarks"].append(result("angle 128x100 float32", "F.angle", 8e-3))
    said = report.readme(report.load([path]), "folder")
    assert "| angle 128x100 float32 | 1 ms | 40x | **0.50x** | F.angle 8.0x |" in said and "reference.py" in said


def test_lines_for_auto_from_measurements():
    """The order that is right most often, and before it the sizes from which on another one is clearly faster."""
    a, b = ("cuda", "triton"), ("triton", "cuda")
    timed = [
        tune.Timed("angle", 10, {"cuda": 1.0, "triton": 2.0}),
        tune.Timed("topk_kd", 1000, {"cuda": 3.0, "triton": 2.0}),
        tune.Timed("topk_kd", 10, {"cuda": 1.0, "triton": 2.0}),
        tune.Timed("topk_kd", 100, {"cuda": 3.0, "triton": 2.9}),  # no clear difference
        tune.Timed("hint", 10, {"cuda": 3.0, "triton": 2.0}),
        tune.Timed("hint", 20, {"cuda": 1.0, "triton": 2.0}),
        tune.Timed("distance", 10, {"cuda": 1.0, "triton": 2.0}),
    ]
    assert tune.choices("cuda", timed) == [
        Choice("cuda", "topk_kd", 1000, b),
        Choice("cuda", "hint", 20, a),
        Choice("cuda", "hint", 10, b),
        Choice("cuda", None, 0, a),
    ]
    assert tune.choices("cuda", []) == []


def test_tuning_times_both_backends(monkeypatch):
    monkeypatch.setattr(tune, "OURS", ("cpp", "reference"))
    monkeypatch.setattr(tune, "ROUNDS", 2)
    timed = tune.time(next(w for w in WORKLOADS if w.op == "dual_softmax"))
    assert timed.op == "dual_softmax" and timed.numbers == 512 * 512
    assert set(timed.seconds) == {"cpp", "reference"} and min(timed.seconds.values()) > 0
