# Two commands do everything on a machine with Python 3.11 or newer: make chat, make test.
PYTHON ?= python3
VENV ?= .venv
BITS ?= 4
MODEL ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: chat test check clean

chat: $(VENV)/.installed
	@if [ -z "$(MODEL)" ]; then \
	  echo "make chat needs a model: make chat MODEL=path/to/Llama-3.2-1B-Instruct (Meta's files, Hugging Face's, or a converted folder)" >&2; exit 2; fi
	@model="$(MODEL)"; \
	if [ -d "$$model" ] && ! grep -qsE '"(quantization|mlx_llama)"' "$$model/config.json"; then \
	  path=$$(cd "$$model" && pwd); \
	  out="models/$$(basename "$$(dirname "$$path")")-$$(basename "$$path")-$(BITS)bit"; \
	  [ -d "$$out" ] || $(VENV)/bin/mlx-llama convert "$$model" -o "$$out" --bits $(BITS) >/dev/null || exit $$?; \
	  model="$$out"; fi; \
	exec $(VENV)/bin/mlx-llama chat "$$model"

test: $(VENV)/.installed-test
	$(VENV)/bin/python -m pytest -q

check: $(VENV)/.installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/basedpyright

clean:
	rm -rf $(VENV) build dist

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
