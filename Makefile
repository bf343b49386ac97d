# SPDX-License-Identifier: Apache-2.0
# make demo | test | lint | docs | env | clean | help
#   ROS=jazzy              for ROS 2 Jazzy instead of Kilted: with the libraries of Ubuntu 24.04, in .venv-jazzy
#   PYTHON=python3.12      interpreter for the environment (3.10 or newer; for Jazzy 3.12 where there is one)
#   VENV=.venv             folder of the environment
#   TORCH_INDEX_URL=URL    package index with CPU builds of torch, where the default one has only CUDA builds
#   NO_APT=1               name missing system packages instead of installing them
#   PYTEST_ARGS="-k gate"  what pytest gets, instead of everything
#   JOBS=2                 processes that share the tests
#   DEMO_ARGS="--help"     what `adatoken3d demo` gets

ROS ?= kilted
ifeq ($(filter kilted jazzy,$(ROS)),)
$(error ROS is '$(ROS)'; there are kilted and jazzy)
endif
ifeq ($(ROS),jazzy)
# Ubuntu 24.04's Python, wherever it is, or else the usual one.
PYTHON ?= $(shell for python in python3.12 $$HOME/.pyenv/versions/3.12.*/bin/python3; do \
	$$python -c '' 2> /dev/null && { echo $$python; exit; }; done; echo python3)
VENV ?= .venv-jazzy
# What touches ROS or the libraries at its edge. Linters, types and the core's tests run once, with Kilted.
PYTEST_ARGS ?= -n $(JOBS) --dist loadfile tests/ros tests/faults tests/test_package.py
else
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
endif
JOBS ?= 2
DEMO_ARGS ?=

# The environment is whole in itself; a sourced ROS installation or workspace would be mixed into it.
unexport PYTHONPATH PYTHONHOME AMENT_PREFIX_PATH CMAKE_PREFIX_PATH COLCON_PREFIX_PATH CMAKE_TOOLCHAIN_FILE
unexport LD_LIBRARY_PATH _ROS_WHEELS_BOOTSTRAP_COMPLETE

# Demo and tests stay off the network.
export ROS_AUTOMATIC_DISCOVERY_RANGE ?= LOCALHOST

.PHONY: help env demo test lint docs format clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//; 2,10p' Makefile

env:
	@command -v $(PYTHON) > /dev/null || { echo "No '$(PYTHON)' here: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "'$(PYTHON)' is $$($(PYTHON) --version 2>&1), and 3.10 is the oldest that works: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) scripts/bootstrap.py --ros $(ROS) --venv $(VENV)

demo: env
	@$(VENV)/bin/adatoken3d demo $(DEMO_ARGS)

test: $(if $(filter kilted,$(ROS)),lint,env)
ifneq ($(PYTEST_ARGS),)
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)
else
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --ignore tests/ros --ignore tests/faults
	# A file at a time: its tests share a node. Each process of the tests has domains of its own.
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile tests/ros tests/faults
endif

lint: env
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The site is in build/site; a link in it that leads nowhere is an error. It needs nothing of the package (Python 3.11).
docs:
	@test -x .venv-docs/bin/mkdocs || { $(PYTHON) -m venv --clear .venv-docs && .venv-docs/bin/python -m pip install -q \
		--no-input -c constraints.txt $$(sed -n 's/^docs = \["\(.*\)"\].*/\1/p' pyproject.toml); }
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

format: env
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) .venv-docs build install log *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
