# Every target does the set-up it needs, from a fresh clone on: .venv, pinned requirements, build.
#
#   make demo     train a small network as written and swapped; ARGS="--epochs 1"
#   make test     all checks: lint, then the tests, in WORKERS processes; ARGS="tests/cli -x"
#   make lint     ruff, mypy, clang-format
#   make bench    the benchmarks; ARGS="-k mish"
#   make clean    remove what was built; .venv stays
#
# Another interpreter: make PYTHON=python3.12 (for a new .venv).

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
RUN := $(BIN)/python -m
REQUIREMENTS := .venv/.requirements-installed
INSTALLED := .venv/.nnfast-installed
CSRC := $(wildcard $(shell find csrc -type f 2>/dev/null))
FORMATTED := $(filter %.h %.cpp %.cu,$(CSRC))

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	@$(RUN) nnfast demo $(ARGS)

test: lint
	@echo "pytest"
	@$(RUN) pytest -n $(WORKERS) $(ARGS)

lint: $(INSTALLED)
	@echo "ruff"
	@$(RUN) ruff check --quiet .
	@$(RUN) ruff format --check --quiet . || { echo "not formatted; run: $(RUN) ruff format ."; exit 1; }
	@echo "mypy --strict"
	@$(RUN) mypy --no-error-summary
	@if [ -n "$(FORMATTED)" ]; then echo "clang-format" && $(BIN)/clang-format --dry-run -Werror $(FORMATTED); \
	else echo "clang-format: no sources in csrc/"; fi

bench: $(INSTALLED)
	@$(RUN) pytest benchmarks $(ARGS)

clean:
	rm -rf build dist ./*.egg-info demo-output nnfast/_C.so nnfast/_build.json $(INSTALLED)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find nnfast tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv

$(REQUIREMENTS): requirements.txt | $(BIN)/python
	@echo "installing requirements.txt"
	@$(RUN) pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# --no-deps and --no-build-isolation: torch is the one pinned in requirements.txt, never another.
$(INSTALLED): $(REQUIREMENTS) pyproject.toml $(wildcard setup.py) $(CSRC)
	@echo "building and installing nnfast"
	@$(RUN) pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
