# `make demo` and `make test` do all the set-up themselves. They need Python >= 3.10 with pip only.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TQDM_DISABLE := 1
RAY_TESTS := tests/compare/run/test_ray.py
FAST_TESTS := tests/test_imports.py tests/method tests/sae tests/metrics tests/training/test_run_file.py

.PHONY: demo test check lint types ray notebooks ci format clean

demo: $(VENV)/.installed
	$(BIN)/sae-lens-atm compare demo --jobs 2

# All tests but those of a Ray cluster and the notebooks, which CI runs too.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --ignore $(RAY_TESTS) --ignore tests/test_notebooks.py

# The fast loop, under a minute: format, lint, import rules, mathematics, SAE, metrics, run files.
check: lint
	$(BIN)/python -m pytest -n 2 $(FAST_TESTS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

ray: $(VENV)/.installed
	$(BIN)/python -m pytest $(RAY_TESTS)

# The notebooks at full length. Without NOTEBOOKS=full they take few training steps.
notebooks: $(VENV)/.installed
	NOTEBOOKS=full $(BIN)/python -m pytest -n 2 tests/test_notebooks.py

ci: test ray lint types notebooks

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# We run exact versions. Users of the package get the wide ranges of pyproject.toml.
# Of sae-probes only the data are used. Its dependencies are large and older than those here. Without
# the package, its tests are skipped.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,notebooks,ray]'
	-$(BIN)/python -m pip install --quiet --no-deps sae-probes==0.4.2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
