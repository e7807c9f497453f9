# `make demo` and `make test` need nothing but Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

.PHONY: env env-train demo docs test test-all packages gpu-check page-check lint clean

env: $(READY)

# For a machine that trains: all that a run needs, nothing that only tests do.
env-train: $(VENV)/.ready-train

# uv installs several times faster than pip; it comes from the same package index.
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fvgen needs Python 3.10 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/bin/uv pip install --python $(VENV)/bin/python --constraint constraints.txt --editable '.[$(1)]'
	touch $@
endef

$(READY): pyproject.toml constraints.txt
	$(call install,dev)

comma := ,
$(VENV)/.ready-train: pyproject.toml constraints.txt
	$(call install,train$(comma)photos$(comma)eval)

demo: $(READY)
	$(VENV)/bin/fvgen demo --out runs/demo

# docs/ as a site in runs/site. What builds it has a small environment of its own and parses fvgen, which it need not have.
docs: .venv-docs/.ready
	.venv-docs/bin/python docs/build.py

.venv-docs/.ready: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --requirement docs/requirements.txt
	touch $@

# A process a core and a thread a process: threads of several tests would wait for each other.
TEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto

test: $(READY)
	$(TEST) -m "not slow and not gpu"

test-all: $(READY)
	$(TEST)

# Wheel and sdist, built, looked into, installed and used in a folder of their own.
packages: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_packages.py

# All that wants to be known of a GPU, in nine minutes at most: benchmarks/results/gpu. Installs nothing: it takes the
# environment that is there, or PYTHON. `make gpu-check DEVICE=cpu SIZE=tiny` rehearses it.
DEVICE ?= cuda
SIZE ?= full
gpu-check:
	PYTHONPATH=src:$$PYTHONPATH $(or $(wildcard $(VENV)/bin/python),$(PYTHON)) benchmarks/gpu_check.py --device $(DEVICE) --preset $(SIZE)

# The page of `fvgen ui` in a real browser (Debian: chromium, chromium-driver); brings Gradio into .venv.
page-check: $(READY)
	$(VENV)/bin/uv pip install --quiet --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dev,ui]'
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_ui_page.py -rs -k "not twenty"

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) .venv-docs .cache runs
