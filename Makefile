# Two commands do everything on a machine with Python 3.11 or newer: make chat, make test.
PYTHON ?= python3
VENV ?= .venv
BITS ?= 4
MODEL ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

# On Linux the native kernels are built too; where nothing can build them all works without.
# A source distribution of mlx-llama does not hold them.
ifeq ($(shell uname -s)$(wildcard kernels/pyproject.toml),Linuxkernels/pyproject.toml)
KERNELS = $(VENV)/.kernels
KERNEL_FILES = $(shell find kernels -name build -prune -o -type f -print)
endif
KERNEL_TOOLS = scikit-build-core nanobind cmake ninja

.PHONY: chat test test-without-kernels check clean kernels kernels-check kernels-check-arm

chat: $(VENV)/.installed $(KERNELS)
	@model="$(MODEL)"; \
	if [ -d "$$model" ] && ! grep -qsE '"(quantization|mlx_llama)"' "$$model/config.json"; then \
	  path=$$(cd "$$model" && pwd); \
	  out="models/$$(basename "$$(dirname "$$path")")-$$(basename "$$path")-$(BITS)bit"; \
	  [ -d "$$out" ] || $(VENV)/bin/mlx-llama convert "$$model" -o "$$out" --bits $(BITS) >/dev/null || exit $$?; \
	  model="$$out"; fi; \
	exec $(VENV)/bin/mlx-llama chat $${model:+"$$model"}

test: $(VENV)/.installed-test $(KERNELS)
	$(VENV)/bin/python -m pytest -q

# The tests of arithmetic where the native kernels are hidden, so that MLX's operations run;
# make test-without-kernels TESTS=tests takes all of them.
test-without-kernels: TESTS ?= tests/kernels tests/mlx_llama tests/quantize tests/convert/test_interop.py
test-without-kernels: export PYTHONPATH := $(CURDIR)/tests/without_kernels
test-without-kernels: $(VENV)/.installed-test
	$(VENV)/bin/python -c 'from mlx_llama import native; assert native.kernels() is None'
	$(VENV)/bin/python -m pytest -q $(TESTS)

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright

# make kernels PYTHON=path/to/python builds them into that interpreter, which must have mlx.
kernels: $(if $(filter command line,$(origin PYTHON)),,$(VENV)/.installed)
	@[ -f kernels/pyproject.toml ] || { echo "make kernels: there is no folder kernels here; take the repository's" >&2; exit 1; }
	@$(if $(filter command line,$(origin PYTHON)),$(PYTHON),$(VENV)/bin/python) -c 'import mlx.core' || \
	  { echo "make kernels: $(PYTHON) has no mlx to build against: pip install 'mlx[cpu]'" >&2; exit 1; }
	@$(call build_kernels,$(if $(filter command line,$(origin PYTHON)),$(PYTHON),$(VENV)/bin/python))

build_kernels = $(1) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(KERNEL_TOOLS) && \
	  PATH="$$(cd "$$(dirname "$$(command -v $(1))")" && pwd):$$PATH" $(1) -m pip --disable-pip-version-check install --quiet \
	  --no-build-isolation --no-deps --force-reinstall ./kernels

$(VENV)/.kernels: constraints.txt $(KERNEL_FILES) | $(VENV)/.installed
	@if ! command -v $${CXX:-c++} >/dev/null; then \
	  echo "no C++ compiler: going on without the native kernels, 22 to 42 times slower on a CPU (docs/cpu.md)" >&2; \
	elif echo "building the native CPU kernels: about a minute" >&2; { $(call build_kernels,$(VENV)/bin/python); } >$(VENV)/kernels.log 2>&1; then touch $@; \
	else touch $@; echo "the native kernels could not be built ($(VENV)/kernels.log; make kernels tries again): going on without, 22 to 42 times slower on a CPU (docs/cpu.md)" >&2; fi

# The arithmetic's own test program, under the sanitizers.
kernels-check: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
kernels-check:
	@for sanitizer in address,undefined thread; do \
	  out=kernels/build/$$sanitizer; \
	  cmake -S kernels -B $$out -DMLK_PYTHON=OFF -DMLK_TESTS=ON -DMLK_SANITIZE=$$sanitizer >/dev/null && \
	  cmake --build $$out --parallel 2 >/dev/null && $$out/check 10 || exit 1; done

# The same for ARM, by a cross compiler, run by an emulator.
kernels-check-arm: export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
kernels-check-arm:
	@out=kernels/build/arm; \
	cmake -S kernels -B $$out -DMLK_PYTHON=OFF -DMLK_TESTS=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static >/dev/null && \
	cmake --build $$out --parallel 2 >/dev/null && qemu-aarch64 $$out/check 5

clean:
	rm -rf $(VENV) build dist kernels/build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("mlx-llama needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
