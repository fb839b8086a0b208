# `make help` lists the targets. The first run of each takes minutes (`setup` installs everything), the next ones seconds.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: fuzz help setup setup-transformers5 setup-runtimes setup-web demo gpu test test-transformers5 faults test-runtimes test-wheel lint types check clean

VENV := .venv
VENV5 := .venv-transformers5
JAVASCRIPT := examples/javascript
MYPY := $(CURDIR)/$(VENV)/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache
PYTEST_ARGS ?= -n 2 --dist loadgroup
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONDONTWRITEBYTECODE # with it, each process that a test starts compiles all of dispc again

# The first of these that runs and is new enough: onnxruntime-gpu 1.31 has no wheels for Python 3.10.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

help: ## show this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22

setup: $(VENV)/.installed ## create and fill .venv (the second time: nothing to do)

setup-transformers5: $(VENV5)/.installed ## the same for .venv-transformers5

setup-web: ## npm packages and Chromium for the JavaScript examples, whose tests skip themselves without
	@if command -v npm > /dev/null; then $(MAKE) $(JAVASCRIPT)/node_modules/.installed; else echo "npm is not installed"; fi
	@if command -v chromium > /dev/null; then :; \
	elif test "$$(id -u)" = 0 && command -v apt-get > /dev/null; then apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium > /dev/null; \
	else echo "Chromium is not installed, and only root can install it with apt-get"; fi

# Install scripts stay off: the one of onnxruntime-node downloads CUDA libraries, and the package has what the CPU needs.
$(JAVASCRIPT)/node_modules/.installed: $(JAVASCRIPT)/package-lock.json
	cd $(JAVASCRIPT) && npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

demo: setup ## compile, validate and time a real pruned SmolLM2-135M
	$(VENV)/bin/dispc demo

test: setup ## run all tests (PYTEST_ARGS="-n 0 -x tests/test_masks.py" for some)
	$(VENV)/bin/pytest $(PYTEST_ARGS)

TRANSFORMERS5_TESTS ?= tests/model tests/export/test_operators.py tests/reference/test_reference.py \
	tests/reference/test_apply_masks.py tests/learn/test_every_family.py \
	tests/test_compile.py::test_an_artifact_computes_what_the_masked_reference_computes
test-transformers5: setup-transformers5 ## run the tests that meet transformers with transformers 5 (TRANSFORMERS5_TESTS=tests: all)
	$(VENV5)/bin/pytest $(PYTEST_ARGS) -m "not extras" $(TRANSFORMERS5_TESTS)

GPU_ARGS ?= --minutes 9 --json benchmarks/results/gpu_minutes.json
gpu: setup ## on a machine with CUDA: parity, speed, learning, most important first (GPU_ARGS="--minutes 5")
	$(VENV)/bin/python benchmarks/gpu_minutes.py $(GPU_ARGS)

fuzz: setup ## damaged inputs for every command (FUZZ_ARGS="--seed 1 --count 2000", the default is 2,000 cases)
	cd tests/shared && OMP_NUM_THREADS=1 $(CURDIR)/$(VENV)/bin/python fuzzing.py $(FUZZ_ARGS)

faults: setup ## plant 1,000 faults into artifacts and judge each (FAULTS_ARGS="--seed 1 --count 100" for other ones)
	$(VENV)/bin/python tests/shared/fault_matrix.py $(FAULTS_ARGS)

# The oldest, one between and the newest; the environments hold these packages and what they need, no dispc, no torch.
RUNTIMES ?= 1.18.0 1.24.1 1.32.0
GENAI ?= 0.6.0 0.11.4 0.18.0
RUNTIME_MARKS = $(RUNTIMES:%=build/runtimes/onnxruntime-%/.installed) $(GENAI:%=build/runtimes/genai-%/.installed)

setup-runtimes: $(RUNTIME_MARKS)

test-runtimes: setup setup-runtimes ## artifacts in other ONNX Runtimes (RUNTIMES="1.18.0") and onnxruntime-genais (GENAI="0.6.0")
	$(VENV)/bin/pytest -n 0 tests/runtimes

# ONNX Runtime 1.18 was built for NumPy 1.
build/runtimes/onnxruntime-%/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet onnxruntime==$* $(if $(filter 1.18.%,$*),'numpy<2')
	@touch $@

build/runtimes/genai-%/.installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet onnxruntime-genai==$*
	@touch $@

WHEEL ?= newest oldest
test-wheel: setup ## the wheel in fresh environments, with the newest and the oldest allowed versions (4 GB)
	bash .ci/try-wheel $(CURDIR)/$(VENV)/bin/python $(WHEEL)

lint: setup ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy does not follow the folder mapping of pyproject.toml, so it is shown the package as a wheel would lay it out.
types: setup ## mypy --strict on the package and the benchmarks
	@rm -rf build/types && mkdir -p build/types/dispc
	@ln -s $(CURDIR)/dispc/* $(CURDIR)/passes $(CURDIR)/export $(CURDIR)/validate build/types/dispc/
	cd build/types && $(MYPY) -p dispc
	cd build/types && MYPYPATH=.:$(CURDIR)/benchmarks:$(CURDIR)/tests/shared $(MYPY) $(CURDIR)/benchmarks/*.py

check: lint types test ## lint, types and test

clean: ## remove everything that make made, both environments included
	rm -rf $(VENV) $(VENV5) $(JAVASCRIPT)/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: requirements.txt
$(VENV5)/.installed: requirements-transformers5.txt

%/.installed: pyproject.toml | %/bin/pip
	@echo "filling $* from $(filter requirements%,$^) (2 GB, a minute or more)"
	$*/bin/python -m pip install --quiet --no-deps -r $(filter requirements%,$^)
	$*/bin/python -m pip install --quiet "$$(grep '^torch==' $(filter requirements%,$^))"
	$*/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

.PRECIOUS: %/bin/pip
%/bin/pip:
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "no Python 3.11 or newer: install one, or name yours with make setup PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $*
