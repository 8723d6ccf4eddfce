# Shortcuts for the commands in README.md; nothing here is needed to use the package.
PYTHON ?= python3
VENV ?= .venv

.PHONY: demo test slow quality

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/ready
	$(VENV)/bin/python examples/iterative_multi_turn_dpo.py

test: $(VENV)/ready
	$(VENV)/bin/pytest -n 2 -m "not slow"

slow: $(VENV)/ready
	$(VENV)/bin/pytest -n 2 -m slow

quality: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
