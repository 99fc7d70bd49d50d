"""The page of `amtml-fast report`, about a real comparison: what it says, what it says when something is missing, and
what a browser makes of it."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import QUIET, ROOT

from amtml_fast import cli
from amtml_fast.train.compare import answers, results
from amtml_fast.train.compare.plan import plan
from amtml_fast.train.compare.session import compare
from amtml_fast.train.config import reading
from amtml_fast.train.config.schema import ConfigError, LossConfig
from amtml_fast.train.data.images import ImageData, ImageSet
from amtml_fast.train.figures import tables
from amtml_fast.train.files import RunError, read_json
from amtml_fast.train.report import gather, page, page_images, page_trust, svg
from amtml_fast.train.run.folder import Run
from amtml_fast.train.run.job import one_job
from amtml_fast.train.run.prepare import load_data, load_teachers

NASTY = """<script>alert("1")</script> & 'co' {{ 7 * 7 }}"""
YAML = f"""
name: tiny
data: {{name: digits, val_fraction: 0.15}}
teachers:
  - {{name: a, model: {{factory: small_cnn, args: {{width: 4}}}}, hint: block3}}
  - {{name: b, model: {{factory: small_cnn, args: {{width: 3}}}}, hint: block2, classes: [0, 1, 2, 3, 4]}}
student: {{name: narrow, factory: small_cnn, args: {{width: 1}}, features: block3, groups: {{low: block1, mid: block2, high: block3}}}}
teach: {{epochs: 1, batch_size: 128}}
distill: {{epochs: 2, batch_size: 128}}
variants: {{nasty: {{method: amtml_no_hint, label: {json.dumps(NASTY)}}}}}
compare: {{methods: [student, avg_mkd, eb_kd, amtml_kd, nasty], seeds: [0, 1]}}
engine: {{threads: 1, device: cpu}}
"""
SECTIONS = [
    "Accuracy",
    "Curves",
    "Soft targets and weights of test images",
    "Which teacher wins where",
    "Is the trust deserved?",
    "Weights by epoch",
    "Where the time of a step goes",
    "To get it again",
]
VOID = {"meta", "img", "br", "hr", "input", "link", "source", "col", "wbr"}


class Reader(HTMLParser):
    """The page's text, attributes and headings; `faults` where tags are not nested as they should be."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.faults: list[str] = []
        self.texts: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        self.faults += [f"never closed: {tag}" for tag in self.open]
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.texts.append(data)
            if self.open and re.fullmatch("h[1-6]", self.open[-1]):
                self.headings.append((self.open[-1], data.strip()))


def read(*sources: Path, images: list[int] | None = None) -> Reader:
    return Reader(page.render(gather.gather(sources), images, QUIET))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of five methods and two seeds."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "tiny.yaml").write_text(YAML)
    compare(reading.load(folder / "tiny.yaml", [f"out={folder}"]), QUIET)
    return folder / "tiny"


@pytest.fixture(scope="module")
def whole(compared: Path) -> tuple[str, Reader]:
    html = page.render(gather.gather([compared]), None, QUIET)
    return html, Reader(html)


@pytest.fixture
def copied(compared: Path, tmp_path: Path) -> Path:
    """The comparison in another place, from where the first one is not to be seen."""
    for file in (copy := Path(shutil.copytree(compared, tmp_path / "copied"))).glob("**/config.yaml"):
        file.write_text(file.read_text().replace(f"out: {compared.parent}", "out: gone"))
    return copy


def edit(run: Path, **changes: object) -> None:
    record = json.loads((run / "run.json").read_text())
    record.update({key: value for key, value in changes.items() if value is not None})
    for key in [key for key, value in changes.items() if value is None]:
        record.pop(key, None)
    (run / "run.json").write_text(json.dumps(record))


# --- what it says -----------------------------------------------------------------------------------------------------


def test_every_section_and_the_finding(whole: tuple[str, Reader], compared: Path) -> None:
    _, reader = whole
    assert [text for tag, text in reader.headings if tag == "h2"] == SECTIONS
    assert [text for tag, text in reader.headings if tag == "h1"] == ["tiny"]
    levels = [int(tag[1]) for tag, _ in reader.headings]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert read_json(compared / "results.json")["finding"] in reader.text
    assert {"Paired tests", "Networks"} <= {text for _, text in reader.headings}


def test_the_table_holds_the_accuracies_of_the_runs(whole: tuple[str, Reader], compared: Path) -> None:
    html, reader = whole
    best = ("", -1.0)
    for method in ("student", "avg_mkd", "eb_kd", "amtml_kd", "nasty"):
        found = [read_json(compared / f"{method}-seed{seed}" / "result.json")["test_accuracy"] for seed in (0, 1)]
        said = f"{100 * statistics.fmean(found):.2f} ± {100 * statistics.stdev(found):.2f}"
        assert said in reader.text
        best = max(best, (said, statistics.fmean(found)), key=lambda pair: pair[1])
    assert f"<strong>{best[0]}</strong>" in html
    for teacher in ("a", "b"):
        accuracy = read_json(compared / "teachers" / teacher / "result.json")["test_accuracy"]
        assert f"teacher: {teacher} {100 * accuracy:.2f}" in reader.text


def test_other_tables_are_those_of_results_md(whole: tuple[str, Reader], compared: Path) -> None:
    text = (compared / "results.md").read_text()
    cells = [
        cell.strip("* ")
        for line in text.split("## Paired tests")[1].splitlines()
        if line.startswith("| ")
        for cell in line[2:-2].split(" | ")
    ]
    assert len(cells) > 20 and all(re.sub(r"\\(.)", r"\1", cell) in whole[1].text for cell in cells)


def test_the_curves_end_where_the_metrics_do(whole: tuple[str, Reader], compared: Path) -> None:
    labels = [
        attributes["aria-label"] or ""
        for tag, attributes in whole[1].tags
        if tag == "svg" and "aria-label" in attributes
    ]
    rows = [Run(compared / f"amtml_kd-seed{seed}").read_metrics()[-1] for seed in (0, 1)]
    accuracy = 100 * statistics.fmean(row["val_accuracy"] for row in rows)
    assert f"AMTML-KD: validation accuracy by epoch, at the end {accuracy:.1f} % on average of 2 runs" in labels
    hint = statistics.fmean(row["hint"] for row in rows)
    assert any(label.startswith("AMTML-KD: training loss") and f"hint {hint:.3g}" in label for label in labels)
    entropy = statistics.fmean(row["entropy"] for row in rows)
    assert f"AMTML-KD: normalized entropy of the weights by epoch, at the end {entropy:.3f}" in labels
    won = [statistics.fmean(row["weight_won"][t] for row in rows) for t in (0, 1)]
    assert any("AMTML-KD: share of examples won" in x and f"a {won[0]:.2f}, b {won[1]:.2f}" in x for x in labels)


def test_by_class_are_the_networks_own_answers(whole: tuple[str, Reader], compared: Path) -> None:
    settings = reading.load(compared.parent / "tiny.yaml", [f"out={compared.parent}"])
    data = load_data(settings)
    teachers = load_teachers(settings, data, plan(settings), QUIET)
    assert teachers is not None
    right = answers.teacher_logits(teachers, data.test, data).argmax(-1) == data.test.labels[:, None]
    for c, name in enumerate(data.classes):
        shares = right[data.test.labels == c].float().mean(0)
        assert f"{name} {100 * shares[0]:.1f} {100 * shares[1]:.1f}" in whole[1].text
    seeds = [one_job(settings, "amtml_kd", seed) for seed in (0, 1)]
    weights = torch.stack([answers.weights_and_logits(job, teachers, data.test, data)[0] for job in seeds])
    three = weights[:, data.test.labels == 3].mean((0, 1))
    assert f"3 {three[0]:.2f} {three[1]:.2f}" in whole[1].text.split("Weights, AMTML-KD")[1]


def test_trust_is_in_who_is_right_and_how_surely() -> None:
    """Four images, two teachers of two classes: on the first two one of them is wrong."""
    logits = torch.tensor([[[3.0, 0], [0, 3.0]], [[3.0, 0], [0, 3.0]], [[3.0, 0], [3.0, 0]], [[0, 3.0], [0, 3.0]]])
    labels = torch.tensor([0, 1, 0, 0])
    good = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.5, 0.5]])
    found = page_trust.section({"good": [good], "bad": [1 - good]}, logits, labels)
    assert (found["disputed"], found["total"], found["fair"]) == (2, 4, "0.50")
    first, second = found["methods"]
    assert (first["on_right"], first["accuracy"]) == ("0.85", "75.0") and second["on_right"] == "0.15"
    alike = page_trust.section({"good": [good]}, logits[:, :1].expand(-1, 2, -1), labels)  # nothing is disputed
    assert alike["fair"] is None and alike["methods"][0]["on_right"] is None
    assert 'aria-label="good: how often' in first["chart"] and 'd=""' in first["chart"]  # no bin has enough images
    sure = torch.tensor([[0.95, 0.05]]).expand(100, 2)
    said = torch.tensor([0] * 80 + [1] * 20)
    assert page_trust.calibration_error(sure, said) == pytest.approx(0.15, abs=1e-6)
    curve = page_trust.reliability(sure, said)
    assert curve[-1] == pytest.approx(0.8) and np.isnan(curve[:-1]).all()


def test_a_class_without_test_images_is_left_out() -> None:
    labels = torch.tensor([0, 2, 2, 0])
    split = ImageSet(torch.zeros(4, 1, 4, 4, dtype=torch.uint8), labels)
    data = ImageData("made", split, split, split, ("x", "absent", "z"), (0.5,), (0.2,))
    logits = torch.eye(3)[torch.tensor([[0, 2], [2, 2], [0, 2], [0, 0]])]  # [4, 2, 3]
    weights = torch.tensor([[0.7, 0.3]]).expand(4, 2)
    found = page_images.class_section({"m": [(None, weights, None)]}, logits, data)  # type: ignore[list-item]
    for lines in (found["accuracy"], found["methods"][0]["lines"]):
        assert [line["class"] for line in lines] == ["x", "z"]
        assert all(math.isfinite(x) for line in lines for cell in line["cells"] for x in cell[:2])
    assert (found["known"], found["shown"], found["classes"]) == (2, 2, 3)


def test_images_are_what_was_asked_for(compared: Path) -> None:
    reader = read(compared, images=[3, 17])
    shown = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert [(x["alt"] or "").split(",")[0] for x in shown] == ["Test image 3", "Test image 17"]
    assert all((x["src"] or "").startswith("data:image/png;base64,") for x in shown)
    with pytest.raises(ConfigError, match=r"--images must be in 0 to \d+ \(the test split\), got 99999"):
        read(compared, images=[99999])


def test_nothing_comes_from_outside(whole: tuple[str, Reader]) -> None:
    html, reader = whole
    links = [
        value or "" for _, attributes in reader.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"https?://|@import|url\(|<link|<iframe", html)
    targets = {attributes.get("id") for _, attributes in reader.tags}
    assert {link[1:] for link in links if link.startswith("#")} <= targets


def test_it_is_well_formed_and_said_in_words(whole: tuple[str, Reader]) -> None:
    html, reader = whole
    assert reader.faults == []
    tags = dict.fromkeys(tag for tag, _ in reader.tags)
    assert {"html", "title", "main", "nav", "svg", "table"} <= set(tags)
    assert ("html", {"lang": "en"}) in reader.tags
    for tag, attributes in reader.tags:
        if tag == "svg":
            assert attributes.get("aria-hidden") == "true" or (attributes["role"], bool(attributes["aria-label"])) == (
                "img",
                True,
            )
        if tag == "th":
            assert attributes.get("scope") in ("row", "col")
        if tag == "img":
            assert attributes["alt"]
    assert not re.search(
        r"\b(nan|None|inf)\b",
        re.sub(r"<style>.*?</style>|<script>.*?</script>", "", html, flags=re.S).split("<pre tabindex")[0],
    )


def test_text_of_users_stays_text(whole: tuple[str, Reader], copied: Path) -> None:
    html, reader = whole
    assert NASTY in reader.text and "alert(" in html and "<script>alert" not in html and "49" not in NASTY
    name = "<b title='x'>t&amp;"
    for run in copied.glob("*-seed*"):
        edit(run, teachers=[name, "b"])
    changed = page.render(gather.gather([copied]), None, QUIET)
    assert name not in changed and "&lt;b title=&#39;x&#39;&gt;t&amp;amp;" in changed
    assert Reader(changed).faults == []


def test_the_same_runs_make_the_same_page(whole: tuple[str, Reader], compared: Path) -> None:
    assert page.render(gather.gather([compared]), None, QUIET) == whole[0]


# --- what is missing --------------------------------------------------------------------------------------------------


def unfinish(run: Path, epochs: int = 1) -> None:
    edit(run, finished=False, seconds_per_step=None, step_seconds=None)
    (run / "result.json").unlink()
    for file in run.glob("*.safetensors"):
        file.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:epochs]))


def test_an_unfinished_run_is_shown_as_unfinished(copied: Path) -> None:
    unfinish(copied / "avg_mkd-seed1")
    reader = read(copied)  # results.json is there: the comparison leaves the method out
    assert "Unfinished" in [text for _, text in reader.headings] and "AvgMKD 1 1 of 2" in reader.text
    assert "AvgMKD" not in reader.text.split("Paired tests")[0].split("best student marked")[1]
    (copied / "results.json").unlink()  # under way: seed 0 is what all have
    reader = read(copied)
    alone = read_json(copied / "avg_mkd-seed0" / "result.json")["test_accuracy"]
    assert f"AvgMKD {100 * alone:.2f}" in reader.text and "seed 1 is left out" in reader.text
    assert reader.faults == []


def test_a_comparison_where_nothing_has_finished(copied: Path) -> None:
    for run in copied.glob("*-seed*"):
        unfinish(run, epochs=0 if run.name == "student-seed0" else 1)
    (copied / "results.json").unlink()
    reader = read(copied)
    assert "No run here has finished yet." in reader.text and reader.faults == []
    assert "so there are none to show" in reader.text and "none has finished" in reader.text


def test_a_planned_run_that_is_not_there_is_named(copied: Path) -> None:
    shutil.rmtree(copied / "avg_mkd-seed1")
    (copied / "extra-seed7").mkdir()
    shutil.copytree(copied / "student-seed0", copied / "extra-seed7", dirs_exist_ok=True)
    text = read(copied).text
    assert "Planned, but not there: avg_mkd-seed1." in text
    assert "1 other run in the folder, not part of this comparison extra-seed7" in text


def test_runs_without_their_metrics_keep_their_results(copied: Path) -> None:
    """What to say was: fmean requires at least one data point."""
    for run in copied.glob("avg_mkd-seed*"):
        (run / "metrics.jsonl").unlink()
    accuracies = [read_json(run / "result.json")["test_accuracy"] for run in copied.glob("avg_mkd-seed*")]
    assert f"AvgMKD {100 * statistics.fmean(accuracies):.2f} ±" in re.sub(r" best ", " ", read(copied).text)
    found = gather.gather([copied]).found
    assert found is not None and next(row for row in found.rows if row.method == "avg_mkd").seconds_per_epoch is None


def test_without_teachers_the_page_says_so(copied: Path) -> None:
    shutil.rmtree(copied / "teachers")
    reader = read(copied)
    assert reader.text.count("What teachers and students say about images cannot be shown here") == 3
    assert "run `amtml-fast teach` first" in reader.text and not [tag for tag, _ in reader.tags if tag == "img"]
    assert [text for tag, text in reader.headings if tag == "h2"] == SECTIONS


def test_teachers_trained_anew_are_not_taken_for_the_old_ones(copied: Path) -> None:
    whole = (copied / "teachers" / "b" / "model.safetensors").read_bytes()
    (copied / "teachers" / "b" / "model.safetensors").write_bytes(whole[:-4] + b"\0\0\0\0")
    assert "The weights of b on disk are not those that the students learned from." in read(copied).text


@pytest.mark.parametrize("name", ["student.safetensors", "objective.safetensors"])
@pytest.mark.parametrize("kept", [100, None], ids=["cut", "removed"])
def test_weights_that_cannot_be_read_cost_the_images_alone(copied: Path, name: str, kept: int | None) -> None:
    file = copied / "amtml_kd-seed1" / name
    whole = file.read_bytes()
    file.unlink()
    if kept is not None:
        file.write_bytes(whole[:kept])
    text = read(copied).text
    assert text.count("What teachers and students say about images cannot be shown here") == 3 and name in text


def test_a_result_without_its_figures_is_named(copied: Path) -> None:
    file = copied / "student-seed0" / "result.json"
    file.write_text('{"test_accuracy": 0.5}')
    with pytest.raises(
        RunError, match=r"student-seed0/result\.json must hold 'val_accuracy' of a run \(float\), got test_accuracy; "
    ):
        read(copied)


def test_without_an_adapter_the_page_says_so(compared: Path) -> None:
    reader = read(compared / "avg_mkd-seed0", compared / "student-seed0")
    assert "No finished run here has learned weights" in reader.text
    assert "No method here has weights of its teachers on record." in reader.text


def test_times_of_a_step(copied: Path) -> None:
    parts = {"data": 0.0011, "teachers": 0.0022, "student": 0.0033, "losses": 0.0044, "optimizer": 0.0055}
    for run in copied.glob("*-seed*"):
        edit(run, step_seconds=parts, seconds_per_step=0.02)
    assert "AMTML-KD 20.0 1.10 2.20 3.30 4.40 5.50 3.50" in read(copied).text
    for seed in (0, 1):
        edit(
            copied / f"amtml_kd-seed{seed}",
            step_seconds={k: v * (1 + seed) for k, v in parts.items()},
            seconds_per_step=0.03,
        )
    reader = read(copied)
    assert "AMTML-KD 30.0 1.65 3.30 4.95 6.60 8.25 5.25" in reader.text
    bars = [x for tag, x in reader.tags if tag == "rect"]
    assert ("c4", "22.00") in [(x["class"], x["width"]) for x in bars]


def test_a_configuration_that_cannot_be_read_is_named(copied: Path) -> None:
    whole = read_json(copied / "results.json")
    whole["config"]["gone"] = 1
    (copied / "results.json").write_text(json.dumps(whole))
    with pytest.raises(ConfigError, match=r"^config: gone: no such key.*results\.json"):
        read(copied)
    (copied / "results.json").unlink()
    for file in copied.glob("*/config.yaml"):
        file.write_text(file.read_text() + "gone: 1\n")
    with pytest.raises(ConfigError, match=r"^config: gone: no such key.*config\.yaml"):
        read(copied)


def test_single_runs_side_by_side(compared: Path) -> None:
    one = read(compared / "amtml_kd-seed0")
    accuracy = read_json(compared / "amtml_kd-seed0" / "result.json")["test_accuracy"]
    assert f"AMTML-KD reaches {100 * accuracy:.2f} % on the test set." in one.text
    two = read(compared / "amtml_kd-seed0", compared / "avg_mkd-seed0", compared / "avg_mkd-seed1")
    assert "seed 1 is left out" in two.text and "one seed cannot tell that from chance" in two.text
    apart = read(compared / "amtml_kd-seed0", compared / "avg_mkd-seed1")
    assert "their seeds differ, so nothing is tested" in apart.text and "Paired tests" not in apart.text
    rows = [tables.Row("oracle", "oracle", 1, [0.99]), *(tables.Row(name, name, 1, [0.8, 0.9]) for name in "ab")]
    assert results.untested(rows).startswith("b has the highest mean of 2 (85.00 %")  # the oracle is none of them
    teacher = read(compared / "teachers" / "a")
    assert "teacher a" in teacher.text and "amtml-fast teach" in teacher.text


def test_runs_of_comparisons_of_one_name_are_told_apart(compared: Path, tmp_path: Path) -> None:
    for place in ("x", "y"):
        for run in ("amtml_kd-seed0", "avg_mkd-seed0"):
            shutil.copytree(compared / run, tmp_path / place / "tiny" / run)
    both = gather.gather([tmp_path / place / "tiny" / "avg_mkd-seed0" for place in ("x", "y")])
    assert both.name == "x/tiny and y/tiny" and [*both.shown()] == ["AvgMKD (x/tiny)", "AvgMKD (y/tiny)"]
    others = gather.gather([compared / "avg_mkd-seed0", tmp_path / "x" / "tiny" / "amtml_kd-seed0"])
    assert [group.label for group in others.groups] == [
        f"AvgMKD ({compared.parent.name}/tiny)",
        "AMTML-KD (x/tiny)",
    ]


def test_runs_that_differ_in_more_than_their_seed_are_no_seeds_alone(copied: Path) -> None:
    first, second = copied / "avg_mkd-seed0", copied / "avg_mkd-seed1"
    assert "not alike" not in read(copied).text and "not alike" not in read(first, second).text
    record = read_json(second / "run.json")
    record["recipe"]["train"] |= {"lr": 0.7, "epochs": 1}
    edit(second, recipe=record["recipe"], data="others")
    said = "The runs of AvgMKD are not alike (train.epochs, train.lr, the images): their mean and spread"
    assert said in read(copied).text and said in read(first, second).text


def test_a_copy_of_a_run_is_no_further_seed(copied: Path) -> None:
    shutil.copytree(copied / "avg_mkd-seed0", copied / "before")
    with pytest.raises(
        RunError, match=r"before and avg_mkd-seed0 are runs of AvgMKD with the same seed, 0, which counts once"
    ):
        gather.gather([copied / "before", copied / "avg_mkd-seed0", copied / "student-seed0"])
    assert "before" in gather.gather([copied]).others  # a comparison knows its own


# --- the command ------------------------------------------------------------------------------------------------------


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as status:
        cli.main(words)
    out, err = capsys.readouterr()
    return int(status.value.code or 0), out, err


def test_the_command_writes_one_file(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    status, out, _ = call(capsys, "report", str(copied), "--images", "1, 2")
    assert status == 0 and f"wrote {copied / 'report.html'}" in out
    assert "Test image 2," in (copied / "report.html").read_text()
    status, out, _ = call(capsys, "report", str(copied / "student-seed0"), "--out", str(tmp_path / "new" / "x.html"))
    assert status == 0 and (tmp_path / "new" / "x.html").is_file()
    after = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert set(after) - set(before) == {copied / "report.html"} and before.items() <= after.items()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no run here; looked for run.json"),
        (["{copied}/figures"], "figures: no run here; looked for run.json"),
        (["{copied}", "{copied}/student-seed0"], "several at once must each be a run"),
        (["{copied}", "--images=x"], "--images must be positions in the test split such as 3,17, got 'x'"),
        (["{copied}", "--out={copied}"], "--out must be a file, got the folder"),
    ],
)
def test_what_is_no_run_is_named(
    copied: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, out, err = call(capsys, "report", *(word.format(copied=copied) for word in words))
    assert status in (1, 2) and message in err and "Traceback" not in err + out
    assert not (copied / "report.html").exists()


@pytest.mark.parametrize("command", ["report", "eval"])
@pytest.mark.parametrize("left", [(), ("student", "seed")], ids=["nothing", "some"])
def test_a_record_that_is_not_a_runs_is_named(
    copied: Path, capsys: pytest.CaptureFixture[str], command: str, left: tuple[str, ...]
) -> None:
    file = copied / "student-seed0" / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: record[key] for key in left}))
    status, out, err = call(capsys, command, str(file.parent))
    assert status in (1, 2) and "Traceback" not in err + out
    got = ", ".join(left) or "nothing"
    assert f"run.json must hold 'method' of a run (str), got {got}; repair it" in " ".join(err.split())


@pytest.mark.parametrize(("key", "value"), [("recipe", None), ("seed", "0"), ("label", 3)])
def test_a_value_of_a_record_that_is_not_a_runs_is_named(
    copied: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    file = copied / "student-seed0" / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    status, out, err = call(capsys, "report", str(file.parent))
    assert status in (1, 2) and "Traceback" not in err + out
    assert f"run.json must hold '{key}' of a run" in " ".join(err.split()) and f"got {key}={value!r}" in " ".join(
        err.split()
    )


def test_how_to_get_it_again() -> None:
    plain = gather.Gathered("digits", reading.load("digits"), True, [])
    assert gather.command(plain) == ("amtml-fast compare digits", False)
    other = gather.Gathered(
        "digits", reading.load("digits", ["distill.epochs=3", "compare.seeds=[7]", "out=/x"]), True, []
    )
    words, save = gather.command(other)
    assert words == "amtml-fast compare digits distill.epochs=3 'compare.seeds=[7]'" and not save
    own = gather.Gathered("mine", reading.load("digits", ["name=mine"]), True, [])
    assert gather.command(own) == ("amtml-fast compare mine.yaml", True)
    assert "out:" not in gather.shown_config(own.config)


@pytest.mark.parametrize(
    ("method", "number", "wanted"),
    [("avg_mkd", 1, " --teachers 1"), ("avg_mkd", 2, " --teachers 2"), ("avg_mkd", 3, ""), ("okd-cnn-wide", 1, "")],
)
def test_how_to_get_a_run_again_names_its_teachers(tmp_path: Path, method: str, number: int, wanted: str) -> None:
    settings = reading.load("digits", [f"out={tmp_path}"])
    recipe = {"teachers": {teacher.name: "" for teacher in settings.teachers[:number]}}
    run = Run(tmp_path / "digits" / "a-run")
    record = {"method": method, "label": "", "student": "student", "seed": 0, "epochs": 1, "recipe": recipe}
    run.start("", record)
    gathered = gather.Gathered("a-run", settings, False, gather.grouped([run], settings))
    assert gather.command(gathered) == (f"amtml-fast distill digits --method {method} --seed 0{wanted}", False)


def test_how_to_get_it_again_has_no_values_of_a_runs_own_method(copied: Path) -> None:
    for folder in ("nasty-seed0", "student-seed0"):
        gathered = gather.gather([copied / folder])
        assert gathered.config.loss == LossConfig(), folder  # nasty trains with hint_weight=0


# --- parts ------------------------------------------------------------------------------------------------------------


def test_the_choice_of_images() -> None:
    sure, unsure = 0.9, 0.6

    def of(*classes: tuple[int, float]) -> list[list[float]]:
        return [[p if c == k else (1 - p) / 2 for k in range(3)] for c, p in classes]

    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    probs = torch.tensor(
        [
            of((0, sure), (1, sure)),  # the second is wrong and gets little
            of((1, sure), (0, unsure)),  # the second is wrong and gets much; the mixture is wrong because of it
            of((0, unsure), (2, unsure)),  # the weights put it right
            of((0, sure), (0, sure)),  # all agree, but the student is wrong
            of((1, sure), (1, sure)),
            of((2, sure), (2, sure)),
            of((1, sure), (1, sure)),  # both are wrong: no weights would help
        ]
    )
    weights = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.3, 0.7], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.9, 0.1]])
    student = torch.tensor(of((0, 0.8), (0, 0.8), (2, 0.8), (1, 0.8), (1, 0.8), (2, 0.8), (1, 0.8)))
    found = {
        choice.why: (choice.index, choice.count) for choice in answers.choose_images(probs, weights, student, labels)
    }
    assert found == {
        "The teachers disagree most": (0, None),
        "A teacher is wrong and gets little weight": (None, 1),  # it is the one above
        "A teacher is wrong and gets much weight": (1, 1),
        "The weights put the mixture right": (2, 1),
        "The weights put the mixture wrong": (None, 1),
        "The mixture is right, the student is wrong": (3, 1),
    }


def test_lines_go_through_their_values() -> None:
    values = np.array([[0.0, 5.0, 10.0], [0.0, 7.0, math.nan]])
    chart = str(svg.lines([svg.Line("<n>", values, "c1")], 'a "b"', size=(320, 190), limits=(0, 10)))
    assert 'aria-label="a &#34;b&#34;"' in chart and "&lt;n&gt; 10.00" in chart and "<n>" not in chart
    (line,) = re.findall(r'class="line c1" d="M([^"]+)"', chart)
    points = [tuple(map(float, point.split())) for point in line.split("L")]
    assert [y for _, y in points] == pytest.approx([170, 170 - 0.6 * 160, 10])  # of the mean, over those that are there
    assert points[0][0] == 36 and points[1][0] == pytest.approx((points[0][0] + points[2][0]) / 2, abs=0.1)
    logs = str(svg.lines([svg.Line("", np.array([[1.0, 10.0, 100.0]]), "c2")], "w", limits=(1, 100), log=True))
    (line,) = re.findall(r'class="line c2" d="M([^"]+)"', logs)
    assert [float(point.split()[1]) for point in line.split("L")] == pytest.approx([170, 90, 10])
    assert len(svg.few(np.arange(1000))) == svg.POINTS and svg.few(np.arange(1000))[-1] == 999
    empty = str(svg.lines([svg.Line("x", np.full((1, 2), math.nan), "c1")], "nothing"))
    assert "nan" not in empty


@pytest.mark.parametrize(("low", "high", "want"), [(0, 1, [0, 0.5, 1]), (81.2, 86.9, [82, 84, 86]), (1, 6, [2, 4, 6])])
def test_ticks_are_round(low: float, high: float, want: list[float]) -> None:
    assert svg.ticks(low, high, 4) == want


def test_the_template_is_packaged() -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    (pattern,) = re.findall(r'"amtml_fast\.train\.report" = \["(.+)"\]', settings)
    assert [path.name for path in Path(page.__file__).parent.glob(pattern)] == ["page.html.j2"]


# --- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
addEventListener("load", () => {
  const frame = document.querySelector("iframe").contentDocument, page = frame.documentElement;
  const charts = [...frame.querySelectorAll("svg.chart, svg.strip, svg.stack")].map((x) => x.getBoundingClientRect());
  const head = [...frame.querySelectorAll("table.sortable th button")].find((x) => x.textContent.includes("accuracy"));
  head.click();
  const cells = [...frame.querySelectorAll("table.sortable tbody tr td:nth-child(2)")].map((x) => Number(x.dataset.v));
  const found = {
    wide: page.scrollWidth, room: frame.defaultView.innerWidth, charts: charts.length, text: frame.body.innerText.length,
    least: Math.min(...charts.map((x) => Math.min(x.width, x.height))), broken: [...frame.images].filter((x) => !x.naturalWidth).length,
    sorted: cells.every((x, i) => i === 0 || cells[i - 1] >= x),
    letters: Math.min(...[...frame.querySelectorAll("svg.chart text")].map((x) => x.getBoundingClientRect().height)),
  };
  document.body.dataset.found = JSON.stringify(found);
});
</script>"""


def browse(profile: Path, *words: str) -> str:
    assert CHROMIUM is not None
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        *quiet,
        "--allow-file-access-from-files",
    ]
    done = subprocess.run(
        [*command, f"--user-data-dir={profile}", *words], capture_output=True, text=True, timeout=120,
        env={**os.environ, "HOME": str(profile)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_all_of_it(whole: tuple[str, Reader], tmp_path: Path, width: int) -> None:
    (tmp_path / "report.html").write_text(whole[0])
    frame = f'<iframe src="report.html" style="border:0;width:{width}px;height:900px"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><body>{frame}{PROBE}")
    dom = browse(tmp_path / "profile", "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "frame.html").as_uri())
    holder = next(attributes for tag, attributes in Reader(dom).tags if tag == "body")
    found = json.loads(holder["data-found"] or "{}")
    assert found["wide"] == found["room"] == width  # nothing sticks out at the side
    assert found["charts"] > 20 and found["least"] > 8 and found["letters"] > 8
    assert found["broken"] == 0 and found["sorted"] and found["text"] > 3000


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_it(whole: tuple[str, Reader], tmp_path: Path) -> None:
    from matplotlib.image import imread

    (tmp_path / "report.html").write_text(whole[0])
    shot = tmp_path / "shot.png"
    browse(tmp_path / "profile", "--window-size=1440,1200", f"--screenshot={shot}", (tmp_path / "report.html").as_uri())
    pixels = imread(shot)[..., :3]
    assert pixels.shape[1] == 1440 and len(np.unique((255 * pixels).astype(int).reshape(-1, 3), axis=0)) > 50
    assert 0.001 < (pixels.mean(-1) < 0.5).mean() < 0.5  # dark letters on a light page
