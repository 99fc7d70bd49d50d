# Every target makes the environment it needs, says what it does and about how long it takes; a second call reuses it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
export AMTML_BUILD_EXT = 1
# Written whatever the shell says: the tests start dozens of processes, and without bytecode each of them compiles torch's
# sources again, 5 of the 9 seconds that it takes to import torch and its compiler.
export PYTHONDONTWRITEBYTECODE =
# pytest with so many workers, each of one thread: tests that are about threads set their number themselves.
# Neighboring tests share what their file's fixtures have trained, so each worker has a part of the list and takes from the
# other's when it is through.
pytest = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(or $(JOBS),$(1)) --dist worksteal
OPERATORS := tests/ops
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.cuh csrc/cuda/*.cu)
QUICK := ops readme readers image_folders samples loader models methods report imports

# CUDA kernels are compiled where a GPU will run them, and for tests wherever nvcc is found. AMTML_BUILD_CUDA=0 or 1 decides.
# What no GPU here will run is compiled for 9.0 alone, which takes half the time; AMTML_CUBINS=all looks at 8.0, too.
NVCC := $(shell command -v nvcc)
GPU := $(and $(NVCC),$(shell nvidia-smi -L 2>&1 | grep '^GPU'))
kernels = .venv/kernels$(if $(filter 1,$(or $(AMTML_BUILD_CUDA),$(if $(1),1,0))),-cuda$(2))
INSTALLED := .venv/packages $(call kernels,$(GPU))
TESTABLE := .venv/packages-test $(call kernels,$(NVCC),$(if $(GPU)$(AMTML_CUBINS),,-9.0))

.PHONY: gpu-kit train lm check test test-zoo oldest clang triton emulated gpu soak fuzz sanitize lint bench bench-quick dist clean
train: $(INSTALLED)
	@echo "make: training 6 teachers and 40 students on real 8x8 digits: about a minute on two cores"
	$(BIN)/amtml-fast compare digits digits_specialists

# Three language models teach a smaller one, on the text of Python's own standard library.
lm: $(INSTALLED)
	@$(BIN)/python -c "import transformers" 2> /dev/null || { echo "make: transformers into .venv: the download (20 MB)"; \
	  AMTML_BUILD_EXT=0 $(BIN)/pip install -q --no-compile --no-build-isolation -e ".[hf]"; }
	@echo "make: training 3 teachers and 12 students on the standard library's text: 8 minutes on two cores"
	$(BIN)/python -m amtml_fast.hf.lm

# Between two edits: every operator, and the trainer's data, models, methods and report.
check: .venv/packages-test $(INSTALLED)
	@test -x $(BIN)/ruff || $(BIN)/pip install -q ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(call pytest,2) -q $(wildcard $(foreach name,$(QUICK),tests/test_$(name).py tests/*/test_$(name).py))

# The compiler runs while packages are downloaded. A third worker for two cores: many tests of the trainer wait for processes.
test:
	@$(MAKE) --no-print-directory -j2 $(TESTABLE)
	$(call pytest,3) tests
	$(MAKE) triton emulated

# The operators' tests on Triton's kernels, through its interpreter, and on the CUDA kernels, compiled for the CPU against an
# emulator of CUDA: need neither a GPU nor nvcc.
triton emulated: $(TESTABLE)
	AMTML_TEST_BACKENDS=$@ $(call pytest,2) $(or $(TESTS),$(OPERATORS))

# Tests on another torch, in an environment of its own, .venv-NAME. Built from a copy, so that the tree's own build stays as
# it is; a pyproject.toml beside the tests, for pytest would find the tree's and take the package from there.
define install_copy
	rm -rf build/$(1) && mkdir -p build/$(1)/source
	cp -r amtml_fast csrc kernels setup.py pyproject.toml README.md LICENSE build/$(1)/source/
	rm -f build/$(1)/source/amtml_fast/*.so
	AMTML_BUILD_CUDA=0 .venv-$(1)/bin/pip install -q --no-build-isolation "./build/$(1)/source[$(EXTRAS)]"
	cp -r tests docs build/$(1)/
	sed '/^pythonpath/d' pyproject.toml > build/$(1)/pyproject.toml
	.venv-$(1)/bin/pip list | grep -iE '^(torch|torchvision|timm|pytorchcv|triton) '
endef
test_copy = cd build/$(1) && OMP_NUM_THREADS=1 ../../.venv-$(1)/bin/python -m pytest -n $(or $(JOBS),2)

# The newest torch with torchvision, timm and pytorchcv (several GB): nets of theirs as teachers, with random weights, and the
# operators' tests.
test-zoo: EXTRAS := train,test,zoo
test-zoo:
	test -x .venv-zoo/bin/python || $(PYTHON) -m venv .venv-zoo
	.venv-zoo/bin/pip install -q --upgrade "setuptools>=77" ninja numpy torch torchvision timm pytorchcv
	$(call install_copy,zoo)
	$(call test_copy,zoo) tests/train/test_zoo.py $(OPERATORS)

# The oldest torch that the package promises, and the Triton that it brings (5 GB): every Triton kernel compiled, and the
# operators' tests on the CPU.
oldest: EXTRAS := test
oldest: TORCH := torch==$(shell sed -n 's/^dependencies = .*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml).0
oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q "setuptools>=77" ninja numpy "$(TORCH)"
	$(call install_copy,oldest)
	export AMTML_CUBINS=all; $(call test_copy,oldest) $(or $(TESTS),$(OPERATORS))

# What `make gpu` would take minutes or a network for, made on any machine with nvcc: the library for one architecture, and the
# Python packages beside torch and Triton. Carry the tree with build/gpu-kit to the machine with the GPU.
gpu-kit: export TORCH_CUDA_ARCH_LIST = $(or $(ARCH),9.0)
gpu-kit: .venv/packages
	rm -rf build/gpu-kit && mkdir -p build/gpu-kit
	AMTML_BUILD_CUDA=1 $(BIN)/python setup.py -q build_ext --build-lib build/gpu-kit/lib --build-temp build/gpu-kit-objects
	mv build/gpu-kit/lib/amtml_fast/_C.abi3.so build/gpu-kit/ && rm -r build/gpu-kit/lib && strip build/gpu-kit/_C.abi3.so
	$(BIN)/python -c "from benchmarks.gpu import sources; print(sources())" > build/gpu-kit/sources
	$(BIN)/pip install -q --no-deps --target build/gpu-kit/python pytest iniconfig packaging pluggy pygments pytest-xdist execnet \
	  pytest-benchmark py-cpuinfo hypothesis sortedcontainers liger-kernel

# Everything that needs an NVIDIA GPU, with the Python that has torch >= 2.11, Triton >= 3.6 and pytest; nvcc on the PATH, no network.
gpu:
	$(PYTHON) -m benchmarks.gpu --part $(or $(PART),all)

soak: $(TESTABLE)  # trainings killed at random moments, AMTML_SOAK of them, and the other faults
	AMTML_SOAK=$(or $(AMTML_SOAK),20) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/train/test_faults.py

fuzz: $(TESTABLE)  # the property tests on newly drawn cases, AMTML_FUZZ times as many
	AMTML_FUZZ=$(or $(AMTML_FUZZ),20) $(BIN)/python -m pytest tests/ops/test_properties.py

# A copy of the tree, build/NAME, with an extension of its own, built with these settings.
comma := ,
define build_copy
	rm -rf build/$(1) && mkdir -p build/$(1)
	cp -r amtml_fast csrc tests docs setup.py pyproject.toml README.md build/$(1)/ && rm -f build/$(1)/amtml_fast/*.so
	rm -rf build/$(1)/amtml_fast/kernels && cp -r kernels build/$(1)/amtml_fast/
	cd build/$(1) && AMTML_BUILD_CUDA=0 $(2) ../../$(BIN)/python setup.py -q build_ext --inplace
endef

# The operators' tests on an extension that Clang has built: macOS has no other compiler. CLANG=clang-19 for another one.
CLANG ?= clang
clang: $(TESTABLE)
	$(call build_copy,clang,CC=$(CLANG) CXX=$(subst clang,clang++,$(CLANG)))
	cd build/clang && OMP_NUM_THREADS=1 ../../$(BIN)/python -m pytest -q -n $(or $(JOBS),2) $(or $(TESTS),$(OPERATORS)) \
	  --ignore=tests/ops/test_cubins.py

# The operators' tests on an extension built with the address and undefined-behavior sanitizers. With -s, so that a sanitizer's
# report is seen.
SANITIZED := ops few_classes chunks divergence topk topk_bucket fused_linear losses whole_loss vocabulary_kernels properties
sanitize: $(TESTABLE)
	$(call build_copy,sanitize,CFLAGS="-fsanitize=address$(comma)undefined -fno-sanitize-recover=undefined -g1")
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ../../$(BIN)/python -m pytest -q -s -p no:cacheprovider $(foreach name,$(SANITIZED),tests/ops/test_$(name).py)

# The suite, its tables and its pictures, into RESULTS. bench-quick: in three to six minutes on two cores, with smaller cases.
RESULTS ?= benchmarks/results/latest
bench-quick: ONLY := -m quick
bench bench-quick: .venv/packages-test $(INSTALLED)
	mkdir -p $(RESULTS)
	$(BIN)/python -m pytest benchmarks $(ONLY) -v -p no:cacheprovider -p no:xdist --benchmark-columns=median,iqr,rounds --benchmark-sort=name --benchmark-json=$(RESULTS)/results.json
	$(BIN)/python -m benchmarks.report $(RESULTS)/results.json
	$(BIN)/python -m benchmarks.report $(RESULTS)/results.json --out $(RESULTS)

dist: export AMTML_BUILD_CUDA := $(if $(findstring cuda,$(TESTABLE)),1,0)
dist: $(TESTABLE)  # sdist and abi3 wheel, installed into an empty environment and tested from outside the tree
	$(BIN)/pip install -q build
	rm -rf dist build/outside && $(BIN)/python -m build --no-isolation -o dist .
	$(PYTHON) -m venv build/outside/venv
	build/outside/venv/bin/pip install -q "$(TORCH)" numpy pytest hypothesis dist/*.whl
	cp -r tests docs build/outside/ && sed '/^pythonpath/d' pyproject.toml > build/outside/pyproject.toml
	cd build/outside && venv/bin/python -m pytest -q tests/ops --ignore=tests/ops/test_cubins.py

lint: .venv/packages-test
	$(BIN)/pip install -q ruff mypy clang-format pre-commit
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) tests/cuda_emulator/*.h tests/cuda_emulator/*.cpp

# Packages in two sizes and kernels in three. The larger stands for the smaller: after `make test`, `make train` has nothing to do.
# Packages are byte-compiled when they are imported: a run imports a quarter of torch.
.venv/packages: pyproject.toml
	@echo "make: Python packages into .venv: half a minute, and the download (PyTorch: 200 MB, with CUDA 3 GB)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install -q --no-compile "setuptools>=77" ninja numpy "$(TORCH)"
	@AMTML_BUILD_EXT=0 $(BIN)/pip install -q --no-compile --no-build-isolation -e ".[train]"
	@touch $@

# peft is in no extra: the trainer of transformers takes its models without importing it.
.venv/packages-test: .venv/packages
	@echo "make: Python packages of the tests: half a minute, and the download"
	@AMTML_BUILD_EXT=0 $(BIN)/pip install -q --no-compile --no-build-isolation -e ".[test,hf]" "peft>=0.21"
	@touch $@

.venv/kernels .venv/kernels-cuda-9.0 .venv/kernels-cuda: setup.py $(SOURCES) | .venv/packages
	@echo "make: compiling the kernels: about $(if $(findstring cuda,$@),two to four minutes on two cores (with CUDA),a minute on two cores (without CUDA))"
	@rm -f .venv/kernels-cuda .venv/kernels-cuda-9.0
	@$(if $(findstring 9.0,$@),TORCH_CUDA_ARCH_LIST=$(or $(TORCH_CUDA_ARCH_LIST),9.0)) AMTML_BUILD_CUDA=$(if $(findstring cuda,$@),1,0) $(BIN)/python setup.py -q build_ext --inplace --force
	@touch .venv/kernels $(if $(findstring cuda,$@),.venv/kernels-cuda-9.0) $@

clean:
	rm -rf .venv .venv-zoo .venv-oldest build dist *.egg-info amtml_fast/*.so
