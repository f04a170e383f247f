# Every target does its own set-up; only Python 3.11+ and make are required.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: help setup demo test test-fast lint lock licences sbom audit wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

setup: $(VENV)/.installed ## create .venv and install everything

# The marker is newer than the lock if the environment is up to date: then a second run does nothing.
$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is required, for example: make PYTHON=python3.11"; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip sync --quiet --compile-bytecode --python $(RUN) requirements.lock
	$(VENV)/bin/uv pip install --quiet --python $(RUN) --no-deps --editable .
	@touch $@

demo: setup ## damage and upscale a few photos and write demo/index.html
	$(RUN) jobs/demo.py

test: setup ## the whole suite: lint, types, tests
	$(MAKE) --no-print-directory lint
	$(RUN) -m pytest -q --numprocesses 2 --dist worksteal -m "not ray"
	$(RUN) -m pytest -q -m ray

test-fast: setup ## the tests that need no Ray and little time, in two processes
	$(RUN) -m pytest -q --numprocesses 2 --dist worksteal -m "not ray and not slow"

lint: setup ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

lock: ## resolve requirements.lock again
	$(VENV)/bin/uv pip compile --quiet pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url --no-header \
		--output-file requirements.lock

licences: setup ## list the licences of all installed packages; fail on non-commercial and strong copyleft ones
	$(RUN) deploy/licences.py

sbom: setup ## write dist/resshift.cdx.json, the bill of materials of requirements.lock (CycloneDX)
	$(RUN) deploy/sbom.py dist/resshift.cdx.json

audit: setup ## ask PyPI's database for known vulnerabilities of what requirements.lock pins; fails also where it is not answered
	$(VENV)/bin/uv tool run pip-audit==2.10.1 --requirement requirements.lock --no-deps --disable-pip --strict

wheel: setup ## build dist/*.whl from this tree, without a network
	$(RUN) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

clean: ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache dist
