# make demo | make test | make test-mutants | make lint | make setup; each sets up what it needs, once.

PYTHON ?= python3
MODEL ?= sd15
VENV := .venv
BIN := $(VENV)/bin
# With an NVIDIA card, torch's own wheels bring the CUDA libraries and pin their versions.
CONSTRAINTS := -c constraints.txt $(if $(shell command -v nvidia-smi),,-c constraints-no-gpu.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: setup demo test test-mutants lint format clean

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

# A file stays in one process: its compiled kernels are kept there.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Whether the tests notice planted faults; hours of one core.
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
