"""Shared by the trainer's tests. Nothing here imports the trainer before it is known that its packages are installed."""

import atexit
import gc
import importlib
import multiprocessing

import pytest

TRAIN = "accelerate sklearn scipy omegaconf typer rich matplotlib tensorboard safetensors PIL jinja2".split()

atexit.register(gc.unfreeze)  # nanobind would call what is frozen leaked


def pytest_collect_file():
    """Without the extra the folder is skipped, not one file of it imported."""
    for package in TRAIN:
        pytest.importorskip(package, reason='the trainer needs pip install "amtml-fast[train]"')


@pytest.fixture(autouse=True)
def nothing_imported_is_garbage():
    """Every training collects garbage twice, and would look at all that torch, SymPy and scikit-learn consist of."""
    if gc.get_freeze_count() < 100_000:  # none yet, or a comparison has ended
        importlib.import_module("torch._dynamo")  # as the first optimizer's step does
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def nothing_runs_on():
    """What a test that has failed left at work."""
    yield
    for process in multiprocessing.active_children():
        process.kill()


@pytest.fixture
def new_engine():
    """Accelerate keeps one precision a process; forget it before and after."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def taught(tmp_path_factory):
    """A folder with a small configuration and its trained teachers."""
    import small_run

    return small_run.teach(tmp_path_factory.mktemp("taught"))


@pytest.fixture
def place(taught, tmp_path, monkeypatch):
    """A copy of it that a test may change."""
    import small_run

    return small_run.furnish(tmp_path, taught, monkeypatch)
