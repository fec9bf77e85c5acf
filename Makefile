# Everything starts here. Each target does its own set-up; a second run finds it done.
#
#   make serve                       the default model on http://127.0.0.1:8000
#   make serve MODEL=path PORT=9000 ARGS="--threads 2"
#   make test                        all tests
#   make test-native                 the native kernels under AddressSanitizer and UBSan
#   make test-clients                other people's clients, each in an environment of its own
#   make lint                        ruff and mypy
#   make bench                       decode speed over HTTP with 1 and 16 streams, and memory
#   make bench-step                  what a decode step costs outside native code
#   make bench-ops                   every kernel, beside the machine's limits
#   make bench-start                 seconds from a clone to the first token
#   make bench-streams               chunks per second, and how late they are on 256 streams
#   make bench-peers LLAMA_SERVER=path    beside llama.cpp's server, turn by turn

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find kernels/csrc -type f) pyproject.toml constraints.txt

# Both names: the isolated build environment obeys one or the other, depending on pip's version.
PIN := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt
PIP := $(PIN) PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

# Enough to reach every line of native code; whole models and the largest vocabulary are for `make test`.
SANITIZED := $(foreach part,products attention route sampling team,tests/kernels/test_native_$(part).py) \
	tests/kernels/test_native_invariance.py::test_a_recorded_step_is_the_eager_one -k "not 49152"

# Not ?=, which would take them from the environment, where HOST is often something else.
MODEL =
HOST =
PORT =
ARGS =

.DELETE_ON_ERROR:
.PHONY: serve test test-native test-clients lint format bench bench-step bench-ops bench-start bench-streams \
	bench-peers clean help

serve: $(VENV)/installed
	@$(BIN)/toptwo serve $(if $(MODEL),"$(MODEL)") $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(ARGS)

# The interpreter is not sanitized, so the sanitizer's library must come first, and that of C++ right after
# it, or it would miss how exceptions are thrown. Python keeps memory to its end: no search for leaks.
test-native: $(VENV)/installed-native
	$(BIN)/cmake -S kernels/csrc -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER=g++ \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DTOPTWO_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/python -m pytest --native build/sanitize/_native*.so $(SANITIZED) $(ARGS)

test-clients: $(VENV)/installed-dev
	$(BIN)/python tests/clients/run.py $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev
	$(BIN)/python tests/bench/serving.py $(ARGS)

bench-step: $(VENV)/installed-dev
	$(BIN)/python tests/bench/step_overhead.py $(MODEL) $(ARGS)

bench-ops: $(VENV)/installed-dev
	$(BIN)/python kernels/bench/ops.py $(ARGS)

bench-start:
	$(PYTHON) tests/bench/first_token.py

bench-streams: $(VENV)/installed-dev
	$(BIN)/python tests/bench/streams.py $(ARGS)

bench-peers: $(VENV)/installed-dev
	@test -n "$(LLAMA_SERVER)" || { echo "bench-peers needs llama.cpp's server: make bench-peers LLAMA_SERVER=path/to/llama-server" >&2; exit 1; }
	$(BIN)/python tests/bench/peers.py --llama-server "$(LLAMA_SERVER)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

clean:
	rm -rf $(VENV) build

help:
	@sed -n '3,15s/^#  *//p' Makefile

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "toptwo needs Python 3.11 or newer; say which: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: $(BIN)/python $(SOURCES)
	@echo "Installing toptwo and what it needs into $(VENV); only once."
	$(PIP) install --editable .
	@touch $@

# Not after `installed`: that would build the native backend twice.
$(VENV)/installed-dev: $(BIN)/python $(SOURCES)
	$(PIP) install --editable '.[test,lint]'
	@touch $(VENV)/installed $@

$(VENV)/installed-native: $(VENV)/installed-dev
	$(PIP) install cmake ninja nanobind
	@touch $@
