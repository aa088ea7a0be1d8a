# Two commands: `make train` sets up and runs the main job, `make test` sets up and checks. `make docs` builds the pages.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
DISTRIBUTIONS := -e kernels -e cost_model -e ".[train,hf,triton,dev]" -e plugins/subquad-scout -e plugins/subquad-ssm -e plugins/subquad-linear
PYPROJECTS := pyproject.toml kernels/pyproject.toml cost_model/pyproject.toml plugins/subquad-scout/pyproject.toml plugins/subquad-ssm/pyproject.toml plugins/subquad-linear/pyproject.toml
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs-installed
# A process a core, up to eight, of 1 to 2 GB each (conftest.py gives each one thread).
PYTEST := -m pytest -n logical --maxprocesses 8 --dist worksteal --durations 20 --durations-min 5
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# The versions of the machines with GPUs, in an environment of their own: several GB, a CUDA build that runs on CPUs.
TWIN := .venv-gpu-versions
TWIN_STAMP := $(TWIN)/.installed

.PHONY: install train test test-all test-gpu-versions install-gpu-versions lint docs test-browser test-release

install: $(STAMP)

$(STAMP): constraints.txt $(PYPROJECTS) tools/check_python.py
	$(PYTHON) tools/check_python.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt "torch==2.13.0" $(DISTRIBUTIONS)
	touch $(STAMP)

train: $(STAMP)
	$(BIN)/python -m subquad train model=scout_mamba

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python $(PYTEST) -m "not gpu and not slow"

test-all: lint
	$(BIN)/python $(PYTEST) -m "not gpu"

# Into site/: `python -m http.server -d site` shows it; reading needs nothing from elsewhere.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e ".[docs]"
	touch $(DOCS_STAMP)

# Pages in a headless Chromium (Debian: chromium-headless-shell); skipped where there is none.
test-browser: docs
	$(BIN)/python -m pytest tests/test_pages_in_a_browser.py

# Downloads torch for every version that is named in tests/test_release.py: gigabytes, and minutes each.
test-release: $(STAMP)
	$(BIN)/python -m pytest tests/test_release.py -m release

install-gpu-versions: $(TWIN_STAMP)

$(TWIN_STAMP): constraints.txt constraints-gpu.txt $(PYPROJECTS) tools/check_python.py
	$(PYTHON) tools/check_python.py
	test -x $(TWIN)/bin/python || $(PYTHON) -m venv $(TWIN)
	grep -vE "^($$(cut -d= -f1 constraints-gpu.txt | paste -sd '|'))==" constraints.txt | cat - constraints-gpu.txt > $(TWIN)/constraints.txt
	$(TWIN)/bin/python $(PIP_INSTALL) -c $(TWIN)/constraints.txt "torch==2.11.0" $(DISTRIBUTIONS)
	touch $(TWIN_STAMP)

test-gpu-versions: $(TWIN_STAMP)
	$(TWIN)/bin/python $(PYTEST) -m "not gpu and not slow" plugins tests/test_compiler.py tests/test_foreign_torch.py $(addprefix kernels/tests/test_,$(addsuffix .py,cached_attention segment_attention segment_attention_tiled selective_scan causal_conv causal_conv_fused softmax_attention rotary replay compile_launches unset_registers))
