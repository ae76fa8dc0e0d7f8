# Development commands. `make test` and `make demo` work from a bare clone: they build .venv first.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Worker processes of the test suite; each uses one thread (tests/conftest.py).
WORKERS ?= 2

.PHONY: help setup browser peers emulator vulkan lint types test demo clean

help:
	@echo "make setup   build $(VENV) with everything needed to develop (does nothing when it is up to date)"
	@echo "make test    setup, then lint, types and the whole test suite"
	@echo "make browser setup, then a Chromium for the tests of the report page, which are skipped where there is none"
	@echo "make peers   setup, then the runtimes that benchmarks/cpu_peers.py compares with"
	@echo "make emulator setup, then what runs code for Arm in QEMU; make vulkan: a software driver for Vulkan. Without"
	@echo "             them the tests of such code are skipped"
	@echo "make demo    setup, then train, compile and run a small model"
	@echo "make lint    ruff;  make types  mypy;  make clean  remove $(VENV), caches and build output"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Trimtab needs Python 3.11 or newer, and no python3 is on the PATH."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Trimtab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	    echo "Install one, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "The module venv does not work. On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $@

# A Chromium that is there already, else Debian's, else the one that Playwright downloads.
browser: setup
	@$(BIN)/python benchmarks/browser.py || \
	    { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && \
	      apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; } || \
	    $(BIN)/playwright install chromium
	@$(BIN)/python benchmarks/browser.py > /dev/null

# The runtimes that benchmarks/cpu_peers.py compares with, and what draws its chart.
peers: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[peers]"

# QEMU and a cross compiler of Debian's, and the runtimes of TVM and IREE for AArch64.
emulator: setup
	@{ command -v qemu-aarch64-static && command -v aarch64-linux-gnu-g++; } > /dev/null || \
	    { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && \
	      apt-get install -y -qq --no-install-recommends qemu-user-static g++-aarch64-linux-gnu libc6-dev-arm64-cross \
	          > /dev/null; }
	@$(BIN)/python benchmarks/emulated.py

# A Vulkan driver that needs no GPU.
vulkan:
	@ls /usr/share/vulkan/icd.d/*.json > /dev/null 2>&1 || \
	    { test "$$(id -u)" = 0 && command -v apt-get > /dev/null && apt-get update -qq && \
	      apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1 > /dev/null; }

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -n $(WORKERS)

demo: setup
	$(BIN)/trimtab demo

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
