PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -c constraints.txt
# A stamp says which extras are installed; it is out of date once one of these changes.
INPUTS := setup.cfg pyproject.toml constraints.txt $(VENV)/pyvenv.cfg
LOWEST := .venv-lowest

.PHONY: help quickstart test test-lowest lint typecheck clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s%s\n", $$1, $$2 }' Makefile

quickstart: $(VENV)/.installed ## install, then train a small model
	$(BIN)/puma fit --config configs/quickstart.yaml

test: $(VENV)/.installed-test ## run the fast tests
	$(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

test-lowest: ## run them against the lowest versions that setup.cfg promises
	test -d $(LOWEST) || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install -c constraints-lowest.txt -e ".[test]"
	$(LOWEST)/bin/pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/.installed-dev ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed-dev ## check types
	$(BIN)/mypy

clean: ## remove the environment, build artefacts and caches, but not runs/
	rm -rf $(VENV) $(LOWEST) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null 2>&1 || { \
	    echo "Found no '$(PYTHON)': install Python >= 3.11, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Expected Python >= 3.11, got $$($(PYTHON) --version 2>&1): name a newer one, as in" \
	        "make PYTHON=python3.13" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "'$(PYTHON)' lacks the modules venv and ensurepip: install them (on Debian and Ubuntu, the package" \
	        "python3-venv), or name another Python: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(INPUTS)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: $(INPUTS)
	$(INSTALL) -e ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(INPUTS)
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed
