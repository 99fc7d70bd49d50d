# Every target makes the environment it needs; a second call reuses it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
INSTALLED := .venv/installed
export AMTML_BUILD_EXT = 1

.PHONY: train test lint bench clean
train: $(INSTALLED)
	$(BIN)/amtml-fast compare digits

test: $(INSTALLED)
	$(BIN)/python -m pytest tests

bench: $(INSTALLED)
	$(BIN)/pip install -q pytest-benchmark
	$(BIN)/python -m pytest benchmarks -p no:cacheprovider --benchmark-columns=median,iqr,rounds --benchmark-sort=name --benchmark-json=benchmarks/results/latest.json

lint: $(INSTALLED)
	$(BIN)/pip install -q ruff mypy clang-format pre-commit
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp

$(INSTALLED): pyproject.toml setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q "setuptools>=77" ninja numpy "$(TORCH)"
	$(BIN)/pip install -q --no-build-isolation -e ".[train,test]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info amtml_fast/*.so
