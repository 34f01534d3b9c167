# Two commands matter: `make demo` and `make test`. Both set up all they need in .venv.
PYTHON ?= python3
VENV ?= .venv
# The torch that tests and figures are from; `make test TORCH="torch==2.6.*" VENV=.venv26` tries another.
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin

# One question each, in the order of a README reader's; about 50 minutes in all, with nothing else running.
BENCHES := stall save planes codec memory restore many lora gil auto faults start

.PHONY: demo test test-slow test-matrix soak check wheel bench knobs clean

demo: $(VENV)/ready
	$(BIN)/python examples/train_lm.py

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "not slow" -n auto --maxprocesses 4 --dist loadgroup --durations 10

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m slow --timeout 3600
	ASYNCSAVE_KERNEL=numpy $(BIN)/python -m pytest -q --timeout 3600 tests/rooms/test_codec.py \
	    tests/rooms/test_format.py tests/sweeps/test_damage.py tests/sweeps/test_hostile.py

soak: $(VENV)/ready
	$(BIN)/python -m tests.sweeps.soak

check: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel as people get it: built, installed where the source tree is not, the README's examples run.
# What it needs is taken from $(VENV) by a line in a .pth file, and pip checks that it is all there.
WHEEL := $(VENV)/wheel
wheel: $(VENV)/ready
	rm -rf $(WHEEL) && mkdir $(WHEEL)
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEEL) .
	$(BIN)/python -m venv --without-pip $(WHEEL)/venv
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	> $$(echo $(WHEEL)/venv/lib/python3*/site-packages)/needs.pth
	$(BIN)/pip --python $(WHEEL)/venv install --quiet --disable-pip-version-check --no-index \
	    --no-deps --force-reinstall $(WHEEL)/*.whl
	$(BIN)/pip --python $(WHEEL)/venv check --disable-pip-version-check
	$(WHEEL)/venv/bin/asyncsave --version
	$(WHEEL)/venv/bin/python tests/scripts/readme.py

# Each in an environment of its own, which is removed again; what is not installed here is said.
MATRIX := 3.11 3.12 3.13 3.14
test-matrix:
	set -e; for each in $(MATRIX); do \
	    if command -v python$$each > /dev/null; then \
	        for torch in "torch==2.6.*" "$(TORCH)"; do \
	            echo "== Python $$each, $$torch"; \
	            $(MAKE) test PYTHON=python$$each VENV=.venv-matrix "TORCH=$$torch" \
	            || echo "!! Python $$each, $$torch: failed"; \
	            rm -rf .venv-matrix; \
	        done; \
	    else echo "== Python $$each is not installed"; fi; \
	done

bench: $(VENV)/bench-ready
	set -e; for each in $(BENCHES); do echo "bench/$$each.py"; $(BIN)/python bench/$$each.py; done

# Which values the product's constants want; nothing else should run meanwhile.
knobs: $(VENV)/ready
	$(BIN)/python bench/knobs.py

clean:
	rm -rf $(VENV)

$(VENV)/ready: pyproject.toml Makefile build_kernel.py asyncsave/codec/kernel.c
	@echo "Setting up $(VENV), once: $(TORCH) and a dozen small packages. 1.1 GB on disk with a CPU build of torch;"
	@echo "where pip picks a CUDA build, up to 3 GB to fetch and 5 GB on disk. One to five minutes."
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "asyncsave needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# one by one: what cannot be installed on this machine is a row that says so
$(VENV)/bench-ready: $(VENV)/ready
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"], sep="\n")' \
	| while read -r peer; do \
	    $(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" "$$peer" || echo "$$peer could not be installed"; \
	done
	touch $@
