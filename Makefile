# `make help` lists what can be made. Everything is installed into the virtual environment .venv, at
# the versions that constraints.txt pins.

PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(shell $(p) -c "import sys; sys.version_info >= (3, 11) and print('$(p)')" 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
# What models run on: cpu, or cuda on a host with an NVIDIA GPU.
ENGINE ?= cpu
DATA ?= $(or $(HISTO_DATA),../shared/data)
SLIDE ?=
# Seconds that one test of the fast tier may take, and one of the full tier: twice as long as the slowest on an idle
# machine, because test machines have other work.
FAST_LIMIT ?= 20
FULL_LIMIT ?= 600
FIND_CHROMIUM := command -v chromium || command -v chromium-browser || command -v google-chrome
DEMO_SLIDE := $(or $(SLIDE),demo/synthetic.tif)

# Older pip reads the first for packages that it builds, newer pip the second.
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
INSTALL := $(BIN)/python -m pip install --quiet
# Each process of the tests has one thread of its own, and threads that wait do not spin.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --durations 25

.PHONY: help demo test test-all lint types types-all docs docs-links browser model lock clean

help: ## List what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.run $(if $(SLIDE),,demo/synthetic.tif) ## Segment a slide into demo/: a synthetic one, or SLIDE=path
	$(BIN)/histo-infer "$(DEMO_SLIDE)" --out demo
	@echo "look at demo/$(basename $(notdir $(DEMO_SLIDE)))/report.html, or: $(BIN)/histo-infer view demo"

demo/synthetic.tif: | $(VENV)/.run
	mkdir -p demo
	$(BIN)/python -m histostream.wsi.synthetic $@ --size 4096x4096 --mpp 0.5 --seed 1

test: lint types ## Linter, type checker and the fast tier of the tests (minutes)
	$(PYTEST) -m "not full" --timeout $(FAST_LIMIT) --override-ini timeout_func_only=true

test-all: $(VENV)/.dev lint types-all browser ## Linter, type checker and all tests, with everything installed
	$(PYTEST) --timeout $(FULL_LIMIT)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An sdist cannot hold these links; CONTRIBUTING.md says what they are for.
LINKS := $(addprefix .typecheck/histostream/,training export runtime wsi benchmarks)
$(LINKS):
	mkdir -p $(@D)
	ln -s ../../$(@F) $@

types: $(VENV)/.test | $(LINKS)
	$(BIN)/mypy
	$(BIN)/mypy tests

types-all: $(VENV)/.dev types
	$(BIN)/mypy docs/conf.py docs/_ext

# Warnings are errors: names in docstrings, links between pages and their anchors, pages that nothing leads to.
docs: $(VENV)/.dev ## The pages and the reference of the code, into docs/_build/html
	rm -rf docs/_api
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n -q -j auto -b html docs docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/docs
	@echo "open docs/_build/html/index.html"

# Asks every address outside of the project, which needs a network; `make docs` looks at their form only.
docs-links: $(VENV)/.dev ## Ask every address that the pages link to
	$(BIN)/python -m sphinx -W --keep-going -b linkcheck docs docs/_build/links

browser: ## A Chromium for the tests of the viewer's page, where apt-get may install one
	@$(FIND_CHROMIUM) || { [ "$$(id -u)" = 0 ] && apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium; } || \
	  echo "there is no Chromium: the tests of the viewer's page will be skipped" >&2

model: $(VENV)/.dev ## Train, export and score the shipped nucleus model again (hours)
	$(BIN)/histo-train --method imems --data "$(DATA)/nuclei-dsb2018/brightfield" --config nuclei --out runs/nuclei
	$(BIN)/python -m histostream.training.strip_checkpoint runs/nuclei training/weights/imems
	$(BIN)/histo-export --method imems --out runtime/models/nuclei --precision fp32,int8 \
	  --tensorrt off --calibrate "$(DATA)/nuclei-dsb2018/brightfield"
	$(BIN)/python -m histostream.benchmarks.accuracy.nuclei --data "$(DATA)" --out benchmarks/results/accuracy-nuclei.json

# Keeps the versions that are pinned where they still fit; UPGRADE=--upgrade takes the newest ones.
lock: | $(VENV)/bin/python ## Write constraints.txt again from pyproject.toml
	$(INSTALL) uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
	  --no-annotate --no-header --quiet $(UPGRADE) --output-file constraints.txt

clean: ## Remove what was made, and the virtual environment
	rm -rf $(VENV) demo build docs/_build docs/_api *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# What running needs, what the fast tier needs, what everything needs; each holds the ones before.
$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[$(ENGINE)]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[$(ENGINE),test]'
	touch $@ $(VENV)/.run

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) --editable '.[$(ENGINE),dev]'
	touch $@ $(VENV)/.test $(VENV)/.run
