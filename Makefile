# Each target makes .venv and installs into it what it needs, once. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_IMAGE ?= assets/fashion
DEMO_DIR ?= output/demo
# Two test processes of one thread each: fits the smallest machine. Tests of one xdist_group share what they set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

.PHONY: help demo install test test-long lint

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## Tokenize images and show them at 1, 2, 4, ... tokens
	$(BIN)/python scripts/inference_tokenizer.py --image $(DEMO_IMAGE) --output_dir $(DEMO_DIR)
	@echo
	@echo "The contact sheet is in $(DEMO_DIR): open its PNG."
	$(BIN)/python scripts/compress.py assets/fashion/sneaker.png --output $(DEMO_DIR)/sneaker.1dp --force
	$(BIN)/python scripts/inspect_compressed.py $(DEMO_DIR)/sneaker.1dp

install: $(VENV)/.installed  ## Make .venv and install what the code needs

test: $(VENV)/.installed-dev  ## Run the tests
	$(PYTEST)

test-long: $(VENV)/.installed-dev  ## Run the tests that take minutes
	$(PYTEST) -m long

lint: $(VENV)/.installed-dev  ## Check style and types of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@command -v $(PYTHON) > /dev/null || { echo "error: there is no $(PYTHON): install Python 3.10 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: Python 3.10 or newer is needed, got $$($(PYTHON) --version): try make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "error: $(PYTHON) cannot make virtual environments (on Debian: apt-get install python3-venv)" >&2; \
	    rm -rf $(VENV); exit 1; }

$(VENV)/.installed: requirements.txt constraints.txt pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV): once, some minutes, about 6 GB with CUDA's libraries."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements-dev.txt
	@touch $@
