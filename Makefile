# `make demo` walks the whole pipeline on generated scenes; `make test` runs the tests.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint lock clean

demo: .venv/ready
	$(BIN)/samcache run quickstart

# Side by side, and with one thread each, so that they do not wait for one another.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4

lint: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# One environment for everyone: exactly the versions of requirements.lock, then this package.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Resolve the newest versions anew, for every supported Python at once. Needs uv.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --group dev --no-header --no-annotate --upgrade \
		pyproject.toml --output-file requirements.lock

clean:
	rm -rf .venv
