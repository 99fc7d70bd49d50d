"""Pictures of a comparison: what they show, and no two texts of one meeting."""

import math

import matplotlib
import numpy as np
import pytest
from figure_rows import grid
from matplotlib.figure import Figure
from matplotlib.image import imread
from pictures import shown_texts, unreadable

from amtml_fast.train.figures import charts, curves, drawing, numbers
from amtml_fast.train.figures.tables import Row

CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
TEACHERS = [
    "resnet14-wide-32",
    "resnet20-narrow",
    "small-cnn-two-blocks",
    "densenet121",
    "resnet110-pretrained-elsewhere",
]


def history(
    final: float, *, seeds: int = 3, epochs: int = 10, loss: float = 2.0, teachers: int = 0, led: bool = False
) -> list[list[dict]]:
    """Runs as metrics.jsonl holds them; with teachers, their weights too, and how often each led."""
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
                run[-1] |= {"weight_won": list(share[::-1] / share.sum())} if led else {}
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


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in shown_texts(figure))


@pytest.mark.parametrize(
    ("build", "args"),
    [
        (curves._curves, (histories(),)),
        (curves._curves, (histories(epochs=1, seeds=1),)),
        (curves._curves, ({f"Method {i} of the family": history(0.9) for i in range(6)},)),  # all end at one point
        (curves._curves, ({f"A method with a very long name {i}": history(0.8 + i / 10) for i in range(2)},)),
        (curves._curves, ({f"AMTML-KD, angle trains weights {i}": history(0.9) for i in range(10)},)),
        (curves._curves, ({f"AMTML-KD, no {i}": history(0.8 + i / 200, seeds=1) for i in range(20)},)),
        (curves._entropy, (histories(), TEACHERS[:3])),
        (curves._entropy, ({"AMTML-KD, angle trains weights": history(0.9, teachers=5, led=True)}, TEACHERS)),
        (curves._entropy, ({"A": history(0.9, teachers=3, seeds=5), "B": history(0.9, teachers=3, led=True)}, None)),
        (charts._number_of_teachers, (grid(),)),
        (charts._number_of_teachers, (grid(counts=(1, 2, 3, 5), seeds=5, methods="abcdefgh"),)),
        (charts._number_of_teachers, (grid(counts=(1, 2, 3, 5), seeds=1, students=("a", "b"), methods="abcdefghij"),)),
        (charts._number_of_teachers, (grid(counts=range(1, 13), methods="abcdefgh")[1:],)),
        (charts._accuracies, (grid(),)),
        (charts._accuracies, (grid(counts=(1, 2, 3), seeds=5, methods="abcdefgh"),)),
        (charts._accuracies, (grid(counts=(1, 3), seeds=1, students=("a-wide-one", "b"), methods="abcdef")[:25],)),
        (curves._entropy, ({"A": history(0.9, teachers=5), "B": history(0.8, teachers=2, seeds=1)}, None)),
        (curves._soft_targets, one_of(*examples())),
        (curves._soft_targets, one_of(*examples(count=1))),
        (curves._soft_targets, one_of(*examples(count=5, classes=100))),
        (curves._weights_gallery, examples()),
        (curves._weights_gallery, examples(n=1, count=1)),
        (curves._weights_gallery, examples(n=8, count=5, classes=100)),
    ],
)
def test_no_two_texts_meet_and_none_leaves_the_picture(build, args):
    figure = draw(build, *args)
    assert unreadable(figure) == []
    assert min(t.get_fontsize() for t in shown_texts(figure)) >= 8


def test_pictures_are_written_and_follow_the_data(tmp_path):
    images, names, probs, weights, labels, teacher_names = examples(n=2)
    one, other = tmp_path / "new" / "one.png", tmp_path / "other.png"
    changed = {**histories(), "AvgMKD": history(0.7)}
    calls = [
        (lambda path, h: curves.curves(h, path), histories(), changed),
        (
            lambda path, h: curves.entropy(h, path, teacher_names),
            histories(),
            {"X": history(0.9, teachers=3, epochs=7)},
        ),
        (lambda path, r: charts.number_of_teachers(r, path), grid(), grid()[1:]),
        (lambda path, r: charts.accuracies(r, path), grid(), grid()[1:]),
        (
            lambda path, w: curves.soft_targets(images[0], names, probs[0], w, labels[0], path, teacher_names),
            weights[0],
            weights[1],
        ),
        (
            lambda path, w: curves.weights_gallery(images, names, probs, w, labels, path, teacher_names),
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
    curves.curves(histories(), one)
    curves.curves(histories(), other)
    assert one.read_bytes() == other.read_bytes()


def test_no_global_state_is_left(tmp_path):
    before = dict(matplotlib.rcParams)
    curves.curves(histories(), tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before


def test_mixtures_are_mixtures_of_probabilities():
    """The authors' Figure 4: 0.57, 0.31, 0.12 with weights 0.70, 0.25, 0.05 make 0.48 (equal weights: 0.33)."""
    probs = np.array([[0.57, 0.43], [0.31, 0.69], [0.12, 0.88]])
    weights = np.array([0.70, 0.25, 0.05])
    image = np.zeros((8, 8), np.uint8)
    said = words(draw(curves._soft_targets, image, ["plane", "dog"], probs, weights, 0, TEACHERS[:3]))
    assert "The adaptive mixture gives the true class 0.48, the equal one 0.33" in said
    gallery = words(
        draw(curves._weights_gallery, [image], ["plane", "dog"], probs[None], weights[None], [0], TEACHERS[:3])
    )
    assert "0.48" in gallery and "0.57" in gallery and "0.70" in gallery


def test_the_true_class_is_always_shown():
    probs = np.full((1, 100), 1 / 200)
    probs[0, :20] = np.linspace(0.05, 0.03, 20)
    names = [f"class {c}" for c in range(100)]
    image = np.zeros((3, 8, 8))
    said = words(draw(curves._soft_targets, image, names, probs, np.ones(1), 77, ["t"])).splitlines()
    assert said.count("class 77") == 2 and "class 8" in said and "class 9" not in said  # once below the image
    said = words(draw(curves._weights_gallery, [image], names, probs[None], np.ones((1, 1)), [77], ["t"])).splitlines()
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
    assert finding in words(draw(curves._curves, runs))


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
    assert finding in words(draw(curves._entropy, {"AMTML-KD": [run]}, None))


def test_the_oracle_is_in_no_title():
    """It knows every label, so it is shown and competes with nobody, as in the tables."""
    runs = {
        k: [[{"epoch": 1, "loss": 1.0, "val_accuracy": a}]] for k, a in {"A": 0.8, "B": 0.9, "oracle": 0.95}.items()
    }
    assert "B ends at 90.0 % validation accuracy, 10.0 points above A" in words(draw(curves._curves, runs))
    best = [Row("oracle", "oracle", 1, [0.99, 0.98, 0.99], student="resnet8", teachers=count) for count in (1, 3)]
    said = words(draw(charts._number_of_teachers, [*grid(), *best]))
    assert "AMTML-KD is highest with every number of teachers" in said
    titles = said.splitlines()
    assert "oracle" in titles  # in the legend


def test_no_mean_weight_is_cut_off():
    """A teacher that leads early and falls back stays inside the picture."""
    shares = [[0.5, 0.5], [0.98, 0.02], [0.6, 0.4]]
    run = [{"epoch": i + 1, "entropy": 0.5, "weight_mean": share} for i, share in enumerate(shares)]
    axes = draw(curves._entropy, {"AMTML-KD": [run]}, None).axes[1]
    assert axes.get_ylim()[1] > 0.98


def test_the_title_of_the_gallery_says_which_teacher_leads():
    images, names, probs, _, labels, teacher_names = examples(n=2)
    for weights, finding in [
        ([[0.2, 0.7, 0.1], [0.6, 0.2, 0.2]], "changes with the image: T1 on 1, T2 on 1 of 2"),
        ([[0.2, 0.7, 0.1], [0.2, 0.6, 0.2]], "Largest weight: T2 (resnet20-narrow), on all 2 images"),
        ([[1 / 3] * 3] * 2, "The teachers weigh the same on every image (0.33 each)"),
    ]:
        said = words(draw(curves._weights_gallery, images, names, probs, weights, labels, teacher_names))
        assert finding in said


def test_unfinished_and_diverged_runs_are_drawn_as_far_as_they_go():
    runs = history(0.9)
    runs[1] = runs[1][:4]
    runs[2][-1] = {"epoch": 10, "loss": math.inf, "val_accuracy": 0.1}
    del runs[0][2]["val_accuracy"]
    loss, accuracy = (axes.lines[0].get_data()[1] for axes in draw(curves._curves, {"A": runs}).axes)
    assert loss[-1] == pytest.approx(runs[0][-1]["loss"])  # of the three, one stopped early and one diverged
    assert accuracy[-1] == pytest.approx(100 * (runs[0][-1]["val_accuracy"] + 0.1) / 2)
    assert accuracy[2] == pytest.approx(100 * (runs[1][2]["val_accuracy"] + runs[2][2]["val_accuracy"]) / 2)


def bars_of(axes) -> list[tuple[float, float]]:
    """(center, height) of every bar, from the left."""
    return sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches)


def test_bars_by_number_of_teachers_hold_the_rows():
    alone, avg1, avg3, ours1, ours3 = rows = grid()
    figure = draw(charts._number_of_teachers, rows)
    legend, axes = figure.axes
    places = bars_of(axes)
    assert [height for _, height in places] == pytest.approx([100 * r.mean for r in (avg1, ours1, avg3, ours3)])
    assert [round(place) for place, _ in places] == [0, 0, 1, 1]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "3"]
    spreads = [np.ptp(bar.get_segments()[0][:, 1]) / 2 for bar in axes.collections]
    assert spreads == pytest.approx([100 * row.std for row in (avg1, avg3, ours1, ours3)])
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == pytest.approx([100 * alone.mean])
    assert [text.get_text() for text in legend.texts] == ["AvgMKD", "AMTML-KD"]
    said = words(figure)
    assert all(f"{100 * row.mean:.2f}" in said for row in rows)
    start = axes.get_ylim()[0]
    assert start > 50 and f"axis starts at {start:g} %; dashed: without teachers" in said
    assert axes.get_ylim()[0] < min(100 * (row.mean - row.std) for row in rows)


def test_bars_from_zero_say_so_and_a_diverged_mean_has_none():
    rows = [Row("a", "A", 1, [v], teachers=t) for t, v in ((1, 0.05), (2, 0.9), (3, math.nan))]
    figure = draw(charts._number_of_teachers, rows)
    assert figure.axes[1].get_ylim()[0] == 0 and "axis starts at 0" in words(figure).splitlines()
    assert [height for _, height in bars_of(figure.axes[1])] == pytest.approx([5, 90])
    assert "nan" in words(figure).splitlines() and "dashed" not in words(figure)


def test_a_method_with_one_number_of_teachers_is_left_out_of_the_bars():
    only = Row("okd", "OKD", 75290, [0.99], student="resnet8", teachers=1)
    figure = draw(charts._number_of_teachers, [*grid(), only])
    assert "OKD" not in words(figure) and len(bars_of(figure.axes[1])) == 4
    assert "methods with one number of teachers are left out" in words(figure)
    assert "left out" not in words(draw(charts._number_of_teachers, grid()))


def test_of_too_many_methods_the_best_are_drawn():
    figure = draw(charts._number_of_teachers, grid(methods="abcdefghij"))
    said = words(figure)
    assert "the best 8 of 10 methods" in said
    assert [text.get_text()[7] for text in figure.axes[0].texts] == list("cdefghij")
    assert "the best" not in words(draw(charts._number_of_teachers, grid(methods="abcdefgh")))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([[0.90, 0.91], [0.91, 0.92]], [[0.95, 0.96], [0.96, 0.97]], "B is highest with every number of teachers, beyond the seeds' spread"),
        ([[0.90, 0.91], [0.91, 0.92]], [[0.95, 0.96], [0.90, 0.93]], "B is highest in 1 of 2 groups, beyond the seeds' spread"),
        ([[0.90, 0.91], [0.91, 0.92]], [[0.90, 0.92], [0.90, 0.94]], "every number of teachers, beyond the seeds' spread in none of 2"),
        ([[0.90, 0.91], [0.91, 0.92]], [[0.95, 0.96], [0.90, 0.94]], "every number of teachers, beyond the seeds' spread in 1 of 2"),
        ([[0.90], [0.91]], [[0.95], [0.90]], "The best method changes with the number of teachers"),
        ([[0.90], [0.91]], [[0.95], [0.93]], "B is highest with every number of teachers"),
        ([[0.90], [0.91]], [[0.90], [0.91]], "Accuracy by the number of teachers"),
        ([[0.90], [0.91]], [[math.nan], [0.92]], "B is highest in 1 of 2 groups"),
    ],
)  # fmt: skip
def test_the_title_of_the_bars_says_what_is_seen(a, b, said):
    rows = [
        Row(name, name, 1, each, teachers=t)
        for name, both in (("A", a), ("B", b))
        for t, each in zip((1, 2), both, strict=True)
    ]
    assert said in words(draw(charts._number_of_teachers, rows))


def test_a_picture_of_every_seed():
    rows = [
        Row("a", "A", 1, [0.90, 0.92]),
        Row("b", "B", 1, [0.95, 0.97]),
        Row("c", "C", 1, [0.99, math.nan]),
        Row("d", "D", 1, [0.93]),
    ]
    figure = draw(charts._accuracies, rows)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["B", "D", "A", "C"]  # diverged: last
    dots = [sorted(points.get_offsets().tolist()) for points in axes.collections]
    assert [[round(x, 6) for x, _ in points] for points in dots] == [[95, 97], [93], [90, 92], [99]]
    assert [{y for _, y in points} for points in dots] == [{0}, {1}, {2}, {3}]
    assert [line.get_xdata()[0] for line in axes.lines] == pytest.approx([96, 91])
    assert [np.mean(line.get_ydata()) for line in axes.lines] == pytest.approx([0, 2])
    said = words(figure).splitlines()
    assert {"96.00 ± 1.41", "91.00 ± 1.41", "93.00", "nan ± nan"} <= set(said)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the best at the top


@pytest.mark.parametrize(
    ("finals", "said"),
    [
        ({"A": [0.80, 0.82], "B": [0.90, 0.92]}, "B is highest, 10.00 points above A"),
        ({"A": [0.80, 0.91], "B": [0.90, 0.92]}, "B has the highest mean, within the seeds' range of A"),
        ({"A": [0.90], "B": [0.90001]}, "B and A are level (90.00 %)"),
        ({"A": [0.90], "B": [math.nan]}, "A reaches 90.00 % on the test set"),
        ({"B": [math.nan]}, "Every method has a run that diverged"),
    ],
)
def test_the_title_of_every_seed_says_what_is_seen(finals, said):
    figure = draw(charts._accuracies, [Row(k, k, 1, v) for k, v in finals.items()])
    assert said in words(figure)
    assert ("one seed: no spread" in words(figure)) == (len(finals["B"]) == 1)


def test_of_many_curves_the_highest_are_named():
    finals = {f"Method {i}": 0.80 + 0.01 * ((7 * i) % 20) for i in range(20)}
    figure = draw(curves._curves, {label: history(final, seeds=1) for label, final in finals.items()})
    named = sorted(finals, key=lambda label: -finals[label])[:7]
    said = words(figure).splitlines()
    assert [label for label in finals if any(line.startswith(f"{label} 9") for line in said)] == [
        label for label in finals if label in named
    ]
    assert "gray: 13 other methods that end lower" in words(figure)
    for axes in figure.axes:
        assert len(axes.lines) == 20 and [line.get_color() for line in axes.lines].count(drawing.OTHERS) == 13
    seven = draw(curves._curves, {f"Method {i}": history(0.9) for i in range(7)})
    assert "gray" not in words(seven) and len({line.get_color() for line in seven.axes[1].lines}) == 7


def test_the_share_of_examples_that_a_teacher_leads():
    runs = [
        [{"epoch": e, "entropy": 0.5, "weight_mean": [0.5, 0.5], "weight_won": won} for e, won in enumerate(each, 1)]
        for each in ([[0.5, 0.5], [0.9, 0.1]], [[0.5, 0.5], [0.7, 0.3]])
    ]
    figure = draw(curves._entropy, {"AMTML-KD": runs}, ["wide", "narrow"])
    led = figure.axes[2]
    assert np.array([line.get_ydata() for line in led.lines[:2]]) == pytest.approx(np.array([[0.5, 0.8], [0.5, 0.2]]))
    assert {"wide\n0.80", "narrow\n0.20", "Largest weight", "on this share of the examples"} <= {
        text.get_text() for text in led.texts
    }


def test_wrong_shapes_are_named():
    images, names, probs, weights, labels, teacher_names = examples()
    with pytest.raises(ValueError, match=r"soft_targets: teacher_probs must be \[3, 10\].*got \[4, 3, 10\]"):
        curves._soft_targets(images[0], names, probs, weights[0], 0, teacher_names)
    with pytest.raises(ValueError, match=r"weights_gallery: weights must be \[4, 3\], got \[3\]"):
        curves._weights_gallery(images, names, probs, weights[0], labels, teacher_names)
    with pytest.raises(ValueError, match="images must be as many as labels"):
        curves._weights_gallery(images[:2], names, probs, weights, labels, teacher_names)
    with pytest.raises(ValueError, match="no epoch with an 'entropy' in the histories of"):
        curves._entropy({"AvgMKD": history(0.9)}, None)
    with pytest.raises(ValueError, match="curves: histories must hold epochs"):
        curves._curves({"A": []})
    with pytest.raises(
        ValueError, match=r"number_of_teachers: rows must hold a method with two numbers.*got \['3 teachers'\]"
    ):
        charts._number_of_teachers(grid(counts=(3,)))
    with pytest.raises(ValueError, match="accuracies: rows must hold at least one, got none"):
        charts._accuracies([])


def test_spread_keeps_what_fits_and_parts_what_does_not():
    assert numbers.spread([0.2, 0.8], [0.1, 0.1]) == pytest.approx([0.2, 0.8])
    assert numbers.spread([0.52, 0.48], [0.1, 0.1]) == pytest.approx([0.55, 0.45])
    places = numbers.spread([1.0, 1.0, 0.97], [0.1, 0.2, 0.1])
    assert max(p + h / 2 for p, h in zip(places, [0.1, 0.2, 0.1], strict=True)) <= 1.03 + 1e-9
    assert sorted(places) == [places[2], places[0], places[1]]
