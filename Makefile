# make demo | test | check | bench | golden | setup. Each sets up .venv when it is missing.
PYTHON ?= python3
# A release that pip finds as a CPU build keeps the install small; set TORCH=torch for the newest CUDA build.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test check bench golden

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[demo,dev]"
	touch $@

demo: setup
	$(BIN)/cpt run recipe=demo

test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit tests/golden tests/test_architecture.py

bench: setup
	$(BIN)/python -m benchmarks

golden: setup
	CPT_GOLDEN=write $(BIN)/python -m pytest -q tests/golden
