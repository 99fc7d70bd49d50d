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
from scipy import stats

from amtml_fast.train.figures import charts, curves, drawing, numbers, significance, tables
from amtml_fast.train.figures.markdown import render
from amtml_fast.train.figures.tables import (
    FIELDS,
    Network,
    Row,
    by_mapping,
    by_student,
    by_teachers,
    comparison,
    networks,
    records,
)

HEADER = ["Model", "Parameters", "Test accuracy (%)", "Seeds", "s / epoch"]
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


def test_the_table_of_paired_tests_is_their_numbers():
    ours = Row("amtml_kd", "AMTML-KD", 10, [0.80, 0.82, 0.81])
    other, level = Row("a", "A", 10, [0.78, 0.79, 0.785]), Row("b", "B", 10, [0.80, 0.82, 0.81])
    lines = render(significance.paired_tests(ours, [other, level])).splitlines()
    gaps = [0.02, 0.03, 0.025]
    low, high = stats.t.interval(0.95, 2, statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(3))
    p = stats.ttest_rel(ours.accuracies, other.accuracies).pvalue
    interval = f"{100 * low:+.2f} to {100 * high:+.2f}"
    assert cells(lines[2]) == ["AMTML-KD - A", "+2.50 ± 0.50 points", interval, f"p = {p:.2g}"]
    assert cells(lines[3]) == ["AMTML-KD - B", "+0.00 ± 0.00 points", "-", "-"]
    assert render(significance.paired_tests(Row("c", "C", 10, [0.5]), [Row("d", "D", 10, [0.6])])) == ""
    assert render(significance.paired_tests(ours, [])) == ""


@pytest.mark.parametrize("accuracies", [[], [0.9, 91.0], [-0.1]])
def test_a_row_refuses_what_is_no_fraction(accuracies):
    with pytest.raises(ValueError, match=r"Row 'M': accuracies must"):
        Row("m", "M", 1, accuracies)


def test_paired_difference_cancels_what_seeds_share():
    student, average, ours = rows()
    assert significance.paired_difference(ours, average)[:3] == pytest.approx((0.01, 0.0, 3))
    mean, std, n, *_ = significance.paired_difference(ours, student)
    gaps = [0.03, 0.04, -0.01]
    assert (mean, std, n) == pytest.approx((statistics.fmean(gaps), statistics.stdev(gaps), 3))
    assert str(significance.paired_difference(ours, student)) == "+2.00 ± 2.65 points"
    assert significance.paired_difference(student, ours).mean == pytest.approx(-0.02)
    assert significance.paired_difference(Row("a", "A", 1, [0.5]), Row("b", "B", 1, [0.4])).std is None
    with pytest.raises(ValueError, match="'B' must have 3 seeds like 'AvgMKD', got 1"):
        significance.paired_difference(average, Row("b", "B", 1, [0.4]))


def pair(gaps: list[float]) -> tuple[Row, Row]:
    """Two rows whose accuracies differ by these, seed by seed."""
    base = [0.80 + 0.01 * i for i in range(len(gaps))]
    return Row("a", "A", 1, [x + gap for x, gap in zip(base, gaps, strict=True)]), Row("b", "B", 1, base)


TWO_SIDED = {  # p of Student's t with these degrees of freedom, in closed form
    1: lambda t: 1 - 2 / math.pi * math.atan(abs(t)),
    2: lambda t: 1 - abs(t) / math.sqrt(2 + t * t),
    4: lambda t: 1 - abs(t) * (t * t + 6) / (t * t + 4) ** 1.5,
}


@pytest.mark.parametrize("gaps", [[0.03, 0.01], [0.03, 0.04, -0.01], [-0.02, -0.03, -0.01, -0.025, -0.04]])
def test_the_paired_t_test_by_its_formula(gaps):
    a, b = pair(gaps)
    test = significance.paired_difference(a, b)
    n, error = len(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    t = statistics.fmean(gaps) / error
    assert (test.t, test.p) == pytest.approx((t, TWO_SIDED[n - 1](t)))
    assert (test.low + test.high) / 2 == pytest.approx(statistics.fmean(gaps))
    edge = (test.high - test.low) / 2 / error  # the t beyond which 5 % lie
    assert TWO_SIDED[n - 1](edge) == pytest.approx(0.05)
    theirs = stats.ttest_rel(a.accuracies, b.accuracies)
    assert (test.t, test.p) == pytest.approx((theirs.statistic, theirs.pvalue))
    assert (test.low, test.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


@pytest.mark.parametrize("gap", [0.1, -0.1, 0.0, 1e-16])
def test_equal_differences_have_no_spread_and_so_no_test(gap):
    """Two seeds of a small test set often differ by the same number of images; and 0.1 + 0.2 - 0.2 and its like differ in the
    last bit, which is no spread."""
    test = significance.paired_difference(*pair([gap] * 3))
    assert test == (pytest.approx(gap, abs=1e-12), 0, 3, None, None, None, None)


def test_one_seed_and_a_diverged_one_have_no_p():
    assert significance.paired_difference(*pair([0.1]))[1:] == (None, 1, None, None, None, None)
    a, b = Row("a", "A", 1, [0.9, math.nan, 0.8]), Row("b", "B", 1, [0.9, 0.7, 0.8])
    for test in (significance.paired_difference(a, b), significance.paired_difference(b, a)):
        assert test.n == 3
        assert all(math.isnan(value) for value in (test.mean, test.std, test.t, test.p, test.low, test.high))


@pytest.mark.parametrize(
    ("gaps", "said"),
    [
        ([0.02], "is 2.00 points above B (80.00 %), but one seed cannot tell that from chance"),
        ([-0.02], "is 2.00 points below B (80.00 %), but one seed cannot tell that from chance"),
        ([0.0], "is level with B (80.00 %), but one seed cannot tell that from chance"),
        ([0.03, 0.02, 0.03], "beats B (81.00 %): +2.67 ± 0.58 points over 3 seeds, p = 0.015 (paired t-test)"),
        (
            [-0.03, -0.02, -0.03],
            "falls behind B (81.00 %): -2.67 ± 0.58 points over 3 seeds, p = 0.015 (paired t-test)",
        ),
        ([0.03, 0.01], "cannot be told from B (80.50 %): +2.00 ± 1.41 points over 2 seeds, p = 0.3 (paired t-test)"),
        (
            [0.02, 0.02],
            "is 2.00 points above B (80.50 %), but 2 seeds with the same difference cannot tell that from chance",
        ),
        ([0.0, 0.0], "is level with B (80.50 %), but 2 seeds with the same difference cannot tell that from chance"),
        ([math.nan, 0.1], "cannot be compared with B (80.50 %): a run diverged"),
        ([math.nan], "cannot be compared with B (80.00 %): a run diverged"),
    ],
)
def test_the_verdict_says_what_was_measured_and_whether_it_is_chance(gaps, said):
    assert significance.verdict(*pair(gaps)) == said


def test_a_difference_of_more_than_its_spread_may_still_be_chance():
    """Three seeds: the mean is 1.9 times the deviation, p is 0.08."""
    said = significance.verdict(*pair([0.01, 0.02, 0.027]))
    assert said.startswith("cannot be told from B") and "+1.90 ± 0.85 points" in said


@pytest.mark.parametrize(
    ("p", "said"),
    [(0.0334, "p = 0.033"), (0.0496, "p = 0.0496"), (0.0504, "p = 0.05"), (0.00099, "p < 0.001"), (0.001, "p = 0.001")],
)
def test_p_is_rounded_but_never_over_the_level(p, said):
    assert significance._p(p) == said


# --- formats ----------------------------------------------------------------------------------------------------------


def test_markdown_reads_back_with_only_the_best_student_in_bold():
    lines = render(comparison(rows(), teachers())).splitlines()
    assert cells(lines[0]) == HEADER
    assert set(lines[1]) <= set("|:-")
    assert cells(lines[2]) == ["teacher: cnn-wide", "1,234,567", "99.00", "1", "-"]
    assert cells(lines[3]) == ["Student alone", "75,290", "91.00 ± 2.65", "3", "10.00"]
    assert cells(lines[4]) == ["AvgMKD", "75,290", "92.00 ± 1.00", "3", "12.00"]
    assert cells(lines[5]) == ["AMTML [KD] ¦ ours", "75,290", "**93.00 ± 1.00**", "3", "13.50"]
    assert "sample standard deviation" in lines[-1]


def test_memory_is_a_column_where_it_was_measured():
    assert "memory" not in render(comparison(rows(), teachers()))
    some = rows()
    some[1].peak_memory, some[2].peak_memory = 684_400_000, 1_230_000_000
    lines = [cells(line) for line in render(comparison(some, teachers())).splitlines()[:6]]
    assert lines[0] == [*HEADER, "Peak memory"]
    assert [line[-1] for line in lines[2:]] == ["-", "-", "684 MB", "1.2 GB"]
    plain, _ = printed(tables.terminal(some, teachers()))
    assert "Peak memory" in plain and "684 MB" in plain and "Peak" not in printed(tables.terminal(rows()))[0]
    of_teacher = [Row("t", "t", 1, [0.9], peak_memory=5)]
    assert cells(render(comparison(rows(), of_teacher)).splitlines()[2])[-1] == "5 B"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (9_940_000, "9.9 MB"), (9_960_000, "10 MB"), (84e6, "84 MB")]
    + [(999_600_000, "1.0 GB"), (12_345e6, "12 GB"), (2e15, "2,000 TB")],
)
def test_memory_in_units_of_a_thousand(count, said):
    memory = Row("m", "M", 1, [0.9], peak_memory=int(count))
    assert cells(render(comparison([memory])).splitlines()[2])[-1] == said


def test_rows_of_one_method_are_told_apart_by_what_differs():
    some = [
        Row("s", "Alone", 1, [0.9], student="a"),
        Row("m", "M", 1, [0.9], student="a", teachers=1),
        Row("m", "M", 1, [0.9], student="a", teachers=3),
        Row("k", "K", 1, [0.9], student="a", teachers=3),
    ]
    shown = [cells(line)[0] for line in render(comparison(some)).splitlines()[2:6]]
    assert shown == ["Alone", "M, 1 teacher", "M, 3 teachers", "K"]
    some.append(Row("s", "Alone", 1, [0.9], student="b"))
    shown = [cells(line)[0] for line in render(comparison(some)).splitlines()[2:7]]
    assert shown == ["Alone, a", "M, a, 1 teacher", "M, a, 3 teachers", "K, a", "Alone, b"]


def test_equal_looking_means_are_bold_together():
    tied = [Row("a", "A", 1, [0.90001]), Row("b", "B", 1, [0.90004]), Row("c", "C", 1, [0.8999])]
    lines = render(comparison(tied)).splitlines()
    assert [cells(line)[2] for line in lines[2:5]] == ["**90.00**", "**90.00**", "89.99"]
    assert "One seed" in lines[-1] and "±" not in "".join(lines)


def test_a_diverged_seed_is_shown_and_never_best():
    broken = [Row("a", "A", 1, [math.nan, 0.9]), Row("b", "B", 1, [0.5, 0.6])]
    lines = render(comparison(broken)).splitlines()
    assert [cells(line)[2] for line in lines[2:4]] == ["nan ± nan", "**55.00 ± 7.07**"]


def test_terminal_table_shows_the_best_in_bold_and_labels_as_they_are():
    plain, styled = printed(tables.terminal(rows(), teachers(), title="digits"))
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
    back = list(csv.DictReader(io.StringIO(tables.csv(rows(), teachers()))))
    assert tuple(back[0]) == FIELDS
    assert [line["role"] for line in back] == ["teacher", "student", "student", "student"]
    assert (back[0]["accuracy_std"], back[0]["seconds_per_epoch"]) == ("", "")
    for line, row in zip(back[1:], rows(), strict=True):
        assert (line["method"], line["label"], int(line["parameters"])) == (row.method, row.label, row.parameters)
        assert [float(a) for a in line["accuracies"].split()] == row.accuracies
        assert (float(line["accuracy_mean"]), float(line["accuracy_std"])) == (row.mean, row.std)
        assert (int(line["seeds"]), float(line["seconds_per_epoch"])) == (3, row.seconds_per_epoch)
        assert (line["student"], line["teachers"], line["peak_memory"]) == ("", "", "")
    known = Row("m", "M", 1, [0.9], None, 1_000, "resnet8", 3)
    (line,) = csv.DictReader(io.StringIO(tables.csv([known])))
    assert (line["peak_memory"], line["student"], line["teachers"]) == ("1000", "resnet8", "3")


def test_records_are_the_same_numbers():
    record = records(rows(), teachers())[-1]
    assert tuple(record) == FIELDS
    assert (record["accuracy_mean"], record["accuracies"]) == (pytest.approx(0.93), [0.92, 0.94, 0.93])


# --- a paper's tables -------------------------------------------------------------------------------------------------


def grid(counts=(1, 3), students=("resnet8",), seeds=3, methods=("avg_mkd", "amtml_kd")) -> list[Row]:
    """Methods x students x numbers of teachers, and the student alone."""
    rng = np.random.default_rng(0)
    out = []
    for s, student in enumerate(students):
        accuracies = [0.9 + 0.01 * s + rng.normal(0, 0.001) for _ in range(seeds)]
        out.append(Row("student", "Student alone", 75290 * (s + 1), accuracies, student=student))
        for (m, method), count in itertools.product(enumerate(methods), counts):
            mean = 0.91 + 0.01 * s + 0.004 * m + 0.003 * count
            accuracies = [mean + rng.normal(0, 0.001) for _ in range(seeds)]
            label = LABELS.get(method, f"Method {method} with a long name")
            out.append(Row(method, label, 75290 * (s + 1), accuracies, student=student, teachers=count))
    return out


LABELS = {"avg_mkd": "AvgMKD", "amtml_kd": "AMTML-KD"}


def mean_std(row: Row) -> str:
    return f"{100 * np.mean(row.accuracies):.2f} ± {100 * np.std(row.accuracies, ddof=1):.2f}"


def lines_of(text: str) -> list[list[str]]:
    """The cells of every line of Markdown tables, without the rules."""
    return [cells(line) for line in text.splitlines() if line.startswith("|") and not line.startswith("|:")]


def test_the_table_of_networks():
    text = render(
        networks(
            [
                Network("wide | 32", "teacher", 1_000_000, 0.99127),
                Network("narrow", "teacher", 500_000, math.nan),
                Network("resnet8", "student", 157_000, None),
                Network("tiny", "student", 700, 0.5),
            ]
        )
    )
    assert text.startswith("| Network | Role | Parameters | Compression | Test accuracy (%) |\n|:---|:---|---:")
    assert lines_of(text)[1:] == [
        ["wide ¦ 32", "teacher", "1,000,000", "1.0x", "99.13"],
        ["narrow", "teacher", "500,000", "2.0x", "nan"],
        ["resnet8", "student", "157,000", "6.4x", "-"],
        ["tiny", "student", "700", "1,429x", "50.00"],
    ]
    assert render(networks([])) == ""
    assert lines_of(render(networks([Network("s", "student", 5)])))[1] == ["s", "student", "5", "-", "-"]


def test_methods_by_number_of_teachers():
    alone, avg1, avg3, ours1, ours3 = grid()
    only = Row("okd", "OKD", 75290, [0.5, 0.6, 0.7], student="resnet8", teachers=1)
    text = render(by_teachers([alone, avg3, avg1, ours1, ours3, only]))
    assert "sample standard deviation" in text
    assert lines_of(text) == [
        ["Method", "1 teacher", "3 teachers"],
        ["Student alone", mean_std(alone), mean_std(alone)],  # no teachers: the same in every column
        ["AvgMKD", mean_std(avg1), mean_std(avg3)],
        ["AMTML-KD", f"**{mean_std(ours1)}**", f"**{mean_std(ours3)}**"],
        ["OKD", mean_std(only), "-"],
    ]
    assert render(by_teachers([alone, avg1, ours1])) == "" and render(by_teachers([])) == ""
    assert "one seed: no spread" in render(by_teachers(grid(seeds=1)))


def test_the_best_of_a_column_is_that_columns_and_never_nan():
    rows = [
        Row("a", "A", 1, [0.9], teachers=1),
        Row("a", "A", 1, [0.7], teachers=2),
        Row("a", "A", 1, [0.7], teachers=3),
        Row("b", "B", 1, [0.8], teachers=1),
        Row("b", "B", 1, [math.nan], teachers=2),
        Row("c", "C", 1, [0.90001], teachers=1),
    ]
    assert lines_of(render(by_teachers(rows)))[1:] == [
        ["A", "**90.00**", "**70.00**", "70.00"],  # alone in the last column: nothing was beaten
        ["B", "80.00", "nan", "-"],
        ["C", "**90.00**", "-", "-"],
    ]


def test_one_table_of_teachers_a_student():
    text = render(by_teachers(grid(students=("small", "large"))))
    assert text.count("Test accuracy in percent, mean") == 1 and text.index("Student small:") < text.index(
        "Student large:"
    )
    assert len(lines_of(text)) == 8
    only_small = [row for row in grid(students=("small", "large")) if row.student == "small" or row.teachers != 1]
    text = render(by_teachers(only_small))
    assert "Student small:" in text and "Student large:" not in text


def test_methods_by_student():
    rows = grid(counts=(3,), students=("small", "large"))
    alone, avg, ours, alone2, _, ours2 = rows
    text = render(by_student([row for row in rows if row is not rows[4]]))
    assert text.startswith("| Method") and "With" not in text
    assert lines_of(text) == [
        ["Method", "small (75,290)", "large (150,580)"],
        ["Student alone", mean_std(alone), mean_std(alone2)],
        ["AvgMKD", mean_std(avg), "-"],
        ["AMTML-KD", f"**{mean_std(ours)}**", f"**{mean_std(ours2)}**"],
    ]
    assert render(by_student(grid())) == "" and render(by_student([])) == ""
    assert lines_of(render(by_student([alone, alone2])))[1] == ["Student alone", mean_std(alone), mean_std(alone2)]


def test_one_table_of_students_a_number_of_teachers():
    rows = grid(counts=(1, 3), students=("small", "large"))
    text = render(by_student(rows))
    assert text.index("With 1 teacher:") < text.index("With 3 teachers:") and len(lines_of(text)) == 8
    text = render(by_student([row for row in rows if row.student == "small" or row.teachers != 1]))
    assert "With 3 teachers:" in text and "With 1" not in text  # one student only: nothing to compare


def test_hint_mappings():
    low = Row("amtml_best_low", "AMTML-KD, best teacher low", 1, [0.91, 0.92, 0.93], student="resnet8", teachers=3)
    random = Row("amtml_random", "AMTML-KD, random mapping", 1, [0.93, 0.95, 0.97], student="resnet8", teachers=3)
    ours = grid()[-1]
    text = render(by_mapping([random, *grid(), low]))
    assert lines_of(text) == [
        ["Mapping", "Test accuracy (%)"],
        ["best high", mean_std(ours)],
        ["best low", "92.00 ± 1.00"],
        ["random", "**95.00 ± 2.00**"],
    ]
    assert render(by_mapping(grid())) == "" and render(by_mapping([low])) == "" and render(by_mapping([])) == ""
    few = Row("amtml_random", "random", 1, [0.5], student="resnet8", teachers=1)
    text = render(by_mapping([*grid(), low, few]))
    assert lines_of(text)[0] == ["Mapping", "resnet8, 1 teacher", "resnet8, 3 teachers"]
    assert [line[1:].count("-") for line in lines_of(text)[1:]] == [0, 1, 1]


def test_two_rows_of_one_cell_are_refused():
    for call in (by_teachers, by_student, by_mapping):
        rows = grid(students=("small", "large"))
        with pytest.raises(
            ValueError, match=r"rows must differ.*got two for 'AMTML-KD' with student '.*' and \d teacher"
        ):
            call([*rows, *(row for row in rows if row.method == "amtml_kd")])


# --- pictures ---------------------------------------------------------------------------------------------------------


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
