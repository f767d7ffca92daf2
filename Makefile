# Two commands to start with: `make demo` and `make test`. Both make .venv when it is missing.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test test-all bench docs docker-check lint clean

$(READY): pyproject.toml constraints.txt
	@echo "installing into .venv (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	@touch $(READY)

demo: $(READY)  ## align the bundled small model, offline, and write a report
	@$(BIN)/penchant demo

test: $(READY)  ## the default suite
	@$(BIN)/python -m pytest

test-all: $(READY)  ## everything, the slow tests too
	@$(BIN)/python -m pytest -m ''

bench: $(READY)  ## DPO against the peer, in turn, on this machine (about half an hour)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	@$(BIN)/python benchmarks/dpo_vs_trl.py

docs: $(READY)  ## the documentation site, into site/; a warning is an error
	@$(BIN)/python -c 'import material, latex2mathml' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "site/index.html; with search: $(BIN)/python -m http.server -d site -b 127.0.0.1"

docker-check: $(READY)  ## lint the Dockerfiles and run the CPU one's steps without an engine (as root, on Linux)
	@$(BIN)/hadolint docker/cpu.Dockerfile docker/cuda.Dockerfile
	@$(BIN)/python docker/check.py docker/cpu.Dockerfile

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf .venv
