# make demo | test | lint | check | bench | golden | setup. Each sets up .venv when it is missing.
PYTHON ?= python3
# A release that pip finds as a CPU build keeps the install small; set TORCH=torch for the newest CUDA build.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
FAST = tests/unit tests/golden tests/test_architecture.py
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo test lint check bench golden

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[demo,dev]"
	touch $@

demo: setup
	$(BIN)/cpt run recipe=demo

# Three at once on two cores, as many tests wait for a queue's clock; those of a file share what they started, and the
# quick ones (unit) come last, so that no process is left with a long file at the end.
test: setup
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -q -n 2 $(FAST)

bench: setup
	$(BIN)/python -m benchmarks

golden: setup
	CPT_GOLDEN=write $(BIN)/python -m pytest -q tests/golden
