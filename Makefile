# The working day of this repository. Python ≥ 3.11, make and git are enough to begin with.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install torch run up up-docker images down test test-slurm-new chaos lint format screenshots bench rig rig-down clean

CONFIG ?= deployments/configs/digits.yaml
PYTEST ?=
# So many processes side by side: most of what the tests do is to wait for real services.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
CATALOG ?= deployments/images/catalog.yaml

# The environment's own interpreter where there is one, else the newest on the machine.
PYTHON ?= $(shell for each in .venv/bin/python python3.13 python3.12 python3.11 python3; do \
	"$$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$each"; break; }; done)
LOCAL = $(or $(PYTHON),$(error no Python 3.11 or newer was found: install one, or say make PYTHON=/path/to/python3)) \
	-m deployments.local
BIN := .venv/bin

help: ## show this
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: ## make .venv, with what the tests need
	@$(LOCAL) install --dev

torch: ## add PyTorch to .venv, which the deployment training/default needs
	@$(LOCAL) install --torch

run: ## run the example sweep through the Prefect flow (CONFIG=FILE for another)
	@$(LOCAL) run "$(CONFIG)"

up: ## start the project's Prefect server and a worker, and deploy
	@$(LOCAL) up

up-docker: ## the same, and a deployment whose flow runs in a container (REGISTRY=HOST/PREFIX pushes it)
	@NEXA_REGISTRY="$(REGISTRY)" $(LOCAL) up --docker

down: ## stop them
	@$(LOCAL) down

test: lint ## check everything, and run every test (PYTEST="-k word" for some)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(PARALLEL) $(PYTEST)

test-slurm-new: install ## as root: the tests with a real Slurm, on a newer one than the machine's (PYTEST="-k word" for some)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest --slurm=new $(PARALLEL) $(PYTEST)

chaos: install ## end clients at random instants, many times over (NEXA_CHAOS_SEED=N for other instants)
	@PATH="$(CURDIR)/$(BIN):$$PATH" NEXA_CHAOS_ROUNDS=$${NEXA_CHAOS_ROUNDS:-200} $(BIN)/python -m pytest tests/chaos $(PYTEST)

lint: install ## ruff, mypy and the import contract
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

format: install ## put the code into ruff's shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

images: install ## build the catalog's container images (REGISTRY=HOST/PREFIX pushes them, and notes digests)
	@$(BIN)/python -m deployments.images build $(if $(BASE),--base "$(BASE)") $(TARGETS)
	@test -z "$(REGISTRY)" || $(BIN)/python -m deployments.images push --registry "$(REGISTRY)" \
		--catalog "$(CATALOG)" $(TARGETS)

screenshots: install ## take the README's pictures again, from Prefect's UI
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest tests/ui/test_run_form.py --screenshots docs/images

rig: install ## as root: a real Slurm and sshd to try, of the tests' kind
	@$(BIN)/python -m tests.rig up

rig-down: ## stop them
	@! test -d .nexa/rig || $(BIN)/python -m tests.rig down

bench: install ## measure, against raw tools and peers
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks

clean: down ## remove what can be made again: .venv and caches (runs in .nexa stay)
	@rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
