"""How the package is built: what the environment asks for, and what goes into a source distribution and a wheel."""

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the tests alone, without what they are built from"
)
WITHOUT_TORCH = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"


def setup(*words, torch=True, **environment):
    """Runs setup.py where the shell has these variables."""
    start = ["setup.py"] if torch else ["-c", WITHOUT_TORCH]
    return subprocess.run(
        [sys.executable, *start, *words],
        cwd=ROOT,
        env={**os.environ, "AMTML_BUILD_EXT": "auto", "AMTML_BUILD_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name, value", [("AMTML_BUILD_EXT", "yes"), ("AMTML_BUILD_CUDA", "ON")])
def test_a_value_that_asks_for_nothing_is_told(name, value):
    out = setup("--name", **{name: value})
    assert out.returncode != 0 and f"{name} must be" in out.stderr and repr(value) in out.stderr


@pytest.mark.parametrize("name", ["AMTML_BUILD_EXT", "AMTML_BUILD_CUDA"])
def test_what_is_asked_for_by_name_is_built_or_told(name):
    out = setup("--name", torch=False, **{name: "1"})
    assert out.returncode != 0 and f"{name}=1" in out.stderr and "torch" in out.stderr


def test_without_torch_the_package_is_built_with_a_notice():
    out = setup("--name", torch=False)
    assert out.returncode == 0 and "built WITHOUT its C++ extension" in out.stderr


@pytest.mark.parametrize("folder", ["csrc", "tests"])
def test_a_source_distribution_has_all_sources(folder):
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    patterns = [
        p for command, where, *given in lines if command == "recursive-include" and where == folder for p in given
    ]
    files = [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in (".pyc", ".so")]
    left_out = [str(p.relative_to(ROOT)) for p in files if not any(fnmatch.fnmatch(p.name, x) for x in patterns)]
    assert files and left_out == []


def test_a_wheel_has_all_files_and_setuptools_warns_of_none(tmp_path):
    out = setup("egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path), AMTML_BUILD_EXT="0")
    assert out.returncode == 0 and "Package would be ignored" not in out.stderr, out.stderr
    want = {
        p.relative_to(ROOT) for p in (ROOT / "amtml_fast").rglob("*") if p.suffix not in (".pyc", ".so") and p.is_file()
    }
    want |= {"amtml_fast" / p.relative_to(ROOT) for p in (ROOT / "kernels").glob("*.*")}
    assert want == {p.relative_to(tmp_path) for p in (tmp_path / "amtml_fast").rglob("*") if p.is_file()}
