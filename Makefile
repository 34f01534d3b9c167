# Two commands matter: `make demo` and `make test`. Both set up all they need in .venv.
PYTHON ?= python3
VENV ?= .venv
# The torch that tests and figures are from; `make test TORCH="torch==2.6.*" VENV=.venv26` tries another.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

.PHONY: demo test test-slow check bench clean

demo: $(VENV)/ready
	$(BIN)/python examples/train_lm.py

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m slow --timeout 3600

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python bench/stall.py

clean:
	rm -rf $(VENV)

$(VENV)/ready: pyproject.toml Makefile
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "asyncsave needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@
