# `make demo` and `make test` do all the set-up themselves; only Python >= 3.10 with pip is needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TQDM_DISABLE := 1

.PHONY: demo test check format versions weekly clean

demo: $(VENV)/.installed
	$(BIN)/sae-lens-atm compare demo --jobs 2

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The core of the tests, on every Python that is here, with the oldest and the newest sae-lens allowed.
versions: $(VENV)/.installed
	$(BIN)/python tools/versions.py floor newest $(VERSIONS_OPTIONS)

# The same with the newest of everything: what breaks, and what constraints.txt has yet to take up.
weekly: $(VENV)/.installed
	$(BIN)/python tools/versions.py newest-of-all

# Exact versions for what we run ourselves; users of the package get pyproject's wide ranges.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,notebooks,ray]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
