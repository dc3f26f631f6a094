# `make demo` and `make test` do their own set-up: a virtual environment in .venv, made once.
#
#   PYTHON=python3.12 make demo     another interpreter (3.11 or newer)
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
#                                   smaller torch wheels, without CUDA
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two tests at a time: those that start processes one after the other, the rest beside them.
PYTEST_ARGS ?= -n 2 --dist loadgroup

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test clients gpu lint format clean

help:
	@echo "make demo    the embedded model pair: plain, speculative and speculative-speculative decoding, compared"
	@echo "make test    the tests, without the slow ones (PYTEST_ARGS='-m slow' for those)"
	@echo "make clients public clients (OpenAI's, lm-eval, LangChain, ...) against a server of a real model (docs/clients.md)"
	@echo "make gpu     everything a GPU has to show, in stages; results in build/gpu (docs/gpu.md)"
	@echo "make lint    ruff check, ruff format --check, pyright"
	@echo "make format  let ruff rewrite the files"
	@echo "make clean   remove the environment and tools' caches (build/ is left alone)"

# torch is named beside the package, so that one resolution fixes its version and nothing replaces it later.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Python 3.11 or newer is needed; say which: PYTHON=python3.12 make" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check "torch>=2.11,<2.14" -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/ssd compare --demo

test: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

clients: $(READY)
	$(BIN)/python -m pytest tests/clients -m slow -rP

gpu: $(READY)
	$(BIN)/python scripts/gpu_check.py --stage all --out build/gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist *.egg-info
	find ssd tests scripts launch -name __pycache__ -type d -prune -exec rm -rf {} +
