# `make up` and `make test` need Python 3.11+ and nothing else of ours; everything is installed into .venv.
#   PYTHON           the Python that .venv is made with (python3)
#   TORCH_INDEX_URL  take torch from this index, e.g. https://download.pytorch.org/whl/cpu where the usual one brings CUDA
#   ARGS             handed to pytest or to the benchmark
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help up down dev logs backup restore test test-all check fuzz bench soak chromium image-check pin-images

help: ## Show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

up: $(VENV)/.serving ## Start Redis, worker, trainer and service in the background; PORT=8123 make up changes the port
	@$(BIN)/python deploy/stack.py up

down: ## Stop what `make up` started
	@if [ -x $(BIN)/python ]; then $(BIN)/python deploy/stack.py down; else echo "nothing was running"; fi

dev: $(VENV)/.serving ## The same in this terminal; Ctrl-C stops it all
	@$(BIN)/python deploy/stack.py dev

logs: $(VENV)/.serving ## Follow the log of what `make up` started
	@$(BIN)/python deploy/stack.py logs

backup: $(VENV)/.serving ## Write all that the running stack knows and keeps into a folder: TO=/mnt/backup make backup
	@TO="$(TO)" $(BIN)/python deploy/stack.py backup

restore: $(VENV)/.serving ## Bring it back before a new stack is started: FROM=/mnt/backup make restore
	@FROM="$(FROM)" $(BIN)/python deploy/stack.py restore

test: $(VENV)/.testing chromium ## The tests that need no GPU and little time
	$(BIN)/python -m pytest -m "not slow and not gpu" $(ARGS)

test-all: $(VENV)/.testing chromium ## All tests
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.testing ## Format, lint, types, import rules
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports --no-logo

fuzz: $(VENV)/.testing ## Send thousands of generated requests to every route (FUZZ_CASES=5000)
	FUZZ_CASES=$${FUZZ_CASES:-5000} $(BIN)/python -m pytest tests/service/test_fuzz.py $(ARGS)

bench: $(VENV)/.testing up ## Time engines, the service under load, releases, requests to the running stack; what the gate catches
	$(BIN)/python -m benchmarks.engines
	$(BIN)/python -m benchmarks.service
	$(BIN)/python -m benchmarks.release
	$(BIN)/python -m benchmarks.gate
	$(BIN)/python -m benchmarks.reliability --jobs 0
	$(BIN)/python -m benchmarks.serving --url "$$($(BIN)/python deploy/stack.py url)" $(ARGS)

soak: $(VENV)/.testing ## A thousand jobs while processes are killed; then everything is counted
	$(BIN)/python -m benchmarks.soak $(ARGS)

image-check: $(VENV)/.testing ## Build the images and run docker-compose.yml, without a registry: root, podman, 10 GB
	$(BIN)/python deploy/image_check.py $(ARGS)

pin-images: $(VENV)/.testing ## Write today's digests behind the images of others: needs docker buildx
	$(BIN)/python deploy/pin_images.py

# --- installation: a stamp in .venv for each set of packages, renewed when their versions change ----------------------

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "error: $(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: $(PYTHON) cannot make virtual environments; install the package python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.serving: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV): minutes and some GB at the first time"
ifneq ($(TORCH_INDEX_URL),)
	@$(PIP) install --no-deps --index-url "$(TORCH_INDEX_URL)" "$(TORCH)"
endif
	@$(PIP) install --constraint constraints.txt --editable '.[service,worker,distill,local]'
	@touch $@

$(VENV)/.testing: $(VENV)/.serving
	@$(PIP) install --constraint constraints.txt --editable '.[service,worker,distill,local,dev]'
	@touch $@

# Browser tests are skipped where there is none.
chromium:
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-liberation; } || \
	        echo "note: Chromium could not be installed; the browser tests are skipped"; \
	else echo "note: the browser tests are skipped; install the package chromium to run them"; fi
