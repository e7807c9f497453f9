# `make demo` and `make test` need nothing but Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: env demo test test-all lint clean

env: $(READY)

# uv installs several times faster than pip; it comes from the same package index.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fvgen needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(VENV)/bin/fvgen demo --out runs/demo

test: $(READY)
	$(VENV)/bin/python -m pytest -m "not slow and not gpu"

test-all: $(READY)
	$(VENV)/bin/python -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) runs
