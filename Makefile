# Everything runs in an environment of the project's own; `make test` and `make train` need only
# Python 3.11 or newer and, for the fast kernels, a C++20 compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/digits
DATA_ROOT ?=
BENCH ?= --threads 1 --threads 2 --json runs/bench.json --chart runs/bench.svg
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml

# The pinned PyTorch is for CPUs and would not load CUDA's library; tests build it for themselves.
export GECO_FAST_CUDA ?= 0

# Tests share the cores: threads that wait for work must not spin. glibc's cache of freed memory
# is off, because what comes from it isn't filled with NaN, as the tests want new memory to be.
TEST := OMP_WAIT_POLICY=passive GLIBC_TUNABLES=glibc.malloc.tcache_count=0 $(BIN)/pytest

CPP := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES)) $(foreach d,cpp emulation,$(wildcard tests/$d/*.h tests/$d/*.cpp))

.PHONY: environment train test test-slow lint format bench clean

environment: $(VENV)/.built

# torch is named first, so that the build finds it; constraints.txt pins its version. Without a
# compiler this brings dependencies only: the next rule builds the library, once.
$(VENV)/.dependencies: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt torch setuptools ninja pybind11
	CXX=none $(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

train: environment
	$(BIN)/geco-fast train --out $(OUT)

test: environment
	$(TEST) --numprocesses auto --dist loadgroup $(if $(DATA_ROOT),--data-root $(DATA_ROOT))

test-slow: environment
	$(TEST) -m slow --numprocesses auto --dist loadgroup $(if $(DATA_ROOT),--data-root $(DATA_ROOT))

lint: environment
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: environment
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# The rivals are large, so nothing else brings them.
$(VENV)/.rivals: $(VENV)/.dependencies
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[dev,bench]'
	touch $@

bench: environment $(VENV)/.rivals
	$(BIN)/geco-fast bench $(BENCH)

clean:
	rm -rf $(VENV) build dist *.egg-info geco_fast/*.so
