# `make demo` and `make test` need nothing but Python 3.11 or 3.12, pip and g++: they make their own .venv once.
# Choose the interpreter with `make PYTHON=python3.12 ...`; pip takes its packages from wherever it is configured to.

PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch>=2.11,<2.14
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export OMP_NUM_THREADS ?= 1
export DS_BUILD_OPS := 0

.PHONY: help demo test test-slow interop verify faults sanitize checks format bench bench-kernels clean distclean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## train a small MoE on real text: 8 ranks, ep 2 x dp 4, on CPU or GPU
	$(BIN)/torchrun --nproc_per_node 8 launch/pretrain_moe.py --ep 2 --dp 4 --config configs/runs/demo.yaml --resume auto

test: $(READY) ## the tests that fit in minutes
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-slow: $(READY) ## the long tests, and the GPU tests where there is a GPU
	$(BIN)/python -m pytest -q -m "slow or gpu"

interop: $(READY) .venv-interop-4/.ready .venv-interop-5/.ready ## what transformers 4.57 and 5.24 read in what is written
	$(BIN)/python -m pytest -q tests/checkpoint/hf/test_interop.py

# AutoConfig needs no torch
.venv-interop-4/.ready: PIN := transformers==4.57.*
.venv-interop-5/.ready: PIN := transformers==5.24.*
.venv-interop-%/.ready: | $(READY)
	test -x $(@D)/bin/python || $(BIN)/python -m venv $(@D) || { rm -rf $(@D); exit 1; }
	$(@D)/bin/python -m pip install "$(PIN)"
	@touch $@

verify: $(READY) ## train every layout of up to 8 ranks against one process (long)
	$(BIN)/python tools/verify_layout.py

faults: $(READY) ## kill, signal and damage real runs, and count what is lost (minutes; TIER=nightly: an hour or more)
	$(BIN)/python -m tests.faults --tier $(or $(TIER),ci)

sanitize: $(READY) ## the C++ kernels under the address, undefined and thread sanitizers (minutes)
	$(BIN)/python tools/kernels/sanitize.py

checks: $(READY) ## lint, types, architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(READY) ## format the Python files in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## one training step against transformers, on two threads
	OMP_NUM_THREADS=2 $(BIN)/python tools/bench_step.py --peer transformers

bench-kernels: $(READY) ## the MoE layer against its peers, on the GPU or on two threads
	OMP_NUM_THREADS=2 $(BIN)/python tools/bench_kernels.py

clean: ## remove what was built, but keep .venv and runs/
	rm -rf build *.egg-info moe_engine/*.so .pytest_cache .ruff_cache $(READY)
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV) .venv-interop-*

# torch comes first and without build isolation, so that the C++ extension and DeepSpeed are built against the same torch.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 found: install one, or name it: make PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install "$(TORCH)" "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install --no-build-isolation -e ".[dev]"
	@touch $@
