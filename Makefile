# `make` lists the targets. Everything is installed into .venv; a second run installs nothing, a changed pyproject.toml again.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
export PIP_NO_INPUT := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test test-faults soak bench-switch bench-decision bench-preemption bench-relay bench-scheduling test-vllm test-packaging test-ui screenshots lint types docs clean test-slow bench-observed

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-16s %s\n", $$1, $$2 }'

demo: $(VENV)/.demo ## switch between two simulated vLLM servers and show what happened
	@$(BIN)/python examples/demo.py

test: $(VENV)/.test ## the fast tests, with branch coverage; ARGS='...' goes to pytest
	@$(BIN)/python -m pytest -n 6 --dist worksteal --cov --cov-branch --cov-report=term --cov-fail-under=95 $(ARGS)

test-faults: $(VENV)/.test ## the half of the fault matrix that `make test` leaves out: each row on its other event loop
	@$(BIN)/python -m pytest -n 6 --dist worksteal -m second_loop $(ARGS)

test-slow: $(VENV)/.test ## clients' libraries that take seconds to import, benchmarks in miniature
	@$(BIN)/python -m pytest -n 2 -m slow -W 'ignore:unclosed:ResourceWarning' $(ARGS) # LiteLLM leaves sockets open

soak: $(VENV)/.test ## 2,000 switches, 20,000 requests and 200 faults, in at most 10 minutes; ARGS='--seed 1 --loop trio'
	@$(BIN)/python -m tests.soak $(ARGS)

bench-switch: $(VENV)/.test ## what the gateway adds to the sleep and wake calls of a switch
	@$(BIN)/python -m tests.benchmarks.switch_overhead

bench-decision: $(VENV)/.test ## what a decision costs with 10, 1,000 and 10,000 waiting requests
	@$(BIN)/python -m tests.benchmarks.decision

bench-preemption: $(VENV)/.test ## how long a long answer holds up another model, with and without preemption, on a real vLLM
	@$(BIN)/python -m tests.benchmarks.preemption $(ARGS)

bench-relay: $(VENV)/.test ## what the relay costs beside nginx, a Rust router and plain httpx; ARGS='--quick --candidates gateway,vllm-router'
	@$(BIN)/python -m tests.benchmarks.relay $(ARGS)

bench-observed: $(VENV)/.ui ## what it costs to have the dashboard open and the metrics scraped
	@$(BIN)/python -m tests.benchmarks.observed

bench-scheduling: $(VENV)/.test ## every policy under every load, measured and simulated; writes docs/scheduling.md anew
	@$(BIN)/python -m tests.benchmarks.scheduling $(ARGS)

test-vllm: $(VENV)/.test ## the tests against a real vLLM on the CPU (builds its environment at the first run)
	@$(BIN)/python -m pytest -m vllm $(ARGS)

test-ui: $(VENV)/.ui ## the dashboard in a real Chromium (Debian's, installed by apt-get if it is missing)
	@$(BIN)/python -m tests.support.debian chromium chromium >/dev/null
	@$(BIN)/python -m pytest -m ui tests/ui $(ARGS)

screenshots: $(VENV)/.ui ## take the pictures of the dashboard in docs/ anew
	@$(BIN)/python -m tests.ui.screenshots

test-packaging: $(VENV)/.packaging ## wheel and sdist in empty environments, the tutorial word for word, nginx, Kubernetes manifests
	@$(BIN)/python -m pytest -m packaging tests/packaging $(ARGS)

lint: $(VENV)/.lint ## ruff: rules and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(VENV)/.lint ## mypy, strict
	@$(BIN)/mypy

docs: $(VENV)/.docs ## build the documentation into site/, and look where its links lead
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@$(BIN)/python -m tests.links site

clean: ## remove what was built or installed here
	rm -rf $(VENV) site dist build .coverage .coverage.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or later is needed and '$(PYTHON)' is not that: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "making $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.demo: pyproject.toml $(VENV)/.pip
	@echo "installing what the demo needs into $(VENV)" >&2
	@$(PIP) install --editable '.[cli,otlp]' 'openai>=1.60'
	@touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.pip
	@echo "installing what the tests need into $(VENV)" >&2
	@$(PIP) install --editable . --group test
	@touch $@ $(VENV)/.demo

$(VENV)/.ui: pyproject.toml $(VENV)/.test
	@echo "installing what the dashboard's tests need into $(VENV)" >&2
	@$(PIP) install --group ui
	@touch $@

$(VENV)/.packaging: pyproject.toml $(VENV)/.test
	@echo "installing what the packaging tests need into $(VENV)" >&2
	@$(PIP) install --group packaging
	@touch $@

$(VENV)/.lint: pyproject.toml $(VENV)/.test
	@echo "installing what the checks need into $(VENV)" >&2
	@$(PIP) install --group lint
	@touch $@

$(VENV)/.docs: pyproject.toml $(VENV)/.pip
	@echo "installing what the documentation needs into $(VENV)" >&2
	@$(PIP) install --group docs
	@touch $@
