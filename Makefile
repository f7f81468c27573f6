# make env | train | test | test-all | check | equality | layouts | faults | fuzz | format | clean
PYTHON ?= python3
BIN := .venv/bin
# Files go to two processes in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
INSTALLED := .venv/.installed

.PHONY: env train test test-rest test-all check equality layouts faults fuzz format clean

env: $(INSTALLED)

# torch comes first: DeepSpeed, built from source, looks for it.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,mpi]'
	touch $@

train: env
	$(BIN)/python tools/train_digits.py

# The quick level: every feature, in minutes.
test: check
	$(PYTEST) -m "not full"

# What the quick level leaves out.
test-rest: env
	$(PYTEST) -m full

test-all: check
	$(PYTEST)

check: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The tables in docs/, measured anew.
equality: env
	$(BIN)/python -m pytest -q tests/parallel/test_equality.py --equality-table docs/equality.md

layouts: env
	$(BIN)/python -m pytest -q tests/parallel/test_layout_change.py --layout-table docs/layout_changes.md

faults: env
	$(BIN)/python -m pytest -q --fault-table docs/faults.md

fuzz: env
	$(BIN)/python tools/fuzz.py --out docs/damage.md

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
