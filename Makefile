# Two commands: `make train` sets up and runs the main job, `make test` sets up and checks.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PYPROJECTS := pyproject.toml kernels/pyproject.toml cost_model/pyproject.toml plugins/subquad-scout/pyproject.toml plugins/subquad-ssm/pyproject.toml
STAMP := $(VENV)/.installed

.PHONY: install train test test-all lint

install: $(STAMP)

$(STAMP): constraints.txt $(PYPROJECTS) tools/check_python.py
	$(PYTHON) tools/check_python.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0" \
		-e kernels -e cost_model -e ".[train,dev]" -e plugins/subquad-scout -e plugins/subquad-ssm
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/python -m subquad train model=scout_mamba

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m "not gpu and not slow"

test-all: lint
	$(BIN)/python -m pytest -m "not gpu"
