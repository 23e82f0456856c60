# Two commands: `make demo` and `make test`. Needs Python 3.10 or newer, make and g++; the rest is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint
demo: $(READY)
	$(BIN)/gdn-ir demo $(TEXT)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target build/typed .
	cd build && MYPYPATH=typed ../$(BIN)/python -m mypy --config-file ../pyproject.toml -p gdn_ir

# torch first: a CUDA build brings the Triton it was made for; a CPU build brings none. Triton 3.6's interpreter breaks with numpy 2.4.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -c "import torch, sys; sys.exit(torch.version.cuda is None)" || $(BIN)/python -m pip install --quiet triton==3.6.0
	$(BIN)/python -m pip install --quiet numpy==2.2.6 tilelang==0.1.15 -e '.[dev]'
	touch $(READY)
