"""Tables and pictures of a comparison: the arithmetic, the formats read back, and no two texts of a picture meeting."""

import csv
import io
import itertools
import math
import statistics

import matplotlib
import numpy as np
import pytest

pytest.importorskip("rich")
from matplotlib.axis import Tick
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text
from rich.console import Console

from amtml_fast.train import drawing, figures, report
from amtml_fast.train.report import Row

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
TEACHERS = [
    "resnet14-wide-32",
    "resnet20-narrow",
    "small-cnn-two-blocks",
    "densenet121",
    "resnet110-pretrained-elsewhere",
]


def rows() -> list[Row]:
    return [
        Row("student", "Student alone", 75290, [0.89, 0.90, 0.94], 10.0),
        Row("avg_mkd", "AvgMKD", 75290, [0.91, 0.93, 0.92], 12.0),
        Row("amtml_kd", "AMTML [KD] | ours", 75290, [0.92, 0.94, 0.93], 13.5),
    ]


def teachers() -> list[Row]:
    return [Row("wide", "cnn-wide", 1234567, [0.99])]


def printed(table) -> tuple[str, str]:
    """The table as plain text, and with its ANSI styles."""
    plain, styled = io.StringIO(), io.StringIO()
    Console(file=plain, width=120, force_terminal=False).print(table)
    Console(file=styled, width=120, force_terminal=True, color_system="standard", legacy_windows=False).print(table)
    return plain.getvalue(), styled.getvalue()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("\\|", "¦").strip("| ").split(" | ")]


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_mean_and_sample_std():
    row = Row("m", "M", 1, [0.89, 0.90, 0.94])
    assert row.mean == pytest.approx(0.91)
    assert row.std == pytest.approx(math.sqrt((0.02**2 + 0.01**2 + 0.03**2) / 2))  # ddof = 1: over n - 1
    assert Row("m", "M", 1, [0.9]).std is None


@pytest.mark.parametrize("accuracies", [[], [0.9, 91.0], [-0.1]])
def test_a_row_refuses_what_is_no_fraction(accuracies):
    with pytest.raises(ValueError, match=r"Row 'M': accuracies must"):
        Row("m", "M", 1, accuracies)


def test_paired_difference_cancels_what_seeds_share():
    student, average, ours = rows()
    assert report.paired_difference(ours, average) == pytest.approx((0.01, 0.0, 3))
    mean, std, n = report.paired_difference(ours, student)
    gaps = [0.03, 0.04, -0.01]
    assert (mean, std, n) == pytest.approx((statistics.fmean(gaps), statistics.stdev(gaps), 3))
    assert str(report.paired_difference(ours, student)) == "+2.00 ± 2.65 points"
    assert report.paired_difference(student, ours).mean == pytest.approx(-0.02)
    assert report.paired_difference(Row("a", "A", 1, [0.5]), Row("b", "B", 1, [0.4])).std is None
    with pytest.raises(ValueError, match="'B' must have 3 seeds like 'AvgMKD', got 1"):
        report.paired_difference(average, Row("b", "B", 1, [0.4]))


# --- formats ----------------------------------------------------------------------------------------------------------


def test_markdown_reads_back_with_only_the_best_student_in_bold():
    lines = report.markdown(rows(), teachers()).splitlines()
    assert cells(lines[0]) == list(report.HEADER)
    assert set(lines[1]) <= set("|:-")
    assert cells(lines[2]) == ["teacher: cnn-wide", "1,234,567", "99.00", "1", "-"]
    assert cells(lines[3]) == ["Student alone", "75,290", "91.00 ± 2.65", "3", "10.00"]
    assert cells(lines[4]) == ["AvgMKD", "75,290", "92.00 ± 1.00", "3", "12.00"]
    assert cells(lines[5]) == ["AMTML [KD] ¦ ours", "75,290", "**93.00 ± 1.00**", "3", "13.50"]
    assert "sample standard deviation" in lines[-1]


def test_equal_looking_means_are_bold_together():
    tied = [Row("a", "A", 1, [0.90001]), Row("b", "B", 1, [0.90004]), Row("c", "C", 1, [0.8999])]
    lines = report.markdown(tied).splitlines()
    assert [cells(line)[2] for line in lines[2:5]] == ["**90.00**", "**90.00**", "89.99"]
    assert "One seed" in lines[-1] and "±" not in "".join(lines)


def test_a_diverged_seed_is_shown_and_never_best():
    broken = [Row("a", "A", 1, [math.nan, 0.9]), Row("b", "B", 1, [0.5, 0.6])]
    lines = report.markdown(broken).splitlines()
    assert [cells(line)[2] for line in lines[2:4]] == ["nan ± nan", "**55.00 ± 7.07**"]


def test_terminal_table_shows_the_best_in_bold_and_labels_as_they_are():
    plain, styled = printed(report.table(rows(), teachers(), title="digits"))
    for text in (
        "digits",
        "cnn-wide",
        "99.00 ",
        "91.00 ± 2.65",
        "93.00 ± 1.00",
        "AMTML [KD] | ours",
        "75,290",
        "13.50",
    ):
        assert text in plain
    bold = "\x1b[1m"
    assert f"{bold}93.00 ± 1.00" in styled
    assert f"{bold}AMTML" in styled
    assert not any(f"{bold}{text}" in styled for text in ("92.00", "91.00", "99.00", "AvgMKD"))


def test_csv_reads_back_exactly():
    back = list(csv.DictReader(io.StringIO(report.csv(rows(), teachers()))))
    assert tuple(back[0]) == report.FIELDS
    assert [line["role"] for line in back] == ["teacher", "student", "student", "student"]
    assert (back[0]["accuracy_std"], back[0]["seconds_per_epoch"]) == ("", "")
    for line, row in zip(back[1:], rows(), strict=True):
        assert (line["method"], line["label"], int(line["parameters"])) == (row.method, row.label, row.parameters)
        assert [float(a) for a in line["accuracies"].split()] == row.accuracies
        assert (float(line["accuracy_mean"]), float(line["accuracy_std"])) == (row.mean, row.std)
        assert (int(line["seeds"]), float(line["seconds_per_epoch"])) == (3, row.seconds_per_epoch)


def test_records_are_the_same_numbers():
    record = report.records(rows(), teachers())[-1]
    assert tuple(record) == report.FIELDS
    assert (record["accuracy_mean"], record["accuracies"]) == (pytest.approx(0.93), [0.92, 0.94, 0.93])


# --- pictures ---------------------------------------------------------------------------------------------------------


def history(
    final: float, *, seeds: int = 3, epochs: int = 10, loss: float = 2.0, teachers: int = 0
) -> list[list[dict]]:
    """Runs as metrics.jsonl holds them; with teachers, their weights too."""
    rng = np.random.default_rng(round(1000 * final))
    runs = []
    for _ in range(seeds):
        run: list[dict] = []
        for epoch in range(1, epochs + 1):
            accuracy = final - 0.4 * math.exp(-epoch) + rng.normal(0, 0.003)
            run.append({"epoch": epoch, "loss": loss * (0.2 + math.exp(-epoch / 2)), "val_accuracy": accuracy})
            if teachers:
                share = np.linspace(1, 2, teachers)
                run[-1] |= {"entropy": 0.97 - 0.01 * epoch, "weight_mean": list(share / share.sum())}
        runs.append(run)
    return runs


def histories(epochs: int = 10, seeds: int = 3, count: int = 3) -> dict:
    return {
        "Student alone": history(0.893, epochs=epochs, seeds=seeds, loss=1),
        "AvgMKD": history(0.896, epochs=epochs, seeds=seeds, loss=9),
        "AMTML-KD": history(0.897, epochs=epochs, seeds=seeds, loss=12, teachers=count),
    }


def examples(n: int = 4, count: int = 3, classes: int = 10, seed: int = 0):
    """(images, class names, teacher_probs, weights, labels, teacher names)"""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, count, classes))
    logits[np.arange(n), :, labels] += 2
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    names = CLASSES if classes == 10 else [f"a long class name {i}" for i in range(classes)]
    images = rng.integers(0, 256, (n, 1, 28, 28)).astype(np.uint8)
    return images, names, probs, rng.dirichlet([1] * count, n), labels, TEACHERS[:count]


def one_of(images, names, probs, weights, labels, teacher_names, i=0):
    return images[i], names, probs[i], weights[i], int(labels[i]), teacher_names


def draw(build, *args) -> Figure:
    with matplotlib.rc_context(drawing.STYLE):
        figure = build(*args)
        figure.draw_without_rendering()
    return figure


def shown_texts(figure: Figure) -> list[Text]:
    """Every text that is drawn: tick labels outside their axis are not."""
    hidden = set()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in axis.findobj(Tick):
                if not min(low, high) <= tick.get_loc() <= max(low, high):
                    hidden |= {tick.label1, tick.label2}
    texts = [text for text in figure.findobj(Text) if text not in hidden]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in shown_texts(figure))


@pytest.mark.parametrize(
    ("build", "args"),
    [
        (figures._curves, (histories(),)),
        (figures._curves, (histories(epochs=1, seeds=1),)),
        (figures._curves, ({f"Method {i} of the family": history(0.9) for i in range(6)},)),  # all end at one point
        (figures._curves, ({f"A method with a very long name {i}": history(0.8 + i / 10) for i in range(2)},)),
        (figures._entropy, (histories(), TEACHERS[:3])),
        (figures._entropy, ({"A": history(0.9, teachers=5), "B": history(0.8, teachers=2, seeds=1)}, None)),
        (figures._soft_targets, one_of(*examples())),
        (figures._soft_targets, one_of(*examples(count=1))),
        (figures._soft_targets, one_of(*examples(count=5, classes=100))),
        (figures._weights_gallery, examples()),
        (figures._weights_gallery, examples(n=1, count=1)),
        (figures._weights_gallery, examples(n=8, count=5, classes=100)),
    ],
)
def test_no_two_texts_meet_and_none_leaves_the_picture(build, args):
    figure = draw(build, *args)
    boxes = [(t.get_text(), Text.get_window_extent(t)) for t in shown_texts(figure)]
    for (text, box), (other, box2) in itertools.combinations(boxes, 2):
        wide = min(box.x1, box2.x1) - max(box.x0, box2.x0)
        high = min(box.y1, box2.y1) - max(box.y0, box2.y0)
        assert wide < 1 or high < 4, f"{text!r} lies over {other!r}"  # boxes hold empty room above and below letters
    whole = figure.bbox
    for text, box in boxes:
        inside = box.x0 >= whole.x0 and box.x1 <= whole.x1 and box.y0 >= whole.y0 and box.y1 <= whole.y1
        assert inside, f"{text!r} leaves the picture"
    assert min(t.get_fontsize() for t in shown_texts(figure)) >= 8


def test_pictures_are_written_and_follow_the_data(tmp_path):
    images, names, probs, weights, labels, teacher_names = examples(n=2)
    one, other = tmp_path / "new" / "one.png", tmp_path / "other.png"
    changed = {**histories(), "AvgMKD": history(0.7)}
    calls = [
        (lambda path, h: report.curves(h, path), histories(), changed),
        (
            lambda path, h: report.entropy(h, path, teacher_names),
            histories(),
            {"X": history(0.9, teachers=3, epochs=7)},
        ),
        (
            lambda path, w: report.soft_targets(images[0], names, probs[0], w, labels[0], path, teacher_names),
            weights[0],
            weights[1],
        ),
        (
            lambda path, w: report.weights_gallery(images, names, probs, w, labels, path, teacher_names),
            weights,
            weights[::-1],
        ),
    ]
    for call, data, different in calls:
        call(one, data)
        first = one.read_bytes()
        call(other, different)
        assert first[:8] == b"\x89PNG\r\n\x1a\n" and len(first) > 15_000
        assert first != other.read_bytes()
        assert 1150 <= imread(one).shape[1] <= 1250  # 8 inches at 150 dpi
    report.curves(histories(), one)
    report.curves(histories(), other)
    assert one.read_bytes() == other.read_bytes()


def test_no_global_state_is_left(tmp_path):
    before = dict(matplotlib.rcParams)
    report.curves(histories(), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def test_mixtures_are_mixtures_of_probabilities():
    """The authors' Figure 4: 0.57, 0.31, 0.12 with weights 0.70, 0.25, 0.05 make 0.48 (equal weights: 0.33)."""
    probs = np.array([[0.57, 0.43], [0.31, 0.69], [0.12, 0.88]])
    weights = np.array([0.70, 0.25, 0.05])
    image = np.zeros((8, 8), np.uint8)
    said = words(draw(figures._soft_targets, image, ["plane", "dog"], probs, weights, 0, TEACHERS[:3]))
    assert "The adaptive mixture gives the true class 0.48, the equal one 0.33" in said
    gallery = words(
        draw(figures._weights_gallery, [image], ["plane", "dog"], probs[None], weights[None], [0], TEACHERS[:3])
    )
    assert "0.48" in gallery and "0.57" in gallery and "0.70" in gallery


def test_the_true_class_is_always_shown():
    probs = np.full((1, 100), 1 / 200)
    probs[0, :20] = np.linspace(0.05, 0.03, 20)
    names = [f"class {c}" for c in range(100)]
    image = np.zeros((3, 8, 8))
    said = words(draw(figures._soft_targets, image, names, probs, np.ones(1), 77, ["t"])).splitlines()
    assert said.count("class 77") == 2 and "class 8" in said and "class 9" not in said  # once below the image
    said = words(draw(figures._weights_gallery, [image], names, probs[None], np.ones((1, 1)), [77], ["t"])).splitlines()
    assert "class 77" in said and "class 2" in said and "class 3" not in said


@pytest.mark.parametrize(
    ("finals", "finding"),
    [
        ({"A": [0.80, 0.82], "B": [0.90, 0.92]}, "B ends at 91.0 % validation accuracy, 10.0 points above A"),
        ({"A": [0.80, 0.91], "B": [0.90, 0.92]}, "B ends highest (91.0 %), but within the seeds' range of A"),
        ({"A": [0.90, 0.92], "B": [0.92, 0.90]}, "A ends at 91.0 % validation accuracy, level with B"),
        ({"A": [0.90]}, "A ends at 90.0 % validation accuracy"),
    ],
)
def test_the_title_of_the_curves_says_what_is_seen(finals, finding):
    runs = {k: [[{"epoch": 1, "loss": 1.0, "val_accuracy": a}] for a in v] for k, v in finals.items()}
    assert finding in words(draw(figures._curves, runs))


@pytest.mark.parametrize(
    ("values", "finding"),
    [
        ([0.9, 0.99995], "collapsed to equal: last entropy above 0.999"),
        ([0.9, 0.002], "collapsed to one teacher an image"),
        ([0.9, 0.95], "entropy 0.95, close to equal"),
        ([0.9, 0.5], "entropy 0.50"),
    ],
)
def test_the_title_of_the_entropy_says_what_is_seen(values, finding):
    run = [{"epoch": i + 1, "entropy": v, "weight_mean": [0.5, 0.5]} for i, v in enumerate(values)]
    assert finding in words(draw(figures._entropy, {"AMTML-KD": [run]}, None))


def test_no_mean_weight_is_cut_off():
    """A teacher that leads early and falls back stays inside the picture."""
    shares = [[0.5, 0.5], [0.98, 0.02], [0.6, 0.4]]
    run = [{"epoch": i + 1, "entropy": 0.5, "weight_mean": share} for i, share in enumerate(shares)]
    axes = draw(figures._entropy, {"AMTML-KD": [run]}, None).axes[1]
    assert axes.get_ylim()[1] > 0.98


def test_the_title_of_the_gallery_says_which_teacher_leads():
    images, names, probs, _, labels, teacher_names = examples(n=2)
    for weights, finding in [
        ([[0.2, 0.7, 0.1], [0.6, 0.2, 0.2]], "changes with the image: T1 on 1, T2 on 1 of 2"),
        ([[0.2, 0.7, 0.1], [0.2, 0.6, 0.2]], "Largest weight: T2 (resnet20-narrow), on all 2 images"),
        ([[1 / 3] * 3] * 2, "The teachers weigh the same on every image (0.33 each)"),
    ]:
        said = words(draw(figures._weights_gallery, images, names, probs, weights, labels, teacher_names))
        assert finding in said


def test_unfinished_and_diverged_runs_are_drawn_as_far_as_they_go():
    runs = history(0.9)
    runs[1] = runs[1][:4]
    runs[2][-1] = {"epoch": 10, "loss": math.inf, "val_accuracy": 0.1}
    del runs[0][2]["val_accuracy"]
    loss, accuracy = (axes.lines[0].get_data()[1] for axes in draw(figures._curves, {"A": runs}).axes)
    assert loss[-1] == pytest.approx(runs[0][-1]["loss"])  # of the three, one stopped early and one diverged
    assert accuracy[-1] == pytest.approx(100 * (runs[0][-1]["val_accuracy"] + 0.1) / 2)
    assert accuracy[2] == pytest.approx(100 * (runs[1][2]["val_accuracy"] + runs[2][2]["val_accuracy"]) / 2)


def test_wrong_shapes_are_named():
    images, names, probs, weights, labels, teacher_names = examples()
    with pytest.raises(ValueError, match=r"soft_targets: teacher_probs must be \[3, 10\].*got \[4, 3, 10\]"):
        figures._soft_targets(images[0], names, probs, weights[0], 0, teacher_names)
    with pytest.raises(ValueError, match=r"weights_gallery: weights must be \[4, 3\], got \[3\]"):
        figures._weights_gallery(images, names, probs, weights[0], labels, teacher_names)
    with pytest.raises(ValueError, match="images must be as many as labels"):
        figures._weights_gallery(images[:2], names, probs, weights, labels, teacher_names)
    with pytest.raises(ValueError, match="no epoch with an 'entropy' in the histories of"):
        figures._entropy({"AvgMKD": history(0.9)}, None)
    with pytest.raises(ValueError, match="curves: histories must hold epochs"):
        figures._curves({"A": []})


def test_spread_keeps_what_fits_and_parts_what_does_not():
    assert drawing.spread([0.2, 0.8], [0.1, 0.1]) == pytest.approx([0.2, 0.8])
    assert drawing.spread([0.52, 0.48], [0.1, 0.1]) == pytest.approx([0.55, 0.45])
    places = drawing.spread([1.0, 1.0, 0.97], [0.1, 0.2, 0.1])
    assert max(p + h / 2 for p, h in zip(places, [0.1, 0.2, 0.1], strict=True)) <= 1.03 + 1e-9
    assert sorted(places) == [places[2], places[0], places[1]]
