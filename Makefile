# Everything sets itself up: `make demo` or `make test` on a machine with Python 3.11, make and git.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
PY := .venv/bin/python
READY := .venv/.ready
VISION := .venv-vision/bin/python
VISION_READY := .venv-vision/.ready

.PHONY: help demo test test-slow test-cluster test-vision test-browser test-wheel test-findings lint run report docs clean python
.DEFAULT_GOAL := help

help:
	@echo "make demo              train plain and residual networks, record, report (under 10 minutes)"
	@echo "make test              the tests (under 5 minutes); test-slow: the demo's numbers, checked"
	@echo "make test-cluster      sweeps on a Slurm cluster of two nodes that it starts here (as root)"
	@echo "make test-vision       image sets and models of torchvision and timm, in an environment of their own (.venv-vision)"
	@echo "make test-wheel        the built wheel in an empty environment (two minutes; 1.7 GB, removed afterwards)"
	@echo "make test-findings     every published finding at few seeds, against its recorded verdict (10 minutes)"
	@echo "make test-browser      the report's page in Chromium (Debian: apt-get install chromium)"
	@echo "make lint              ruff and mypy"
	@echo "make docs              docs/reference.md, from the docstrings"
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

test-vision: $(VISION_READY)
	@$(VISION) -m pytest -m vision tests/vision

test-browser: $(READY)
	@$(PY) -m pytest -m browser tests/browser

test-wheel: $(READY)
	@$(PY) -m pytest -m wheel tests/test_wheel.py

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

docs: $(READY)
	@$(PY) docs/make_reference.py

clean:
	rm -rf .venv .venv-vision build dist .mypy_cache .pytest_cache .ruff_cache

python:
	@command -v git >/dev/null || { echo "make: git is missing: install it first"; exit 1; }
	@test -n "$(PYTHON)" || { echo "make: python3.11 is missing: install it first"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "make: $(PYTHON) is not Python 3.11 to 3.13: name one with make PYTHON=…"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "make: $(PYTHON) has no venv: install it first (Debian: python3.11-venv)"; exit 1; }

$(READY): pyproject.toml constraints.txt | python
	@echo "Setting up .venv (about 1.7 GB; one to three minutes) …"
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tensorboard,wandb,slurm,dev]'
	@touch $@

# torchvision goes with the torch of its own release: an environment beside the other. timm is there
# for the tests of other people's models.
$(VISION_READY): pyproject.toml constraints.txt | python
	@echo "Setting up .venv-vision (about 6 GB; two to four minutes) …"
	@$(PYTHON) -m venv .venv-vision
	@grep -v '^torch==' constraints.txt >.venv-vision/constraints.txt
	@$(VISION) -m pip install --quiet --disable-pip-version-check \
		-c .venv-vision/constraints.txt -e '.[vision,dev]' torch==2.14.1 torchvision==0.29.1 timm
	@touch $@
