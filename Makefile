# What a person types. Each target installs first if it needs to.

PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
ARGS ?=
CLUSTER ?= cluster/gpu.yaml
# Parts of the tests that run side by side.
JOBS ?= 2
# A Mac's make, of 2006, has no --output-sync.
TOGETHER := $(MAKE) --no-print-directory --keep-going \
	$(if $(filter output-sync,$(.FEATURES)),--output-sync=target) --jobs
PYTEST := $(BIN)/pytest --ignore tests/faults --ignore tests/cluster

.PHONY: install sweep ablation ablation-large report bench bench-check test test-quick checks units integration selected \
	test-faults test-cluster head up rotate-token status tunnel submit logs image down prices \
	ui clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@echo 'Installing into .venv: some gigabytes, most of them PyTorch with CUDA.'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt uv
	@# uv reads none of pip's settings, such as an index of one's own: where it fails, pip has them.
	UV_HTTP_TIMEOUT=$${UV_HTTP_TIMEOUT:-300} $(BIN)/uv pip install --python $(BIN)/python \
		--constraint constraints.txt --editable '.[test]' \
		|| { echo 'uv could not: pip tries.' >&2; \
		$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'; }
	touch $@

sweep: install  ## search clipping, batch size and augmentation on the digits; ARGS="--trials 30"
	$(BIN)/python experiments/agc_sweep.py $(ARGS)

ablation: install  ## clipping against batch size on the digits; fails unless the findings hold
	$(BIN)/python experiments/clipping_vs_batch_size.py --check $(ARGS)

ablation-large: install  ## the same on 60,000 images at the paper's batch sizes; hours, and goes on where it was stopped
	$(BIN)/python experiments/clipping_vs_batch_size.py --recipe fashion_mnist --seeds 1 --check --name ablation-large $(ARGS)

report: install  ## what all recorded runs say, in report/
	$(BIN)/python experiments/report.py $(ARGS)

test: install  ## everything that must hold; each part's output comes when it is through
	@echo 'Every part shows what it printed when it is through, in minutes.'
	@$(TOGETHER) $(JOBS) checks $(if $(ARGS),selected,integration units)

test-quick: install  ## what holds without a Ray, a server or a script; while one works
	@echo 'Every part shows what it printed when it is through, in minutes.'
	@$(TOGETHER) $(JOBS) checks units

checks: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --exclude SC1090,SC1091,SC2329 cluster/*.sh cluster/slurm.sbatch
	$(BIN)/hadolint cluster/Dockerfile

units: install
	$(PYTEST) -m "not slow" $(ARGS)

integration: install
	$(PYTEST) -m slow

selected: install
	$(PYTEST) $(ARGS)

test-faults: install  ## processes killed at random moments; takes longer
	$(BIN)/pytest tests/faults $(ARGS)

test-cluster: install  ## clusters on this machine, over SSH between network namespaces; needs root
	$(BIN)/pytest tests/cluster $(ARGS)

bench: install  ## speed beside what a user would pick instead, as ratios; minutes
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-check: install  ## the same, and fails where a ratio is 15 % worse than the kept one
	$(BIN)/python benchmarks/run.py --check $(ARGS)

head: install  ## a local Ray to submit jobs to
	@bash cluster/local_head.sh

up: install  ## a cluster on AWS, as cluster/gpu.yaml says; asks before it costs money or ends jobs
	$(BIN)/python cluster/check.py $(CLUSTER) $(if $(SSH_FROM),--ssh-from $(SSH_FROM))
	$(BIN)/python cluster/up.py $(CLUSTER) $(ARGS)

rotate-token: install  ## a new token for the cluster: the old one is refused; asks before it restarts Ray
	$(BIN)/python cluster/rotate_token.py $(CLUSTER) $(ARGS)

status: install  ## what the cluster's nodes do, and what is waiting for more
	@$(BIN)/ray exec $(CLUSTER) 'ray status'

tunnel: install  ## Ray's dashboard at http://127.0.0.1:8265 and MLflow's at :5000, until Ctrl-C
	@$(BIN)/ray exec $(CLUSTER) --port-forward 8265 --port-forward 5000 'sleep infinity'

submit: export RAY_AUTH_MODE := token
submit: export RAY_AUTH_TOKEN :=
submit: export RAY_API_SERVER_ADDRESS := http://127.0.0.1:8265
submit: install  ## a job for the cluster, through the tunnel; ARGS="python experiments/agc_sweep.py"
	@token=$$($(BIN)/python cluster/tokens.py --of $(CLUSTER)) && RAY_AUTH_TOKEN_PATH="$$token" $(BIN)/ray job submit -- $(ARGS)

logs: install  ## what the autoscaler says, as it goes on
	@$(BIN)/ray exec $(CLUSTER) 'tail -n 100 -F /tmp/ray/session_latest/logs/monitor.log'

image: install  ## keeps the head's environment in the bucket: new machines unpack it in seconds
	@$(BIN)/ray exec $(CLUSTER) 'bash ~/nflab/cluster/install.sh keep'

down: install  ## saves, checks, and ends the cluster with all that costs money
	$(BIN)/python cluster/down.py $(CLUSTER)

prices: install  ## renews prices.csv from a public list of AWS's prices, and adds the region of CLUSTER
	$(BIN)/python cluster/prices.py $(CLUSTER) $(ARGS)

ui: install  ## MLflow's pages, on this machine only
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(BIN)/mlflow ui --workers 1 \
		--host 127.0.0.1 --port $${PORT:-5000} \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}"

clean:  ## removes what can be made again; runs/ and mlflow.db stay
	rm -rf .venv build *.egg-info platform/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
