# `make serve` sets up and serves the demo model; `make test` sets up and passes every test.
PYTHON ?= python3
TORCH_VERSION ?= 2.13.0
# Where the build of torch without GPU libraries is, if the package index in use does not have it.
TORCH_PIP_ARGS ?= --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 15
MODEL ?= demo
HOST ?= 127.0.0.1
PORT ?= 30000
ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help serve test checks tests-core tests tests-triton tests-rocm tests-tpu tests-aot tests-npu example bench constraints clean
.DELETE_ON_ERROR:

BIN := .venv/bin
CORE := .venv-core/bin
TPU := .venv-tpu/bin
AOT := .venv-aot/bin
AITER := .venv/amd_aiter-0.1.7.post2.dev18-py3-none-any.whl
NPU := .venv-npu/bin
# Releases of torch-npu: the one that is simulated, and another whose schemas are compared.
TORCH_NPU ?= 2.13.0
TORCH_NPU_OLDER ?= 2.10.0.post4
PACKAGES := core/polyradix backends/torch/polyradix_torch backends/cpu/polyradix_cpu backends/cuda/polyradix_cuda \
            backends/tpu/polyradix_tpu backends/rocm/polyradix_rocm backends/npu/polyradix_npu \
            conformance/polyradix_conformance
# The versions that the tests have passed with, but for torch and what must fit it. `make test CONSTRAINTS=` in a fresh tree
# takes the newest, and then `make constraints` writes down what they are.
CONSTRAINTS ?= ci/constraints.txt
SETUP := Makefile pyproject.toml $(CONSTRAINTS) $(wildcard */pyproject.toml backends/*/pyproject.toml ci/requirements-*.txt)
NATIVE := backends/cpu/setup.py $(wildcard backends/cpu/csrc/*)
pytest = PYTHONPATH=ci $(1)/python -m pytest -p strict
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# No installer compiles modules, as few are ever imported; what Python then compiles is kept.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make serve   set up and serve the demo model at http://$(HOST):$(PORT) (MODEL=, HOST=, PORT=, ARGS=)"
	@echo "make test    set up and run every check and test"
	@echo "make bench   measure this engine, and the peers that are installed (ARGS=)"
	@echo "make clean   remove what the others made"

serve: .venv/served
	$(BIN)/polyradix serve --model $(MODEL) --device cpu --host $(HOST) --port $(PORT) $(ARGS)

# Environments first, as most of that is waiting; then two at a time, the longest first, and each one's output is shown when
# it has ended. Idle threads must not spin: torch's can wait instead, NumPy's cannot.
test: export OMP_WAIT_POLICY := passive
test: export OPENBLAS_NUM_THREADS := 1
test:
	$(MAKE) --no-print-directory -j4 .venv/tested .venv-npu/tested .venv-aot/tested .venv-tpu/tested .venv-core/tested $(AITER)
	$(MAKE) --no-print-directory -j2 -Otarget tests tests-rocm tests-triton tests-tpu tests-npu tests-core tests-aot checks

checks: .venv/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict $(PACKAGES) ci/gates.py ci/strict.py
	$(BIN)/lint-imports
	$(BIN)/python ci/gates.py

tests-core: .venv-core/tested
	$(CORE)/python ci/gates.py --bare
	$(call pytest,$(CORE)) core/tests --ignore=core/tests/reference

BROWSER = $(firstword $(shell command -v chromium chromium-browser google-chrome))
tests: .venv/tested
	$(if $(BROWSER),,@echo "NOT RUN: conformance/tests/test_matrix_browser.py, there is no Chromium (apt-get install chromium)")
	$(call pytest,$(BIN)) ci/tests core/tests/reference backends/torch/tests backends/cpu/tests conformance/tests \
	  --ignore=backends/torch/tests/triton $(if $(BROWSER),,--ignore=conformance/tests/test_matrix_browser.py)
	POLYRADIX_CPU_KERNELS=torch $(call pytest,$(BIN)) backends/cpu/tests --ignore-glob='*/test_native*' \
	  --ignore=backends/cpu/tests/test_engine.py
	for kernels in native torch; do for profile in dense moe mla quant; do \
	  $(BIN)/conform run --backend cpu --option kernels=$$kernels --profile $$profile -o .venv/cpu-$$kernels-$$profile.json; \
	  done; done
	$(BIN)/conform run --backend cpu --option kernels=torch --profile sparse -o .venv/cpu-torch-sparse.json
	for profile in dense mesh moe mla quant sparse; do $(BIN)/conform run --backend numpy --profile $$profile -o .venv/numpy-$$profile.json; done
	$(BIN)/conform verify .venv/*-*.json
	$(BIN)/conform matrix .venv/*-*.json -o .venv

# Triton's interpreter is chosen when triton is imported, hence a process of its own.
tests-triton: .venv/tested
	$(call pytest,$(BIN)) backends/torch/tests/triton backends/cuda/tests/interpreted backends/cuda/tests/aot

tests-rocm: export POLYRADIX_AMD_AITER := $(AITER)
tests-rocm: .venv/tested $(AITER)
	$(call pytest,$(BIN)) backends/rocm/tests \
	  --ignore=backends/rocm/tests/gpu --ignore=backends/rocm/tests/interpreted
	$(call pytest,$(BIN)) backends/rocm/tests/interpreted
	for profile in dense moe mla quant sparse; do $(BIN)/conform run --backend rocm --emulate --profile $$profile -o .venv/rocm-$$profile.json; done
	$(BIN)/conform verify .venv/rocm-*.json

# AMD's kernels for ROCm, whose sources the tests read, and of which they run what needs no GPU; nothing depends on it.
$(AITER): | .venv/bin/uv
	$(BIN)/pip download -q --no-deps -d $(@D) amd-aiter==0.1.7.post2.dev18

tests-tpu: export XLA_FLAGS := --xla_backend_optimization_level=0
tests-tpu: .venv-tpu/tested
	$(call pytest,$(TPU)) backends/tpu/tests --ignore=backends/tpu/tests/aot

# The real TPU compiler, which is proprietary and has half a gigabyte, in an environment of its own.
tests-aot: export JAX_PLATFORMS := cpu
tests-aot: .venv-aot/tested
	$(call pytest,$(AOT)) backends/tpu/tests/aot

# The vendor's wheel over stand-ins for its libraries, in an environment of its own: with it, plain `import torch` fails.
# Of conformance, bfloat16: float32 is plain torch here, and ci/npu.yml runs whole profiles.
tests-npu: export TORCH_DEVICE_BACKEND_AUTOLOAD := 0
tests-npu: export OMP_NUM_THREADS := 1
tests-npu: .venv-npu/tested
	$(call pytest,$(NPU)) backends/npu/tests
	for profile in dense moe mla; do $(NPU)/conform run --backend npu --emulate --profile $$profile --only bfloat16; done

# What a vendor does with a backend of their own, away from this tree.
example: .venv/tested .venv/served
	PYTHON=$(CURDIR)/$(BIN)/python ci/example.sh

bench: .venv/served
	$(BIN)/python bench/cpu.py $(ARGS)

constraints:
	for bin in $(BIN) $(CORE) $(TPU) $(AOT) $(NPU); do $(BIN)/pip --python $$bin/python freeze --exclude-editable; done \
	  | grep -Ev '^(torch|torch[_-]npu|triton)=' | LC_ALL=C sort -fu > ci/constraints.txt

clean:
	rm -rf .venv .venv-core .venv-tpu .venv-aot .venv-npu .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	rm -rf backends/cpu/polyradix_cpu/native/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +

.venv/bin/uv:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Polyradix needs Python 3.11 or newer")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile 'setuptools>=77'
	$(BIN)/pip install -q --no-compile $(constrained) uv || touch $@

# The native kernels are made by pip: uv, which keeps what it made once, does not look whether they are still there.
.venv/installed: $(SETUP) $(NATIVE) | .venv/bin/uv
	$(call torch,$(BIN))
	$(call install,$(BIN),-e core -e backends/torch)
	$(BIN)/pip install -q --no-compile --no-build-isolation -e backends/cpu
	touch $@

.venv/served: .venv/installed
	$(BIN)/python -c 'from polyradix.graph.checkpoint import fetch_demo; print(fetch_demo())'
	touch $@

.venv/tested: .venv/installed
	$(call install,$(BIN),-e core -e backends/torch -e backends/cuda -e backends/rocm -e backends/tpu -e backends/npu \
	  -e conformance -r ci/requirements-test.txt)
	touch $@

.venv-core/tested: $(SETUP) | .venv/bin/uv
	test -x $(@D)/bin/python || $(PYTHON) -m venv --without-pip $(@D)
	$(call install,$(CORE),-e core -r ci/requirements-core.txt)
	touch $@

.venv-tpu/tested: $(SETUP) | .venv/bin/uv
	test -x $(@D)/bin/python || $(PYTHON) -m venv --without-pip $(@D)
	$(call install,$(TPU),-e core -e conformance -e 'backends/tpu[cpu$(comma)flax]' -r ci/requirements-core.txt)
	touch $@

.venv-aot/tested: $(SETUP) | .venv/bin/uv
	test -x $(@D)/bin/python || $(PYTHON) -m venv --without-pip $(@D)
	$(call install,$(AOT),-e core -e conformance -e 'backends/tpu[aot]' -r ci/requirements-core.txt)
	touch $@

.venv-npu/installed: $(SETUP) | .venv/bin/uv
	test -x $(@D)/bin/python || $(PYTHON) -m venv --without-pip $(@D)
	$(call torch,$(NPU))
	$(call install,$(NPU),'torch-npu==$(TORCH_NPU)' -e core -e backends/torch -e conformance -e backends/npu -r ci/requirements-core.txt)
	$(BIN)/pip download -q --no-deps 'torch-npu==$(TORCH_NPU_OLDER)' -d .venv-npu/older
	touch $@

# The CPU's kernels lie in the source tree, so only one pip at a time makes them.
.venv-npu/tested: .venv-npu/installed $(NATIVE) | .venv/installed
	$(call pip,$(NPU)) --no-build-isolation -e backends/cpu
	touch $@

comma := ,
constrained = $(addprefix -c ,$(CONSTRAINTS))

# uv needs a tenth of pip's time. Where it fails, as with an index that only pip was told of, pip does it; and where there is
# no such version for this machine, or no longer, the newest is taken.
pip = $(BIN)/pip --python $(1)/python install -q --no-compile
define install
$(BIN)/uv pip install -q --python $(1)/python $(constrained) $(2) || $(call pip,$(1)) $(constrained) $(2) \
  || $(call pip,$(1)) $(2)
endef

# A plain `torch` from PyPI brings gigabytes of GPU libraries on Linux, so the CPU build is tried first, by its full version.
define torch
$(call pip,$(1)) 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null \
  || $(call pip,$(1)) 'torch==$(TORCH_VERSION)+cpu' $(TORCH_PIP_ARGS) \
  || $(call pip,$(1)) 'torch==$(TORCH_VERSION)'
endef
