# The commands of a contributor. Activate a virtual environment first, or name another
# interpreter: make test PYTHON=.venv/bin/python
PYTHON ?= python

.PHONY: install lint types test docs

install:
	$(PYTHON) -m pip install --editable '.[dev,docs]'

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m pyright

test:
	$(PYTHON) -m pytest -n 2 -m 'not slow'

docs:
	$(PYTHON) -m sphinx -W --keep-going docs docs/_build
