"""Tables of a comparison, as cells, for the terminal and as CSV; markdown.py and the page write the cells.

Pure: numbers in, text out; nothing of the training code is imported. Accuracies come in as fractions and are shown in
percent as mean ± sample standard deviation (ddof = 1) over the seeds; one seed has no deviation. The best mean among
the students is bold, and so is every other one that prints the same two decimals. Teachers are listed for scale and
never compete.
"""

from __future__ import annotations

import csv as csvlib
import io
import math
import re
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import rich.table
from rich.text import Text

HEADER = ("Model", "Parameters", "{} accuracy (%)", "Seeds", "s / epoch")  # of the test or the validation split
MEMORY = "Peak memory"  # one more column where it was measured
FIELDS = (
    "role",
    "method",
    "label",
    "student",
    "teachers",
    "parameters",
    "seeds",
    "split",
    "accuracy_mean",
    "accuracy_std",
    "seconds_per_epoch",
    "peak_memory",
    "accuracies",
)
FORMULA = ("=", "+", "-", "@", "\t")  # how one begins in a spreadsheet
ORACLE = "oracle"  # the method that knows every label: shown, but it competes with nobody
MEAN = "Mean ± sample standard deviation over seeds"
MAPPINGS = {"amtml_kd": "best high", "amtml_best_low": "best low", "amtml_random": "random"}  # method -> hint mapping

T = TypeVar("T", bound=Hashable)


@dataclass
class Row:
    """One line of the table: a method (or a teacher) over its seeds.

    accuracies: fractions in [0, 1], one a seed, the same seed order in every row. seconds_per_epoch: None where nothing
    was trained (a teacher read from a file). peak_memory: bytes, or None where it was not measured. student: the name
    of the student network. teachers: how many it learned from, None for none. split: where it was measured. Raises
    ValueError for no accuracies, or for percent.
    """

    method: str
    label: str
    parameters: int
    accuracies: list[float]
    seconds_per_epoch: float | None = None
    peak_memory: int | None = None
    student: str = ""
    teachers: int | None = None
    split: str = "test"

    def __post_init__(self) -> None:
        self.accuracies = [float(a) for a in self.accuracies]
        if not self.accuracies:
            raise ValueError(f"Row {self.label!r}: accuracies must hold one fraction a seed, got none")
        for accuracy in self.accuracies:
            if accuracy < 0 or accuracy > 1:  # NaN passes: a diverged run is shown as nan, not hidden
                raise ValueError(f"Row {self.label!r}: accuracies must be fractions in [0, 1], got {accuracy}")

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Sample standard deviation, or None for a single seed."""
        return sample_std(self.accuracies)


class Bold(str):
    """A cell in bold."""

    bold = True


class Table(NamedTuple):
    """Cells as they are to be read, some of them Bold; the first `left` columns are text, the others numbers."""

    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    left: int = 1


Blocks = Sequence[Table | str]  # tables and paragraphs, in their order


class Network(NamedTuple):
    """A network of the comparison. role: "teacher" or "student"; accuracy: a fraction, None where there is none."""

    name: str
    role: str
    parameters: int
    accuracy: float | None = None


# --- methods x seeds --------------------------------------------------------------------------------------------------


def terminal(rows: Sequence[Row], teachers: Sequence[Row] = (), *, title: str | None = None) -> rich.table.Table:
    """The comparison as a rich table: teachers above the line, methods below it."""
    # Text, not str, wherever a name may be: [brackets] are no markup, and :colons: no pictures.
    heading = None if title is None else Text(title, style="table.title")
    out = rich.table.Table(title=heading, title_justify="left", caption=_caption(rows), caption_justify="left")
    header, body = _main(rows, teachers)
    for i, name in enumerate(header):
        # Left for the accuracy too: with and without a deviation, the decimal points stay below each other.
        out.add_column(name, justify="left" if i in (0, 2) else "right", overflow="fold")
    for line in body[: len(teachers)]:
        out.add_row(*(Text(cell, style="dim") for cell in line))
    if teachers:
        out.add_section()
    best = _best(rows)
    for row, (name, parameters, accuracy, *rest) in zip(rows, body[len(teachers) :], strict=True):
        style = "bold" if _printed(row) == best else ""
        out.add_row(
            Text(name, style=style), Text(parameters), Text(accuracy, style=style), *(Text(cell) for cell in rest)
        )
    return out


def comparison(rows: Sequence[Row], teachers: Sequence[Row] = ()) -> tuple[Table, str]:
    """The main table and its caption."""
    best = _best(rows)
    header, body = _main(rows, teachers)
    lines = [(f"teacher: {name}", *rest) for name, *rest in body[: len(teachers)]]
    for row, (name, parameters, accuracy, *rest) in zip(rows, body[len(teachers) :], strict=True):
        lines.append((name, parameters, _bold(accuracy, _printed(row) == best), *rest))
    return Table(header, lines), _caption(rows)


def csv(rows: Sequence[Row], teachers: Sequence[Row] = ()) -> str:
    """The comparison as CSV (fractions at full precision; `accuracies` holds every seed's, separated by spaces).

    A name that a spreadsheet would take for a formula has an apostrophe before it.
    """
    out = io.StringIO()
    writer = csvlib.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for record in records(rows, teachers):
        plain = {key: one_line(value) if isinstance(value, str) else value for key, value in record.items()}
        formulas = {key: f"'{value}" for key, value in plain.items() if str(value).startswith(FORMULA)}
        writer.writerow({**plain, **formulas, "accuracies": " ".join(map(repr, record["accuracies"]))})
    return out.getvalue()


def records(rows: Sequence[Row], teachers: Sequence[Row] = ()) -> list[dict[str, Any]]:
    """The comparison as plain dicts, ready for JSON; `role` tells teachers from students."""
    roles = [("teacher", row) for row in teachers] + [("student", row) for row in rows]
    return [
        {
            "role": role,
            "method": row.method,
            "label": row.label,
            "student": row.student,
            "teachers": row.teachers,
            "parameters": row.parameters,
            "seeds": len(row.accuracies),
            "split": row.split,
            "accuracy_mean": row.mean,
            "accuracy_std": row.std,
            "seconds_per_epoch": row.seconds_per_epoch,
            "peak_memory": row.peak_memory,
            "accuracies": row.accuracies,
        }
        for role, row in roles
    ]


def names(rows: Sequence[Row]) -> list[str]:
    """Each row's label, with the student and the number of teachers where only these tell rows apart."""
    students = len({row.student for row in rows}) > 1
    counts = {row.label: {other.teachers for other in rows if other.label == row.label} for row in rows}
    out = []
    for row in rows:
        parts = [row.label]
        parts += [row.student] if students and row.student else []
        parts += [count_of(row.teachers)] if row.teachers is not None and len(counts[row.label]) > 1 else []
        out.append(", ".join(parts))
    return out


# --- a paper's tables -------------------------------------------------------------------------------------------------


def networks(networks: Sequence[Network], split: str = "test") -> Blocks:
    """Every network's size, how much smaller than the largest teacher it is, and its accuracy; nothing of none."""
    if not networks:
        return []
    largest = max((network.parameters for network in networks if network.role == "teacher"), default=0)
    lines = [
        (
            network.name,
            network.role,
            f"{network.parameters:,}",
            _times(largest / network.parameters) if largest and network.parameters else "-",
            "-" if network.accuracy is None else f"{100 * network.accuracy:.2f}",
        )
        for network in networks
    ]
    header = ("Network", "Role", "Parameters", "Compression", f"{split.capitalize()} accuracy (%)")
    caption = (
        "Compression: parameters of the largest teacher / this network's. A student's accuracy is the one it has alone."
    )
    return [Table(header, lines, left=2), caption]


def by_teachers(rows: Sequence[Row]) -> Blocks:
    """Methods x number of teachers, one table a student; nothing for fewer than two numbers of teachers.

    A method without teachers has the same value in every column. Raises ValueError for two rows of one cell.
    """
    tables = []
    students = unique(row.student for row in rows)
    for student in students:
        own = [row for row in rows if row.student == student]
        counts = teacher_counts(own)
        if len(counts) > 1:
            lines = _methods(own, counts, lambda row: row.teachers)
            table = _best_of_columns("Method", [count_of(count) for count in counts], lines)
            tables.append((f"Student {student}:" if len(students) > 1 else "", table))
    return _section(tables, rows)


def by_student(rows: Sequence[Row]) -> Blocks:
    """Methods x student networks, one table a number of teachers; nothing for fewer than two students.

    A method without teachers stands in every table. Raises ValueError for two rows of one cell.
    """
    tables = []
    counts: list[int | None] = [*teacher_counts(rows)]
    for count in counts or [None]:
        students = unique(row.student for row in rows if row.teachers == count)
        if len(students) > 1:
            size = {row.student: row.parameters for row in rows}
            own = [row for row in rows if row.teachers in (count, None) and row.student in students]
            heads = [f"{student} ({size[student]:,})" for student in students]
            table = _best_of_columns("Method", heads, _methods(own, students, lambda row: row.student))
            tables.append((f"With {count_of(count)}:" if count is not None and len(counts) > 1 else "", table))
    return _section(tables, rows)


def by_mapping(rows: Sequence[Row]) -> Blocks:
    """Strategies of the hint mapping, a column for each student and number of teachers that tried several.

    Nothing where none tried more than one. Raises ValueError for two rows of one cell.
    """
    own = [row for row in rows if row.method in MAPPINGS]
    places = [(row.student, row.teachers) for row in own]
    columns = [place for place in unique(places) if places.count(place) > 1]
    tried = [row for row in own if (row.student, row.teachers) in columns]
    if not columns:
        return []
    lines = [
        (name, cells)
        for method, name in MAPPINGS.items()
        for _, cells in _methods(
            [row for row in tried if row.method == method], columns, lambda row: (row.student, row.teachers)
        )
    ]
    heads = [f"{split_of(rows)} accuracy (%)"]
    if len(columns) > 1:
        heads = [", ".join(filter(None, (student, count_of(count) if count else ""))) for student, count in columns]
    return _section([("", _best_of_columns("Mapping", heads, lines))], tried)


def highest(rows: Sequence[Row]) -> Row:
    """The row with the highest mean. One that diverged comes last: NaN, were it the first of a max, would stay."""
    return max(rows, key=lambda row: row.mean if math.isfinite(row.mean) else -1.0)


def count_of(teachers: int | None) -> str:
    return "no teacher" if teachers is None else f"{teachers} teacher{'' if teachers == 1 else 's'}"


def teacher_counts(rows: Sequence[Row]) -> list[int]:
    """The numbers of teachers, ascending; of rows with any."""
    return sorted({row.teachers for row in rows if row.teachers is not None})


def split_of(rows: Sequence[Row]) -> str:
    """Test or Validation: where these accuracies were measured."""
    return rows[0].split.capitalize() if rows else "Test"


def unique(values: Iterable[T]) -> list[T]:
    """Each value once, in the order of its first appearance."""
    return list(dict.fromkeys(values))


def _methods(
    rows: Sequence[Row], columns: Sequence[T], column: Callable[[Row], T | None]
) -> list[tuple[str, list[Row | None]]]:
    """A line a method: its label and its row in every column, None where it was not run.

    column(row): the row's own column, or None for a row that holds for every one.
    """
    lines: dict[str, dict[T, Row]] = {}
    labels: dict[str, str] = {}
    for row in rows:
        line = lines.setdefault(row.method, {})
        labels.setdefault(row.method, row.label)
        own = column(row)
        for place in columns if own is None else [own]:
            if place in line:
                want = "rows must differ in method, student or number of teachers"
                what = f"{row.label!r} with student {row.student!r} and {count_of(row.teachers)}"
                raise ValueError(f"tables: {want}, got two for {what}")
            line[place] = row
    return [(labels[method], [line.get(place) for place in columns]) for method, line in lines.items()]


def _best_of_columns(corner: str, heads: Sequence[str], lines: Sequence[tuple[str, Sequence[Row | None]]]) -> Table:
    """The best of each column bold where there is something to beat."""
    columns = [[row for _, cells in lines if (row := cells[i]) is not None] for i in range(len(heads))]
    best = [_best(column) if len(column) > 1 else None for column in columns]
    body = [
        (name, *("-" if row is None else _bold(accuracy(row), _printed(row) == best[i]) for i, row in enumerate(cells)))
        for name, cells in lines
    ]
    return Table((corner, *heads), body)


def _section(tables: Sequence[tuple[str, Table]], rows: Sequence[Row]) -> Blocks:
    """Each table below the words that say what it is of, and a caption; nothing without tables."""
    if not tables:
        return []
    spread = "one seed: no spread" if all(len(row.accuracies) == 1 for row in rows) else MEAN.lower()
    blocks = [block for of, table in tables for block in (of, table) if block]
    return [*blocks, f"{split_of(rows)} accuracy in percent, {spread}; best of each column in bold."]


# --- cells ------------------------------------------------------------------------------------------------------------


def accuracy(row: Row) -> str:
    return _printed(row) + ("" if row.std is None else f" ± {100 * row.std:.2f}")


def sample_std(values: Sequence[float]) -> float | None:
    """Sample standard deviation (ddof = 1), None for fewer than two values, NaN where one is."""
    if len(values) < 2:
        return None
    # statistics.stdev raises on NaN in some Python versions; a diverged run must not take the table down.
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _main(rows: Sequence[Row], teachers: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and cells of the main table, the teachers' lines first; memory only where some row has it."""
    whole = [*teachers, *rows]
    lines = [
        (
            name,
            f"{row.parameters:,}",
            accuracy(row),
            str(len(row.accuracies)),
            "-" if row.seconds_per_epoch is None else f"{row.seconds_per_epoch:,.2f}",
        )
        for name, row in zip(names(teachers) + names(rows), whole, strict=True)
    ]
    header = tuple(name.format(split_of(whole)) for name in HEADER)
    if all(row.peak_memory is None for row in whole):
        return header, [*lines]
    return (*header, MEMORY), [(*line, _bytes(row.peak_memory)) for line, row in zip(lines, whole, strict=True)]


def _bytes(count: int | None) -> str:
    """In the unit that leaves two or three digits: 84 MB, 1.2 GB."""
    if count is None:
        return "-"
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:  # 999.6 MB would be written as 1,000 MB
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if value < 9.95 and units[0] != "B" else f"{value:,.0f} {units[0]}"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 99.95 else f"{ratio:,.0f}x"


def _printed(row: Row) -> str:
    return f"{100 * row.mean:.2f}"


def _best(rows: Sequence[Row]) -> str | None:
    """The best mean as it is printed, so that equal-looking means are bold together; None if there is none."""
    finite = [row for row in rows if math.isfinite(row.mean) and row.method != ORACLE]
    return _printed(highest(finite)) if finite else None


def _caption(rows: Sequence[Row]) -> str:
    if all(len(row.accuracies) == 1 for row in rows):
        return "Best student in bold. One seed: no spread."
    return f"{MEAN}; best student in bold."


def _bold(text: str, best: bool) -> str:
    return Bold(text) if best else text


def one_line(text: str) -> str:
    return re.sub(r"\s*[\r\n]\s*", " ", text)
