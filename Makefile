# make train | make test | make lab …  Windows or no make: the same verbs are `python -m toolkit VERB` (README).
PYTHON ?= python3
PY := .venv/bin/python
RECIPE ?=
ARGS ?=
RUN ?= outputs/pocket

.PHONY: setup train test lint mix evaluate sweep compare export fit bench bench-mix notebooks lab doctor clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: .venv/.toolkit-requirements  ## make .venv and install requirements.txt (only when it changed)

.venv/.toolkit-requirements: requirements.txt
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@$(PY) -m toolkit setup
	@touch $@

train: setup  ## fine-tune; RECIPE=data_recipes/….yaml ARGS="train.max_steps=10 …"
	@$(PY) -m toolkit train $(RECIPE) $(ARGS)

test: setup  ## lint and tests
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@$(PY) -m pytest tests -q -m "not slow" $(ARGS)

test-slow: setup  ## the tests that take minutes: two processes, long fuzzing, real shapes
	@$(PY) -m pytest tests -q -m slow $(ARGS)

mix: setup  ## compile and show a mix without training
	@$(PY) -m toolkit mix $(RECIPE) $(ARGS)

doctor: setup  ## what is installed, what will run, and the fix for what will not
	@$(PY) -m toolkit doctor
