"""Shared by the trainer's tests."""

import pytest


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
