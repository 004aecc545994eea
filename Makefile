# blockzoo: `make` lists the targets. Everything runs without sudo, in an environment of its own (.venv).
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
help: ## Print this text
	@echo 'blockzoo serves many fine-tuned variants of a language model from shared blocks.'
	@echo
	@echo 'Start here:'
	@echo '  make demo        see it: several variants of a real model answer one prompt from shared blocks'
	@echo '  make test        check it: every test that is not marked long (meant to take less than 10 minutes on two cores)'
	@echo
	@echo 'Targets:'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | sort \
	    | while IFS=$$'\t' read -r name text; do printf '  %-16s %s\n' "$$name" "$$text"; done
	@echo
	@echo 'Settings, as in `make demo MODEL=/path/to/checkpoint`:'
	@echo '  MODEL=PATH       demo, demo-cluster: a Hugging Face checkpoint folder to use instead of SmolLM2-135M-Instruct'
	@echo '  TORCH_INDEX=URL  an extra package index for the torch wheel, for example the one with CPU wheels'
	@echo '  PYTHON=PATH      the Python to use, 3.11 or newer (now: $(PYTHON))'
	@echo '  VENV=PATH        the folder of the environment (now: $(VENV))'
	@echo '  JOBS=N           test: number of test processes (now: $(JOBS)); 0 runs the tests in one process'
	@echo '  ARGS=...         test, test-long: arguments for pytest, for example ARGS="-k gc -x"; bench-peers: its options'

.PHONY: venv
venv: ## Create the environment with everything that development needs
	@scripts/environment.sh dev

.PHONY: demo-venv
demo-venv:
	@scripts/environment.sh demo

.PHONY: model
model: demo-venv ## Download SmolLM2-135M-Instruct (93 MB, once) and convert it to a checkpoint in .cache/smollm2
	@$(BIN)/python scripts/get_model.py --out .cache/smollm2

.PHONY: tuned
tuned: model ## Train the demo's tuned variant into .cache/hacker-smollm2 (about two minutes, once)
	@$(BIN)/python scripts/train_top_quarter.py --model .cache/smollm2 --out .cache/hacker-smollm2

.PHONY: demo
demo: demo-venv $(if $(MODEL),,model) ## Answer one prompt with several variants of a real model, from shared blocks
	@$(BIN)/python scripts/demo.py $(if $(MODEL),--model '$(MODEL)')

.PHONY: demo-cluster
demo-cluster: demo-venv $(if $(MODEL),,model) ## Run a cluster of three workers and twelve variants, and kill a worker in the middle
	@$(BIN)/python scripts/demo_cluster.py $(if $(MODEL),--model '$(MODEL)')

.PHONY: test
test: venv model tuned ## Run every test that is not marked long; meant to take less than 10 minutes on two cores
	@echo 'Running the tests that are not marked long; the others are `make test-long`.'
	@$(BIN)/pytest -m 'not long' -n $(JOBS) --dist loadscope --no-loadscope-reorder $(ARGS)

.PHONY: test-long
test-long: venv model ## Run the tests marked long
	@echo 'Running the tests marked long.'
	@$(BIN)/pytest -m long $(ARGS)

.PHONY: bench
bench: venv model ## Measure our own figures of docs/benchmarks.md, into benchmarks/results
	@$(BIN)/python benchmarks/run.py

.PHONY: bench-peers
bench-peers: venv model ## Measure against vLLM and transformers, 20 minutes; ARGS="--only single-8", "--runs 3", "--quick"
	@$(BIN)/python benchmarks/run_peers.py $(ARGS)

.PHONY: presubmit
presubmit: venv proto-check lint typecheck wheel test ## Run everything that must pass before a change is merged: all checks, then `make test`

.PHONY: lint
lint: venv ## Run ruff, import-linter and buf (messages stay compatible with proto/baseline.binpb)
	@$(BIN)/ruff check --quiet . && echo 'ok  ruff check'
	@$(BIN)/ruff format --quiet --check . && echo 'ok  ruff format' || { echo 'run `make format`'; exit 1; }
	@log=$$($(BIN)/lint-imports 2>&1) && echo 'ok  lint-imports' || { echo "$$log"; exit 1; }
	@scripts/proto.sh lint && echo 'ok  buf lint and breaking'

.PHONY: format
format: venv ## Format the code and apply safe fixes
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

.PHONY: typecheck
typecheck: venv ## Run mypy in strict mode
	@log=$$($(BIN)/mypy 2>&1) && echo 'ok  mypy' || { echo "$$log"; exit 1; }

.PHONY: proto
proto: ## Generate the stubs under proto/ with the oldest supported tools
	@scripts/proto.sh generate

.PHONY: proto-check
proto-check:
	@scripts/proto.sh check && echo 'ok  proto stubs'

.PHONY: protos
protos: ## Pack the public .proto files into dist/, for clients in Go, Node and other languages
	@$(PYTHON) scripts/protos.py dist

.PHONY: docs
docs: venv ## Regenerate what docs/ takes from the code: settings, metrics, the list of modules
	@$(BIN)/python scripts/config_docs.py && $(BIN)/python scripts/metrics_docs.py && $(BIN)/python scripts/field_docs.py
	@$(BIN)/python scripts/document_modules.py

.PHONY: findings
findings: ## Check that libraries still behave as findings/ says; needs a package index
	@status=0; for script in findings/*.sh; do \
	    name=$$(basename "$$script" .sh); log=$$("$$script" 2>&1); \
	    case $$? in \
	        0) echo "ok       $$name" ;; \
	        1) echo "changed  $$name"; echo "$$log" | tail -n 3; status=1 ;; \
	        *) echo "not run  $$name"; echo "$$log" | tail -n 3; status=1 ;; \
	    esac; done; exit $$status

.PHONY: wheel
wheel: venv ## Build the wheel into dist/ and check that it holds all four packages
	@$(BIN)/python scripts/check_wheel.py dist && echo 'ok  wheel'

.PHONY: clean
clean: ## Remove the environment, caches, the prepared model and the zoo of the demo
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
