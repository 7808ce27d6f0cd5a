# Needs python3 (3.10 or newer), a package index and a C++17 compiler, for tests one of C++20 with
# AddressSanitizer, such as GCC 12; the rest is set up in .venv.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
OUT ?= build/gpu
LIMIT ?= 540
TOTAL ?= 570

PY := $(VENV)/bin/python
SOURCES := $(shell find csrc python benches third_party -type f -not -name '*.pyc' -not -path '*/results/*') \
           CMakeLists.txt pyproject.toml

.PHONY: setup install demo test sanitize bench check gpu registers new-op clean

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

# The CUDA kernels run on the CPU: as plain code among the tests, then under AddressSanitizer and UBSan.
test: install
	$(PY) -m pytest tests
	$(PY) tests/cuda_on_host/run.py address

# The same with every build there is, ThreadSanitizer's too, which takes minutes.
sanitize: install
	$(PY) -m pytest tests/cuda_on_host
	for kind in plain address thread; do $(PY) tests/cuda_on_host/run.py $$kind || exit 1; done

bench: install
	$(PY) -m viops bench

# Looks only, edits nothing.
check: setup
	$(PY) -m ruff check python tests benches .ci
	$(PY) -m ruff format --check python tests benches .ci
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
	$(PY) -m mypy

# On a machine with a GPU: builds against the torch that PYTHON has, without a .venv, checks and times.
# make gpu [STAGE="build test"] [OUT=folder] [LIMIT=seconds a stage] [TOTAL=seconds in all]
#     [GPU_OPTIONS="--rest --quick"]; GPU_OPTIONS=--help says which stages fit in ten minutes
gpu:
	$(PYTHON) .ci/gpu.py --out $(OUT) --limit $(LIMIT) --total $(TOTAL) $(GPU_OPTIONS) $(STAGE)

# Registers, shared memory and spills of every CUDA kernel; needs nvcc and no GPU.
registers:
	$(or $(wildcard $(PY)),$(PYTHON)) .ci/registers.py

# make new-op NAME=my_op
new-op: setup
	$(PY) .ci/new_op.py $(NAME)

clean:
	rm -rf build $(VENV)
