# Every verb makes its own environment: `make demo` and `make test` are enough on a machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := vastproxy tests benchmarks

.PHONY: help install demo test check fix bench chaos clean

help: ## say what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/run.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[compression]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/run.stamp

install: $(VENV)/run.stamp ## make .venv with vastproxy in it

demo: $(VENV)/run.stamp ## ad servers, proxy and page on loopback, ready to look at
	$(BIN)/vastproxy demo

test: $(VENV)/dev.stamp ## all tests
	$(BIN)/python -m pytest

check: $(VENV)/dev.stamp ## formatting, lint, types, import directions, docstrings, tests
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/interrogate --quiet tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

fix: $(VENV)/dev.stamp ## repair what a machine can repair
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

chaos: $(VENV)/dev.stamp ## trouble before ad servers and Redis, for minutes
	CHAOS_ROUNDS=$(or $(ROUNDS),20) CHAOS_SEED=$(or $(SEED),1) $(BIN)/python -m pytest tests/functional/test_chaos.py

bench: $(VENV)/dev.stamp ## CPU per ad request, as ratios to the floor and to a peer
	$(BIN)/python -m benchmarks

clean: ## remove what make made
	rm -rf $(VENV) build dist
