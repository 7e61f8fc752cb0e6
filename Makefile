# Everything sets itself up: `make demo` or `make test` on a machine with Python 3.11, make and git.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PY := .venv/bin/python
READY := .venv/.ready

.PHONY: help demo test test-slow test-cluster test-findings lint run report clean
.DEFAULT_GOAL := help

help:
	@echo "make demo              train plain and residual networks, record, report (under 10 minutes)"
	@echo "make test              the tests (under 5 minutes); test-slow: the demo's numbers, checked"
	@echo "make test-cluster      sweeps on a Slurm cluster of two nodes that it starts here (as root)"
	@echo "make test-findings     every published finding at few seeds, against its recorded verdict (10 minutes)"
	@echo "make lint              ruff and mypy"
	@echo "make run ARGS='…'      python -m gradflow …, for instance ARGS='depth=56 skip=false max_steps=0'"
	@echo "make report            python -m analysis: report/index.html over all of runs/"

demo: $(READY)
	@$(PY) -m experiments.demo

test: $(READY)
	@$(PY) -m pytest -n 2 --dist worksteal

test-slow: $(READY)
	@$(PY) -m pytest -m slow

test-cluster: $(READY)
	@$(PY) tests/cluster/slurm.py check
	@$(PY) -m pytest -m cluster tests/cluster

test-findings: $(READY)
	@$(PY) -m experiments --all --quick --check --runs $${TMPDIR:-/tmp}/gradflow-quick-$$$$

lint: $(READY)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

run: $(READY)
	@$(PY) -m gradflow $(ARGS)

report: $(READY)
	@$(PY) -m analysis $(ARGS)

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	@command -v git >/dev/null || { echo "make: git is missing: install it first"; exit 1; }
	@test -n "$(PYTHON)" || { echo "make: python3.11 is missing: install it first"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "make: $(PYTHON) is not Python 3.11 to 3.13: name one with make PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: $(PYTHON) has no venv: install it first (Debian: python3.11-venv)"; exit 1; }
	@echo "Setting up .venv (about 1.7 GB; one to three minutes) …"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[wandb,slurm,dev]'
	@touch $@
