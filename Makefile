# blockzoo: `make` explains. Everything runs without sudo, in an environment of its own (.venv).
SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
MODEL ?=
ARGS ?=
JOBS ?= 2
BIN := $(VENV)/bin
export PYTHON VENV TORCH_INDEX
# A folder named kernels/ or services/ in the current directory must never win over a package of that name.
export PYTHONSAFEPATH := 1
unexport PYTHONPATH

.PHONY: help
help: ## This text
	@echo 'blockzoo serves many fine-tuned variants of a language model from shared blocks.'
	@echo
	@echo 'Start here:'
	@echo '  make demo        see it: a real model and its variants, answered from shared blocks'
	@echo '  make test        check it: every test that is not long (meant to take under 15 minutes on two cores)'
	@echo
	@echo 'Targets:'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | sort \
	    | while IFS=$$'\t' read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done
	@echo
	@echo 'Settings, as in `make demo MODEL=/path/to/checkpoint`:'
	@echo '  MODEL=PATH       demo: another Hugging Face checkpoint folder instead of SmolLM2-135M-Instruct'
	@echo '  TORCH_INDEX=URL  an extra package index for the torch wheel, for example the one with CPU wheels'
	@echo '  PYTHON=PATH      the Python to use, 3.11 or newer (now: $(PYTHON))'
	@echo '  VENV=PATH        where the environment goes (now: $(VENV))'
	@echo '  JOBS=N           test: processes that share the tests (now: $(JOBS)); 0 for one after another'
	@echo '  ARGS=...         test, test-long: more arguments for pytest, for example ARGS="-k gc -x"; bench-peers: its own'

.PHONY: venv
venv: ## The environment with everything development needs
	@scripts/environment.sh dev

.PHONY: demo-venv
demo-venv:
	@scripts/environment.sh demo

.PHONY: model
model: demo-venv ## SmolLM2-135M-Instruct as a checkpoint in .cache/smollm2 (93 MB to download, once)
	@$(BIN)/python scripts/get_model.py --out .cache/smollm2

.PHONY: demo
demo: demo-venv $(if $(MODEL),,model) ## Several variants of a real model answered side by side from shared blocks
	@$(BIN)/python scripts/demo.py $(if $(MODEL),--model '$(MODEL)')

.PHONY: demo-cluster
demo-cluster: demo-venv $(if $(MODEL),,model) ## Three workers, twelve variants, one killed in the middle: a cluster in five minutes
	@$(BIN)/python scripts/demo_cluster.py $(if $(MODEL),--model '$(MODEL)')

.PHONY: test
test: venv model ## Every test that is not long, meant to take under 15 minutes on two cores
	@echo 'Running the tests that are not marked long; the others are `make test-long`.'
	@$(BIN)/pytest -m 'not long' -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

.PHONY: test-long
test-long: venv model ## The tests marked long
	@echo 'Running the tests marked long.'
	@$(BIN)/pytest -m long $(ARGS)

.PHONY: bench
bench: venv model ## The measurements behind every figure in README and docs, into benchmarks/results
	@$(BIN)/python benchmarks/run.py

.PHONY: bench-peers
bench-peers: venv model ## Ours beside vLLM in one run, 20 minutes; ARGS="--only single-8", "--runs 3", "--quick"
	@$(BIN)/python benchmarks/run_peers.py $(ARGS)

.PHONY: presubmit
presubmit: venv proto-check lint typecheck wheel test ## What must pass before a change is merged: all gates, then `make test`

.PHONY: lint
lint: venv ## ruff, import layers, buf (messages stay compatible with proto/baseline.binpb)
	@$(BIN)/ruff check --quiet . && echo 'ok  ruff check'
	@$(BIN)/ruff format --quiet --check . && echo 'ok  ruff format' || { echo 'run `make format`'; exit 1; }
	@log=$$($(BIN)/lint-imports 2>&1) && echo 'ok  lint-imports' || { echo "$$log"; exit 1; }
	@scripts/proto.sh lint && echo 'ok  buf lint and breaking'

.PHONY: format
format: venv ## Write the code as the linter wants it
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

.PHONY: typecheck
typecheck: venv ## mypy, strict
	@log=$$($(BIN)/mypy 2>&1) && echo 'ok  mypy' || { echo "$$log"; exit 1; }

.PHONY: proto
proto: ## Generate the stubs under proto/ with the oldest supported tools
	@scripts/proto.sh generate

.PHONY: proto-check
proto-check:
	@scripts/proto.sh check && echo 'ok  proto stubs'

.PHONY: docs
docs: venv ## Write what docs/ takes from the code: settings, metrics, the list of modules
	@$(BIN)/python scripts/config_docs.py && $(BIN)/python scripts/metrics_docs.py
	@$(BIN)/python scripts/document_modules.py

.PHONY: wheel
wheel: venv ## Build the wheel into dist/ and check that it holds all four packages
	@$(BIN)/python scripts/check_wheel.py dist && echo 'ok  wheel'

.PHONY: clean
clean: ## Remove the environment, caches, the prepared model and the zoo of the demo
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
