# On a machine with a GPU of its own, name the torch to install: make demo TORCH="torch torchvision"
TORCH ?= torch==2.14.1 torchvision==0.29.1
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint format

# The virtual environment, made anew only when the dependencies change.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[demo,test]"
	touch $@

demo: .venv/installed  ## fine-tune, evaluate, classify and draw; results under outputs/demo
	$(BIN)/python scripts/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -m "not slow" tests

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
