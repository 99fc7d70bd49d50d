"""Tables of a comparison, in every format: read back."""

import csv
import io
import math

import numpy as np
import pytest
from figure_rows import cells, grid, rows, teachers
from rich.console import Console

from amtml_fast.train.figures import tables
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


def printed(table) -> tuple[str, str]:
    """The table as plain text, and with its ANSI styles."""
    plain, styled = io.StringIO(), io.StringIO()
    Console(file=plain, width=120, force_terminal=False).print(table)
    Console(file=styled, width=120, force_terminal=True, color_system="standard", legacy_windows=False).print(table)
    return plain.getvalue(), styled.getvalue()


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
