# make train | make test | make lab …  No make (Windows)? Each target is a verb: `python -m toolkit VERB` (README).
PYTHON ?= python3
PY := .venv/bin/python
RECIPE ?=
RUN ?= pocket
ARGS ?=

.PHONY: help setup lock docs train test test-slow mix fit evaluate sweep compare replay export chat serve bench bench-mix faults notebooks lab doctor
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: .venv/.toolkit-requirements  ## make .venv and install requirements.txt (only when it changed)

.venv/.toolkit-requirements: requirements.txt requirements.lock
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv .venv; }  # one without pip was cut short
	@$(PY) -m toolkit setup
	@touch $@

# torch and NVIDIA's libraries are left out: which build of them is right depends on the machine
lock:  ## write requirements.lock again after a change of requirements.txt; needs uv
	@torch=$$(echo "torch$$(sed -n 's/^torch\(==[^ ]*\).*/\1/p' requirements.txt)" | uv pip compile -q --universal --python-version 3.11 - | grep -oE '^(torch|nvidia-|cuda-)[^=]*'); \
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header requirements.txt $$(printf -- '--no-emit-package %s ' $$torch) > requirements.lock
	@sed -n 's/^# --no-deps //p' requirements.txt | tr ' ' '\n' | uv pip compile -q --no-deps --universal --python-version 3.11 --generate-hashes --no-annotate --no-header - >> requirements.lock

train: setup  ## fine-tune; RECIPE=data_recipes/….yaml ARGS="train.max_steps=10 …"
	@$(PY) -m toolkit train $(RECIPE) $(ARGS)

test: setup  ## lint, types and tests
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -m "not slow" -n 2 --dist loadfile $(ARGS)

test-slow: setup  ## the tests that take minutes: two processes, real shapes, llama.cpp's own tools
	@$(PY) -m pytest tests -q -m slow $(ARGS)

mix: setup  ## compile and show a mix without training; ARGS="--show 2"
	@$(PY) -m toolkit mix $(RECIPE) $(ARGS)

fit: setup  ## memory of a run before it is run; ARGS="--vram 8"
	@$(PY) -m toolkit fit $(RECIPE) $(ARGS)

evaluate: setup  ## score a run again; RUN=name ARGS="--level full"
	@$(PY) -m toolkit evaluate $(RUN) $(ARGS)

sweep: setup  ## compare mix ratios; default: five ratios on the pocket model
	@$(PY) -m toolkit sweep $(or $(RECIPE),data_recipes/sweep_pocket.yaml) $(ARGS)

compare: setup  ## every scored run: one table, one picture, one sentence
	@$(PY) -m toolkit compare $(ARGS)

replay: setup  ## the base's own verified answers as a source; RECIPE=… ARGS="--count 100"
	@$(PY) -m toolkit replay $(or $(RECIPE),data_recipes/pocket.yaml) $(ARGS)

export: setup  ## merged weights, GGUF, Modelfile, certificate; RUN=name ARGS="--quant q4_k_m"
	@$(PY) -m toolkit export $(RUN) $(ARGS)

chat: setup  ## talk to a run; RUN=name
	@$(PY) -m toolkit chat $(RUN) $(ARGS)

serve: setup  ## API and chat page on 127.0.0.1:8000; RUN=name
	@$(PY) -m toolkit serve $(RUN) $(ARGS)

bench: setup  ## how long a start takes; on a GPU, speed and memory beside other ways
	@$(PY) -m tests.tools.bench $(ARGS)

faults: setup  ## kills, full disks, damage, two at once: what is lost (an hour); ARGS="--quick"
	@$(PY) -m tests.tools.faults --record $(ARGS)

bench-mix: setup  ## time and audit the data stage beside the usual ways (a quarter of an hour)
	@$(PY) -m tests.tools.bench.mix $(ARGS)

notebooks: setup  ## execute every notebook and write its outputs
	@$(PY) -m tests.tools.run_notebooks $(ARGS)

lab: setup  ## JupyterLab on the notebooks
	@$(PY) -m jupyterlab notebooks $(ARGS)

doctor: setup  ## what is installed, what will run, and the fix for what will not; ARGS=--gpu tries the card
	@$(PY) -m toolkit doctor $(ARGS)

docs: setup  ## the reference pages in docs/, from the code
	@$(PY) -m docs.make
