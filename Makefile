# Each target makes .venv and installs into it what it needs, once. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_IMAGE ?= assets/fashion
DEMO_DIR ?= output/demo
PAGE_DIR ?= output/page
PAGE_MODELS := one-d-piece_fashion one-d-piece_emoji
# Two test processes of one thread each: fits the smallest machine. Tests of one xdist_group share what they set up.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup

.PHONY: help demo page install test test-long lint

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed  ## Tokenize images and show them at 1, 2, 4, ... tokens
	$(BIN)/python scripts/inference_tokenizer.py --image $(DEMO_IMAGE) --output_dir $(DEMO_DIR)
	@echo
	@echo "The contact sheet is in $(DEMO_DIR): open its PNG."
	$(BIN)/python scripts/compress.py assets/fashion/sneaker.png --output $(DEMO_DIR)/sneaker.1dp --force
	$(BIN)/python scripts/inspect_compressed.py $(DEMO_DIR)/sneaker.1dp

page:  ## Assemble the page that compresses in a browser, for any static host
	mkdir -p $(PAGE_DIR)/examples
	cp page/*.html page/*.css page/*.js page/*.svg $(PAGE_DIR)
	for model in $(PAGE_MODELS); do mkdir -p $(PAGE_DIR)/models/$$model && \
	    cp assets/models/$$model/config.json assets/models/$$model/*.safetensors $(PAGE_DIR)/models/$$model || exit 1; done
	for set in fashion emoji; do mkdir -p $(PAGE_DIR)/examples/$$set && cp assets/$$set/* $(PAGE_DIR)/examples/$$set || exit 1; done
	@echo
	@echo "The page is in $(PAGE_DIR). To see it: python3 -m http.server --bind 127.0.0.1 --directory $(PAGE_DIR) 8000"

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
