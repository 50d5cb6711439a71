# Every target makes and uses .venv, so a fresh clone needs nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= auto
# Compiled tests and sources are kept also where the environment says otherwise: every process that runs tests compiles all of them again without.
TESTS := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1
TEST_EXTRAS := mujoco,robotics,box2d,trl,export,hub,video

.PHONY: demo test test-slow test-wheel test-oldest test-newest fuzz lint format docs bench clean test-kill audit

# One stamp per set of extras: reinstalled when the dependencies change, otherwise free.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "rlkit2 needs Python 3.11 or newer; choose one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.core: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,$(TEST_EXTRAS)]'
	@touch $@ $(VENV)/.core

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

demo: $(VENV)/.core
	$(BIN)/rlkit2 demo

test: $(VENV)/.dev
	$(TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow"

test-slow: $(VENV)/.dev
	$(TESTS) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

# The wheel in an environment of its own.
test-wheel: $(VENV)/.dev
	$(BIN)/pip install --quiet --disable-pip-version-check 'hatchling>=1.25'
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

# The fast tests with the oldest dependencies that pyproject.toml allows, and with the newest that there are.
test-oldest:
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) -m tests.bounds > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt -e '.[test,label]' 'gymnasium[classic-control]'
	$(TESTS) .venv-oldest/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" tests

test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager -c constraints.txt -e '.[test,label]' 'gymnasium[classic-control]'
	$(TESTS) .venv-newest/bin/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" tests

# Damages files of every kind and uses them, and gives odd arrays to functions; what ends in a traceback, hangs or takes too much memory is printed.
MINUTES ?= 5
FIRST ?= 0
fuzz: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.campaign --minutes $(MINUTES) --first $(FIRST)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.arrays --first $(FIRST)

# Kills every kind of work at random moments, does it again and compares.
KILLS ?= 300
test-kill: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.kill.campaign --kills $(KILLS)

# Packages, versions and licences that come along; known vulnerabilities where pip-audit is installed and there is a network.
audit: $(VENV)/.dev
	$(BIN)/python -m tests.audit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/codespell

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: $(VENV)/.dev
	for name in data entanglement matmul starc startup training uncertainty; do $(BIN)/python benchmarks/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest docs/_build build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
