# make test          everything a change must pass      make train   the demonstration run
# make test-matrix   the suite beside other versions    make wheel   dist/: a wheel and the sources
PYTHON ?= python3

BIN := .venv/bin
STAMP := .venv/setup-done
NATIVE := $(wildcard lst_kernels/native/src/*)

.PHONY: setup test test-matrix lint wheel corpus train bench docs clean

setup: $(STAMP)

# The constraints keep pip on the versions that development is pinned to, torch first of all.
$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,speech,scale,llama,float8,log,plots,docs,eval,demo,hub]'
	touch $@

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

# One fresh environment each, with downloads; EXTREMES="bare no-triton" runs some of them alone.
test-matrix: setup
	$(BIN)/python tests/matrix.py $(EXTREMES)

wheel: setup
	rm -rf dist
	$(BIN)/python -m build

corpus: setup
	$(BIN)/python -m lst.prepare demo

train: corpus
	$(BIN)/torchrun --standalone --nproc-per-node 1 -m lst.train demo

bench: setup
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/pytest benchmarks/ --benchmark-only

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean:
	rm -rf .venv build dist site lst.egg-info lst_kernels/native/*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
