"""How the package is built: what the environment asks for, and what goes into a source distribution and a wheel."""

import fnmatch
import os
import shutil
import subprocess
import sys
import zipfile
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


def test_an_older_setuptools_is_named():
    start = (
        "import runpy, setuptools; setuptools.__version__ = '70.0.0'; runpy.run_path('setup.py', run_name='__main__')"
    )
    out = subprocess.run([sys.executable, "-c", start], cwd=ROOT, capture_output=True, text=True)
    assert out.returncode != 0 and "setuptools must be 77 or later to build it, got 70.0.0" in out.stderr


def test_without_torch_the_package_is_built_with_a_notice():
    out = setup("--name", torch=False)
    assert out.returncode == 0 and "built WITHOUT its C++ extension" in out.stderr


def test_a_wheel_without_the_extension_says_why_and_has_nothing_of_an_earlier_build(tmp_path):
    stale = [tmp_path / "amtml_fast" / name for name in ("_C.abi3.so", "removed.py")]
    stale[0].parent.mkdir()
    for path in stale:
        path.write_text("")
    words = "egg_info", "--egg-base", str(tmp_path), "build", "--build-lib", str(tmp_path)
    no_compiler = {"CC": "/nowhere/cc", "CXX": "/nowhere/c++", "PATH": os.environ["PATH"]}
    for given in ({"torch": False}, no_compiler):
        out = setup(*words, "--build-temp", str(tmp_path / "objects"), **given)
        assert out.returncode == 0 and not any(path.exists() for path in stale), out.stderr
        reason = (tmp_path / "amtml_fast" / "not_built.txt").read_text()
        assert ("--no-build-isolation" in reason) is ("torch" in given) and reason.strip() in out.stderr


def test_a_wheel_without_the_extension_has_a_name_of_its_own(tmp_path):
    """A wheelhouse would take it for the fast one."""
    words = "egg_info", "--egg-base", str(tmp_path), "bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir"
    folders = ["build", "--build-base", str(tmp_path / "build")]
    for given in ({"torch": False}, {"CC": "/nowhere/cc", "CXX": "/nowhere/c++"}):
        out = setup(*folders, *words, str(tmp_path / "wheel"), **given)
        assert out.returncode == 0, out.stderr
        (wheel,) = tmp_path.glob("*.whl")
        assert wheel.name.endswith("-py3-none-any.whl")
        with zipfile.ZipFile(wheel) as packed:
            assert "amtml_fast/not_built.txt" in packed.namelist()
            (facts,) = (name for name in packed.namelist() if name.endswith(".dist-info/WHEEL"))
            assert b"Root-Is-Purelib: true" in packed.read(facts)
        wheel.unlink()


def test_a_build_into_the_source_folder_leaves_it_whole(tmp_path):
    package = tmp_path / "amtml_fast"
    package.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    for name in ("__init__.py", "_C.abi3.so", "not_committed.py"):
        (package / name).write_text("")
    (package / "configs").mkdir()
    out = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "build_py", "--build-lib", "."],
        cwd=tmp_path, env={**os.environ, "AMTML_BUILD_EXT": "auto"}, capture_output=True, text=True,
    )  # fmt: skip
    assert {"__init__.py", "_C.abi3.so", "not_committed.py"} <= {path.name for path in package.iterdir()}, out.stderr
    assert not (package / "not_built.txt").exists()


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
