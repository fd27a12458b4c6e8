# `make demo` shows the whole stack on this machine, `make test` runs everything that CI runs. Both start from nothing.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help venv demo demo-clean test lint unit agent-test promtool-test molecule uses build pin-images lock clean

PYTHON ?= python3
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
