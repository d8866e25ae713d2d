# make demo | test | lint | bench, each setting up what is missing. PYTHON names the interpreter of the environment;
# VENV= (empty) uses the active environment as it is and installs nothing but this package.
PYTHON ?= python3
VENV ?= .venv
SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh python/*) setup.py pyproject.toml

ifeq ($(VENV),)
RUN :=
BUILT := build/.installed
else
RUN := $(VENV)/bin/
BUILT := $(VENV)/.installed
endif
PY := $(RUN)python

.PHONY: demo test lint bench clean
demo: $(BUILT)
	$(PY) examples/distill.py

test: $(BUILT)
	$(PY) -m pytest

lint: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(BUILT)
	$(PY) -m benchmarks rows --device cpu
	$(PY) -m benchmarks linear --device cpu
	$(PY) -m benchmarks sparse --device cpu

clean:
	rm -rf build $(BUILT) kdkernels/*.so kdkernels/_C.pyi

.venv/.requirements: requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

.venv/.installed: .venv/.requirements $(SOURCES)
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

build/.installed: $(SOURCES)
	python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	mkdir -p build && touch $@
