# make demo [SLIDE=path]   segment a slide (without SLIDE, a synthetic one) into demo/
# make test                lint, types and tests
# make docs                the pages and the reference into docs/_build/html, their examples run
# make browser             a Chromium for the tests of the viewer's page, where apt-get may install one
# make model               train, export and score the shipped nucleus model again (hours)

PYTHON ?= $(firstword $(foreach p,python3.13 python3.12 python3.11 python3,$(shell $(p) -c "import sys; sys.version_info >= (3, 11) and print('$(p)')" 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DATA ?= $(or $(HISTO_DATA),../shared/data)
SLIDE ?=
FIND_CHROMIUM := command -v chromium || command -v chromium-browser || command -v google-chrome
DEMO_SLIDE := $(or $(SLIDE),demo/synthetic.tif)

.PHONY: demo test lint types docs docs-links browser model clean

demo: $(VENV)/.run $(if $(SLIDE),,demo/synthetic.tif)
	$(BIN)/histo-infer "$(DEMO_SLIDE)" --out demo
	@echo "look at demo/$(basename $(notdir $(DEMO_SLIDE)))/report.html, or: $(BIN)/histo-infer view demo"

demo/synthetic.tif: | $(VENV)/.run
	mkdir -p demo
	$(BIN)/python -m histostream.wsi.synthetic $@ --size 4096x4096 --mpp 0.5 --seed 1

test: lint types
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2 --dist loadgroup

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy tests
	$(BIN)/mypy docs/conf.py docs/_ext

# Warnings are errors: names in docstrings, links between pages and their anchors, pages that nothing leads to.
docs: $(VENV)/.dev
	rm -rf docs/_api
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -n -q -j auto -b html docs docs/_build/html
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/docs
	@echo "open docs/_build/html/index.html"

# Asks every address outside of the project, which needs a network; `make docs` looks at their form only.
docs-links: $(VENV)/.dev
	$(BIN)/python -m sphinx -W --keep-going -b linkcheck docs docs/_build/links

browser:
	@$(FIND_CHROMIUM) || { [ "$$(id -u)" = 0 ] && apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends chromium; } || \
	  echo "there is no Chromium: the tests of the viewer's page will be skipped" >&2

model: $(VENV)/.dev
	$(BIN)/histo-train --method imems --data "$(DATA)/nuclei-dsb2018/brightfield" --config nuclei --out runs/nuclei
	$(BIN)/python -m histostream.training.publish runs/nuclei training/weights/imems
	$(BIN)/histo-export --method imems --out runtime/models/nuclei --precision fp32,int8 \
	  --tensorrt off --calibrate "$(DATA)/nuclei-dsb2018/brightfield"
	$(BIN)/python -m histostream.benchmarks.accuracy.nuclei --data "$(DATA)" --out benchmarks/results/accuracy-nuclei.json

clean:
	rm -rf $(VENV) demo build docs/_build docs/_api *.egg-info .mypy_cache .ruff_cache .pytest_cache

# A virtual environment with what running needs, and one step more with what developing needs.
$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.run
