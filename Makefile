# Two targets do everything: `make demo` and `make test`. Both make .venv/ and the model's cache first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REQUIREMENTS := requirements/cpu.txt
TORCH := torch==2.13.0
STAMP := $(VENV)/ready
DEMO_ARGS ?=
FIDELITY_ARGS ?=
PROVE_ARGS ?=
PYTEST_ARGS ?=
SGLANG_VERSIONS ?= 0.5.17 0.5.23
GPU_PYTHON ?= $(BIN)/python
SANITIZER_TOOLS ?= memcheck racecheck
SANITIZER_JOBS ?= 4
# Without the longest, a launch that CUDA is meant to refuse, and a capture that takes memory of PyTorch's allocator.
SANITIZED ?= not 128k and not chance and not byte_products and not refused_not_awaited and not older_than_the_calibration
GPU_TESTS := tests/gpu tests/sglang tests/telemetry/test_collector_cuda.py
SANITIZED_FILES := tests/gpu/test_kernels.py tests/gpu/test_selectors.py tests/gpu/test_uniform.py
LOAD_HOST ?= http://127.0.0.1:30000
APT = DEBIAN_FRONTEND=noninteractive apt-get -q -y

.DEFAULT_GOAL := help
.PHONY: help has-gpu demo test test-fast test-sglang-versions test-gpu sanitize prove bench bench-gpu fidelity loadtest lint format env model tools clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-22s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: env ## serve a real model on this CPU and show what the bound costs (DEMO_ARGS="--once --json")
	@$(BIN)/vattn demo $(DEMO_ARGS)

test: env tools lint ## lint, types and every test; pytest's summary is printed last
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: env ## tests that start no server
	@$(BIN)/python -m pytest -m "not e2e" $(PYTEST_ARGS)

test-sglang-versions: $(SGLANG_VERSIONS:%=test-sglang-%) ## the end-to-end tests with the oldest and newest SGLang

test-sglang-%: requirements/sglang-%.txt
	@$(MAKE) --no-print-directory env VENV=.venv-sglang-$* OVERLAY=$<
	@echo "== SGLang $*" && .venv-sglang-$*/bin/python -m pytest -m e2e tests/e2e $(PYTEST_ARGS)

# This tree and no copy of it that is installed there; and nothing is skipped for want of a GPU.
GPU_PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/telemetry$(if $(PYTHONPATH),:$(PYTHONPATH))
test-gpu bench-gpu: export PYTHONPATH := $(GPU_PYTHONPATH)
test-gpu: export TEST_GPU_REQUIRED := 1
sanitize-%: export PYTHONPATH := $(GPU_PYTHONPATH)
sanitize-%: export TEST_GPU_REQUIRED := 1

has-gpu:
	@command -v $(GPU_PYTHON) >/dev/null || { echo "$(GPU_PYTHON) is missing: set GPU_PYTHON=python3, or run make env" >&2; exit 1; }
	@error=$$($(GPU_PYTHON) -c 'import torch, pytest' 2>&1) || { echo "$$error" | tail -1 >&2; echo "set GPU_PYTHON to the Python that serves with CUDA, and install pytest there" >&2; exit 1; }
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device here: run this on a GPU; make test and make bench do without")'

test-gpu: has-gpu ## kernels and servers on a GPU (GPU_PYTHON=python3, TEST_GPU_MODEL=folder of a converted model)
	@test -d "$(TEST_GPU_MODEL)" || { echo 'TEST_GPU_MODEL="$(TEST_GPU_MODEL)" is no folder: set it to what `vattn model fetch` prints' >&2; exit 1; }
	@$(GPU_PYTHON) -m pytest -m gpu -rs $(GPU_TESTS) $(PYTEST_ARGS)

sanitize: $(SANITIZER_TOOLS:%=sanitize-%) ## the GPU kernels under compute-sanitizer, four tests a process (SANITIZER_JOBS=16)

sanitize-%: has-gpu
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is missing: it comes with CUDA's toolkit, put its bin folder on PATH" >&2; exit 1; }
	@tests=$$($(GPU_PYTHON) -m pytest --collect-only -q -m gpu -k "$(SANITIZED)" $(SANITIZED_FILES)) || { echo "$$tests"; exit 1; }; \
	tests=$$(echo "$$tests" | grep ::); echo "== $*: $$(echo "$$tests" | wc -l) tests"; \
	echo "$$tests" | PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 xargs -d '\n' -n 4 -P $(SANITIZER_JOBS) \
	    sh -c '"$$@" || { echo "== ended with $$?: $$*"; exit 1; }' sh \
	    compute-sanitizer --tool $* --error-exitcode 9 $(GPU_PYTHON) -m pytest -m gpu -q $(PYTEST_ARGS)

prove: env ## violations of delta by sampler, target, bound and population; writes docs/proof.md
	@$(BIN)/python -m vattn_sgl.eval.prove $(PROVE_ARGS)

bench: env ## on this CPU: decode speed against SGLang's torch_native, both in one run (on a GPU: bench-gpu)
	@$(BIN)/python kernels/benchmarks/serve_cpu.py

bench-gpu: has-gpu ## on a GPU: attention against the best dense kernels, what its counters cost, servers, and the table of it (GPU_PYTHON=python3)
	@$(GPU_PYTHON) -c 'import matplotlib' || { echo "matplotlib, which draws the plot, is missing: $(GPU_PYTHON) -m pip install matplotlib" >&2; exit 1; }
	@status=0; for command in decode_gpu.py telemetry_gpu.py \
	    "serve.py --backends triton flashinfer vattention --densities 0.1 0.05 --json kernels/benchmarks/serve.json" \
	    "serve.py --context 1024 --densities 1 --tokens 400 --json kernels/benchmarks/serve_1k.json" report.py; do \
	    echo "== $$command"; $(GPU_PYTHON) kernels/benchmarks/$$command || status=1; done; exit $$status

fidelity: env ## measure the bound on a real model's attention and write docs/fidelity.md (FIDELITY_ARGS="--quick")
	@$(BIN)/vattn eval fidelity --out docs --server $(FIDELITY_ARGS)

loadtest: env ## load a running server for a minute (LOAD_HOST=http://127.0.0.1:30000)
	@$(BIN)/python -m locust -f loadtest/locustfile.py --headless --host $(LOAD_HOST) --users 4 --spawn-rate 2 --run-time 1m

lint: env ## format, lint and types
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

format: env ## format and fix
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

model: env ## fetch the demonstration model into the cache
	@$(BIN)/vattn model fetch

env: $(STAMP) ## make the environment in .venv/

$(STAMP): $(REQUIREMENTS) $(OVERLAY) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	@command -v g++ >/dev/null || $(MAKE) --no-print-directory apt-g++
	@echo "== environment in $(VENV) (two to four minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq --disable-pip-version-check $(TORCH)
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps -r $(REQUIREMENTS) $(if $(OVERLAY),&& $(BIN)/pip install -qq --disable-pip-version-check --no-deps -r $(OVERLAY))
	@$(BIN)/pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -c "from vattn_sgl.cpu import torchvision_ops; torchvision_ops.install()"
	@touch $@

tools: ## promtool, which checks the alert rules
	@command -v promtool >/dev/null || $(MAKE) --no-print-directory apt-prometheus

apt-%:
	@echo "== installing $* with apt"
	@test "$$(id -u)" = 0 || { echo "$* is missing: run apt-get install $* as root" >&2; exit 1; }
	@$(APT) update >/dev/null && $(APT) install --no-install-recommends $* >/dev/null

clean: ## remove environments and build leftovers; the model's cache stays
	@rm -rf .venv .venv-sglang-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
