# Two commands do everything: `make demo` and `make test`. Both make their own virtual environment in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find compress kernels recipes evaluation -name '*.py' -o -name '*.yaml' -o -path '*/tables/*.json' -o -path '*/reference/model/*' -o -path '*/templates/*')
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PACKAGES := -p paredown.compress -p paredown.commands -p paredown.kernels -p paredown.recipes -p paredown.evaluation

.PHONY: help demo test test-slow test-serving lint format clean

help:
	@echo "make demo    prune the bundled model to 2:4, print before and after, leave out/demo"
	@echo "make test    lint, types and tests"
	@echo "make test-slow   tests of ten seconds and more: README's commands, the rehearsal of the GPU programme, all kernels compiled"
	@echo "make test-serving  vLLM, llama.cpp and onnxruntime read what we write (an environment of its own, half an hour)"
	@echo "make lint    ruff, mypy and the direction of imports only"
	@echo "make format  rewrite the sources with ruff"
	@echo "make clean   remove .venv and out"

demo: $(VENV)/installed
	@rm -rf out/demo
	$(BIN)/paredown demo -o out/demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-slow: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m slow

test-serving:
	tests/serving/make_env.sh .venv-serving $(PYTHON)
	OMP_NUM_THREADS=1 .venv-serving/bin/python -m pytest tests/serving

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/lint-imports --no-logo --no-cache

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Installed as users install it, not in place: mypy and the tests then see exactly what is shipped.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt $(SOURCES)
	@rm -rf build
	$(BIN)/python -m pip install -q -c constraints.txt --force-reinstall --no-deps .
	$(BIN)/python -m pip install -q -c constraints.txt '.[eval,report]'
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/python -m pip install -q -c constraints.txt '.[test]'
	@touch $@
