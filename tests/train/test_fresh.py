"""--fresh starts all over, and a stop in between leaves to redo what it had not come to."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from small_run import Place

from amtml_fast import cli
from amtml_fast.train.compare import results
from amtml_fast.train.run import trainer
from amtml_fast.train.run.folder import Run

SMALL = ["compare.methods=[student]", "compare.seeds=[0, 1]", "distill.epochs=2"]


def call(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, stop: int | None = None
) -> tuple[list[str], list[str]]:
    """Runs a command, stopped by Ctrl-C after its `stop`-th checkpoint: what was saved, by folder and epoch, and what it says to type
    to go on."""
    save, saved = trainer.Trainer.save, list[str]()

    def save_and_stop(self: trainer.Trainer) -> None:
        save(self)
        saved.append(f"{self.run.folder.name} {self.done}")
        if len(saved) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", save_and_stop)
        patch.setattr(sys, "argv", ["amtml-fast", *words])
        with pytest.raises(SystemExit) as status:
            cli.main(words)
    said = capsys.readouterr().err
    assert status.value.code in (None, 0) if stop is None else status.value.code == 130, said
    return saved, shlex.split(said.split("To go on: amtml-fast ")[1].splitlines()[0]) if "To go on" in said else []


def kept(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_a_fresh_comparison_that_is_stopped_goes_on_being_one(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = ["a 1", "b 1", *(f"student-seed{seed} {epoch}" for seed in (0, 1) for epoch in (1, 2))]
    words = place.words("compare", *SMALL)
    assert call(words, capsys, monkeypatch)[0] == everything[2:]  # the teachers are there
    before = kept(place.folder)
    done, again = call([*words, "--fresh"], capsys, monkeypatch, stop=3)
    assert done == everything[:3] and again == words
    more, again = call(again, capsys, monkeypatch, stop=1)  # the second epoch of the first student
    assert more == everything[3:4] and again == words
    assert not Run(place.folder / "small" / "student-seed1").finished()
    assert call(again, capsys, monkeypatch)[0] == everything[4:]
    assert call(again, capsys, monkeypatch)[0] == [] and kept(place.folder) == before


def test_several_comparisons_and_their_teachers_start_over_together(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.yaml.open("a") as file:
        file.write("regimes: {x: {}, y: {}}\n")
    words = place.words("compare", "compare.methods=[student]", "compare.seeds=[0]", "distill.epochs=1")
    everything = ["a 1", "b 1", "student-seed0 1", "student-seed0 1"]
    assert call(words, capsys, monkeypatch)[0] == everything[2:]  # the teachers are there
    done, again = call([*words, "--fresh"], capsys, monkeypatch, stop=2)
    assert done == everything[:2] and call(again, capsys, monkeypatch)[0] == everything[2:]
    assert call(again, capsys, monkeypatch)[0] == []


def test_teachers_that_start_over_go_on_doing_so(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = place.words("teach")
    done, again = call([*words, "--fresh"], capsys, monkeypatch, stop=1)
    assert done == ["a 1"] and again == words
    assert call(again, capsys, monkeypatch)[0] == ["b 1"]


def test_a_stop_before_anything_was_removed_says_fresh_again(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    words = place.words("distill", "distill.epochs=1", "--method=student", "--fresh")
    assert call(words, capsys, monkeypatch)[0] == ["student-seed0 1"]
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "make_distiller", stopped)
        assert call(words, capsys, monkeypatch, stop=0) == ([], words)
    assert Run(place.folder / "small" / "student-seed0").finished()


def test_a_stop_at_the_tables_of_a_fresh_comparison_keeps_its_runs(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    words = place.words("compare", "compare.methods=[student]", "compare.seeds=[0]", "distill.epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(results, "write_tables", stopped)
        assert call([*words, "--fresh"], capsys, monkeypatch, stop=0)[1] == words
    assert call(words, capsys, monkeypatch)[0] == []
