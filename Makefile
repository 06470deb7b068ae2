# Everything a developer or a CI server runs. `make test` on a fresh checkout does it all.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PYTHONS ?= python3.11 python3.12 python3.13 python3.14 python3
WORKERS ?= 2

# The name of the stamp says what was installed: a change of these files means another stamp.
INSTALLED := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')

.PHONY: help setup check test demo bench clean

help:  ## lists these targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: $(INSTALLED)  ## makes .venv with everything in it; does nothing if it is up to date

check: setup  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: setup check  ## check, then all tests; WORKERS=4 for more processes
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

demo: setup  ## a small search on this machine
	$(BIN)/smlt sweep examples/sweep.yaml

bench: setup  ## every benchmark, one after the other
	@for bench in benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python "$$bench"; done

clean:  ## removes what tools left behind, but not .venv
	rm -rf build dist demo-report benchmarks/results/tmp .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@for candidate in $(PYTHONS); do \
		"$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
		if ! "$$candidate" -c 'import ensurepip, venv' 2>/dev/null; then \
			version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
			echo "$$candidate cannot make virtual environments: python3-venv is missing. Install it:" >&2; \
			echo "    sudo apt-get install python$$version-venv" >&2; \
			exit 1; \
		fi; \
		echo "making $(VENV) with $$candidate"; \
		exec "$$candidate" -m venv $(VENV); \
	done; \
	echo "Python 3.11 or newer is needed. Install it, for instance:" >&2; \
	echo "    sudo apt-get install python3.11 python3.11-venv" >&2; \
	exit 1

# torch first and alone: asked for by its exact version, pip finds the build for this machine;
# everything after that sees it installed and leaves it as it is. --group needs pip 25.1.
$(INSTALLED): | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--editable '.[all]' --group test --group bench --group check
	@rm -f $(VENV)/.installed-*
	@touch $@
