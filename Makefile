# Needs git, make and Python 3.11 or newer; everything else goes into .venv. Another Python: make PYTHON=python3.13 ...
PYTHON ?= python3
BIN := .venv/bin
TIMES := .inkwell/demo.times
.DEFAULT_GOAL := help
.PHONY: help demo test bench conformance faults doctor up down lock

help: ## print this
	@echo "Inkwell: train, distil, judge and serve diffusion models as one versioned pipeline"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## fresh clone to finished pipeline: environment, every stage, the table of results
	@mkdir -p $(dir $(TIMES)) && echo "demo_started $$(date +%s)" > $(TIMES)
	@$(MAKE) --no-print-directory .venv/.stamp
	@$(BIN)/python -m pipelines.tracking > /dev/null
	@echo "repro_started $$(date +%s)" >> $(TIMES)
	$(BIN)/dvc repro
	@echo "repro_ended $$(date +%s)" >> $(TIMES)
	@$(BIN)/python -m infra.local.summary

test: .venv/.stamp ## fresh clone to tested: lint, format, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: .venv/.stamp ## measure beside the peer packages (B=name for one) and rewrite docs/benchmarks.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks $(B)

conformance: .venv/.stamp ## hold every schedule, target, solver and guide against closed forms; rewrites docs/conformance.md
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.conformance

faults: .venv/.stamp ## do faults on purpose (F=F10 for one, FULL=1 for the full counts) and rewrite docs/faults.md
	OMP_NUM_THREADS=1 FULL=$(FULL) SEED=$(SEED) $(BIN)/python -m tests.faults $(F)

doctor: .venv/.stamp ## examine this checkout and repair what a killed run or a torn dvc.lock left
	@$(BIN)/python -m pipelines.doctor

up: .venv/.stamp ## start MLflow, Ray and the endpoint on this machine; prints their addresses
	@$(BIN)/python -m infra.local.platform up

down: .venv/.stamp ## stop what `make up` started
	@$(BIN)/python -m infra.local.platform down

lock: .venv/.stamp ## write requirements.lock anew from pyproject.toml
	$(BIN)/python -m infra.local.lock

.venv/.stamp: requirements.lock infra/local/bootstrap.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Inkwell needs Python 3.11 or newer, and $(PYTHON) is not one; name another: make PYTHON=python3.13 ..."; exit 1; }
	@$(PYTHON) -I infra/local/bootstrap.py
