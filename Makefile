# What a newcomer types. Every target sets up .venv first; that is quick when nothing has changed.
#   make demo      train a small GPT through the service and look at it
#   make test      the tests
#   make unit      the unit tests alone
#   make check     what CI runs: format, lint, types, import contracts, documentation, then the tests
#   make docs      the documentation as HTML under build/docs
#   make coverage  branch coverage of the tests
#   make parity    every layout against one rank (an hour)
#   make chaos     kills everything at random moments (15 minutes); CHAOS=tests: all long forms (hours)
#   make fuzz      sends what /openapi.json allows, and what it does not (minutes)
#   make bench     figures as JSON, one object a line
#   make manifests renders the overlays for Kubernetes (needs kubectl)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
BENCH  ?=
CHAOS  ?= tests/integration/test_chaos.py
JOBS   ?= 2
# tests/conftest.py sends a file's tests to one process; files come in its order, long ones first.
# Tests start many processes: what was compiled once is kept, whatever the shell's setting.
export PYTHONDONTWRITEBYTECODE :=
SHARED := -n $(JOBS) --dist loadscope --no-loadscope-reorder
TORCH  := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: setup demo test unit check docs coverage bench parity chaos fuzz manifests
.DEFAULT_GOAL := test

setup: $(VENV)/.installed

demo: setup
	@$(BIN)/megatron-ray demo

test: setup
	$(BIN)/pytest $(SHARED)

unit: setup
	$(BIN)/pytest $(SHARED) tests/unit tests/architecture

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) docs test

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/mkdocs.yml

coverage: setup
	$(BIN)/pytest $(SHARED) --cov --cov-report=term:skip-covered tests/unit tests/numerics tests/parallel

bench: setup
	@$(BIN)/python -m tests.bench $(BENCH)

parity: setup
	$(BIN)/pytest $(SHARED) -m "parity or parallel" --steps 20

chaos: setup
	$(BIN)/pytest -s -m chaos $(CHAOS)

fuzz: setup
	$(BIN)/python -m tests.fuzz

manifests:
	for overlay in dev gpu kueue production rayjob; do \
	  kubectl kustomize deploy/kubernetes/overlays/$$overlay > deploy/kubernetes/rendered/$$overlay.yaml || exit 1; \
	done
	kubectl kustomize deploy/kubernetes/rayjob > deploy/kubernetes/rendered/rayjob-template.yaml

# .building marks an installation under way. When it was interrupted half-written packages may look installed, so the
# next run starts from an empty environment; after an ordinary failure (no network, say) what is there stays. Temporary
# files go below .venv, so that an interruption leaves none elsewhere.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "megatron-ray needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; exit 1; }
	@stopped=; trap 'stopped=1' INT TERM HUP; \
	if [ -e $(VENV)/.building ]; then rm -rf $(VENV); fi; \
	mkdir -p $(VENV)/.tmp && touch $(VENV)/.building || exit 1; \
	export TMPDIR="$(CURDIR)/$(VENV)/.tmp"; \
	run() { echo "+ $$*"; "$$@" && [ -z "$$stopped" ]; }; \
	give_up() { rm -rf $(VENV)/.tmp; [ -n "$$stopped" ] || rm -f $(VENV)/.building; exit 1; }; \
	if [ ! -x $(BIN)/pip ]; then run $(PYTHON) -m venv $(VENV) 2>$(VENV)/.tmp/venv.log \
	  || { [ -n "$$stopped" ] || cat $(VENV)/.tmp/venv.log >&2; stopped=1; give_up; }; fi; \
	if command -v nvidia-smi >/dev/null 2>&1; then \
	  run $(BIN)/pip install -c constraints.txt torch || give_up; \
	else \
	  echo "no GPU here: looking for a CPU build of torch $(TORCH)"; \
	  run $(BIN)/pip install -q -c constraints.txt 'torch==$(TORCH)+cpu' 2>/dev/null \
	  || { [ -z "$$stopped" ] && run $(BIN)/pip install -q -c constraints.txt --retries 1 --timeout 15 \
	       --extra-index-url https://download.pytorch.org/whl/cpu 'torch==$(TORCH)+cpu' 2>/dev/null; } \
	  || { [ -z "$$stopped" ] && run $(BIN)/pip install -c constraints.txt torch; } || give_up; \
	fi; \
	run $(BIN)/pip install -q -c constraints.txt -e '.[dev]' || give_up; \
	rm -rf $(VENV)/.tmp $(VENV)/.building
	@touch $@
