# The commands of a contributor. They use the virtual environment that `make install`
# creates, or another interpreter: make test PYTHON=python
PYTHON ?= .venv/bin/python

.PHONY: install lint types test docs

install:
	python3 -m venv .venv
	.venv/bin/python -m pip install --editable '.[dev,docs]'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m pyright

test:
	$(PYTHON) -m pytest -n 2 -m 'not slow'

docs:
	$(PYTHON) -m sphinx -W --keep-going docs docs/_build
