"""Names of runs, methods, teachers and classes are drawn and printed as they are, whatever they hold."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from amtml_fast.train.figures import charts, curves, drawing, significance, tables
from amtml_fast.train.figures.markdown import escaped, paragraph, render
from amtml_fast.train.figures.tables import Bold, Network, Row, by_student, by_teachers, comparison, networks
from amtml_fast.train.progress import Display
from amtml_fast.train.report import svg

NAMES = [
    "cost $5 or $6",
    r"$\foo$",
    "$x^2$",
    "[bold]x[/bold]",
    "[/x]",
    "[a](http://x)",
    "_a_ b_c",
    "a | b",
    "a \\| b",
    "back\\",
    "<b>x</b>",
    "&lt;",
    "**x**",
    "`x`",
    "~~x~~",
    ":bug: #1 #",
    "=1+1",
    "+1",
    "@x",
    "-1",
    "1. x",
    "> x",
    "{0} %s {{ x }}",
]


# What matplotlib may read: formulas, labels that begin with an underscore, escapes and format strings.
DRAWN = ["cost $5 or $6", r"$\foo$", "_a_ b_c", "back\\", "&lt;", "{0} %s {{ x }}"]


def rows(name: str) -> list[Row]:
    made = [("student", "student alone", None, [0.5, 0.6]), ("x", name, 2, [0.7, 0.8]), ("x", name, 3, [0.8, 0.9])]
    return [Row(*it[:2], 10, it[3], 1.0, teachers=it[2], student=name) for it in made]


def histories(name: str) -> dict[str, list[list[dict[str, object]]]]:
    epoch = {"loss": 1.0, "val_accuracy": 0.5, "entropy": 0.9, "weight_mean": [0.4, 0.6], "weight_won": [0.1, 0.9]}
    return {name: [[epoch, {**epoch, "loss": 0.5}]], "other": [[epoch, epoch]]}


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_draw_it(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    save = drawing.save

    def watched(draw, path, *args):
        def remember(*args):
            figure = draw(*args)
            texts = [text for text in figure.findobj(lambda one: hasattr(one, "get_parse_math")) if text.get_text()]
            drawn.extend(text.get_text() for text in texts)
            assert not any(text._preprocess_math(text.get_text())[1] for text in texts)  # none is a formula
            return figure

        save(remember, path, *args)

    monkeypatch.setattr(drawing, "save", watched)
    probs, image = np.full((2, 3), 1 / 3), np.zeros((1, 8, 8), np.uint8)
    classes, teachers, weights = [name, "b", "c"], [name, "other"], np.array([0.4, 0.6])
    curves.curves(histories(name), tmp_path / "1.png")
    curves.entropy(histories(name), tmp_path / "2.png", teachers)
    curves.soft_targets(image, classes, probs, weights, 0, tmp_path / "3.png", teachers)
    curves.weights_gallery([image], classes, probs[None], weights[None], [0], tmp_path / "4.png", teachers)
    charts.accuracies(rows(name), tmp_path / "5.png")
    charts.number_of_teachers(rows(name), tmp_path / "6.png")
    assert all((tmp_path / f"{i}.png").stat().st_size > 1000 for i in range(1, 7))
    assert name in drawn and any(text.startswith(name) for text in drawn)


@pytest.mark.parametrize("name", NAMES)
def test_the_terminal_prints_it(name: str) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=False)
    console.print(tables.terminal(rows(name), rows(name), title=name))
    display = Display(console)
    display.say(name)
    display.warn(name)
    with display.bar(name, 1) as bar:
        bar.note(name)
        console.print(display.progress.get_renderable())
    printed = console.file.getvalue().splitlines()
    assert printed[0].rstrip() == name and f"warning: {name}" in printed
    assert sum(name in line for line in printed) == 1 + 4 + 2 + 1
    assert printed[-1].count(name) == 2  # the bar, its title and its note


def read_markdown(text: str) -> list[str]:
    """The texts of all cells, headings and paragraphs as a reader sees them; ¦...¦ where something is no text."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        if token.type == "inline":
            kept = [each for each in token.children if each.content or each.type not in ("strong_open", "strong_close")]
            found.append(
                "".join(each.content if each.type in ("text", "text_special") else f"¦{each.type}¦" for each in kept)
            )
    return found


@pytest.mark.parametrize("name", NAMES)
def test_markdown_prints_it(name: str) -> None:
    found = read_markdown(paragraph(f"{name} wins"))
    assert found == [f"{name} wins"]
    assert read_markdown(f"# {escaped(name)}: 3") == [f"{name}: 3"]
    text = render(comparison(rows(name)[:2], rows(name)[:1]))
    assert name in read_markdown(text)
    text = "\n\n".join([
        render(networks([Network(name, "teacher", 10, 0.5)])),
        render(by_teachers(rows(name))),
        render(by_student([*rows(name), Row("x", name, 10, [0.5, 0.5], teachers=3, student="other")])),
        render(significance.paired_tests(rows(name)[1], rows(name)[:1])),
    ])  # fmt: skip
    found = read_markdown(text)
    assert found.count(name) == 3 and f"{name} (10)" in found and f"{name} - student alone" in found
    assert not [cell for cell in found if "¦" in cell]


@pytest.mark.parametrize("name", NAMES)
def test_cells_and_charts_of_the_page_have_it(name: str) -> None:
    table, _ = comparison(rows(name)[1:2])
    assert table.lines[0][0] == name and isinstance(table.lines[0][2], Bold)
    assert not isinstance(table.lines[0][0], Bold)
    chart = svg.lines([svg.Line(name, np.array([[0.1, 0.2]]), "c1")], name)
    assert str(svg.Markup.escape(f"{name} 0.20")) in chart and f'aria-label="{svg.Markup.escape(name)}"' in chart


@pytest.mark.parametrize("name", [*NAMES, "\tx", "x"])
def test_no_spreadsheet_computes_it(name: str) -> None:
    (line,) = csv.DictReader(io.StringIO(tables.csv(rows(name)[1:2]), newline=""))
    begins = name.startswith(("=", "+", "-", "@", "\t"))
    assert line["label"] == line["student"] == (f"'{name}" if begins else name)
    assert line["method"] == "x" and line["accuracies"] == "0.7 0.8"


def test_a_name_stays_on_its_line() -> None:
    assert escaped("a\n b\r\nc") == "a b c"
