"""Comparisons: what is planned, side by side or one after another, stopped and grown, and what they report."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file
from small_run import QUIET, Running, wait_for

from amtml_fast.train.compare import results, workers
from amtml_fast.train.compare.plan import checked, plan
from amtml_fast.train.compare.session import Outcome, Session, compare
from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import Config, ConfigError, StagesConfig
from amtml_fast.train.data.images import ImageData, Loader
from amtml_fast.train.figures.tables import Row
from amtml_fast.train.files import RunError, read_json
from amtml_fast.train.progress import Display
from amtml_fast.train.run import optim
from amtml_fast.train.run.distiller import make_distiller, teachers_of
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.job import student_job, teacher_job
from amtml_fast.train.run.memory import PeakMemory
from amtml_fast.train.run.prepare import data_of, load_data
from amtml_fast.train.run.tasks import distill, teach
from amtml_fast.train.teachers import frozen
from amtml_fast.train.teachers.fill import use_cache
from amtml_fast.train.teachers.frozen import Teachers

YAML = """
name: small
data: {name: digits, val_fraction: 0.15}
teachers:
  - {name: a, model: {factory: small_cnn, args: {width: 4}}, hint: block3}
  - {name: b, model: {factory: small_cnn, args: {width: 3}}, hint: block2}
  - {name: c, model: {factory: small_cnn, args: {width: 3}}, hint: block3, classes: [0, 1, 2]}
student: {name: narrow, factory: small_cnn, args: {width: 1}, features: block3, groups: {low: block1, mid: block2, high: block3}}
teach: {epochs: 1, batch_size: 128}
distill: {epochs: 2, batch_size: 128}
compare:
  methods: [student, avg_mkd, amtml_kd]
  seeds: [0, 1]
  teachers: [2, 3]
  students: [{name: wide, factory: small_cnn, args: {width: 2}, features: block3, groups: {low: block1, mid: block2, high: block3}}]
engine: {threads: 1, device: cpu}
"""


def load(folder: Path, *overrides: str, lines: str = YAML) -> Config:
    path = folder / "small.yaml"
    path.write_text(lines)
    return checked(reading.load(path, [f"out={folder}", *overrides]))


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("small/**/*.safetensors"))}


class Compared(NamedTuple):
    folder: Path
    outcome: Outcome
    weights: dict[str, bytes]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """The whole comparison, one run after another."""
    folder = tmp_path_factory.mktemp("compared")
    outcome = compare(load(folder), QUIET)
    return Compared(folder, outcome, weights(folder))


@pytest.fixture
def copied(compared: Compared, tmp_path: Path) -> Path:
    """Its folder, in another place, where a test may add to it."""
    return shutil.copytree(compared.folder, tmp_path, dirs_exist_ok=True)


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_every_student_is_trained_once_and_named_by_what_differs(tmp_path: Path) -> None:
    jobs = plan(load(tmp_path, "compare.seeds=[3]"))
    assert [job.folder.name for job in jobs] == [
        "student-seed3",
        "avg_mkd-2teachers-seed3",
        "amtml_kd-2teachers-seed3",
        "avg_mkd-seed3",
        "amtml_kd-seed3",
        "student-wide-seed3",
        "avg_mkd-wide-2teachers-seed3",
        "amtml_kd-wide-2teachers-seed3",
        "avg_mkd-wide-seed3",
        "amtml_kd-wide-seed3",
    ]
    assert [len(job.teachers) for job in jobs if job.method.name == "avg_mkd"] == [2, 3, 2, 3]
    assert {job.train.epochs for job in jobs} == {2}


def test_single_teachers_do_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    jobs = plan(load(tmp_path, "compare.methods=[okd, dml]", "compare.seeds=[0]", "compare.students=[]"))
    assert [(job.folder.name, job.teachers) for job in jobs] == [
        ("okd-a-seed0", ("a",)),
        ("okd-b-seed0", ("b",)),
        ("okd-c-seed0", ("c",)),
        ("dml-2teachers-seed0", ("a", "b")),
        ("dml-seed0", ("a", "b", "c")),
    ]


def test_a_method_is_given_the_teachers_and_maps_that_it_asks_for(compared: Compared) -> None:
    settings = load(compared.folder)
    data = load_data(settings)
    everyone = frozen.load(settings, data, hints=True)
    use_cache(settings, everyone, data, QUIET)

    def of(method: str, number: int | None = None) -> Teachers | None:
        return teachers_of(student_job(settings, method, 0, teachers=number), everyone)

    two, best, single, none = of("avg_mkd", 2), of("fitnet"), of("okd-b"), of("student")
    assert two is not None and best is not None and single is not None and none is None
    assert (two.names, single.names) == (["a", "b"], ["b"])
    assert best.names == [everyone.names[max(range(3), key=lambda t: everyone.scores[t])]]
    assert two.channels == [] and len(best.channels) == 1
    batch = next(iter(Loader(data.train, data, 4)))
    for chosen, maps in ((two, 0), (best, 1), (single, 0)):
        out = chosen.outputs(batch)
        assert (len(out.logits), len(out.maps)) == (len(chosen.names), maps)
        live = chosen.live(batch.images).logits
        for cached, now in zip(out.logits, live, strict=True):
            torch.testing.assert_close(cached, now, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        ("amtml_kd", "student.groups={}", r"narrow\.groups must be layer groups for amtml_kd"),
        (
            "fitnet",
            "student.features=null",
            r"narrow\.features must be the path of the last convolutional map for fitnet",
        ),
        ("amtml_kd", "loss.mapping={a: top}", r"a layer group of narrow \(low, mid, high\), got 'top'"),
        ("amtml_kd", "loss.mapping={d: low}", r"must name teachers \(a, b, c\), got 'd'"),
        ("amtml_kd", "loss.mapping={7: low}", r"must name teachers \(a, b, c\), got 7"),
        ("amtml_kd", "student.groups={low: block1, high: block3}", r"narrow\.groups must be at least 3 for 3 teachers"),
        ("fitnet", "teachers.2.hint=null", r"teachers\.c\.hint must be .* for fitnet, got null"),
        ("okd", "name=x", r"one method, got 'okd', which stands for okd-a, okd-b, okd-c"),
        ("okd-d", "name=x", r"one of okd, student.*, got 'okd-d'"),
    ],
)
def test_what_the_student_does_not_offer(tmp_path: Path, method: str, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        student_job(load(tmp_path, change), method, 0)


def test_an_explicit_mapping_is_cut_to_the_teachers_that_there_are(tmp_path: Path) -> None:
    settings = load(tmp_path, "loss.mapping={b: low, 0: high, c: mid}")
    assert student_job(settings, "amtml_kd", 0).config.loss.mapping == {"b": "low", "a": "high", "c": "mid"}
    assert student_job(settings, "amtml_kd", 0, teachers=1).config.loss.mapping == {"a": "high"}
    assert student_job(settings, "amtml_paper_code", 0, teachers=1).config.loss.mapping == {"a": "low"}
    with pytest.raises(ConfigError, match=r"at least one of a, got {'b': 'low'}"):
        student_job(load(tmp_path, "loss.mapping={b: low}"), "amtml_kd", 0, teachers=1)


def test_paper_code_takes_the_groups_of_the_student_at_hand(tmp_path: Path) -> None:
    other = "compare.students=[{name: other, factory: small_cnn, features: block3, groups: {x: block1, y: block2, z: block3}}]"
    jobs = plan(load(tmp_path, other, "compare.methods=[amtml_paper_code]", "compare.seeds=[0]"))
    assert {str(job.config.loss.mapping) for job in jobs} == {"{'a': 'low', 'b': 'mid'}", "{'a': 'x', 'b': 'y'}"}


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("one: {label: Same}, two: {label: Same}", r"labels of their own, got 'Same' twice"),
        ("one: {}, one-wide: {}", r"must have folders of their own, got .*one-wide-2teachers-seed0 for both"),
    ],
)
def test_what_would_be_mixed_up(tmp_path: Path, variants: str, message: str) -> None:
    lines = YAML.replace("methods: [student, avg_mkd, amtml_kd]", "methods: [one, two, one-wide]")
    lines = lines + f"variants: {{{variants}}}\n"
    names = "[one, two]" if "two" in variants else "[one, one-wide]"
    with pytest.raises(ConfigError, match=message):
        plan(load(tmp_path, f"compare.methods={names}", lines=lines.replace("[one, two, one-wide]", names)))


def test_what_decides_a_result_is_in_its_recipe(compared: Compared) -> None:
    folder = compared.folder

    def recipe(*overrides: str, method: str = "amtml_kd", variants: str = "") -> dict[str, object]:
        lines = YAML + (f"variants: {{{variants}}}\n" if variants else "")
        return student_job(load(folder, *overrides, lines=lines), method, 0).recipe()

    plain = recipe()
    groups = "student.groups={mid: block2, low: block1, high: block3}"  # the order says which are low and high
    assert recipe(groups) != plain and recipe("loss.at_weight=7", "compare.seeds=[5]") == plain
    assert recipe("stages.adapter_epochs=1") != plain and recipe("teachers.0.hint=block1") != plain
    alone = recipe(method="student")
    assert recipe("seed=1", method="student") != alone  # another split
    assert recipe("stages.adapter_epochs=1", "loss.temperature=2", method="student") == alone
    mean = recipe(method="avg_mkd")
    assert recipe("stages.adapter_epochs=1", "teachers.0.hint=block1", method="avg_mkd") == mean
    assert recipe("loss.temperature=2", method="avg_mkd") != mean
    first = recipe(method="mine", variants="mine: {method: avg_mkd}")
    assert first != recipe(method="mine", variants="mine: {method: aekd}") and first == mean


def test_a_module_that_the_student_does_not_have(compared: Compared) -> None:
    settings = load(compared.folder, "student.groups={low: block1, mid: blok2, high: block3}", "name=untaught")
    with pytest.raises(ValueError, match=r"no module groups.mid='blok2'; near names: block"):
        compare(settings, QUIET)
    assert not (compared.folder / "untaught").exists()  # before anything was trained


# --- specialists and stages -------------------------------------------------------------------------------------------


def test_a_specialist_sees_its_classes_alone(tmp_path: Path) -> None:
    config = load(tmp_path)
    data = load_data(config)

    def of_classes(classes: list[int] | None) -> ImageData:
        asked = replace(config, teachers=[replace(config.teachers[0], classes=classes)])
        return data_of(teacher_job(asked, asked.teachers[0]), data)

    part = of_classes([0, 1, 2])
    assert part.train.labels.unique().tolist() == [0, 1, 2] and part.val is data.val and part.test is data.test
    whole = data.train.labels
    assert len(part.train) == sum((whole == label).sum().item() for label in (0, 1, 2))
    assert torch.equal(part.train.images, data.train.images[whole <= 2])
    assert torch.equal(of_classes(None).train.images, data.train.images)
    for classes in ([], [3, 10]):
        with pytest.raises(ConfigError, match=r"must be labels in \[0, 10\)"):
            of_classes(classes)


def test_a_specialist_never_predicts_another_class(compared: Compared) -> None:
    settings = load(compared.folder, "teach.epochs=8", "name=specialist", "compare.methods=[student]")
    data = load_data(settings)
    teach(settings, data, QUIET)
    teachers = frozen.load(settings, data, hints=False)
    guesses = teachers.live(next(iter(Loader(data.test, data, 300))).images).logits
    assert set(guesses[2].argmax(1).tolist()) <= {0, 1, 2} and len(set(guesses[0].argmax(1).tolist())) > 3


def test_the_adapter_may_have_a_rate_of_its_own() -> None:
    stages = StagesConfig(adapter_lr=0.2, adapter_milestones=[2, 4])
    rates = [optim.adapter_rate(stages, epoch) for epoch in range(1, 7)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002])
    assert optim.adapter_rate(StagesConfig(), 1) is None


def test_an_adapter_at_rate_zero_stays_while_the_student_learns(copied: Path) -> None:
    settings = load(copied, "stages.adapter_lr=0.0", "distill.epochs=1")
    data = load_data(settings)
    run = distill(settings, data, "amtml_kd", 5, QUIET, resume=False, fresh=False)
    teachers = frozen.load(settings, data, hints=True)
    fresh = make_distiller(student_job(settings, "amtml_kd", 5), data, teachers)
    after, before = load_file(run.folder / "objective.safetensors"), fresh.objective.state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], value) == ("adapter" in key), key


# --- running ----------------------------------------------------------------------------------------------------------


def start(folder: Path, *overrides: str) -> Running:
    load(folder)
    return Running(folder, ["compare", str(folder / "small.yaml"), f"out={folder}", *overrides])


def students(folder: Path) -> list[Path]:
    """Those in training, or trained."""
    return list(folder.glob("small/*-seed0/metrics.jsonl"))


def test_a_stopped_comparison_side_by_side_ends_like_one_run_after_another(compared: Compared, tmp_path: Path) -> None:
    process = start(tmp_path, "compare.workers=2")
    wait_for(lambda: len(students(tmp_path)) >= 2, process, "students in training")
    team = workers_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    status, said = process.end()
    assert status == 130, said
    assert "of 20 students are finished" in said and "To go on: amtml-fast compare" in said
    assert len(team) == 2 and not [pid for pid in team if psutil.pid_exists(pid)]
    other = compare(load(tmp_path, "compare.workers=2"), QUIET)
    assert weights(tmp_path) == compared.weights and len(compared.weights) > 20
    for one, two in zip(compared.outcome.found.rows, other.found.rows, strict=True):
        assert (one.method, one.student, one.teachers) == (two.method, two.student, two.teachers)
        assert one.accuracies == two.accuracies


def test_a_second_comparison_in_one_folder_is_refused(tmp_path: Path) -> None:
    process = start(tmp_path, "distill.epochs=500")
    wait_for(lambda: students(tmp_path), process, "a student in training")
    status, said = start(tmp_path, "distill.epochs=500").end()
    assert status == 1 and f"error: {tmp_path / 'small'}: process {process.pid} on " in said, said
    assert process.at_work()
    process.send(signal.SIGKILL)
    process.end()
    with pytest.raises(RunError, match=r"train\.epochs: 500 there, 1 here"):  # not the lock
        compare(load(tmp_path, "distill.epochs=1"), QUIET)
    assert not (tmp_path / "small" / ".lock").exists()


def test_a_worker_that_dies_is_named_and_the_others_stop(tmp_path: Path) -> None:
    settings = load(tmp_path, "compare.workers=2", "distill.epochs=30")
    team: list[Any] = []

    def kill_one() -> None:
        while len(students(tmp_path)) < 2:
            time.sleep(0.005)
        team.extend(multiprocessing.active_children())
        team[-1].kill()

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    with pytest.raises(RunError, match=r"its process ended with exit code -9.*goes on from there"):
        compare(settings, QUIET)
    killer.join()
    assert len(team) == 2 and not any(worker.is_alive() for worker in team)


def workers_of(pid: int) -> list[int]:
    """Workers of a process: what its forkserver has forked."""
    servers = [child for child in psutil.Process(pid).children() if "forkserver" in " ".join(child.cmdline())]
    return sorted(worker.pid for server in servers for worker in server.children())


def test_a_workers_mistake_is_the_parents_message(tmp_path: Path) -> None:
    settings = load(tmp_path, "compare.workers=2", "teachers.0.model.factory=small_cn")
    with pytest.raises(ValueError, match=r"no model 'small_cn'; near names: small_cnn"):
        compare(settings, QUIET)


def test_a_method_that_diverges_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = YAML.replace("methods: [student, avg_mkd, amtml_kd]", "methods: [student, bad, avg_mkd]")
    lines += "variants: {bad: {method: amtml_kd, label: Bad, loss: {hint_weight: 1e18}}}\n"
    settings = load(tmp_path, "compare.students=[]", "compare.teachers=[]", "compare.seeds=[0]", lines=lines)
    found = compare(settings, Display()).found
    assert [row.method for row in found.main] == ["student", "avg_mkd"]
    assert found.missing == ["Bad, seed 0"] and "Left out" in found.sentence and "Bad, seed 0" in found.sentence
    assert "goes on without Bad" in capsys.readouterr().out
    assert "Left out" in (tmp_path / "small" / "results.md").read_text()


def test_comparisons_of_different_precision_follow_one_another(compared: Compared, tmp_path: Path) -> None:
    one = ["compare.methods=[student]", "compare.students=[]", "compare.teachers=[]", "compare.seeds=[0]"]
    settings = [load(tmp_path, *one, f"engine.mixed_precision={kind}", f"name={kind}") for kind in ("bf16", "no")]
    for each in settings:
        Session(each, QUIET).check()
    for each in settings:
        compare(each, QUIET)
    half, full = ((tmp_path / kind / "student-seed0" / "student.safetensors").read_bytes() for kind in ("bf16", "no"))
    assert full == compared.weights["small/student-seed0/student.safetensors"] != half


def test_a_comparison_grows_without_training_again(copied: Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in copied.glob("small/*/run.json")}
    grown = compare(load(copied, "compare.methods=[student, avg_mkd, eb_kd, amtml_kd]", "loss.at_weight=3"), QUIET)
    assert len(stamps) == 20 and {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert {row.method for row in grown.found.rows} == {"student", "avg_mkd", "eb_kd", "amtml_kd"}


def test_a_folder_of_another_configuration_is_refused_before_anything_is_trained(
    compared: Compared,
) -> None:
    folder = compared.folder
    before = sorted(folder.glob("small/*"))
    with pytest.raises(RunError, match=r"train\.lr: 0\.1 there, 0\.2 here"):
        compare(load(folder, "compare.seeds=[9, 0]", "distill.lr=0.2"), QUIET)
    assert sorted(folder.glob("small/*")) == before


# --- what is reported -------------------------------------------------------------------------------------------------


def test_tables_have_every_side_of_the_comparison(compared: Compared) -> None:
    folder, outcome, _ = compared
    text = (folder / "small" / "results.md").read_text()
    for heading in ("## Accuracy", "## Paired tests", "## Networks", "## Number of teachers", "## Students"):
        assert text.count(heading) == 1, heading
    assert outcome.found.sentence in text and "Peak memory" in text
    whole = json.loads((folder / "small" / "results.json").read_text())
    rows, ours = whole["rows"], [run for run in outcome.found.main if run.method == "amtml_kd"]
    for test, other in zip(whole["paired_tests"], ("student", "avg_mkd"), strict=True):
        (them,) = (row for row in outcome.found.main if row.method == other)
        assert (test["method"], test["less"], test["n"]) == ("amtml_kd", other, 2)
        assert test["mean"] == pytest.approx(ours[0].mean - them.mean, abs=1e-9)
    assert {(row["student"], row["teachers"]) for row in rows if row["role"] == "student"} == {
        ("narrow", None), ("narrow", 2), ("narrow", 3), ("wide", None), ("wide", 2), ("wide", 3)}  # fmt: skip
    assert all(0 < row["peak_memory"] < 1e9 and row["seconds_per_epoch"] > 0 for row in rows)
    for row in rows:
        if (
            row["role"] == "student"
            and row["method"] == "avg_mkd"
            and row["student"] == "wide"
            and row["teachers"] == 2
        ):
            folders = [folder / "small" / f"avg_mkd-wide-2teachers-seed{seed}" for seed in (0, 1)]
            assert row["accuracies"] == [read_json(Run(f).result)["test_accuracy"] for f in folders]


def test_the_plain_case_is_the_one_with_the_most_teachers_compared(copied: Path) -> None:
    found = compare(load(copied, "compare.teachers=[2]"), QUIET).found
    assert [(row.method, row.teachers) for row in found.main] == [("student", None), ("avg_mkd", 2), ("amtml_kd", 2)]
    assert "AMTML-KD" in found.sentence and "AvgMKD" in found.sentence


def test_every_network_is_in_the_table_of_sizes(compared: Compared) -> None:
    text = (compared.folder / "small" / "results.md").read_text().split("## Networks")[1].split("##")[0]
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert {"a", "b", "c", "narrow", "wide"} <= set(lines)
    (alone,) = (row for row in compared.outcome.found.rows if row.method == "student" and row.student == "wide")
    assert f"{100 * alone.mean:.2f}" in lines["wide"] and f"{alone.parameters:,}" in lines["wide"]


def test_pictures_are_written(compared: Compared) -> None:
    folder, outcome, _ = compared
    names = {file.name for file in outcome.files if file.suffix == ".png"}
    assert names == {
        "curves.png", "accuracies.png", "number_of_teachers.png", "entropy.png", "soft_targets.png", "weights_gallery.png"
    }  # fmt: skip
    assert {path.name for path in (folder / "small" / "figures").iterdir()} == names


def test_the_share_of_examples_won_is_logged(compared: Compared) -> None:
    for row in Run(compared.folder / "small" / "amtml_kd-seed0").read_metrics():
        assert len(row["weight_won"]) == 3 and sum(row["weight_won"]) == pytest.approx(1)


def test_okds_mean_is_over_the_first_teachers(tmp_path: Path) -> None:
    settings = load(tmp_path)
    row = Row
    values = ("a", 0.3), ("b", 0.5), ("c", 0.7)
    main = [row(f"okd-{name}", name, 10, [v, v + 0.1], student=settings.student.name) for name, v in values]
    main += [row(f"okd-{name}", name, 20, [v / 2, v], student="wide") for name, v in values]  # no row of this student
    found = results.Found(main, main, [], [], "", {})
    assert settings.compare.teachers == [2, 3]
    means = results.okd_means(settings, found)
    settings.compare.teachers += [3]  # asked for twice it is one column
    assert results.okd_means(settings, found) == means
    assert [(r.teachers, r.accuracies) for r in means] == [
        (2, pytest.approx([0.4, 0.5])),
        (3, pytest.approx([0.5, 0.6])),
    ]


def test_peak_memory_sees_what_was_held_inside() -> None:
    kept = [torch.ones(10_000) for _ in range(5_000)]  # 200 MB in small pieces, which malloc keeps when they go
    memory = PeakMemory(torch.device("cpu"))
    nothing = memory.read()
    torch.ones(50_000_000).sum()
    something = memory.read()
    del kept
    freed = PeakMemory(torch.device("cpu"))
    kept = [torch.ones(10_000) for _ in range(2_500)]
    again = freed.read()
    assert nothing is not None and something is not None and again is not None
    assert nothing < 20e6 and 190e6 < something < 250e6 and 80e6 < again < 130e6 and len(kept) == 2_500


def test_workers_share_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(tmp_path, "compare.workers=2", "engine.threads=null")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert workers.count(settings) == 2 and workers.share(settings).engine.threads == 4
    assert workers.count(load(tmp_path)) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert workers.count(settings) == 1
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6,7")
    gpus = load(tmp_path, "engine.device=auto")
    assert workers.count(gpus) == 4
    with workers.its_gpu(gpus, 1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5,6,7" and workers.share(gpus).engine.threads == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with workers.its_gpu(gpus, 6):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_workers_take_no_other_amtml_fast_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forkserver imports from there first: not this package, where there is another of its name."""
    monkeypatch.chdir(tmp_path)
    own = "amtml_fast.train.compare.session"
    assert workers.preloaded(Session) == ["torch._dynamo", own]
    (tmp_path / "amtml_fast").mkdir()
    assert workers.preloaded(Session) == ["torch._dynamo"]
    with monkeypatch.context() as installed:  # in an environment inside of the source folder
        installed.setattr(
            workers, "__file__", str(tmp_path / ".venv" / "amtml_fast" / "train" / "compare" / "workers.py")
        )
        assert workers.preloaded(Session) == ["torch._dynamo"]
    monkeypatch.chdir(Path(workers.__file__).parents[3])
    assert workers.preloaded(Session) == ["torch._dynamo", own]
