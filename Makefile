# Each target prepares what it needs (.venv, native build) and is quick the second time.
.PHONY: serve test unit parity lint format bench bench-kernels bench-peers bench-plots docs clean
.DEFAULT_GOAL := help

VENV    := .venv
PYTHON  := $(VENV)/bin/python
PARITY  := .venv-parity
PORT    ?= 8000
MODEL   ?= smollm2-135m
JOBS    ?= $(shell nproc)
NATIVE_BUILD = $(shell ls -dt build/*/CMakeCache.txt | head -1 | xargs dirname)
NATIVE  := CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' 2>/dev/null)
PACKAGES := $(shell find src -name __init__.py)

help:
	@echo "make serve [PORT=8000] [MODEL=smollm2-135m]   serve a model"
	@echo "make test | unit | parity | lint | bench | docs"
	@echo "make bench-kernels [ARGS=\"--filter 'matmul Q4_0 m8'\"]   every kernel against the reference and the machine"
	@echo "make bench-peers [ARGS='--rows prefill']   beside llama.cpp and other rivals; make bench-plots draws the sweep"

$(VENV)/.tools: pyproject.toml
	@test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --upgrade pip
	$(PYTHON) -m pip install --quiet "scikit-build-core>=0.11" "nanobind>=2.9" "cmake>=3.18" ninja
	@touch $@

# The package itself, editable: Python changes count at once; native sources trigger an incremental build, a new
# package a new list of where modules are.
$(VENV)/.installed: $(VENV)/.tools $(NATIVE) $(PACKAGES)
	@echo "setpoint: building and installing ..."
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PYTHON) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	@touch $@

serve: $(VENV)/.installed
	$(VENV)/bin/setpoint serve $(MODEL) --port $(PORT)

test: unit
	$(PYTHON) -m pytest --ignore tests/unit

# No native code, no processes, no sockets: the suite to run after every change.
unit: $(VENV)/.installed
	$(PYTHON) -m pytest tests/unit -n $(JOBS)

# Regenerates the golden logits and tokens with the reference implementations and fails on any difference.
$(PARITY)/.installed: pyproject.toml
	@test -x $(PARITY)/bin/python || python3 -m venv $(PARITY)
	$(PARITY)/bin/python -m pip install --quiet --upgrade pip
	$(PARITY)/bin/python -m pip install --quiet torch==2.13.0 "transformers>=4.57" "gguf>=0.17" "safetensors>=0.5" "numpy>=2.0" \
		sentencepiece regex accelerate
	@touch $@

parity: $(VENV)/.installed $(PARITY)/.installed
	$(PARITY)/bin/python tests/parity/make_goldens.py --check \
		smollm2-135m=$$($(VENV)/bin/setpoint models pull smollm2-135m) \
		gemma3-270m=$$($(VENV)/bin/setpoint models pull gemma3-270m)
	$(PARITY)/bin/python tests/parity/make_tokenizer_goldens.py --check
	$(PYTHON) -m pytest tests/parity

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.cpp %.h,$(NATIVE))

format: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(filter %.cpp %.h,$(NATIVE))

bench: $(VENV)/.installed
	$(VENV)/bin/setpoint bench engine $(MODEL)

# The kernel workshop, built in the directory of the native module so that they share their objects.
bench-kernels: $(VENV)/.installed
	@$(VENV)/bin/cmake --build $(NATIVE_BUILD) --target kernel_bench --parallel $(JOBS) > $(NATIVE_BUILD)/kernel_bench.log \
		|| { cat $(NATIVE_BUILD)/kernel_bench.log; exit 1; }
	@$(NATIVE_BUILD)/kernel_bench $(ARGS)

# Installs the rivals into environments of their own at the first run: llama.cpp is built for this machine.
bench-peers: $(VENV)/.installed
	$(PYTHON) benchmarks/vs_llamacpp.py $(ARGS)

$(VENV)/.plots: $(VENV)/.installed
	$(PYTHON) -m pip install --quiet "matplotlib>=3.9"
	@touch $@

bench-plots: $(VENV)/.plots
	$(PYTHON) benchmarks/plots.py $(ARGS)

docs: $(VENV)/.installed
	$(PYTHON) docs/generate.py

clean:
	rm -rf $(VENV) $(PARITY) .venv-peers* build
