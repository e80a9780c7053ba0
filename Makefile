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

.PHONY: help install demo test lint format clean
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
	$(ONE_THREAD) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that was made
	rm -rf $(VENV) build dist demo-out .pytest_cache .mypy_cache .ruff_cache
