# `make studio`, `make demo` and `make test` each set up what they need in .venv, once: they install again only when a
# file that says what to install has changed. Another interpreter: make test PYTHON=python3.13
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Processes that share the tests.
WORKERS ?= 2

.PHONY: demo studio test torture check screenshots bench clean

demo: $(VENV)/installed
	@$(BIN)/lowrank-align demo

# On the embedded base; more with FLAGS: make studio FLAGS="--preset qwen3-4b --port 8000"
studio: $(VENV)/installed
	@$(BIN)/lowrank-align studio $(FLAGS)

test: $(VENV)/installed-dev
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# The faults of tests/torture in their hundreds, within 60 minutes on two cores; writes docs/reliability.md. A part of
# them is only printed: make torture FLAGS="-k sigkill"
torture: $(VENV)/installed-dev
	@LOWRANK_TORTURE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist load --junitxml=.torture.xml tests/torture $(FLAGS); \
		ended=$$?; [ $$ended -gt 1 ] || $(BIN)/python tests/torture/report.py .torture.xml $(if $(FLAGS),--print) || ended=1; \
		exit $$ended

# Ours beside TRL, in an environment of its own (about 40 minutes on two cores): docs/benchmarks.md. DATA is LLaMA-Factory's
# data folder; a part of it with FLAGS: make bench FLAGS="--only dpo"
DATA ?= ../shared/data
bench: $(VENV)/installed $(PEERS)/installed
	@$(BIN)/python benchmarks/bench.py --data $(DATA) --peers $(PEERS) $(FLAGS)

# The pictures of docs/studio.md, taken by the browser test on its way.
screenshots: $(VENV)/installed-dev
	@LOWRANK_SCREENSHOTS=$(CURDIR)/docs/pictures $(BIN)/python -m pytest -q tests/browser/test_round.py -k mouse

check: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

clean:
	rm -rf $(VENV) $(PEERS) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .torture.xml
	find lowrank_align apps tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and alone, so that pip takes a CPU build where one is configured. No build isolation: setuptools is
# pinned like everything else, instead of downloaded in its newest version.
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "lowrank-align needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt setuptools torch==2.13.0
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# TRL 1.16 no longer has PPO; the last version that has it lies beside it and comes first for that case alone.
$(PEERS)/installed: constraints.txt
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt torch==2.13.0
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt trl==1.16.0 peft bitsandbytes psutil
	$(PEERS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade --target $(PEERS)/trl-ppo trl==1.12.0
	@touch $@
