# shellcheck shell=bash
# What every process on a cluster's nodes has in its environment; sourced, never run.
. ~/.nflab

export PATH="$HOME/nflab/.venv/bin:$PATH"
# Whoever can submit a job can run any command: only who holds the token may.
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=0
# On the head, where the drivers of jobs run, which alone speak to MLflow.
export MLFLOW_TRACKING_URI=http://127.0.0.1:5000
export NFLAB_STORAGE="$NFLAB_RESULTS/runs"
# What drivers keep on the head's disk, of jobs with a --working-dir too; backup.py copies it.
export NFLAB_OF_DRIVERS="$HOME/nflab/runs"
# Else DDP over gloo listens at what the host's own name stands for, often the loopback.
GLOO_SOCKET_IFNAME=$(ip -o route show default | sed -n '1s/.* dev \([^ ]*\).*/\1/p')
export GLOO_SOCKET_IFNAME
# NCCL would take all cards that it finds, a container's bridge too.
export NCCL_SOCKET_IFNAME=$GLOO_SOCKET_IFNAME
# Read by the head's autoscaler: how long a worker's setup may take, in seconds. After that it is ended
# and another one launched, and Ray's half an hour is short where files are copied.
export RAY_AUTOSCALER_RECONCILE_RAY_INSTALL_STATUS_TIMEOUT_S=3600
