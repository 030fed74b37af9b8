# Each target does the whole set-up that it needs, once: a virtual environment in .venv with the pinned
# packages of requirements.txt, and the native code in csrc. `make help` lists the targets.
#
#   PYTHON=/path/to/python3     the Python to use (3.10 or later; default: the first suitable one on PATH)
#   VENV=.venv-old              the folder of the virtual environment (default: .venv)
#   PACKAGES="transformers==5.7.0"  other versions than the pinned ones, installed over them; give them a VENV
#   PIP_ARGS="..."              more arguments for pip, for instance an index with CPU builds of torch
#   COMOE_CUDA=0                build without CUDA also where nvcc is found
#   COMOE_CUDA_ARCHS="80;90"    GPU architectures to build for (default: the present GPU's)

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
PIP_ARGS ?=
PACKAGES ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=
AARCH64_CXX ?= aarch64-linux-gnu-g++
QEMU ?= qemu-aarch64
SUITABLE := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
WHICH := import sys; print(sys.base_prefix, sys.version_info[:3])

.PHONY: help demo test test-gpu sanitize-gpu bench bench-gpu profile lint format sanitize test-arm native-test build clean

help:
	@echo "make demo         run the bundled model in less and less memory"
	@echo "make test         native tests, then pytest"
	@echo "make test-gpu     the tests that need a CUDA device; make sanitize-gpu: under compute-sanitizer"
	@echo "make bench        benchmarks on the CPU; make bench-gpu: on a CUDA device"
	@echo "make profile      the GPU benchmark under Nsight Systems"
	@echo "make lint         ruff and clang-format; make format: apply them"
	@echo "make sanitize     native tests under ASan + UBSan, then under TSan"
	@echo "make test-arm     native tests built for aarch64, run under qemu"
	@echo "make build        virtual environment and native code only"
	@echo "make clean        remove .venv, build and caches"

demo: build
	$(BIN)/comoe demo --out demo-out

test: native-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: build
	$(BIN)/python csrc/ninja_build.py --gpu
	$(BIN)/python -m pytest -m gpu -rs $(PYTEST_ARGS)
	$(BIN)/python -m pytest -rs tests/test_paged_expert_ffn.py tests/test_dequant_matmul.py tests/test_merged_lowrank_matmul.py

sanitize-gpu: build
	@command -v compute-sanitizer >/dev/null || { \
	  echo "error: make sanitize-gpu needs compute-sanitizer, which comes with the CUDA toolkit" >&2; exit 1; }
	$(BIN)/python csrc/ninja_build.py --gpu --build-only
	compute-sanitizer --tool memcheck --error-exitcode 1 build/native-gpu/test_gpu_plane
	compute-sanitizer --tool racecheck --error-exitcode 1 build/native-gpu/test_gpu_plane

# Every kernel once, in less than a minute on two idle cores; BENCH_ARGS: of pytest, such as --write or -k disk.
BENCH = $(BIN)/python -m pytest bench -o python_files='bench_*.py' -o tmp_path_retention_policy=none --benchmark-quiet --timeout 600

bench: build
	$(BENCH) -m "not gpu" $(BENCH_ARGS)

# The script has its own arguments: --quick, --json, --write.
bench-gpu: build
	$(BIN)/python csrc/ninja_build.py --gpu --build-only
	$(BIN)/python bench/gpu.py $(BENCH_ARGS)

profile: build
	@command -v nsys >/dev/null || { \
	  echo "error: make profile needs nsys (Nsight Systems); see bench/profile.md" >&2; exit 1; }
	nsys profile --trace=cuda,nvtx,osrt --force-overwrite=true --output=build/profile \
	  $(BIN)/python bench/gpu.py --quick $(BENCH_ARGS)
	nsys stats --report nvtx_sum,cuda_gpu_kern_sum,cuda_gpu_mem_time_sum build/profile.nsys-rep

CPP_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' | sort)

lint: $(VENV)/.packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.packages
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

native-test: build
	$(BIN)/python csrc/ninja_build.py

sanitize: $(VENV)/.packages
	$(BIN)/python csrc/ninja_build.py --sanitizer address
	$(BIN)/python csrc/ninja_build.py --sanitizer thread

test-arm: $(VENV)/.packages
	@command -v $(AARCH64_CXX) >/dev/null && command -v $(QEMU) >/dev/null || { \
	  echo "error: make test-arm needs $(AARCH64_CXX) and $(QEMU); on Debian and Ubuntu:" >&2; \
	  echo "  apt-get install g++-aarch64-linux-gnu qemu-user" >&2; exit 1; }
	$(BIN)/python csrc/ninja_build.py --machine aarch64 --cxx $(AARCH64_CXX) --runner $(QEMU)

build: $(VENV)/.installed
	@$(if $(PACKAGES),$(BIN)/python -m pip install -q $(PIP_ARGS) $(PACKAGES))
	@$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.packages
	@echo "building comoe"
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.packages: requirements.txt $(VENV)/.python
	@echo "installing the packages of requirements.txt into $(VENV) (some minutes the first time)"
	@$(BIN)/python -m pip install -q $(PIP_ARGS) -r requirements.txt
	@touch $@

# `PYTHON` is checked when it is given, and a virtual environment of another one made anew; otherwise
# the first one that will do is taken.
ifneq ($(PYTHON),)
ifneq ($(shell "$(PYTHON)" -c '$(WHICH)' 2>/dev/null),$(shell $(BIN)/python -c '$(WHICH)' 2>/dev/null))
.PHONY: $(VENV)/.python
endif
endif
$(VENV)/.python:
	@chosen=; for p in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10); do \
	  if "$$p" -c '$(SUITABLE)' 2>/dev/null; then chosen="$$p"; break; fi; done; \
	if [ -z "$$chosen" ]; then \
	  echo "error: comoe needs Python 3.10 or later with its venv module; tried: $(or $(PYTHON),python3 python3.13 ... python3.10)." >&2; \
	  echo "Install one (Debian and Ubuntu: apt-get install python3 python3-venv python3-dev) or say make PYTHON=/path/to/python3" >&2; exit 1; fi; \
	echo "making $(VENV) with $$("$$chosen" -c 'import sys; print(sys.executable, sys.version.split()[0])')"; \
	"$$chosen" -m venv --clear $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info .pytest_cache .ruff_cache .benchmarks .hypothesis comoe/_C*.so
	find comoe comoe_kernels tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
