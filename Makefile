# every target sets up what it needs; `make` lists them
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# a process a core, each of one thread; a test goes to whichever is free
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup study test test-all lint format typecheck bench results architectures ui data

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: .venv/.complete ## create .venv from pinned versions and compile (done by every other target)

.venv/.complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	# torch first and by its exact version: any other install would bring the CUDA build and gigabytes
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) -e '.[dev,hub,peers]'
	# without a compiler plain PyTorch serves, more slowly
	-$(BIN)/fffexp build
	@touch $@

# what only `make test-all` uses
.venv/.all: .venv/.complete
	# apart from the rest: the torchvision that timm imports is a CUDA build, and beside a CPU torch torchmetrics trips on it
	$(PIP) --no-deps --upgrade --target .venv/timm timm torchvision
	$(PIP) --no-deps --upgrade --target .venv/adapters peft torchao
	@touch $@

study: setup ## the main job: which layer for the embedded digits, over depth and leaf width
	$(BIN)/fffexp study run studies/digits_depth_leaf.yaml --jobs $(JOBS)

test: setup ## the default tests, on a CPU
	$(PYTEST) -m "not slow and not gpu"

test-all: .venv/.all ## all tests and their coverage, also what needs minutes, a server, a browser or a GPU; says what it skipped
	$(PYTEST) -ra --cov --cov-report=

lint: setup ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: setup ## mypy, strict
	$(BIN)/mypy

bench: setup ## inference and training of the layers: tables, and JSON in outputs/ (8 minutes)
	$(BIN)/fffexp bench inference --peers --json outputs/bench/inference.json
	$(BIN)/fffexp bench training --peers --json outputs/bench/training.json

results: setup ## draw every committed picture and print every committed table again from docs/results/
	$(BIN)/python -m fffexp.paper.results

architectures: .venv/.all ## write docs/architectures.md: in which models MLPs are replaced (5 minutes)
	$(BIN)/python tests/adapt/architectures.py

ui: setup ## the MLflow UI on http://127.0.0.1:5000 (PORT=... for another port)
	@mkdir -p outputs
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
	$(BIN)/mlflow server --workers 1 --host 127.0.0.1 --port $${PORT:-5000} \
	  --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///outputs/mlflow.db}

data: setup ## fetch Fashion-MNIST and two texts into data/
	$(BIN)/python -m fffexp.data.fetch
