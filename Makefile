# Needs only make and python3 >= 3.11. `make PYTHON=python3.12 demo` chooses another Python.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# -qq: errors only; the steps announce themselves
PIP := $(BIN)/python -m pip install -qq -c .ci/constraints.txt

# What the machine happens to have set must not matter. pip's registry settings (index, certificate, cache) stay.
unexport PYTHONPATH PYTHONHOME PYTHONOPTIMIZE PYTHONWARNINGS PYTHONSAFEPATH VIRTUAL_ENV CONDA_PREFIX
unexport PIP_TARGET PIP_PREFIX PIP_ROOT PIP_USER PIP_REQUIREMENT PIP_EDITABLE PIP_CONSTRAINT PIP_BUILD_CONSTRAINT
unexport PIP_NO_DEPS PIP_DRY_RUN PIP_PRE PIP_PYTHON PIP_REPORT PIP_UPGRADE PIP_FORCE_REINSTALL PIP_IGNORE_INSTALLED
unexport PYTEST_ADDOPTS PYTEST_PLUGINS MYPYPATH
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
export PIP_NO_INPUT := 1
export HF_HUB_OFFLINE := 1
export ANONYMIZED_TELEMETRY := False

.PHONY: help demo test check bench clean FORCE

help:
	@echo "make demo    set up $(VENV) if needed, then run examples/demo.py"
	@echo "make test    set up $(VENV) if needed, then run the tests"
	@echo "make check   lint, format, types and layout"
	@echo "make bench   run the benchmarks"
	@echo "make clean   remove $(VENV), caches and build leftovers"

demo: $(READY)
	@$(BIN)/python examples/demo.py

test: $(READY)
	@$(BIN)/pytest

check: $(READY)
	@echo "ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "mypy"
	@bash .ci/types
	@echo "layout, doctests and README"
	@$(BIN)/pytest -qq tests/test_layout.py

bench: $(READY)
	@$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) build dist memory_os.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp holds the path that it was made for: in a copied or moved checkout the environment is made anew.
MOVED := $(if $(wildcard $(READY)),$(shell [ "$$(cat $(READY))" = "$(CURDIR)" ] || echo --clear))
ifneq ($(MOVED),)
$(READY): FORCE
endif

$(READY): pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "memory_os needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>/dev/null || echo missing). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "[1/3] Python environment in $(VENV)"
	@$(PYTHON) -m venv $(MOVED) $(VENV) || { echo "python3 -m venv failed (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "[2/3] installing PyTorch (this step and the next take some minutes the first time)"
	@$(PIP) torch "setuptools>=77"
	@echo "[3/3] installing memory_os and its packages"
	@$(PIP) -e ".[dev,langchain]" || \
	    { echo "Installing failed, see above. llama-cpp-python needs a C and C++ compiler (apt install build-essential)." >&2; exit 1; }
	@echo "$(CURDIR)" > $(READY)
	@echo "ready: $(VENV)"
