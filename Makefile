# Everything starts here. Each target does its own set-up; a second run finds it done.
#
#   make serve                       the default model on http://127.0.0.1:8000
#   make serve MODEL=path PORT=9000 ARGS="--threads 2"
#   make test                        all tests
#   make test-native                 the native kernels under AddressSanitizer and UBSan
#   make test-cuda-interpreted       the CUDA backend's kernels on the processor, in Triton's interpreter
#   make test-clients                other people's clients, each in an environment of its own
#   make test-model                  the trained experts against their bars, on a sixteenth of the held-out text
#   make test-reliability            the promises that take minutes to test, and a table of what was measured
#   make soak                        twenty minutes of random faults on two replicas behind HAProxy
#   make parity                      every family beside an independent implementation, as a table
#   make lint                        ruff and mypy
#   make lock                        the files of locked requirements, after a change of constraints.txt
#   make sbom                        what a server consists of, as CycloneDX JSON: build/sbom.json
#   make bench                       decode speed over HTTP with 1 and 16 streams, and memory
#   make bench-step                  what a decode step costs outside native code
#   make bench-ops                   every kernel, beside the machine's limits
#   make bench-start                 seconds from a clone to the first token
#   make bench-streams               chunks per second, and how late they are on 256 streams
#   make bench-auth                  what keys, limits and charges of accounts add to a request
#   make bench-peers LLAMA_SERVER=path    beside llama.cpp's server, turn by turn

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
TOOLS := build/tools
SOURCES := $(shell find kernels/csrc -type f) pyproject.toml constraints.txt

# Both names: the isolated build environment obeys one or the other, depending on pip's version.
PIN := PIP_CONSTRAINT=$(CURDIR)/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/constraints.txt
PIP := $(PIN) PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip

# Enough to reach every line of native code; whole models and the largest vocabulary are for `make test`.
SANITIZED := $(foreach part,products attention route sampling team,tests/kernels/test_native_$(part).py) \
	tests/kernels/test_native_invariance.py::test_a_recorded_step_is_the_eager_one -k "not 49152"

# Tests that a busy machine would fail.
ALONE := $(addprefix tests/,api bench_command e2e engine security telemetry text test_faultproxy.py \
	runtime/test_constraints.py default_model/test_preparation.py)

# Not ?=, which would take them from the environment, where HOST is often something else.
MODEL =
HOST =
PORT =
ARGS =

.DELETE_ON_ERROR:
.PHONY: serve test test-native test-cuda-interpreted test-clients test-model test-reliability soak parity lint \
	format bench bench-step bench-ops bench-start bench-streams bench-auth bench-peers lock sbom clean help

serve: $(VENV)/installed
	@$(BIN)/toptwo serve $(if $(MODEL),"$(MODEL)") $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

# One at a time what the clock judges, or what starts servers; all else on every core.
test: $(VENV)/installed-dev
ifdef ARGS
	$(BIN)/python -m pytest $(ARGS)
else
	$(BIN)/python -m pytest --numprocesses logical --dist loadfile $(addprefix --ignore=,$(ALONE))
	$(BIN)/python -m pytest $(ALONE)
endif

# The interpreter is not sanitized, so the sanitizer's library must come first, and that of C++ right after
# it, or it would miss how exceptions are thrown. Python keeps memory to its end: no search for leaks.
test-native: $(VENV)/installed-native
	$(BIN)/cmake -S kernels/csrc -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER=g++ \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python -DTOPTWO_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
		$(BIN)/python -m pytest --native build/sanitize/_native*.so $(SANITIZED) $(ARGS)

test-cuda-interpreted: $(VENV)/installed-triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/cuda $(or $(ARGS),--numprocesses logical)

test-clients: $(VENV)/installed-dev
	$(BIN)/python tests/clients/run.py $(ARGS)

test-model: $(VENV)/installed-dev
	$(BIN)/python -m toptwo.default_model.card $(or $(ARGS),build/experts --quick)

# Needs haproxy, slowhttptest and wrk. Figures of a whole run replace all earlier ones.
test-reliability: $(VENV)/installed-dev
	$(if $(ARGS),,rm -f build/reliability.jsonl)
	$(BIN)/python -m pytest tests/reliability $(ARGS)
	@$(BIN)/python tests/reliability/figures.py

soak: $(VENV)/installed-dev
	$(BIN)/python -m pytest tests/reliability/test_r17_soak.py --soak-seconds 1200 --capture no $(ARGS)

parity: $(VENV)/installed-dev
	$(BIN)/python tests/parity.py $(ARGS)

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

bench-auth: $(VENV)/installed-dev
	$(BIN)/python tests/bench/auth_overhead.py $(ARGS)

bench-peers: $(VENV)/installed-dev
	@test -n "$(LLAMA_SERVER)" || { echo "bench-peers needs llama.cpp's server: make bench-peers LLAMA_SERVER=path/to/llama-server" >&2; exit 1; }
	$(BIN)/python tests/bench/peers.py --llama-server "$(LLAMA_SERVER)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

lock: $(TOOLS)/installed
	$(TOOLS)/bin/python .ci/lock.py

sbom: $(TOOLS)/installed
	$(TOOLS)/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type application --output-reproducible \
		--output-format JSON --output-file build/sbom.json requirements.lock

clean:
	rm -rf $(VENV) build

help:
	@sed -n '3,/^$$/s/^#  *//p' Makefile

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

# In an environment of their own: what they need is nothing that a server, or a test, should meet.
$(TOOLS)/installed: constraints.txt
	@$(PYTHON) -m venv $(TOOLS)
	$(PIN) PIP_DISABLE_PIP_VERSION_CHECK=1 $(TOOLS)/bin/python -m pip install uv cyclonedx-bom
	@touch $@

$(VENV)/installed-native: $(VENV)/installed-dev
	$(PIP) install cmake ninja nanobind
	@touch $@

$(VENV)/installed-triton: $(VENV)/installed-dev
	$(PIP) install triton
	@touch $@
