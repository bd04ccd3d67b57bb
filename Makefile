# Every target sets up what it needs: on a fresh clone, `make demo` is enough.
PYTHON ?= python3
RUN := .venv/bin/python
READY := .venv/.installed

.PHONY: install demo test test-fast lint check docs zoo

install: $(READY)

# torch first and by itself: as a direct requirement it is the CPU build where the package index offers one.
$(READY): setup.cfg pyproject.toml constraints.txt
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv || { \
		echo "make: '$(PYTHON) -m venv' failed. On Debian and Ubuntu it is a package of its own:" >&2; \
		echo "make:   sudo apt-get install python3-venv" >&2; \
		echo "make: Python 3.10 or later is needed; another one can be named: make install PYTHON=python3.12" >&2; \
		exit 1; }
	.venv/bin/pip install "$$(grep '^torch==' constraints.txt)"
	.venv/bin/pip install -c constraints.txt -e ".[dev,mujoco,sb3,robosuite]"
	@touch $@

demo: $(READY)
	$(RUN) -m kairos_gym.cli demo

test: $(READY)
	$(RUN) -m pytest

test-fast: $(READY)
	$(RUN) -m pytest -m "not slow"

lint: $(READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy

check: lint test-fast

# The documentation as pages, in site/, from the files alone: it needs no network. The variable silences an advertisement.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# Trains the models that ship with the package anew, each with the command that its card holds.
zoo: $(READY)
	$(RUN) -m kairos_gym.learning.recipes
