"""The command line, end to end on the embedded digits."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from amtml_fast import backends, cli

for extra in ("accelerate", "omegaconf", "typer", "rich", "safetensors", "sklearn", "matplotlib", "tensorboard"):
    pytest.importorskip(extra, reason='needs pip install "amtml-fast[train]"')

ROOT = Path(__file__).resolve().parent.parent
SHORT = ["teach.epochs=1", "teachers.1.train.epochs=1", "distill.epochs=2", "compare.seeds=[0,1]", "engine.threads=1"]


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of one command line, run in this process."""
    with pytest.raises(SystemExit) as status:
        cli.main(words)
        raise SystemExit(0)  # `backends` returns
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of `amtml-fast compare digits`, short, in a process of its own."""
    folder = tmp_path_factory.mktemp("compared")
    done = subprocess.run(
        [sys.executable, "-m", "amtml_fast", "compare", "digits", *SHORT, f"out={folder}"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return folder / "digits", done.stdout


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
    assert {"student", "avg_mkd", "amtml_kd", "cnn-wide", "cnn-narrow", "resnet8"} == set(rows)
    for method in ("student", "avg_mkd", "amtml_kd"):
        accuracies = [float(x) for x in rows[method]["accuracies"].split()]
        results = [json.loads((folder / f"{method}-seed{seed}" / "result.json").read_text()) for seed in (0, 1)]
        assert accuracies == [result["test_accuracy"] for result in results]
    for name in ("curves", "entropy", "soft_targets", "weights_gallery"):
        assert (folder / "figures" / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_methods_are_compared_at_equal_epochs(compared: tuple[Path, str]) -> None:
    runs = [json.loads(path.read_text()) for path in compared[0].glob("*-seed*/run.json")]
    assert len(runs) == 6 and {run["epochs"] for run in runs} == {2} and all(run["finished"] for run in runs)


def test_a_second_compare_trains_nothing(compared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = compared
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("**/*.safetensors")}
    before = (folder / "results.csv").read_text()
    status, out, _ = call(capsys, "compare", "digits", *SHORT, f"out={folder.parent}")
    assert status == 0 and "AMTML-KD" in out
    assert {path: path.stat().st_mtime_ns for path in folder.glob("**/*.safetensors")} == stamps
    assert (folder / "results.csv").read_text() == before


def test_eval_prints_the_accuracy(compared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = compared
    result = json.loads((folder / "avg_mkd-seed1" / "result.json").read_text())
    expected = f"test accuracy {100 * result['test_accuracy']:.2f} % on "
    by_name = ["eval", "digits", *SHORT, f"out={folder.parent}", "--method", "avg_mkd", "--seed", "1"]
    for words in (by_name, ["eval", str(folder / "avg_mkd-seed1")]):
        status, out, _ = call(capsys, *words)
        assert status == 0 and expected in out
    teacher = json.loads((folder / "teachers" / "resnet8" / "result.json").read_text())
    status, out, _ = call(capsys, "eval", "digits", f"out={folder.parent}", "--teacher=resnet8", "--split=val")
    assert status == 0 and f"val accuracy {100 * teacher['val_accuracy']:.2f} %" in out


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


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["distill", "digits", "distill.epohcs=1"], 2, "did you mean 'distill.epochs'?"),
        (["distill", "digts"], 2, "did you mean 'digits'?"),
        (["distill", "digits", "--method=amtml"], 2, "one of okd, student, fitnet"),
        (["distill", "digits", "--student=wide"], 2, "one of student wanted, got 'wide'"),
        (["distill", "digits", "--teachers=4"], 2, "1 to 3 wanted, got 4"),
        (["methods", "digts"], 2, "did you mean 'digits'?"),
        (["eval", "digits", "--split=tst"], 2, "one of train, val, test wanted"),
        (["eval", "digits"], 1, "no such run; train it first"),
        (["teach", "digits", "teachers=[]"], 2, "at least one teacher wanted"),
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
