# make demo | test | lint | bench | package | integrations, each setting up what is missing. PYTHON names the
# interpreter of the environment; VENV= (empty) uses the active environment as it is and installs nothing but this package.
PYTHON ?= python3
VENV ?= .venv
SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh python/*) setup.py pyproject.toml
PIP = $(PY) -m pip install --quiet --disable-pip-version-check

ifeq ($(VENV),)
PY := python
TOOLS :=
BUILT := build/.installed
else
PY := $(VENV)/bin/python
TOOLS := $(VENV)/.requirements
BUILT := $(VENV)/.installed
endif

.PHONY: demo test lint bench package integrations clean
demo: $(BUILT)
	$(PY) examples/distill.py

# Two processes of one thread each: twice as fast on two cores, and no more than fits on a GPU.
test: $(BUILT)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: $(BUILT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(BUILT)
	$(PY) -m benchmarks rows --device cpu
	$(PY) -m benchmarks linear --device cpu
	$(PY) -m benchmarks sparse --device cpu

# An sdist and, from it, a wheel into dist/; the wheel's test in an environment that holds nothing else.
package: $(TOOLS)
	$(PY) tests/package/check.py

# What tests/integrations compares the adapters with. Its losses need no more than that file names.
integrations: $(TOOLS)
	$(PIP) --no-deps -r requirements-integrations.txt

clean:
	rm -rf build dist $(BUILT) kdkernels/*.so kdkernels/_C.pyi

$(BUILT): $(TOOLS) $(SOURCES)
	$(PIP) --no-build-isolation --no-deps -e .
	mkdir -p $(@D) && touch $@

ifneq ($(VENV),)
$(TOOLS): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "kdkernels needs Python >= 3.10: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements-dev.txt
	touch $@
endif
