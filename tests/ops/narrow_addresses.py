"""Products and loops of 32 bits that an address of a Triton kernel is made of, read from its TTIR: what could wrap, for sizes that
neither the interpreter nor a test can allocate."""

import re
from collections import defaultdict
from pathlib import Path

# What is made of small values alone is small.
_KEEP_SMALL = (
    "constant splat broadcast expand_dims reshape extsi extui trunci muli addi subi divsi remsi minsi maxsi".split()
)
KERNELS = Path(__file__).parents[2] / "kernels"
_OTHER_NUMBERS = "tt.load", "tt.atomic", "arith.cmp"  # not made of their operands: from memory, or true and false


def _source(file: Path, line: int) -> str:
    """What is compiled may come from Triton's cache, and name a copy of the tree that is no more."""
    own = KERNELS / file.name
    file = own if own.is_file() else file
    return file.read_text().splitlines()[line - 1].strip() if file.is_file() else str(line)


def _places(ttir: str) -> dict[str, str]:
    """Where each location of the text is: the file and its line."""
    known = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, flags=re.M))

    def place(name: str) -> str:
        text = known[name]
        if found := re.search(r'"([^"]+)":(\d+):\d+', text):
            return f"{Path(found[1]).name}: {_source(Path(found[1]), int(found[2]))}"
        inner = re.search(r"#loc\d*", text)
        return place(inner[0]) if inner else text

    return {name: place(name) for name in known}


def narrow_addresses(ttir: str) -> set[str]:
    """Source lines whose numbers reach an address, with a product in 32 bits of two numbers of which neither is a constant, or a loop
    in 32 bits with a step that is none: beyond its end it may be below 0 and go on."""
    places, found = _places(ttir), set()
    carried: dict[tuple[int, int], set[str]] = defaultdict(set)  # what a loop or a branch hands on
    loops: dict[int, str] = {}
    for _ in range(3):  # what a loop hands to its next turn is known behind it
        marks: dict[str, set[str]] = defaultdict(set)  # of a value: the lines that it is made of
        small: dict[str, bool] = {}
        regions: list[tuple[int, list[str]]] = []
        for number, line in enumerate(ttir.splitlines()):
            code, _, location = line.strip().rpartition(" loc(") if " loc(" in line else (line.strip(), "", "")
            where = places.get(re.sub(r"\).*", "", location), "")
            if code.startswith("}") and not line.endswith("{"):
                opened, results = regions.pop()
                loops[opened] = where
                for k, name in enumerate(results):
                    marks[name], small[name] = carried[opened, k], False
                continue
            left, _, right = code.partition(" = ") if re.match(r"%\w+(:\d+)? = ", code) else ("", "", code)
            name, _, count = left.partition(":")
            values = re.findall(r"%[\w#]+", right)
            made = set().union(*(marks[v] for v in values))
            narrow = re.search(r"[ x]i32>?( \{)?$", code)
            constant = all(small.get(v, False) for v in values)
            if right.startswith("scf.for"):
                variable, low, high, step, *rest = values
                wraps = narrow and not small.get(step, False)
                marks[variable] = marks[low] | marks[step] | ({loops[number]} if wraps and number in loops else set())
                small[variable] = small.get(high, False)
                for k, (argument, first) in enumerate(zip(rest[::2], rest[1::2])):
                    marks[argument], small[argument] = marks[first] | carried[number, k], False
            elif right.startswith("scf.yield"):
                for k, value in enumerate(values):
                    carried[regions[-1][0], k] |= marks[value]
            elif right.startswith("tt.addptr"):
                found |= marks[values[1]]
                marks[name] = set()
            elif name:
                kind = re.split(r"[ (]", right)[0].split(".")[-1].strip('"')
                small[name] = kind in _KEEP_SMALL and constant
                marks[name] = set() if right.strip('"').startswith(_OTHER_NUMBERS) else made
                if kind == "muli" and narrow and not any(small.get(v) for v in values):
                    marks[name] = made | {where}
            if line.endswith("{") and not code.startswith("}"):
                of_region = right.startswith(("scf.for", "scf.if"))
                several = [f"{name}#{k}" for k in range(int(count or 0))]
                regions.append((number, (several or [name]) if name and of_region else []))
    return found
