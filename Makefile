# Two commands to start with: `make demo` and `make test`. Both make .venv when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DEVICE ?= cuda
READY := .venv/.ready
TOOLS := .venv/.ready-tools
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# One thread a worker: as many workers as cores share the machine without getting into each other's way.
# A file's tests go to one worker: what they share is made once.
# A worker that hangs ends itself (tests/conftest.py) and is not replaced: the suite fails instead of waiting for it.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all test-gpu bench docs docker-check lint clean

$(READY): pyproject.toml constraints.txt
	@echo "installing into .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(INSTALL) torch
	@$(INSTALL) -e .
	@touch $@

# The optional packages that tests need to be more than skipped; mlflow, trackio and ray are left out for their size.
$(TOOLS): $(READY)
	@echo "installing what tests and checks use into .venv"
	@$(INSTALL) -e '.[dev,docs,eval,gguf,languages,search,serve,slurm,tensorboard,wandb]'
	@touch $@

demo: $(READY)  ## align the bundled small model, offline, and write a report
	@$(BIN)/penchant demo

test: $(TOOLS)  ## the default suite
	@$(PYTEST)

test-all: $(TOOLS)  ## everything, the slow tests too
	@$(PYTEST) -m ''

test-gpu: $(TOOLS)  ## what depends on the device, on this machine's GPU (DEVICE=mps or xpu for others), with a table of what ran; skipped where there is none
	@why=$$($(BIN)/python -c 'from penchant.base.machine import why_not; print(why_not("$(DEVICE)"))') && \
	if test -z "$$why"; \
	then CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -m device --device $(DEVICE); \
	else echo "test-gpu: skipped, nothing ran: $$why"; fi

bench: $(READY)  ## DPO against the peer, in turn, on this machine (about half an hour)
	@$(INSTALL) -e '.[gguf]'
	@$(BIN)/python benchmarks/dpo_vs_trl.py

docs: $(TOOLS)  ## the documentation site, into site/; a warning is an error (with --quiet it would be none)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site -b 127.0.0.1"

docker-check: $(TOOLS)  ## lint the Dockerfiles and run the CPU one's steps without an engine (as root, on Linux)
	@$(BIN)/hadolint docker/cpu.Dockerfile docker/cuda.Dockerfile
	@$(BIN)/python docker/check.py docker/cpu.Dockerfile

lint: $(TOOLS)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf .venv
