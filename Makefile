# modelmill: `make help` lists the targets. `demo` and `test` need nothing but Python 3.11 or newer.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := core,train,kfp,track,eval,finetune,forecast,aws,dev
STAMP := $(VENV)/.installed

export PYTHONDONTWRITEBYTECODE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-full test-images lint types bench bench-peers compile images manifests clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /|/' | column -t -s '|'

demo: $(STAMP) ## pretrain a small Llama through the whole pipeline (about 3 minutes on 2 cores)
	@$(BIN)/modelmill run laptop/llama-demo

test: $(STAMP) ## lint and the tests (under 10 minutes on 2 cores)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-full: $(STAMP) ## the long tests: drills, kill schedules, the laptop recipes end to end
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(STAMP) ## ruff and the type checker
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	@$(MAKE) --no-print-directory types

# Editors and the type checker know packages by folder name, and setup.cfg maps ours to modelmill.*:
# two links give them the mapped names. Point an editor's extra path at .venv/mapped as well.
types: $(STAMP) ## mypy over the mapped package names
	@mkdir -p $(VENV)/mapped/modelmill
	@ln -sfn ../../../components $(VENV)/mapped/modelmill/components
	@ln -sfn ../../../pipelines $(VENV)/mapped/modelmill/pipelines
	@MYPYPATH=$(VENV)/mapped $(BIN)/mypy -p modelmill.components -p modelmill.pipelines

bench: bench-peers ## run every benchmark and rewrite the table of figures in README.md
	@$(BIN)/python -m tests.benchmarks

bench-peers: $(VENV)/litgpt/.installed ## install the peers that need an environment of their own

# Wants another huggingface_hub than the rest of the lock.
$(VENV)/litgpt/.installed: $(STAMP)
	@$(PYTHON) -m venv $(VENV)/litgpt
	@$(VENV)/litgpt/bin/pip install -q --disable-pip-version-check litgpt==0.5.13 lightning==2.6.6 torch==2.13.0
	@touch $@

compile: $(STAMP) ## compile every pipeline to KFP YAML below build/pipelines
	@$(BIN)/modelmill compile --all -o build/pipelines

images: $(STAMP) ## build the images: cpu and mlflow, or FAMILIES="gpu neuron" (docker, podman or buildah)
	@$(BIN)/python -m images.build $(or $(FAMILIES),cpu mlflow) $(ARGS)

test-images: $(STAMP) ## build the cpu image and run steps in it (podman; MODELMILL_TEST_BASE names the base)
	@MODELMILL_TEST_IMAGES=1 $(BIN)/python -m pytest -q -rs tests/images/test_build.py $(ARGS)

manifests: $(STAMP) ## fill a team's values into the manifests (VALUES=team.yaml) below build/manifests
	@$(BIN)/python -m manifests.render --values $(or $(VALUES),manifests/values.yaml) -o build/manifests

clean: ## remove the environment and everything a run left behind
	rm -rf $(VENV) build dist .modelmill *.egg-info .mypy_cache .ruff_cache .pytest_cache

# Rebuilt when it is missing or older than the lock or the package's metadata. torch comes first: on a machine
# without a GPU, point pip at a CPU wheel (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS) or it brings CUDA along.
$(STAMP): constraints.txt setup.cfg pyproject.toml
	@echo "Installing into $(VENV) (a few minutes the first time) ..."
	@rm -f $@
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]' 2> $(VENV)/install.log \
		|| { cat $(VENV)/install.log; exit 1; }
	@touch $@
