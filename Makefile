# Every target sets up .venv by itself; it is built again only when pyproject.toml or constraints.txt change.
# pip would compile all of the modules that it installs, most of which nothing imports: half a minute. Python compiles
# what it imports, once, if it may write bytecode.

export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean

help:
	@echo 'make demo    explain this machine, measure, train a small model, draw (about two minutes)'
	@echo 'make test    ruff, mypy --strict and pytest: what CI runs'
	@echo 'make lint    the same without pytest'
	@echo 'make format  let ruff rewrite the sources'
	@echo 'make clean   remove .venv, caches and demo-output'

demo: $(STAMP)
	@$(BIN)/python -m dilated_attention demo --output demo-output

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --num-workers auto

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build demo-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dilated-attention needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0])'
	@[ -x $(BIN)/python ] || { echo 'Creating $(VENV)'; $(PYTHON) -m venv --clear $(VENV); }
	@echo 'Installing into $(VENV) (once; PyTorch is the large part)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@
