"""Tables as Markdown, names in it as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .tables import Blocks, Bold, Table, one_line

# What Markdown would not print as it is: marks of emphasis, code, tables and formulas wherever they stand, the rest where
# it would be understood (an underscore within a word is not).
SPECIAL = re.compile(r"[\\`*|$~#]|(?<![^\W_])_|_(?![^\W_])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[:])")


def escaped(text: str) -> str:
    """A name, to be read in Markdown as it is; on one line."""
    return SPECIAL.sub(r"\\\g<0>", one_line(text))


def paragraph(text: str) -> str:
    """The same for a text that begins a line."""
    return re.sub(r"^(\d*)(?=[-+>=.)])", r"\1\\", escaped(text.lstrip()))


def render(blocks: Blocks) -> str:
    """These tables and paragraphs, ending in a newline; "" of none."""
    return "\n".join(f"{_text(block)}\n" for block in blocks)


def _text(block: Table | str) -> str:
    if isinstance(block, str):
        return paragraph(block)
    rule = "|" + "|".join(":---" if i < block.left else "---:" for i in range(len(block.header))) + "|"
    return "\n".join([_line(block.header), rule, *map(_line, block.lines)])


def _line(cells: Sequence[str]) -> str:
    return (
        "| " + " | ".join(f"**{escaped(cell)}**" if isinstance(cell, Bold) else escaped(cell) for cell in cells) + " |"
    )
