# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` start from a fresh clone: Debian, Python 3.11 or later, make.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test check venv wheel clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/kvsplice demo

test: check
	$(BIN)/python -m pytest -n auto --dist loadfile

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

venv: $(READY)

$(READY): pyproject.toml scripts/make_venv.sh
	bash scripts/make_venv.sh $(PYTHON) .venv
	touch $@

wheel: $(READY)
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf .venv build dist
