# Each target makes .venv where it is missing, and installs again only when what the package is built from has changed.
#
#   make demo     installs fusetune and fine-tunes a pretrained model
#   make test     the tests
#   make bench    the benchmarks
#   make lint     checks style and types;  make format  mends style
#   make clean    removes what these made

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt requirements-demo.txt setup.py CMakeLists.txt $(shell find csrc -type f)
SOURCES := $(shell find csrc tests/cuda_host -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench lint format clean

demo: .venv/demo
	$(BIN)/fusetune finetune

test: .venv/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

bench: .venv/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks --benchmark-only \
	  --benchmark-json=$$($(BIN)/python benchmarks/results.py path)
	$(BIN)/python benchmarks/results.py write

lint: .venv/dev .cache/typing/fusetune
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf .venv .cache .benchmarks .mypy_cache .pytest_cache .ruff_cache build dist fusetune.egg-info pyfront/_C.*.so

.venv:
	$(PYTHON) -m venv $@

# The demo's installation lacks what development needs, the ISA level of the tests included; the other has all of it.
.venv/demo: $(INPUTS) | .venv
	$(INSTALL) -e '.[train]'
	$(INSTALL) --no-deps --require-hashes -r requirements-demo.txt
	rm -f .venv/dev
	touch $@

.venv/dev: $(INPUTS) | .venv
	FUSETUNE_TEST_LEVELS=1 $(INSTALL) -e '.[train,triton,dev]'
	$(INSTALL) --no-deps --require-hashes -r requirements-demo.txt
	touch .venv/demo $@

# mypy needs the package under its name.
.cache/typing/fusetune:
	mkdir -p $(@D)
	ln -s ../../pyfront $@
