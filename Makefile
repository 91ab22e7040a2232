PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-slow test-lowest test-newest wheel docs docs-browser lint format quality speed bench bench-figures figures install

demo: install
	$(BIN)/python examples/geyser.py

test: install
	$(BIN)/pytest -n 2

test-slow: install
	$(BIN)/pytest -m slow

# The lower bounds of pyproject.toml, each exactly.
test-lowest:
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python tests/lowest.py > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/pip install --quiet --constraint $(VENV)-lowest/constraints.txt --editable ".[dev]"
	$(VENV)-lowest/bin/pytest -n 2

# What pip takes without constraints of ours.
test-newest:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	$(VENV)-newest/bin/pytest -n 2

wheel: install
	$(BIN)/python tests/wheel.py

docs: $(VENV)/.docs
	rm -rf docs/_build
	$(BIN)/sphinx-build -b html -W --keep-going docs docs/_build/html

docs-browser: docs
	$(BIN)/pytest -m browser tests/browser

quality: install
	$(BIN)/python benchmarks/uci.py
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/missing.py
	$(BIN)/python benchmarks/known_truth.py
	$(BIN)/python benchmarks/few_rows.py
	$(BIN)/python benchmarks/kinds.py

speed: install
	$(BIN)/python benchmarks/posterior.py

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/diabetes.py
	$(BIN)/python benchmarks/survival.py
	$(BIN)/python benchmarks/counts.py
	$(BIN)/python benchmarks/angles.py
	$(BIN)/python benchmarks/log_prob.py
	$(BIN)/python benchmarks/channels.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/time_to_quality.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/scaling.py

bench-figures: install
	$(BIN)/python benchmarks/scaling.py --figure docs/scaling.png

figures: install
	$(BIN)/python examples/geyser.py
	$(BIN)/python examples/inverse_sine.py --seeds 1
	$(BIN)/python examples/arviz_workflow.py
	$(BIN)/python examples/bayesian_weights.py
	$(BIN)/python examples/active_learning.py
	cp out/geyser.png out/inverse_sine.png out/arviz_workflow.png out/bayesian_weights.png out/active_learning.png docs/

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $@
