"""A folder holds one run: of one recipe and of one set of images. What starts over leaves nothing of the old one to go on from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import QUIET, Place

from amtml_fast.train.config.schema import ConfigError
from amtml_fast.train.data.images import ImageData, ImageSet
from amtml_fast.train.files import RunError
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.prepare import load_data
from amtml_fast.train.run.tasks import distill, evaluate, teach

ONE = "distill.epochs=1"


def other(data: ImageData) -> ImageData:
    """One image of the test set has another label."""
    labels = data.test.labels.clone()
    labels[0] = (labels[0] + 1) % data.num_classes
    return ImageData(**{**vars(data), "test": ImageSet(data.test.images, labels)})


def test_other_data_is_another_run(place: Place) -> None:
    run, settings = place.train(ONE, method="student"), place.load(ONE)
    data = load_data(settings)
    for method in ("student", "avg_mkd"):  # its own folder, and its teachers'
        with pytest.raises(RunError, match=r"holds a run on other data: images, labels or classes of digits"):
            distill(settings, other(data), method, 0, QUIET, resume=True, fresh=False)
    with pytest.raises(RunError, match="holds a run on other data"):
        teach(settings, other(data), QUIET)
    record = json.loads(run.record.read_text())
    del record["data"]  # as earlier versions wrote it
    run.record.write_text(json.dumps(record))
    assert distill(settings, other(data), "student", 0, QUIET, resume=True, fresh=False).folder == run.folder


def test_a_checkpoint_knows_its_recipe(place: Place) -> None:
    run = place.train(ONE, method="student")
    assert run.checkpoint.is_file()
    run.record.unlink()
    with pytest.raises(RunError, match=r"checkpoint\.pt: is of another configuration, or of other data"):
        place.train(ONE, "distill.lr=0.01", method="student")
    assert place.train(ONE, method="student").finished()


def test_a_stop_while_an_old_run_is_removed_leaves_nothing_to_go_on_from(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = place.train(ONE, method="student"), place.load(ONE, "distill.lr=0.01")
    unlink, calls = Path.unlink, []

    def stopped(self: Path, missing_ok: bool = False) -> None:
        calls.append(self)
        if len(calls) > 1:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stopped)
        with pytest.raises(KeyboardInterrupt):
            distill(settings, load_data(settings), "student", 0, QUIET, resume=False, fresh=True)
    assert run.record.is_file() and not run.checkpoint.exists()
    with pytest.raises(RunError, match="holds a run of another configuration"):
        distill(settings, load_data(settings), "student", 0, QUIET, resume=True, fresh=False)


@pytest.mark.parametrize("words", [["distill.batch_size=100000"], ["engine.gradient_accumulation_steps=3"]])
def test_fresh_removes_nothing_before_all_fits(place: Place, words: list[str]) -> None:
    run = place.train(ONE, method="student")
    before = {path.name: path.read_bytes() for path in run.folder.glob("*.*") if path.is_file()}
    settings = place.load(ONE, *words)
    with pytest.raises((ConfigError, ValueError), match="batch"):
        distill(settings, load_data(settings), "student", 0, QUIET, resume=False, fresh=True)
    assert before == {path.name: path.read_bytes() for path in run.folder.glob("*.*") if path.is_file()}
    own = place.load(ONE, f"student.weights={run.folder / 'student.safetensors'}")
    with pytest.raises(RunError, match=r"--fresh would remove .*which this run starts from"):
        distill(own, load_data(own), "student", 0, QUIET, resume=False, fresh=True)


def test_eval_is_of_the_runs_own_split_and_normalization(place: Place) -> None:
    run = place.train(ONE, method="student")
    again = place.load(ONE, "seed=1")  # draws another split, of which a part was trained on
    data = load_data(again)
    with pytest.raises(RunError, match="holds a run on other data"):
        evaluate(again, data, run.folder, "val")
    result = json.loads(run.result.read_text())
    shifted = ImageData(**{**vars(load_data(place.load(ONE))), "mean": (0.9,), "std": (0.1,)})
    assert evaluate(again, data, run.folder, "test")[1] == result["test_accuracy"]
    assert evaluate(again, shifted, run.folder, "test")[1] == result["test_accuracy"]


NETS = """
from torch import nn


def net(num_classes, in_channels, slope=0.0):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.LeakyReLU(slope), nn.Linear(16, num_classes))


def other(num_classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, num_classes))
"""


def test_another_network_with_the_same_weights_is_another_run(place: Place) -> None:
    (place.folder / "two_nets.py").write_text(NETS)
    own = "teachers=[{name: a, model: {factory: 'two_nets:net'}}]"
    settings = place.load(own, "name=own")
    teach(settings, load_data(settings), QUIET)
    file = settings.teacher_folder("a") / "model.safetensors"

    def train(factory: str, args: str = "{}", resume: bool = False) -> Run:
        given = f"teachers=[{{name: a, model: {{factory: 'two_nets:{factory}', args: {args}, weights: {file}}}}}]"
        return place.train(given, "name=own", ONE, method="avg_mkd", resume=resume)

    run = train("net")
    differ = [
        ("other", "{}", r"networks\.a\.factory: 'two_nets:net' there"),
        ("net", "{slope: 0.5}", r"networks\.a\.args\.slope"),
    ]
    for earlier in (False, True):
        if earlier:  # as earlier versions wrote it
            record, state = run.read_record(), run.load_checkpoint()
            for recipe in (record["recipe"], state["of"]["recipe"]):
                del recipe["networks"]
            run.write_record(record)
            run.save_checkpoint(state)
        for factory, args, message in differ:
            with pytest.raises(RunError, match=message):
                train(factory, args)
        stamp = run.record.stat().st_mtime_ns
        assert train("net").record.stat().st_mtime_ns == stamp
    run.write_record(record | {"finished": False})
    assert train("net", resume=True).finished()
    run.config.unlink()  # nobody knows
    run.write_record(
        run.read_record() | {"recipe": {k: v for k, v in run.read_record()["recipe"].items() if k != "networks"}}
    )
    assert train("other").finished()


def test_weights_that_teach_made_for_another_network_are_refused(place: Place) -> None:
    (place.folder / "two_nets.py").write_text(NETS)
    nets = {name: f"teachers=[{{name: a, model: {{factory: 'two_nets:{name}'}}}}]" for name in ("net", "other")}
    settings = place.load(nets["net"], "name=own")
    teach(settings, load_data(settings), QUIET)
    with pytest.raises(
        RunError, match=r"holds another teacher a \(factory: 'two_nets:net' there, 'two_nets:other' here\)"
    ):
        place.train(nets["other"], "name=own", ONE, method="avg_mkd")
    assert place.train(nets["net"], "name=own", ONE, method="avg_mkd").finished()
