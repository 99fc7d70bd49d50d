"""Who trains on what: shares of the images, hidden labels, domains, teachers that know little, and several configurations in a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_run import QUIET

from amtml_fast import cli
from amtml_fast.train.compare.plan import check_shared
from amtml_fast.train.compare.results import finding
from amtml_fast.train.compare.session import TEACH, Session
from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import Config, ConfigError, TeacherConfig
from amtml_fast.train.data import parts
from amtml_fast.train.data.images import ImageData, ImageSet
from amtml_fast.train.figures import regimes
from amtml_fast.train.figures.tables import Bold, Row
from amtml_fast.train.methods.registry import chosen
from amtml_fast.train.run.job import student_job, teacher_job
from amtml_fast.train.run.prepare import data_of, load_data, load_teachers
from amtml_fast.train.run.tasks import distill, teach
from amtml_fast.train.run.trainer import Trainer, start_over
from amtml_fast.train.teachers import frozen

YAML = """
name: parts
data: {name: digits, val_fraction: 0.15}
teachers:
  - {name: a, model: {factory: small_cnn, args: {width: 4}}, hint: block3}
  - {name: b, model: {factory: small_cnn, args: {width: 3}}, hint: block3}
student: {factory: small_cnn, args: {width: 2}, features: block3, groups: {low: block1, high: block3}}
teach: {epochs: 1, batch_size: 64}
distill: {epochs: 1, batch_size: 64}
engine: {threads: 1, device: cpu}
"""


def load(folder: Path, *overrides: str, lines: str = YAML) -> Config:
    path = folder / "parts.yaml"
    path.write_text(lines)
    return reading.load(path, [f"out={folder}", *overrides])


def counts(split: ImageSet) -> list[int]:
    return torch.bincount(parts.truth(split.labels), minlength=10).tolist()


def made(images: int = 12, size: tuple[int, int] = (4, 4)) -> ImageData:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 1, *size), generator=g, dtype=torch.uint8)
    split = ImageSet(pixels, torch.arange(images) % 3)
    return ImageData("made", split, split, split, ("x", "y", "z"), (0.5,), (0.2,))


def test_shares_are_of_every_class_and_of_each_other(tmp_path: Path) -> None:
    whole = load_data(load(tmp_path))
    data = load_data(load(tmp_path, "data.share=0.5", "data.student_share=0.25"))
    assert data.teaching is not None and whole.teaching is not None
    for all_of_it, half, quarter in zip(counts(whole.train), counts(data.teaching), counts(data.train), strict=True):
        assert half == round(all_of_it / 2) and quarter == round(half / 4)
    teaching = {image.numpy().tobytes() for image in data.teaching.images}
    assert all(image.numpy().tobytes() in teaching for image in data.train.images)
    assert torch.equal(data.test.images, whole.test.images) and torch.equal(data.val.images, whole.val.images)
    assert torch.equal(whole.train.images, whole.teaching.images)


def test_labels_are_hidden_by_each_students_seed(tmp_path: Path) -> None:
    config = load(tmp_path, "data.labeled_share=0.1")
    data = load_data(config)

    def of(seed: int, method: str = "avg_mkd") -> ImageSet:
        return data_of(student_job(config, method, seed), data).train

    first, again, other = of(0), of(0), of(1)
    assert torch.equal(first.labels, again.labels) and not torch.equal(first.labels, other.labels)
    assert torch.equal(first.images, data.train.images) and torch.equal(parts.truth(first.labels), data.train.labels)
    seen = parts.known(first.labels)
    assert set(seen[first.labels < 0].tolist()) == {parts.IGNORED}
    shown = torch.bincount(seen[seen >= 0], minlength=10).tolist()
    assert shown == [round(n / 10) for n in counts(data.train)]
    # Without teachers there are the same labels, over and over, in an epoch as long.
    alone = of(0, "student")
    assert len(alone) == len(first) and (alone.labels >= 0).all()
    known = {image.numpy().tobytes() for image in first.images[first.labels >= 0]}
    assert {image.numpy().tobytes() for image in alone.images} == known
    assert (data.train.labels >= 0).all()  # a teacher's, and the next student's


def test_labels_without_teachers_come_equally_often_in_a_set_sorted_by_class() -> None:
    data = made(images=90)
    ordered = replace(data, train=data.train.at(data.train.labels.argsort(stable=True)))
    for share in (0.1, 0.4, 0.6, 0.9):
        alone = parts.of_student(ordered, share, 0, alone=True).train
        assert len(alone) == 90 and torch.bincount(alone.labels).tolist() == [30, 30, 30], share
        times = torch.unique(alone.images.flatten(1), dim=0, return_counts=True)[1]
        assert times.max() - times.min() <= 1, share


def test_domains_go_round_and_a_teacher_sees_one() -> None:
    data = made()
    config = reading.parse({"data": {"domains": ["upright", "rotated", "inverted", "noisy"]}}, "a test")
    divided = parts.divided(data, config.data, 0)
    images, shown = data.train.images, divided.test.images
    assert torch.equal(shown[0::4], images[0::4]) and torch.equal(shown[1::4], images[1::4].rot90(1, (2, 3)))
    assert torch.equal(shown[2::4], 255 - images[2::4])
    off = (shown[3::4].float() - images[3::4].float())[(shown[3::4] > 0) & (shown[3::4] < 255)]
    assert 20 < off.std() < 80 and torch.equal(parts.divided(data, config.data, 0).test.images, shown)
    assert torch.equal(divided.train.images, divided.val.images)

    def of(**teacher: object) -> ImageSet:
        return parts.of_teacher(divided, TeacherConfig(**teacher), config.data.domains, 0).train  # type: ignore[arg-type]

    assert torch.equal(of(domain="inverted").images, 255 - images)  # all of them
    assert torch.equal(of().images, shown)
    assert torch.equal(of(classes=[1], domain="rotated").images, images[1::3].rot90(1, (2, 3)))
    shuffled = of(shuffled_labels=True)
    assert torch.equal(shuffled.labels.sort().values, data.train.labels.sort().values)
    assert not torch.equal(shuffled.labels, data.train.labels)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.domains=[sideways]", r"data.domains must be different ones of upright, .*, got 'sideways'"),
        ("data.domains=[upright, upright]", r"data.domains must be different ones of"),
        ("data.share=0", r"data.share must be"),
        ("data.labeled_share=1", r"data.labeled_share must be"),
        ("data.labeled_share=0.1; loss.alpha=0", r"loss.alpha must be above 0 with data.labeled_share .*, got 0.0"),
        (
            "teachers.0.shuffled_labels=true; teachers.0.model.weights=x.safetensors",
            r"teachers.a must be trained here for domain and shuffled_labels, got one that brings its weights",
        ),
        ("data.student_share=1.5", r"data.student_share must be"),
        ("teachers.0.domain=rotated", r"teachers.a.domain must be one of data.domains, \(none\), got 'rotated'"),
    ],
)
def test_what_makes_no_sense_is_refused(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load_data(load(tmp_path, *override.split("; ")))


def test_too_few_images_for_a_label_are_refused() -> None:
    few = made(images=3)
    for alone in (True, False):
        with pytest.raises(
            ConfigError, match=r"labeled_share must be enough for a label of one class, of 3 images, got 0\.1"
        ):
            parts.of_student(few, 0.1, 0, alone=alone)


def test_rotating_needs_square_images() -> None:
    with pytest.raises(ConfigError, match="must be square for the domain rotated, got 4 x 6"):
        parts.in_domains(made(size=(4, 6)).train, ["upright", "rotated"])


def test_recipes_say_what_a_run_has_seen_and_no_more(tmp_path: Path) -> None:
    def student(*overrides: str) -> dict[str, object]:
        return student_job(load(tmp_path, *overrides), "student", 0).recipe()

    def teacher(*overrides: str) -> dict[str, object]:
        config = load(tmp_path, *overrides)
        return teacher_job(config, config.teachers[0]).recipe()

    assert "share" not in str(student())  # runs from before there were shares are what they were
    for override in ("data.share=0.5", "data.student_share=0.5", "data.labeled_share=0.5", "data.domains=[noisy]"):
        assert student(override) != student()
    for override in ("data.student_share=0.5", "data.labeled_share=0.5"):
        assert teacher(override) == teacher()
    for override in ("data.share=0.5", "data.domains=[noisy]", "teachers.0.shuffled_labels=true"):
        assert teacher(override) != teacher()


def test_a_gate_is_fitted_to_the_labels_that_are_known(tmp_path: Path) -> None:
    """From the disk and live alike, of few images as of all, and resumed as it was."""
    config = load(tmp_path, "data.labeled_share=0.1")
    data = load_data(config)
    teach(config, data, QUIET)
    job = student_job(config, "gated_kd", 0)
    kept, live = load_teachers(config, data, [job], QUIET), frozen.load(config, data, hints=False)
    assert kept is not None and kept.cache and not live.cache
    own = data_of(job, data)
    logits, labels = frozen.sample(kept, own)
    assert torch.equal(labels, parts.known(own.train.labels))
    for mine, theirs in zip(logits, frozen.sample(live, own)[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    run = distill(config, data, "gated_kd", 0, QUIET, resume=False, fresh=False)
    assert run.read_metrics()[0]["weight_mean"] != [0.5, 0.5]
    assert (run.folder / "objective.safetensors").is_file()


def test_alpha_falls_with_the_steps_also_of_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(tmp_path, "distill.epochs=2")
    data = load_data(config)
    teach(config, data, QUIET)
    seen: list[float] = []
    learn = Trainer.learn

    def watched(self: Trainer, *args: object) -> None:
        seen.append(float(self.bare.progress))
        if len(seen) == 30:
            seen.pop()
            raise KeyboardInterrupt
        learn(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "learn", watched)
    with pytest.raises(KeyboardInterrupt):
        distill(config, data, "gated_kd", 0, QUIET, resume=False, fresh=False)
    steps = len(data.train) // 64
    del seen[steps:]  # the checkpoint is of the end of the first epoch
    seen += [-1.0] * 30
    distill(config, data, "gated_kd", 0, QUIET, resume=True, fresh=False)
    taken = [p for p in seen if p >= 0]
    assert taken == pytest.approx([i / (2 * steps) for i in range(2 * steps)])


def test_of_many_images_those_with_a_label_are_in_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load(tmp_path, "data.labeled_share=0.1")
    data = load_data(config)
    teach(config, data, QUIET)
    own = data_of(student_job(config, "gated_kd", 0), data)
    monkeypatch.setattr(frozen, "SAMPLE", 200)
    _, labels = frozen.sample(frozen.load(config, data, hints=False), own)
    assert len(labels) == 200 and (labels >= 0).sum() == (own.train.labels >= 0).sum()
    order = data.train.labels.argsort()  # as image folders are read
    sorted_by_class = replace(data, train=data.train.at(order))
    _, labels = frozen.sample(frozen.load(config, data, hints=False), sorted_by_class)
    assert len(labels) == 200 and len(labels.unique()) == 10


REGIMES = YAML + "regimes:\n  plain: {}\n  few: {data: {labeled_share: 0.2}, teach: {epochs: 1}}\n"


def test_a_file_of_several_configurations(tmp_path: Path) -> None:
    path = tmp_path / "parts.yaml"
    path.write_text(REGIMES)
    plain, few = reading.load_all(path, ["distill.epochs=3", f"out={tmp_path}"])
    assert (plain.name, few.name) == ("parts/plain", "parts/few") and plain.distill.epochs == few.distill.epochs == 3
    assert plain.data.labeled_share is None and few.data.labeled_share == 0.2
    assert plain.teacher_folder("a") == few.teacher_folder("a") == tmp_path / "parts" / "teachers" / "a"
    assert reading.load(f"{path}:few").data.labeled_share == 0.2
    with pytest.raises(
        ConfigError, match=r"must be one configuration .*parts.yaml:plain, .*:few\), got all of .*parts.yaml"
    ):
        reading.load(path)
    assert [c.name for c in reading.load_all(path, ["name=mine"])] == ["mine/plain", "mine/few"]
    assert reading.load(f"{path}:few", ["name=mine"]).teachers_folder == "runs/mine/teachers"
    with pytest.raises(ConfigError, match="must be followed by one of plain, few, got 'many'"):
        reading.load(f"{path}:many")
    path.write_text(YAML)
    with pytest.raises(ConfigError, match="must have regimes to choose 'few' from, got none"):
        reading.load(f"{path}:few")
    for text, said in (
        ("{few: {datas: {}}}", "datas: no such key.*parts.yaml:few"),
        ("[a, b]", "regimes must be a mapping of names to keys, got ListConfig"),
        ("{}", "regimes must be a mapping of names to keys, got none"),
        ("{few: 3}", "regimes.few must be a mapping of keys, got 3"),
        ("{few: {name: x}}", "regimes must share name, out, teachers_folder and base, got name in few"),
        ("{teachers: {}}", "got the name 'teachers', where their teachers go"),
        ("{a/b: {}}", "regimes must be unique names"),
    ):
        path.write_text(f"{YAML}regimes: {text}")
        with pytest.raises(ConfigError, match=said):
            reading.load_all(path)
    odd = tmp_path / "odd:name.yaml"
    odd.write_text(YAML)
    assert reading.load(odd).name == "parts"


def test_one_folder_holds_one_teacher(tmp_path: Path) -> None:
    path = tmp_path / "parts.yaml"
    second = "{name: b, model: {factory: small_cnn, args: {width: 3}}, hint: block3}"
    path.write_text(f"{YAML}regimes:\n  x: {{}}\n  y: {{teachers: [{second}]}}\n")
    check_shared(reading.load_all(path)[:1])
    with pytest.raises(
        ConfigError,
        match=r"parts/x and parts/y must have the same teacher b in .*teachers/b, got seed 1 and 0, which is",
    ):
        check_shared(reading.load_all(path))


def test_a_fresh_comparison_trains_shared_teachers_once(tmp_path: Path) -> None:
    path = tmp_path / "parts.yaml"
    path.write_text(REGIMES)
    settings = reading.load_all(path, [f"out={tmp_path}", "compare.methods=[student]", "compare.seeds=[0]"])
    teach(settings[0], load_data(settings[0]), QUIET)
    sessions = [Session(one, QUIET) for one in settings]
    start_over([job for one in sessions for job in one.jobs[TEACH]], QUIET)
    assert [len(one.waiting(TEACH)) for one in sessions] == [2] * len(sessions)
    teach(settings[0], load_data(settings[0]), QUIET)
    assert [one.waiting(TEACH) for one in sessions] == [[]] * len(sessions)


def test_a_variant_of_a_method_that_does_not_read_alpha_end_is_refused(tmp_path: Path) -> None:
    config = load(tmp_path, "variants={late: {method: amtml_kd, loss: {alpha_end: 0}}}")
    with pytest.raises(ConfigError, match=r"variants.late must set keys that amtml_kd reads, got loss.alpha_end"):
        chosen(config, ["late"])
    # A run from its folder does not inherit it.
    assert student_job(load(tmp_path), "gated_kd", 0).config.loss.alpha_end is None


def test_regimes_are_compared_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "parts.yaml"
    path.write_text(REGIMES)

    def command(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, f"out={tmp_path}"])
        assert stop.value.code in (0, None)
        return capsys.readouterr().out

    said = command("compare", str(path), "compare.methods=[student, gated_kd, oracle]", "compare.seeds=[0]")
    folder = tmp_path / "parts"
    assert f"Side by side: {folder}/results.md" in said.replace("\n", "")
    assert sorted(p.name for p in (folder / "teachers").iterdir()) == ["a", "b"]  # once for both
    text = (folder / "results.md").read_text()
    assert "| Method | plain | few |" in text and "| oracle |" in text
    assert (folder / "regimes.png").stat().st_size > 5000
    assert "test accuracy" in command("eval", f"{path}:few", "--teacher", "a")


# --- the digest -------------------------------------------------------------------------------------------------------


def rows(**accuracies: list[float]) -> list[Row]:
    return [Row(name.replace("__", "-"), name, 10, values) for name, values in accuracies.items()]


FOUND = {
    "one": rows(
        student=[0.50, 0.52, 0.51],
        okd__a=[0.40, 0.41, 0.42],
        okd__b=[0.60, 0.60, 0.61],
        gated_kd=[0.70, 0.71, 0.72],
        oracle=[0.75, 0.76, 0.77],
    ),
    "two": rows(
        student=[0.50, 0.51, 0.52],
        okd__a=[0.70, 0.74, 0.72],
        okd__b=[0.10, 0.10, 0.11],
        gated_kd=[0.70, 0.71, 0.73],
        oracle=[0.75, 0.76, 0.77],
    ),
}


def test_the_digest_marks_what_cannot_be_told_from_the_best() -> None:
    table = regimes.accuracy_table(FOUND)[0]
    lines = {line[0]: line[1:] for line in table.lines}  # type: ignore[union-attr]
    assert list(lines) == ["student", "best single teacher", "gated_kd", "oracle"]
    bold = {name: [isinstance(cell, Bold) for cell in cells] for name, cells in lines.items()}
    assert bold == {
        "student": [False, False],
        "best single teacher": [False, True],
        "gated_kd": [True, True],
        "oracle": [False, False],
    }
    assert lines["best single teacher"][0].startswith("60.33") and lines["best single teacher"][1].startswith("72.00")


def test_a_teacher_that_diverged_is_not_the_best_one() -> None:
    diverged = rows(student=[0.5, 0.5], okd__a=[float("nan"), 0.4], okd__b=[0.6, 0.7], gated_kd=[0.5, 0.8])
    one = regimes.with_best_teacher(diverged)[1]
    assert one.label == "best single teacher" and one.mean == pytest.approx(0.65)
    assert "okd__b (65.00 %)" in finding(diverged)  # named as the best of the others


def test_the_digest_says_how_much_of_the_oracles_gain() -> None:
    gains, words = regimes.gain_table(FOUND, "gated_kd")
    assert gains.lines[0][:5] == ("one", "+25.00", "+20.00", "80 %", "2 of 2")  # type: ignore[union-attr]
    assert gains.lines[1][4:] == ("1 of 2", "none")  # type: ignore[union-attr]
    assert "points" in str(words)
    worse = {
        "one": [replace(row, accuracies=[0.3, 0.31, 0.33]) if row.method == "gated_kd" else row for row in FOUND["one"]]
    }
    assert "student" in regimes.gain_table(worse, "gated_kd")[0].lines[0][5]  # type: ignore[union-attr]
    assert regimes.gain_table({"one": FOUND["one"][:2]}, "gated_kd") == []
