# The course in one command: make start. All logic is in tools/bootstrap.py and the llmcourse command.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help start test test-gpu doctor clean

PYTHON ?=
TORCH ?= auto
JUPYTER ?= 1
BROWSER ?= 1
PORT ?=
EXTRAS := notebook

define USAGE
make start    set up .venv, fetch the model, hear it speak, open JupyterLab
                JUPYTER=0  stop before JupyterLab        BROWSER=0  print the address only
                PORT=8890  JupyterLab's port             PYTHON=python3.12  the Python of .venv
                TORCH=cpu or cuda  PyTorch's build (default: what this machine needs)
make test     set up, then run all that CI runs: ruff, mypy, pytest
make test-gpu the tests that need an NVIDIA GPU
make doctor   what this machine can do for the course
make clean    remove .venv and build results (the downloaded model stays in your cache folder)
endef
export USAGE

# A candidate is run before it is believed: some launchers are there only to say that they can't.
define set_up
@python='$(PYTHON)'; exact=--exact-python; \
if [ -z "$$python" ]; then \
	exact=; python=python3; \
	for candidate in python3.12 python3.13 python3.11 python3; do \
		if "$$candidate" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
			>/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
fi; \
if ! "$$python" -c pass >/dev/null 2>&1; then \
	printf '\nPythonError: %s cannot be run.\n  The course needs Python 3.11, 3.12 or 3.13.\n  %s\n' "$$python" \
		'Try installing one of them, or name one: make start PYTHON=/path/to/python3.12' >&2; \
	exit 1; \
fi; \
"$$python" tools/bootstrap.py --extras $(EXTRAS) --torch '$(TORCH)' $$exact
endef

help:
	@echo "$$USAGE"

start:
	$(set_up)
	@.venv/bin/llmcourse start $(if $(filter 0,$(JUPYTER)),--no-jupyter) \
		$(if $(filter 0,$(BROWSER)),--no-browser) $(if $(PORT),--port '$(PORT)')

doctor:
	$(set_up)
	@.venv/bin/llmcourse doctor

# Tests that are timed, or use both cores themselves, come second and alone.
ALONE := tests/notebooks tests/browser tests/labs/test_pace.py
test: EXTRAS := notebook,cluster,grade,test
test:
	$(set_up)
	.venv/bin/llmcourse assets fetch
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ALONE:%=--ignore %)
	.venv/bin/python -m pytest $(ALONE)

test-gpu: EXTRAS := notebook,cluster,grade,test
test-gpu:
	$(set_up)
	.venv/bin/llmcourse assets fetch
	.venv/bin/python -m pytest tests/gpu

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
