# The two commands of the README are `make book` and `make test`; pip and venv are all they need.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SITE := _build/html
BUILD := $(BIN)/jupyter-book build . -W -n --keep-going
NBVAL := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg --ignore=_build --ignore=book/_ext

export OMP_NUM_THREADS := 1
export PYTHONHASHSEED := 0
export MPLCONFIGDIR := $(CURDIR)/$(VENV)/matplotlib

.PHONY: help book serve test lint format units chapters site canary gate bench notebooks pages clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or later is needed, found '$(PYTHON)'. Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	$(BIN)/python -W ignore -c 'import matplotlib.pyplot'  # builds the font cache once, here
	@touch $@

book: $(READY)  ## Build the book in _build/html (the first time, set up .venv)
	$(BUILD) --quiet || { rm -rf _build; exit 1; }  # else a second try would not repeat the warnings
	@echo "The book: $(CURDIR)/$(SITE)/index.html"

serve: book  ## Build the book and serve it on localhost:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory $(SITE) 8000

test: lint site units chapters canary gate  ## Everything that CI checks
	@echo "All checks passed."

lint: $(READY)  ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## Let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

site: $(READY)  ## Build the book from nothing and check the pages
	rm -rf _build
	$(BUILD) --quiet --all
	GRADLAB_SITE=required $(BIN)/pytest -q -m site tests/test_site.py

units: $(READY)  ## Unit tests, statistical tests and doctests
	$(BIN)/pytest -q -n 2 -m "not site and not canary"

chapters: $(READY)  ## Execute every chapter again and compare with what it prints
	$(BIN)/pytest -q -n 2 --dist loadfile $(NBVAL) book

canary: $(READY)  ## Break the package on purpose: each chapter must notice
	$(BIN)/pytest -q -n 2 -m canary tests/test_canary.py

gate: $(READY)  ## Measure what has a goal; where CI is set, fail far from it
	$(BIN)/python -m benchmarks --gate $(if $(CI),,|| echo "Slower than the goals allow: an error where CI is set, not here.")

bench: $(READY)  ## Measure all, beside other libraries, and store it for the page of speeds
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c requirements.lock -e '.[bench]'
	$(BIN)/python -m benchmarks
	$(BIN)/python scripts/pages.py

notebooks: $(READY)  ## Execute and store every chapter, then renew the generated pages
	$(BIN)/python scripts/notebooks.py
	$(BIN)/python scripts/pages.py

pages: $(READY)  ## Renew the generated pages: checks, coverage, API
	$(BIN)/python scripts/pages.py

clean:  ## Remove what was built (and leave .venv)
	rm -rf _build build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find gradlab tests scripts book -name __pycache__ -type d -prune -exec rm -rf {} +
