# Needs python3 (3.10 or newer), a C++17 compiler and a package index; the rest is set up in .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= gpu_out

PY := $(VENV)/bin/python
SOURCES := $(shell find csrc python benches third_party -type f -not -name '*.pyc' -not -path '*/results/*') \
           CMakeLists.txt pyproject.toml

.PHONY: setup install demo test bench check gpu new-op clean

setup: $(VENV)/.ready
install: $(VENV)/.installed

$(VENV)/.ready: requirements-dev.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --requirement requirements-dev.txt
	$(PY) -m pip install --quiet --no-deps torchvision==0.28.0 timm==1.0.31
	touch $@

$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	$(PY) -m pip install --quiet --no-deps --no-build-isolation .
	touch $@

demo: install
	$(PY) -m viops demo

test: install
	$(PY) -m pytest tests

bench: install
	$(PY) -m viops bench

# Looks only, edits nothing.
check: setup
	$(PY) -m ruff check python tests benches .ci
	$(PY) -m ruff format --check python tests benches .ci
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(PY) -m mypy

# On a machine with a GPU: builds against the torch that PYTHON has, without a .venv.
gpu:
	$(PYTHON) -c "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 'make gpu: torch sees no GPU')"
	$(PYTHON) -m pip install --no-deps --no-build-isolation -Ccmake.define.VIOPS_CUDA=ON .
	$(PYTHON) -m viops doctor
	$(PYTHON) -m pytest tests
	$(PYTHON) -m viops bench --device cuda --json $(OUT)/bench.json

# make new-op NAME=my_op
new-op: setup
	$(PY) .ci/new_op.py $(NAME)

clean:
	rm -rf build $(VENV)
