# Everything a contributor runs. `make` alone lists the targets.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := test,dev,report

# Two processes: most of the time goes into tracing and compiling, which one process
# does on one core. PYTEST_ARGS="-n 0 -k name" for a closer look.
PYTEST_ARGS ?= -n 2 --dist worksteal
MARKERS     ?= not gpu and not gpu_compile and not tpu_compile

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help venv test test-gpu test-gpu-compile test-tpu-compile demo lint format constraints clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) \
	  | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

venv: $(STAMP) ## create .venv with Python 3.12 and the pinned dependencies
	@:

# The stamp makes a second run instant; a change of either file installs again.
$(STAMP): pyproject.toml constraints.txt scripts/make_venv.sh
	@bash scripts/make_venv.sh $(VENV)
	@echo "Installing angeljax[$(EXTRAS)] into $(VENV), a few minutes the first time"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

test: $(STAMP) ## run the tests that need no accelerator
	$(BIN)/python -m pytest -m "$(MARKERS)" $(PYTEST_ARGS)

test-gpu: $(STAMP) ## run the tests that need a CUDA device
	ANGELJAX_TEST_PLATFORM=cuda $(BIN)/python -m pytest -m gpu

test-gpu-compile: $(STAMP) ## compile the kernels for an H100 (needs jax[cuda13], no GPU)
	$(BIN)/python -m pytest -m gpu_compile

test-tpu-compile: $(STAMP) ## compile the kernels for TPU on this host (needs libtpu)
	$(BIN)/python -m pytest -m tpu_compile

demo: $(STAMP) ## compress a small model and show what came of it
	@$(BIN)/python -m angeljax.demo

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(STAMP) ## pin what .venv holds now in constraints.txt
	@{ sed -n '/^#/p' constraints.txt; \
	   $(BIN)/python -m pip freeze -qq --exclude-editable; } > constraints.tmp
	@mv constraints.tmp constraints.txt

clean: ## remove .venv, caches and build outputs
	rm -rf $(VENV) build dist demo-output *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
