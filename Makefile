# make demo | make check | make test | make test-full | make test-mutants | make lint; each sets up what it needs, once.

PYTHON ?= python3
MODEL ?= sd15
VENV := .venv
BIN := $(VENV)/bin
# With an NVIDIA card, torch's own wheels bring the CUDA libraries and pin their versions.
CONSTRAINTS := -c constraints.txt $(if $(shell command -v nvidia-smi),,-c constraints-no-gpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo check test test-full test-mutants lint format clean

setup: $(VENV)/.built

$(VENV)/.installed: constraints.txt constraints-no-gpu.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q $(CONSTRAINTS) torch numpy setuptools wheel ninja
	$(PIP) install -q $(CONSTRAINTS) --no-build-isolation -e ".[dev]"
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(wildcard csrc/cpu/*)
	$(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

demo: setup
	$(BIN)/python -m examples.demo --model $(MODEL)

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# The largest sample of each op on each runner
check: setup lint
	$(PYTEST) --quick tests/contract/test_contract.py::test_contract tests/test_boundaries.py

# Every sample, and every pair of values
test: setup
	$(PYTEST) --durations 15

# All combinations
test-full: setup
	$(PYTEST) --full --durations 50

# Planted faults that the tests must notice
test-mutants: setup
	$(BIN)/python -m tests.mutants

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build *.egg-info kernels/fastsd_kernels/*.so

CXX_FILES = $(shell git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.hpp' '*.cu' '*.cuh')
