# Everything runs in .venv, which any target makes when it is missing or older than what it is made from.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo demo-finetune test test-slow test-cluster lint bench clean

demo: $(READY)
	$(BIN)/python -m launch.demo

demo-finetune: $(READY)
	$(BIN)/python -m launch.demo_finetune

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow --timeout=900

# On a SLURM and MPIs of its own. As root on Debian it installs SLURM; where none can be had the tests are skipped.
test-cluster: $(READY)
	tests/cluster/install.sh
	$(BIN)/python -m pytest -m cluster tests/cluster

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/run launch/*.sh launch/*.slurm tests/cluster/*.sh

bench: $(READY)
	$(BIN)/python benchmarks/sample_order.py

clean:
	rm -rf .venv demo-output demo-finetune-output

# torch comes first and with what it needs (on a GPU machine: CUDA's libraries); everything else comes exactly
# as locked. DeepSpeed is built from source against that torch, without compiling kernels ahead of time.
$(READY): pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $$(grep '^torch==' requirements.lock)
	$(BIN)/pip install --quiet --no-deps $$(grep -E '^(setuptools|wheel|packaging|ninja|py-cpuinfo|numpy)==' requirements.lock)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
