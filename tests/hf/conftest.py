import pytest


def pytest_collect_file():
    """Without the extra the folder is skipped, not one file of it imported."""
    pytest.importorskip("transformers", reason='language models need pip install "amtml-fast[hf]"')
