# Every target makes its own environment in .venv the first time, and again only after pyproject.toml or
# constraints.txt have changed. Nothing but Python 3.11 or later and make is needed.

SHELL  := /bin/sh
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/python -m pip --disable-pip-version-check

# Two workers with one thread each are faster, and more repeatable, than two that fight over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1
WORKERS    ?= 2

# Most of the tests' time with JAX is compilation, of programs that run for milliseconds: code that is generated in half
# the time and runs slower is the better bargain here. Everything else (make demo, notebooks) compiles as a user does.
# (Not without fusion emitters too: with level 0, XLA of jax 0.10.2 then gives gradients of 0 through a maximum.)
QUICK_XLA := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

.PHONY: help install demo test test-arviz lint format notebooks docs figures clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv

# The build backend is pinned and installed like everything else, hence no build isolation.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt hatchling editables
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[pyro,numpyro,dev]'
	touch $@

demo: $(STAMP)  ## estimate a rare catastrophe, train it away, audit the result
	$(ONE_THREAD) $(BIN)/probest demo

test: lint  ## lint and types, then the tests
	$(ONE_THREAD) XLA_FLAGS="$(QUICK_XLA) $$XLA_FLAGS" \
	  $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

# ArviZ 1.0 and later need Python 3.12: `make test-arviz PYTHON=python3.12` tries reports, results and files with it.
test-arviz:  ## the tests of reports with the newest ArviZ, where PYTHON is 3.12 or later
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "PYTHON is older than 3.12: ArviZ 1.x needs that")'
	test -x build/arviz/bin/python || $(PYTHON) -m venv build/arviz
	build/arviz/bin/python -m pip --disable-pip-version-check install --quiet hatchling editables pytest
	build/arviz/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation \
	  --editable '.[numpyro,report]' "arviz>=1" h5py
	$(ONE_THREAD) build/arviz/bin/python -m pytest --quiet tests/test_report.py tests/test_result.py

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMP)  ## run the notebooks, into build/notebooks
	mkdir -p build/notebooks
	for path in notebooks/*.py; do \
	  into="build/notebooks/$$(basename "$$path" .py).ipynb"; \
	  $(BIN)/jupytext --quiet --to notebook --output "$$into" "$$path" || exit 1; \
	  $(ONE_THREAD) $(BIN)/jupyter-execute --inplace --timeout=300 "$$into" || exit 1; done

docs: $(STAMP)  ## build the documentation, into build/docs
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[docs]'
	$(ONE_THREAD) $(BIN)/python -m sphinx -W --keep-going --quiet docs build/docs

figures: $(STAMP)  ## make the pictures of README.md and docs/
	$(ONE_THREAD) $(BIN)/python docs/figures.py

clean:  ## remove everything that was made
	rm -rf $(VENV) build dist docs/notebooks demo-out .pytest_cache .mypy_cache .ruff_cache
