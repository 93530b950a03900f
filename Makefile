# relook: run `make` for the list of targets. Needs Python 3.11 or later and make; everything else is installed into .venv.
#
# PIP_ARGS goes to every pip install. On Linux the package index offers the CUDA build of torch (several GB); to take the
# CPU build:  make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

# The first of these that runs and is new enough (a name may exist and not work, as pyenv's shims do).
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt $(PIP_ARGS)

# Nothing in the suite or the demo needs the network; torch's threads are left to the machine.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-slow lint bench bench-load docs examples clean cards-tiny receipts-tower receipts-tiny receipts-arms

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "relook needs Python 3.11 or later; none found. Install it, or: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Stamps: a second run installs nothing until pyproject.toml or constraints.txt changes. torch comes first and alone, so
# that the pinned build is settled before anything that depends on it is resolved.
$(VENV)/.core: $(BIN)/python pyproject.toml constraints.txt
	@echo "installing relook into $(VENV) (some minutes the first time)"
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core zoo/pyproject.toml
	@echo "installing what the tests need"
	$(PIP) -e ".[dev,serve]"
	$(PIP) --no-deps --no-build-isolation -e zoo
	@touch $@

$(VENV)/.slow: $(VENV)/.dev
	@echo "installing what the long tests need besides"
	$(PIP) -e ".[dev,serve,ray-serve,deepspeed,qlora,captions,notebook]"
	@touch $@

setup: $(VENV)/.dev  ## a virtual environment with everything, in .venv

demo: $(VENV)/.core  ## ask the shipped models about the pages in examples/; pictures go to out/
	@$(BIN)/python examples/demo.py

lint: $(VENV)/.dev  ## ruff, mypy, and the order of layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

# mypy takes the package that the tests are of (tests/model: src/relook/model), or everything where there is none.
FILES ?= tests
check: $(VENV)/.dev  ## the quick loop, lint and a part of the tests: make check FILES="tests/model"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(sort $(wildcard $(foreach file,$(FILES),src/relook/$(word 2,$(subst /, ,$(file))))))
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/pytest $(FILES)

# Tests of pages drive a Chromium that is there already (Debian: apt-get install chromium); without one they are skipped.
test: lint  ## lint and the whole default suite (no network, no GPU)
	$(BIN)/pytest -n auto --dist loadscope

test-slow: $(VENV)/.slow  ## the long tests
	$(BIN)/pytest -m slow

bench: $(VENV)/.dev  ## what a look costs, as ratios within one run
	$(BIN)/relook bench

bench-load: $(VENV)/.dev  ## the server under load, beside itself without batching and transformers serve
	$(BIN)/python tools/stock_env.py build/stock
	$(BIN)/relook bench load --transformers-serve build/stock/bin/python

docs: $(VENV)/.dev  ## write docs/cli.md again from --help
	$(BIN)/python -m relook.cli.reference > docs/cli.md

examples: $(VENV)/.dev  ## draw the pages in examples/ again
	$(BIN)/python examples/make_pages.py

cards-tiny: $(VENV)/.dev  ## train the shipped cards-tiny again
	$(BIN)/relook train zoo/recipes/cards-tiny.yaml

receipts-tower: $(VENV)/.dev  ## train the vision tower in zoo/recipes/receipts-tower again
	$(BIN)/relook train zoo/recipes/receipts-tower.yaml

receipts-tiny: $(VENV)/.dev  ## train the shipped receipts-tiny again, from the tower in zoo/recipes/receipts-tower
	$(BIN)/relook train zoo/recipes/receipts-tiny.yaml

receipts-arms: $(VENV)/.dev  ## train and evaluate all settings of zoo/receipts.md, and write its table and figures again
	$(BIN)/python zoo/tools/receipts_arms.py

clean:  ## remove caches, build outputs and out/ (not .venv)
	rm -rf build dist out src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
