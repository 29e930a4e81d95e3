# make help lists the targets. Everything is installed into .venv, once; nothing outside this folder is touched.

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Stands while an install runs. Left behind by an interrupted one, it is newer than .venv/.torch and so starts it anew.
UNFINISHED := $(VENV)/.unfinished
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DELETE_ON_ERROR:
.PHONY: help quickstart test check clean

help:
	@echo 'make quickstart   train a small model, export it and let it write'
	@echo 'make test         formatting, lint, types, spelling, then the tests on two cores'
	@echo 'make check        formatting, lint, types, spelling only'
	@echo 'make clean        remove .venv and what tools left behind; runs/ stays'
	@echo
	@echo 'PYTHON=python3.12       the Python to use, 3.11 or newer (make clean first to change it)'
	@echo 'TORCH=torch==2.13.0     the torch to install; one that PYTHON already has, 2.11 or newer, is kept instead'
	@echo 'PIP_FLAGS="--index-url URL"   more options for installing torch, e.g. an index of CPU builds'

# Prints the folder of a torch that PYTHON can import and that is new enough, and its version.
FIND_TORCH := import os, re, torch; \
	found = re.match(r"(\d+)\.(\d+)(\.0)?(a|b|rc|\.dev)?", torch.__version__); \
	number = (int(found[1]), int(found[2])); \
	is_new = number > (2, 11) or (number == (2, 11) and not found[4]); \
	print(torch.__version__, os.path.dirname(os.path.dirname(os.path.abspath(torch.__file__)))) if is_new else None

# The torch of PYTHON is shared through a .pth file: it is big, and often chosen for this machine's GPU.
$(VENV)/.torch: $(wildcard $(UNFINISHED))
	@command -v '$(PYTHON)' >/dev/null || \
		{ echo "$(PYTHON): not found. Install it (sudo apt-get install python3 python3-venv) or set PYTHON=..." >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is $$('$(PYTHON)' --version 2>&1); 3.11 or newer is needed." \
			"Try: sudo apt-get install python3.11 python3.11-venv && make PYTHON=python3.11" >&2; exit 1; }
	@'$(PYTHON)' -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments. Try: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo 'Making $(VENV) with $(PYTHON)'
	@'$(PYTHON)' -m venv --clear $(VENV)
	@found=$$('$(PYTHON)' -c '$(FIND_TORCH)' 2>/dev/null | tail -n 1); \
	if [ -n "$$found" ]; then \
		version=$${found%% *}; folder=$${found#* }; \
		echo "torch $$version: the one of $(PYTHON), in $$folder; nothing is downloaded for it"; \
		site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		printf '%s\n' "$$folder" > "$$site/torch_of_parent.pth"; \
	else \
		echo "torch: $(PYTHON) has none that is 2.11 or newer; installing $(TORCH) into $(VENV)"; \
		$(PIP_INSTALL) $(PIP_FLAGS) '$(TORCH)'; \
	fi
	@$(BIN)/python -c 'import torch'
	@touch $@

$(VENV)/.core: pyproject.toml $(VENV)/.torch
	@echo 'Installing infctx and what it needs into $(VENV)'
	@touch $(UNFINISHED)
	@$(PIP_INSTALL) -e .
	@rm -f $(UNFINISHED)
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo 'Installing what the tests need into $(VENV)'
	@touch $(UNFINISHED)
	@$(PIP_INSTALL) -e '.[test]'
	@rm -f $(UNFINISHED)
	@touch $@

quickstart: $(VENV)/.core
	@echo 'Trains a small model on the documentation of Python, exports it, and lets it write a little.'
	@echo 'Stop it when you like: started again, it continues where it was.'
	$(BIN)/infctx train recipes/quickstart.yaml
	$(BIN)/infctx export runs/quickstart --format pth --dtype fp32 --output runs/quickstart/model.pth --force
	$(BIN)/infctx generate runs/quickstart/model.pth --prompt 'The "for" statement is used to ' \
		--max-tokens 250 --temperature 1.0 --top-p 0.95 --seed 1

# As modules: a tool that came with the torch of PYTHON has no command in .venv/bin.
check: $(VENV)/.test
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy
	$(BIN)/python -m codespell_lib

test: check
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || \
		{ echo "The C++ kernels cannot be tested without a compiler. Try: sudo apt-get install g++" >&2; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -path ./.git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
