# Each target does its own set-up: a fresh clone needs Python 3.11 or newer and make, nothing else.
#
#   make setup      .venv with the pinned packages of constraints.txt and this project in editable mode
#   make demo       draw clips, train VAE, transformer and LoRA, sample, score: outputs/demo/report.html
#   make demo-long  the same with longer clips and longer training: outputs/demo-long/report.html
#   make test       the CPU test suite
#   make lint       ruff check and ruff format --check
#   make clean      remove .venv and caches; outputs/ and runs/ stay
#
# Variables: PYTHON=/path/to/python3.11   PIP_OPTIONS="--extra-index-url ..."   TEST_WORKERS=2
#            DEMO_OPTIONS="--fresh"   TEST_OPTIONS="-k lora"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
PYTHON ?=
PIP_OPTIONS ?=
TEST_WORKERS ?= 2
TEST_OPTIONS ?=
DEMO_OPTIONS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-long test lint clean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

setup: $(READY)

# The stamp comes last, so that an interrupted set-up is taken up again.
$(READY): pyproject.toml constraints.txt
	@python=; \
	for candidate in $(if $(PYTHON),"$(PYTHON)",python3 python3.13 python3.12 python3.11 python); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  found="$$(command -v "$(or $(PYTHON),python3)" >/dev/null && "$(or $(PYTHON),python3)" --version 2>&1 || echo 'not there')"; \
	  echo "error: Python 3.11 or newer is needed; $(or $(PYTHON),python3) is $$found." \
	       "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if ! $(VENV_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo "setup: creating $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV); \
	fi
	@echo "setup: installing the packages pinned in constraints.txt (a few minutes the first time)"
	@# torch alone first: DeepSpeed's build looks for it, and a later range must not pull another build.
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt torch
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS) -c constraints.txt -e ".[dev]"
	@touch $@
	@echo "setup: ready ($$($(VENV_PYTHON) -c 'import torch; print("torch", torch.__version__)'))"

demo: setup
	@$(VENV_PYTHON) -m scripts.demo $(DEMO_OPTIONS)

demo-long: setup
	@$(VENV_PYTHON) -m scripts.demo --long $(DEMO_OPTIONS)

test: setup
	@OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest tests -n $(TEST_WORKERS) --dist loadfile $(TEST_OPTIONS)

lint: setup
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache sat/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
