# make train | make test | make lab …  No make (Windows)? Each target is a verb: `python -m toolkit VERB` (README).
PYTHON ?= python3
PY := .venv/bin/python
RECIPE ?=
RUN ?= pocket
ARGS ?=

.PHONY: help setup lock train test test-slow init mix fit evaluate sweep compare dial blend replay export verify chat \
	serve generate report list doctor bench bench-mix faults notebooks docs lab
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: .venv/.toolkit-requirements  ## .venv with requirements.txt, when it changed

.venv/.toolkit-requirements: requirements.txt requirements.lock
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf .venv; $(PYTHON) -m venv .venv; }  # none, or one that was cut short
	@$(PY) -m toolkit setup
	@touch $@

# torch and NVIDIA's libraries are left out: which build of them is right depends on the machine
lock:  ## requirements.lock, after a change of requirements.txt (uv)
	@torch=$$(echo "torch$$(sed -n 's/^torch\(==[^ ]*\).*/\1/p' requirements.txt)" | uv pip compile -q --universal --python-version 3.11 - | grep -oE '^(torch|nvidia-|cuda-)[^=]*'); \
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header requirements.txt $$(printf -- '--no-emit-package %s ' $$torch) > requirements.lock
	@sed -n 's/^# --no-deps //p' requirements.txt | tr ' ' '\n' | uv pip compile -q --no-deps --universal --python-version 3.11 --generate-hashes --no-annotate --no-header - >> requirements.lock

train: setup  ## fine-tune; RECIPE=hybrid, or a file; ARGS="train.max_steps=10"
	@$(PY) -m toolkit train $(RECIPE) $(ARGS)

test: setup  ## lint, types and tests
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup  ## the tests that take minutes
	@$(PY) -m pytest tests -q -m slow $(ARGS)

init: setup  ## write a recipe for a data file; ARGS=my_data.jsonl
	@$(PY) -m toolkit init $(ARGS)

mix: setup  ## a mix without training; RECIPE=hybrid ARGS="--show 2"
	@$(PY) -m toolkit mix $(RECIPE) $(ARGS)

fit: setup  ## memory and hours before a run; ARGS="--vram 8"
	@$(PY) -m toolkit fit $(RECIPE) $(ARGS)

evaluate: setup  ## score a run again; RUN=name ARGS="--level full"
	@$(PY) -m toolkit evaluate $(RUN) $(ARGS)

sweep: setup  ## compare mix ratios; default: the pocket model
	@$(PY) -m toolkit sweep $(or $(RECIPE),data_recipes/sweep_pocket.yaml) $(ARGS)

compare: setup  ## every scored run: a table, a picture, a sentence
	@$(PY) -m toolkit compare $(ARGS)

dial: setup  ## how much of an adapter to keep; RUN=name
	@$(PY) -m toolkit dial $(RUN) $(ARGS)

blend: setup  ## the weighted sum of runs; ARGS="A B --weights 0.25 0.75"
	@$(PY) -m toolkit blend $(ARGS)

replay: setup  ## the base's own answers as a source; ARGS="--count 100"
	@$(PY) -m toolkit replay $(or $(RECIPE),data_recipes/pocket.yaml) $(ARGS)

export: setup  ## merged weights and GGUF; RUN=name ARGS="--quant q4_k_m"
	@$(PY) -m toolkit export $(RUN) $(ARGS)

verify: setup  ## check an export against its run again; RUN=name
	@$(PY) -m toolkit verify $(RUN) $(ARGS)

chat: setup  ## talk to a run; RUN=name
	@$(PY) -m toolkit chat $(RUN) $(ARGS)

serve: setup  ## API and chat page on 127.0.0.1:8000; RUN=name
	@$(PY) -m toolkit serve $(RUN) $(ARGS)

generate: setup  ## answer a file of prompts; ARGS="in.jsonl out.jsonl"
	@$(PY) -m toolkit generate $(RUN) $(ARGS)

report: setup  ## a run's page again; RUN=name
	@$(PY) -m toolkit report $(RUN) $(ARGS)

list: setup  ## runs with their state, and recipes
	@$(PY) -m toolkit list $(ARGS)

doctor: setup  ## what is installed and what will run; ARGS=--gpu
	@$(PY) -m toolkit doctor $(ARGS)

lab: setup  ## JupyterLab on the notebooks
	@$(PY) -m jupyterlab notebooks $(ARGS)

notebooks: setup  ## execute every notebook and write its outputs
	@$(PY) -m tests.tools.run_notebooks $(ARGS)

docs: setup  ## the reference pages in docs/, from the code
	@$(PY) -m docs.make

bench: setup  ## how long a start takes; on a GPU speed and memory
	@$(PY) -m tests.tools.bench $(ARGS)

bench-mix: setup  ## the data stage beside the usual ways
	@$(PY) -m tests.tools.bench.mix $(ARGS)

faults: setup  ## kills, full disks, damage; an hour; ARGS="--quick"
	@$(PY) -m tests.tools.faults --record $(ARGS)
