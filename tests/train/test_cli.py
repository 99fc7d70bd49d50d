"""The command line, end to end on the embedded digits."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from small_run import ROOT, Place, own_weights

from amtml_fast import __version__, backends, cli
from amtml_fast.train.commands import find_run
from amtml_fast.train.figures import curves
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.job import student_job

SHORT = ["teach.epochs=1", "teachers.1.train.epochs=1", "distill.epochs=2", "compare.seeds=[0,1]", "compare.workers=1"]
SHORT += ["engine.threads=1"]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line, run in this process."""
    with pytest.raises(SystemExit) as status:
        cli.main(words)
        raise SystemExit(0)  # `backends` returns
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of `amtml-fast compare digits`, short."""
    folder, printed = tmp_path_factory.mktemp("compared"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), pytest.raises(SystemExit) as status:
        patch.setenv("COLUMNS", "120")
        cli.main(["compare", "digits", *SHORT, f"out={folder}"])
    assert not status.value.code
    return folder / "digits", printed.getvalue()


def test_compare_prints_the_table_and_what_it_found(compared: tuple[Path, str]) -> None:
    folder, printed = compared
    for words in ("student alone", "AvgMKD", "AMTML-KD", "cnn-wide", "±", "Pictures:", "points over 2 seeds"):
        assert words in printed
    found = json.loads((folder / "results.json").read_text())["finding"]
    assert found in printed and found in (folder / "results.md").read_text()


def test_compare_writes_tables_and_pictures(compared: tuple[Path, str]) -> None:
    folder, _ = compared
    with open(folder / "results.csv") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    methods = ("student", "avg_mkd", "amtml_kd", "gated_kd")
    assert {*methods, "cnn-wide", "cnn-narrow", "resnet8"} == set(rows)
    for method in methods:
        accuracies = [float(x) for x in rows[method]["accuracies"].split()]
        results = [json.loads((folder / f"{method}-seed{seed}" / "result.json").read_text()) for seed in (0, 1)]
        assert accuracies == [result["test_accuracy"] for result in results]
    for name in ("curves", "entropy", "soft_targets", "weights_gallery"):
        assert (folder / "figures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_methods_are_compared_at_equal_epochs(compared: tuple[Path, str]) -> None:
    runs = [json.loads(path.read_text()) for path in compared[0].glob("*-seed*/run.json")]
    assert len(runs) == 8 and {run["epochs"] for run in runs} == {2} and all(run["finished"] for run in runs)


def test_a_second_compare_trains_nothing(compared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = compared
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("**/*.safetensors")}
    before = (folder / "results.csv").read_text()
    status, out, _ = call(capsys, "compare", "digits", *SHORT, f"out={folder.parent}")
    assert status == 0 and "AMTML-KD" in out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("**/*.safetensors")} == stamps
    assert (folder / "results.csv").read_text() == before


def test_several_comparisons_one_after_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.yaml").write_text("base: digits\nname: other\nteachers: []\n")
    words = ["digits", "teachers=[]", "compare.methods=[student]", "distill.epochs=1", f"out={tmp_path}"]
    status, _, err = call(capsys, "compare", *words, "digits")
    assert status == 2 and "name must differ between comparisons" in err and not (tmp_path / "digits").exists()
    status, _, err = call(capsys, "compare", *words, "digts")
    assert status == 2 and "did you mean 'digits'?" in err and not (tmp_path / "digits").exists()
    status, out, err = call(capsys, "compare", *words, str(tmp_path / "other.yaml"), "compare.seeds=[0]")
    assert status == 0, err
    trained, tables = out.split("digits: 1 epochs")  # both tables after all trainings
    assert trained.count("student alone, seed 0: test") == 2 and "other: 1 epochs" in tables
    for name in ("digits", "other"):
        assert f"Tables: {tmp_path / name}/results.md" in tables and (tmp_path / name / "results.json").is_file()


def test_eval_prints_the_accuracy(compared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = compared
    result = json.loads((folder / "avg_mkd-seed1" / "result.json").read_text())
    expected = f"test accuracy {100 * result['test_accuracy']:.2f} % on "
    by_name = ["eval", "digits", *SHORT, f"out={folder.parent}", "--method", "avg_mkd", "--seed", "1"]
    for words in (by_name, ["eval", str(folder / "avg_mkd-seed1")]):
        status, out, _ = call(capsys, *words)
        assert status == 0 and expected in out
    teacher = json.loads((folder / "teachers" / "resnet8" / "result.json").read_text())
    for split in ("validation", "val"):
        status, out, _ = call(capsys, "eval", "digits", f"out={folder.parent}", "--teacher=resnet8", f"--split={split}")
        assert status == 0 and f"{split} accuracy {100 * teacher['val_accuracy']:.2f} %" in out


def test_teach_and_distill_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["digits", *SHORT, f"out={tmp_path}"]
    status, _, err = call(capsys, "distill", *words)
    assert status == 1 and "run `amtml-fast teach` first" in err
    status, out, _ = call(capsys, "teach", *words)
    assert status == 0 and "teacher resnet8: validation" in out and "model.safetensors" in out
    status, out, _ = call(capsys, "distill", *words, "--method=student", "--seed=5")
    assert status == 0 and "student alone, seed 5" in out and str(tmp_path / "digits" / "student-seed5") in out
    status, out, _ = call(capsys, "distill", *words, "--method=okd-resnet8")
    assert status == 0 and "OKD from resnet8, seed 0" in out and "okd-resnet8-seed0" in out
    status, out, _ = call(capsys, "distill", *words, "--method=avg_mkd", "--teachers=2")
    assert status == 0 and str(tmp_path / "digits" / "avg_mkd-2teachers-seed0") in out


def test_eval_measures_what_is_named(compared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = compared
    run = str(folder / "avg_mkd-seed1")

    def measured(*words: str) -> tuple[str, str]:
        status, out, err = call(capsys, "eval", *words)
        assert status == 0, err
        return out.split()[2], out

    def expected(name: str) -> tuple[str, str]:
        result = json.loads((folder / name / "result.json").read_text())
        return f"{100 * result['test_accuracy']:.2f}", name

    asked = {
        ("--teacher=resnet8",): "teachers/resnet8",
        ("--method=student",): "student-seed1",
        ("--seed=0",): "avg_mkd-seed0",
        ("--method=amtml_kd", "--seed=0"): "amtml_kd-seed0",
        (): "avg_mkd-seed1",
    }
    for options, name in asked.items():
        accuracy, out = measured(run, *options)
        assert (accuracy, name) == expected(name) and f"{folder / name}/" in out
    teacher = str(folder / "teachers" / "resnet8")
    assert measured(teacher)[0] == expected("teachers/resnet8")[0]
    assert measured(teacher, "--teacher=cnn-wide")[0] == expected("teachers/cnn-wide")[0]
    weights = folder / "teachers" / "resnet8" / "model.safetensors"
    _, out = measured("digits", f"teachers.2.model.weights={weights}", "--teacher=resnet8")
    assert out.split()[2] == expected("teachers/resnet8")[0] and str(weights) in out
    for words in (["--teacher=x"], ["--teacher=resnet8", "--method=student"], ["--teacher=resnet8", "--seed=0"]):
        status, _, err = call(capsys, "eval", run, *words)
        assert status == 2 and err.startswith("error: --teacher must be one of cnn-wide, cnn-narrow, resnet8, without")


def test_eval_finds_what_the_number_of_teachers_and_the_student_make_of_a_name(place: Place) -> None:
    """What the method asks for is in its name, not what the named run asks for."""
    config = place.load(
        "compare.students=[{name: wide, factory: small_cnn, features: block3}]", "variants={mine: {method: okd-b}}"
    )
    methods = ("avg_mkd", "ca_mkd", "dml", "student", "okd-a", "mine")
    jobs = [
        student_job(config, name, 0, student=student, teachers=number)
        for name in methods
        for student in (config.student, *config.compare.students)
        for number in (1, None)
    ]
    for job in jobs:
        peers = {"peers": len(job.teachers)} if job.method.peers else {}
        recipe = {"teachers": dict.fromkeys(job.teachers)} if job.method.needs_teachers else peers
        record = {
            "method": job.method.name,
            "label": "",
            "student": job.student,
            "seed": 0,
            "epochs": 1,
            "recipe": recipe,
        }
        Run(job.folder).start("", record)
    for job in jobs:
        known = job.method.teacher is None and (job.method.needs_teachers or job.method.peers)
        for name in methods:
            student = next(s for s in (config.student, *config.compare.students) if s.name == job.student)
            wanted = student_job(config, name, 1, student=student, teachers=len(job.teachers) if known else None)
            assert find_run(str(job.folder), config, name, 1, None) == wanted.folder, (job.folder.name, name)


def test_a_run_that_was_moved_is_not_continued_unsaid(
    place: Place, taught: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["distill.epochs=1", *own_weights(place)]
    run = place.train(*settings, method="student")
    line = "is not where its config.yaml puts runs. This command writes to"
    words = ["distill", "--method=student"]
    status, out, _ = call(capsys, *words, str(run.folder))
    assert status == 0 and line not in out
    moved = place.folder / "elsewhere" / "small" / "student-seed0"
    shutil.copytree(run.folder, moved)
    status, out, _ = call(capsys, *words, str(moved))
    assert status == 0 and f"warning: {moved} {line} {run.folder.parent}; out=... chooses another place" in out
    status, out, _ = call(capsys, *words, str(moved), f"out={moved.parent.parent}")
    assert status == 0 and line not in out and str(moved / "student.safetensors") in out
    for folder, said in ((taught, False), (place.folder, True)):  # the latter is a copy
        status, out, _ = call(capsys, "teach", str(folder / "small" / "teachers" / "a"))
        assert status == 0 and (line in out) == said
    status, out, _ = call(capsys, "compare", str(moved), "compare.methods=[student]", "compare.seeds=[0]")
    assert status == 0 and line in out
    run.record.write_text("{")
    status, out, _ = call(capsys, *words, str(run.folder), "--fresh")  # which replaces it
    assert status == 0 and line not in out


OWN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Data(TensorDataset):
    classes = [7, "$x[/bold]$"]


def data():
    images = torch.arange(64 * 64).reshape(64, 1, 8, 8).mul(7).remainder(256).to(torch.uint8)
    labels = torch.arange(64) % 2
    return Data(images, labels), Data(images, labels)


def net(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
OWN_YAML = """
name: a$b$[/x]
data: {name: own:data, val_fraction: 0.5}
teachers:
  - {name: a, model: {factory: own:net}}
  - {name: b, model: {factory: small_cnn, args: {width: 2}}}
student: {factory: small_cnn, args: {width: 1}, features: block3}
loss: {hint_weight: 0}
teach: {epochs: 1, batch_size: 16}
distill: {epochs: 1, batch_size: 16}
variants: {mine: {method: amtml_kd, label: "$[/x] | <b>"}}
compare: {methods: [student, mine], seeds: [0], workers: 2}
engine: {threads: 1, device: cpu}
"""


def own(folder: Path) -> None:
    """A configuration there, and the module that it names."""
    (folder / "own.py").write_text(OWN)
    (folder / "own.yaml").write_text(OWN_YAML)


def script(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as the console script that pip writes: its own folder, not the working directory, is in sys.path."""
    (folder / "bin").mkdir(exist_ok=True)
    file = folder / "bin" / "amtml-fast"
    file.write_text("from amtml_fast.cli import main\nif __name__ == '__main__':\n    main()\n")
    return subprocess.run(
        [sys.executable, str(file), *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment},
    )


def test_odd_names_and_modules_beside_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])  # a script has no working directory there
    status, out, err = call(capsys, "compare", "own.yaml")
    assert status == 0, err  # workers, too, find the module `own`
    assert "a$b$[/x]: 1 epochs" in out and "$[/x] | <b>" in out
    folder = tmp_path / "runs" / "a$b$[/x]"
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "curves.png", "accuracies.png", "entropy.png", "soft_targets.png", "weights_gallery.png"}  # fmt: skip
    assert "\\$[/x] \\| \\<b>" in (folder / "results.md").read_text()
    assert script(tmp_path, "methods", "own.yaml", PYTHONSAFEPATH="1").returncode == 0
    status, _, err = call(capsys, "report", str(folder))
    assert status == 0, err
    html = (folder / "report.html").read_text()
    assert "<b>" not in html.replace("<b title", "") and "$[/x] | &lt;b&gt;" in html and "$x[/bold]$" in html


PATH = """
import os, sys
from amtml_fast import cli
sys.path.remove("")  # a script has no working directory there
try:
    cli.main(["--help"])
except SystemExit:
    print(sys.path.index(os.getcwd()) == len(sys.path) - 1)
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_source_folder_does_not_hide_the_installed_package(tmp_path: Path, there: bool) -> None:
    """The processes of compare.workers look along this path."""
    if there:
        (tmp_path / "amtml_fast").mkdir()
    shell = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = subprocess.run([sys.executable, "-c", PATH], cwd=tmp_path, env=shell, capture_output=True, text=True)
    assert out.stdout.split()[-1] == str(there), out.stderr


def test_letters_that_the_output_does_not_have_end_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own.yaml").write_text("variants: {own: {method: student, label: Schüler}}\n", encoding="utf-8")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
    with pytest.raises(SystemExit) as status:
        cli.main(["methods", str(tmp_path / "own.yaml")])
    sys.stdout.flush()
    assert not status.value.code and b"Sch\\xfcler" in printed.getvalue()


def test_a_picture_that_fails_loses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_ink(*args: object) -> None:
        raise RuntimeError("no ink\nleft")

    own(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(curves, "entropy", no_ink)
    status, out, err = call(capsys, "compare", "own.yaml", "compare.workers=1")
    folder = tmp_path / "runs" / "a$b$[/x]"
    assert status == 1 and "Traceback" not in err
    assert "entropy.png is not drawn: RuntimeError: no ink\n" in out and "Tables: " in out
    assert {path.name for path in folder.glob("results.*")} == {"results.json", "results.csv", "results.md"}
    names = {"curves.png", "accuracies.png", "soft_targets.png", "weights_gallery.png"}
    assert {path.name for path in (folder / "figures").iterdir()} == names


NETS = """
from torch import nn


class Pair(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.block3 = nn.Conv2d(1, num_classes, 8)

    def forward(self, x):
        return self.block3(x).flatten(1), x


class Narrow(Pair):
    def forward(self, x):
        return super().forward(x)[0][:, :3]


def broken(num_classes):
    raise RuntimeError("no such net")
"""
PLACE = ("out={file}/x", "out={file}", "out=/proc/x", "cache.folder={file}/x", "cache.folder=/proc/x")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        *(
            (c, [word], r" must be a folder, got|that can be written, got")
            for c in ("teach", "compare")
            for word in PLACE
        ),
        ("distill", ["out={file}/x"], "out must be a folder, got"),
        ("compare", ["student.factory=nets:Pair", "student.args={}"], r"must return logits \[2, 10\], .*got tuple"),
        ("compare", ["student.factory=nets:Narrow", "student.args={}"], r"logits \[2, 10\], .*got \[2, 3\]"),
        (
            "compare",
            ["student.args={in_channels: 3}"],
            r"must take images \[2, 1, 8, 8\] of digits, got RuntimeError: Given",
        ),
        ("compare", ["student.factory=nets:broken"], r"takes no argument 'width'"),
        (
            "compare",
            ["student.factory=nets:broken", "student.args={}"],
            r"nets:broken must make a network .* no such net",
        ),
        (
            "compare",
            ["teachers.0.model.factory=nets:Pair", "teachers.0.model.args={}"],
            r"must return logits .*got tuple",
        ),
        (
            "teach",
            ["teachers.2.model.factory=nets:Pair", "teachers.2.model.args={}"],
            r"teacher resnet8: .*must return logits .*tuple",
        ),
        (
            "teach",
            ["teachers.2.model.args={in_channels: 3, depth: 8}"],
            r"teacher resnet8: the network must take images",
        ),
        (
            "compare",
            ["teachers.0.hint=fc"],
            r"teachers.cnn-wide.hint must name a module whose output is \[N, c, h, w\], got 'fc'",
        ),
        ("compare", ["teachers.0.hint=block9"], r"no module hint='block9'"),
        ("compare", ["teachers.1.model.weights=nowhere.pt"], r"looked for nowhere.pt: there is no such file"),
        ("compare", ["student.weights=nowhere.pt"], r"looked for the state dict nowhere.pt, not found"),
        (
            "compare",
            ["student.groups={a: fc, b: block2, c: block3}"],
            r"student.groups.a must name a module .*\[2, 10\]",
        ),
        ("compare", ["distill.batch_size=5000"], r"batch_size must be at most 1222 for student alone, seed 0"),
        ("teach", ["teachers.2.train={batch_size: 5000}"], r"batch_size must be at most 1222 for teacher resnet8"),
        ("teach", ["teachers.2.classes=[3, 10]"], r"must be labels in \[0, 10\)"),
        ("compare", ["engine.threads=0"], r"engine.threads must be in \[1, 4096\], got 0"),
        ("compare", ["loss.hint_bound=-1"], r"loss.hint_bound must be in \[1e-18, 1e\+18\], got -1.0"),
        (
            "compare",
            ["data.name=fashion_mnist", "data.root={unreadable}"],
            r"data.root must be a folder whose files can be read, got .*unreadable \(.*Input/output error\)",
        ),
        ("compare", ["data.name=image_folder", "data.root={file}"], r"looked for the folder train"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_anything_is(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: list[str],
    message: str,
) -> None:
    # Root may write everywhere: a path below a file and one below /proc are refused to it, too.
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "file").write_text("")
    (tmp_path / "unreadable").mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "unreadable" / f"{name}-ubyte.gz").symlink_to("/proc/self/mem")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    for place in ("file", "unreadable"):
        words = [word.replace(f"{{{place}}}", str(tmp_path / place)) for word in words]
    status, out, err = call(capsys, command, "digits", *SHORT[:-1], f"out={tmp_path / 'runs'}", *words)
    assert status in (1, 2) and re.search(message, err), err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err + out
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("option", ["--seed=010", "--seed=1_0", "--seed=-1", "--seed=5e-4", "--teachers=02"])
def test_numbers_of_options_are_read_as_those_of_keys(capsys: pytest.CaptureFixture[str], option: str) -> None:
    status, _, err = call(capsys, "distill", "digits", option)
    assert status == 2 and " must be " in err and "got" in err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["distill", "digits", "distill.epohcs=1"], 2, "did you mean 'distill.epochs'?"),
        (["distill", "digts"], 2, "did you mean 'digits'?"),
        (["distill", "digits", "--method=amtml"], 2, "one of okd, student, fitnet"),
        (["distill", "digits", "--student=wide"], 2, "--student must be one of student, got 'wide'"),
        (["distill", "digits", "--teachers=4"], 2, "--teachers must be in 1 to 3, got 4"),
        (["methods", "digts"], 2, "did you mean 'digits'?"),
        (["eval", "digits", "--split=tst"], 2, "--split must be one of train, validation, test"),
        (["eval", "digits"], 1, "no such run; train it first"),
        (["teach", "digits", "teachers=[]"], 2, "teachers must hold at least one"),
        (["teach", "digits", "data.name=mnist"], 1, "mnist"),
        (["compare", "digits", "compare.seeds=[]"], 2, "at least one method and one seed"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, message: str
) -> None:
    found, out, err = call(capsys, *words, f"out={tmp_path}")
    assert found == status and message in err and err.startswith("error: ") and "Traceback" not in err + out


def test_methods_lists_what_each_one_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    status, out, _ = call(capsys, "methods", "digits")
    needs = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert status == 0 and {"student", "okd-cnn-wide", "ca_mkd", "amtml_kd", "amtml_paper_code"} <= set(needs)
    assert needs["student"].rstrip().endswith("-")
    assert "student groups" in needs["amtml_kd"] and "hints" not in needs["amtml_no_hint"].partition("no hints")[2]
    assert "labels for the weights" in needs["ca_mkd"] and "best teacher" in needs["rkd"]


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--version"], ["--version", "methods"]):
        assert call(capsys, *words)[:2] == (0, f"amtml-fast {__version__}\n")
    assert "--version" in call(capsys, "--help")[1]


@pytest.mark.parametrize("word", ["backends", "--version"])
def test_nobody_reads_to_the_end(word: str) -> None:
    """As with `| head`: no complaint."""
    run = subprocess.Popen([sys.executable, "-m", "amtml_fast", word], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout and run.stderr
    run.stdout.close()
    assert run.wait() == 1 and run.stderr.read() == b""


def test_backends_lists_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "backends")
    assert status == 0
    lines = [line.split() for line in out.splitlines()]
    for op, backend, available, _ in backends():
        assert any(line[:3] == [op, backend, "yes" if available else "no"] for line in lines)


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    # A typer that cannot be imported stands before the real one.
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def bare(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "amtml_fast", *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)

    missing = bare("teach", "digits")
    assert missing.returncode == 1 and 'pip install "amtml-fast[train]"' in missing.stderr
    assert "Traceback" not in missing.stderr
    works = bare("backends")
    assert works.returncode == 0 and "multi_teacher_kd" in works.stdout


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "--help")
    assert status == 0 and all(
        name in out for name in ("teach", "distill", "eval", "compare", "report", "methods", "backends")
    )
