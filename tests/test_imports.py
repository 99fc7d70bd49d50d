"""What imports what in the package, read from its source: no circles, and every module under its own name."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import amtml_fast

PACKAGE = Path(amtml_fast.__file__).resolve().parent
TRAIN = "amtml_fast.train"
SHARED = ("names", "progress", "files", "lock")  # files beside the rooms, for all of them
# From the lowest to the highest: a room imports from those before it, and from the shared files.
ROOMS = ("config", "data", "models", "figures", "methods", "teachers", "run", "compare", "report", "commands")


class Import(NamedTuple):
    """One name of one import statement, at the top of a file or inside a function."""

    file: str  # dotted, as target
    line: int
    target: str
    name: str  # by which the file knows it


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of a package and what is below it."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, source: str, known: dict[str, Path], *, package: bool) -> Iterator[Import]:
    """The imports of the project's own modules in a file's source. `package`: the file is an __init__.py."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for one in node.names:
                if one.name in known:
                    yield Import(name, node.lineno, one.name, one.asname or one.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")
            base = base[: len(base) - node.level + package] if node.level else []
            start = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            for one in node.names:
                target = f"{start}.{one.name}" if f"{start}.{one.name}" in known else start
                if target in known:
                    yield Import(name, node.lineno, target, one.asname or one.name)


@functools.cache
def all_imports(package: Path = PACKAGE) -> list[Import]:
    known = modules(package)
    return [
        one
        for name, path in known.items()
        for one in imports(name, path.read_text(encoding="utf-8"), known, package=path.name == "__init__.py")
    ]


def circle(found: list[Import]) -> list[str]:
    """Files that import one another, by whatever way; none where all imports go one way."""
    graph: dict[str, set[str]] = {}
    for one in found:
        if one.file != one.target:
            graph.setdefault(one.file, set()).add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def in_trainer(name: str) -> bool:
    return f"{name}.".startswith(("amtml_fast.train.", "amtml_fast.cli."))


def test_no_files_import_one_another() -> None:
    found = all_imports()
    assert len(found) > 250
    assert circle(found) == []


def room_of(name: str) -> str:
    """Of a file of the trainer: its folder, the file itself if it is `commands`, or "" for the shared ones."""
    first = name.removeprefix(f"{TRAIN}.").partition(".")[0]
    return "" if first in SHARED else first


def upwards(found: list[Import]) -> list[str]:
    """The imports that do not go down from room to room."""
    order = {room: i for i, room in enumerate(("", *ROOMS))}
    out = []
    for one in found:
        if one.file.startswith(f"{TRAIN}.") and one.target.startswith(f"{TRAIN}."):
            here, there = room_of(one.file), room_of(one.target)
            if here != there and order[here] <= order[there]:
                out.append(f"{one.file}:{one.line}: {one.target}")
    return out


def test_rooms_import_downwards_alone() -> None:
    found = all_imports()
    files = {one.removeprefix(f"{TRAIN}.") for one in modules(PACKAGE) if one.startswith(f"{TRAIN}.")}
    assert {one.partition(".")[0] for one in files} == {*SHARED, *ROOMS}, "a new room needs a place in ROOMS"
    assert upwards(found) == []
    planted = (
        Import(f"{TRAIN}.data.images", 1, f"{TRAIN}.run.job", "job"),
        Import(f"{TRAIN}.files", 1, f"{TRAIN}.lock", "lock"),
    )
    assert upwards(list(planted)) == [f"{TRAIN}.data.images:1: {TRAIN}.run.job"]


def test_the_package_does_not_import_the_trainer() -> None:
    outside = [one for one in all_imports() if not in_trainer(one.file) and one.file != "amtml_fast.__main__"]
    assert [one for one in outside if in_trainer(one.target)] == []


def test_no_module_is_imported_under_another_name() -> None:
    """Nor anything in one: a name says the same in every file."""
    named = []
    known = modules(PACKAGE)
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("amtml_fast")):
                named += [f"{name}:{node.lineno}: {one.name} as {one.asname}" for one in node.names if one.asname]
            elif isinstance(node, ast.Import):
                own = [one for one in node.names if one.asname and one.name.startswith("amtml_fast")]
                named += [f"{name}:{node.lineno}: {one.name} as {one.asname}" for one in own]
    assert named == []


@pytest.mark.parametrize("module", ["amtml_fast", "amtml_fast.dropin", "amtml_fast.train.commands"])
def test_importing_it_does_not_import_the_compiler(module: str) -> None:
    """Nor Triton. Both take longer than torch and all else together."""
    code = f"import sys, {module}; print(*sorted({{'torch._dynamo', 'triton'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_a_function_is_marked_as_torch_marks_a_constant_one() -> None:
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(marked).items() <= vars(amtml_fast.backend.why_not_gpu).items()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from . import b", "from . import a"),
        ("from .b import f", "def g():\n    from .a import g"),
        ("def f():\n    import planted.b", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import a"),
        ("from .room import c", "from . import a"),  # a -> room.c -> a; b is not in it
    ],
)
def test_a_planted_circle_is_found(tmp_path: Path, first: str, second: str) -> None:
    package = tmp_path / "planted"
    (package / "room").mkdir(parents=True)
    for place in (package, package / "room"):
        (place / "__init__.py").touch()
    (package / "a.py").write_text(first)
    (package / "b.py").write_text(second)
    (package / "room" / "c.py").write_text("from ..a import g")
    found = circle(all_imports(package))
    assert len(set(found)) == 2 and "planted.a" in found


def test_what_language_models_need_is_named() -> None:
    code = """
import sys
sys.modules["accelerate"] = sys.modules["transformers"] = None  # as where they are not installed
try:
    import amtml_fast.hf
except ModuleNotFoundError as error:
    assert str(error) == 'amtml_fast.hf: the package accelerate is missing; pip install "amtml-fast[hf]"', error
else:
    raise SystemExit("imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
