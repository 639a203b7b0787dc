# make test, make demo, make lint: each makes its own virtual environment first, on a fresh machine too.
#   PYTHON=python3.12     the Python that the virtual environment is made with
#   VENV=.venv            where the virtual environment lies
#   PIP_ARGS=...          for pip, e.g. --extra-index-url https://download.pytorch.org/whl/cpu (a small torch without CUDA)
#   PYTEST_ARGS=...       for pytest, e.g. "-m 'not slow'"
#   DEMO_ARGS=...         for the demo
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=

PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
INSTALLED = $(VENV)/.installed-test
INSTALLED_DEV = $(VENV)/.installed-dev

.PHONY: help test demo lint clean

help:
	@echo "make test   set up $(VENV) if need be and run the tests"
	@echo "make demo   set up $(VENV) if need be and run the demonstration (seven to 25 minutes on two cores)"
	@echo "make lint   ruff and mypy"
	@echo "make clean  remove build leftovers and caches (not $(VENV))"

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

demo: $(INSTALLED)
	$(VENV)/bin/python -m nnunet_dsp.benchmark.demo $(DEMO_ARGS)

# mypy reads the installed layout, hence the copy in build/lint.
lint: $(INSTALLED_DEV)
	$(VENV)/bin/python -m ruff check .
	@rm -rf build/lint
	@$(PIP) install --quiet --no-deps --no-build-isolation --target build/lint .
	MYPYPATH=build/lint $(VENV)/bin/python -m mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "nnunet_dsp needs Python 3.10 or newer, and '$(PYTHON)' is not. Try: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "Could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(INSTALLED): pyproject.toml setup.py | $(VENV)/bin/python
	@echo "Installing nnunet_dsp, nnU-Net and torch into $(VENV): takes about two minutes the first time ..."
	@$(PIP) install --quiet $(PIP_ARGS) -e '.[test]'
	@touch $@
	@echo "Installed."

$(INSTALLED_DEV): $(INSTALLED)
	@echo "Installing ruff and mypy into $(VENV) ..."
	@$(PIP) install --quiet $(PIP_ARGS) -e '.[test,dev]'
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
