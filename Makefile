# make help tells the targets. All of them work on a fresh machine with python3 (3.11 to 3.13) and make.
PYTHON ?= python3
MODEL ?= builtin
# Where the processor-only build of torch is, for the tests. Elsewhere torch comes with gigabytes of CUDA libraries.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# Where the engines that Penstock is compared with are, each in an environment of its own.
PEERS ?= .peers

bin := .venv/bin
pip := $(bin)/python -m pip install --progress-bar on
sources := services backends clients/python tests tools benchmarks

.PHONY: help setup demo serve test faults lint protos bench bench-peers bench-peers-setup clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    the suite on the built-in model: one answer over gRPC, one over HTTP'
	@echo 'make serve   MODEL=FOLDER|HUB_ID|builtin, on 127.0.0.1:8000 (HTTP) and :8001 (gRPC); ARGS=… for more flags'
	@echo 'make test    everything the tests need, then all of them; ARGS=… for pytest'
	@echo 'make faults  faults at random under load, then every fault at every point of a handoff, one by one; half an hour'
	@echo 'make lint    style, types, import contracts, protos'
	@echo 'make setup   .venv with everything for test, lint and protos'
	@echo 'make protos  the Python messages and stubs from protos/'
	@echo 'make bench   every scenario in this process and through the suite; MODEL=…, ARGS=… for penstock bench engine'
	@echo 'make bench-peers-setup  environments for the engines that Penstock is compared with, in PEERS=.peers; minutes, 12 GB'
	@echo 'make bench-peers        all of them and Penstock in turn, with ratios; MODEL=FOLDER, ARGS=… for benchmarks/against_peers.py'
	@echo 'make clean   removes .venv and caches'

setup: .venv/.setup-developer

demo: .venv/.setup
	$(bin)/python tools/demo.py

serve: .venv/.setup
	exec $(bin)/penstock up $(MODEL) $(ARGS)

test: .venv/.setup-developer
	$(bin)/python -m pytest $(ARGS)

faults: .venv/.setup-developer
	$(bin)/python benchmarks/random_faults.py
	$(bin)/python -m pytest tests/faults -m matrix $(ARGS)

lint: .venv/.setup-developer
	$(bin)/ruff check $(sources)
	$(bin)/ruff format --check $(sources)
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/buf lint
	tools/check_protos.sh
	tools/check_namespace.sh

protos: .venv/.setup-developer
	tools/generate_protos.sh

bench: .venv/.setup
	tools/bench.sh $(or $(MODEL),builtin) $(ARGS)

bench-peers-setup: .venv/.setup
	$(bin)/python benchmarks/set_up_peers.py --peers $(PEERS) $(ARGS)
	test -e $(PEERS)/qwen3-0.6b/model.safetensors || $(bin)/python benchmarks/random_checkpoint.py $(PEERS)/qwen3-0.6b

bench-peers: .venv/.setup
	$(bin)/python benchmarks/against_peers.py $(if $(filter builtin,$(MODEL)),$(PEERS)/qwen3-0.6b,$(MODEL)) --peers $(PEERS) $(ARGS)

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis dist build

.venv/.python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "$(PYTHON) must be Python 3.11, 3.12 or 3.13: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || { echo "$(PYTHON) has no venv module: install python3-venv" >&2; exit 1; }
	$(pip) --upgrade 'pip>=25.1'
	@touch $@

.venv/.setup: .venv/.python pyproject.toml
	$(pip) --editable .
	@touch $@

.venv/.setup-developer: .venv/.setup
	$(pip) --retries 0 --no-deps --extra-index-url $(TORCH_INDEX) --group torch
	$(pip) --group test --group lint --group protos
	@touch $@
