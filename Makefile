# What a person types. Each target installs first if it needs to.

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
ARGS ?=

.PHONY: install sweep test test-faults head ui clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

sweep: install  ## search clipping, batch size and augmentation on the digits; ARGS="--trials 30"
	$(BIN)/python experiments/agc_sweep.py $(ARGS)

test: install  ## everything that must hold
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --ignore tests/faults $(ARGS)

test-faults: install  ## processes killed at random moments; takes longer
	$(BIN)/pytest tests/faults $(ARGS)

head: install  ## a local Ray to submit jobs to
	@bash cluster/local_head.sh

ui: install  ## MLflow's pages, on this machine only
	$(BIN)/mlflow ui --host 127.0.0.1 --port $${PORT:-5000} \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}"

clean:  ## removes what can be made again; runs/ and mlflow.db stay
	rm -rf .venv build *.egg-info platform/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
