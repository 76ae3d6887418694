# Everything one does with a checkout. Each target makes .venv first where it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: study test test-deep lint bench gpu peers clean

# torch first and alone: a build of it that is already at hand is then taken before the index's newest.
$(VENV)/built: pyproject.toml constraints.txt setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools pybind11
	$(PIP) --no-build-isolation --editable '.[xarray,arrow,graph,test,lint]'
	touch $@

# The image study at its quick preset: about half an hour on two cores. A GPU is used where there is one.
study: $(VENV)/built
	$(BIN)/vaecirc study image --preset quick --out runs/image

test: $(VENV)/built
	$(BIN)/python -m pytest -m "not deep and not gpu"

test-deep: $(VENV)/built
	$(BIN)/python -m pytest -m "not gpu"

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/cuda_on_cpu/*)
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/built
	$(BIN)/python -m benchmarks

# On a machine with a GPU: builds in place with what is installed, no network; tests, benchmarks, results.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py

# Against the real packages of others, in an environment of their own.
peers: $(VENV)/built
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt torch
	.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt -r benchmarks/peers.txt -e .
	.venv-peers/bin/python -m pip --disable-pip-version-check install --quiet --no-deps dictionary-learning==0.1.0
	.venv-peers/bin/python -m pytest tests/compat
	.venv-peers/bin/python -m benchmarks.peers

clean:
	rm -rf build $(VENV) *.egg-info vaecirc_fast/*.so
