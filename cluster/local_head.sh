#!/usr/bin/env bash
# Starts a Ray head on this machine for `ray job submit`, and prints what a new shell must export.
# RAY_PORT and DASHBOARD_PORT choose other ports than Ray's own.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
dashboard=127.0.0.1:${DASHBOARD_PORT:-8265}

# Jobs run in the environment of the head: its python, its store, its storage.
export PATH="$root/.venv/bin:$PATH"
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///$root/mlflow.db}"
export NFLAB_STORAGE="${NFLAB_STORAGE:-$root/runs}"
# Whoever can submit a job can run any command: only who holds the token may.
export RAY_AUTH_MODE=token
# No cluster's, for those are copied to machines of theirs.
RAY_AUTH_TOKEN_PATH=$(python cluster/tokens.py this-machine)
export RAY_AUTH_TOKEN_PATH
unset RAY_AUTH_TOKEN
# Ray looks up where a job belongs in its folder, and in the common one each Ray that was started later
# stands for all: a job would run there.
folder=/tmp/nflab-head-$UID-${RAY_PORT:-6379}
log=$(mktemp)
# As `timeout` does, which a Mac has not.
at_most() {
    python -c 'import os, signal, sys
signal.alarm(int(sys.argv[1]))
os.execvp(sys.argv[2], sys.argv[2:])' "$@"
}
if ! ray start --head --port "${RAY_PORT:-6379}" --temp-dir "$folder" \
    --dashboard-host 127.0.0.1 --dashboard-port "${dashboard#*:}" \
    --dashboard-agent-listen-port 0 --disable-usage-stats >"$log" 2>&1; then
    cat "$log" >&2
    exit 1
fi
# A head accepts jobs some seconds after it has started: it is up when one has run.
export RAY_API_SERVER_ADDRESS="http://$dashboard"
for ((attempt = 0; ; attempt++)); do
    if at_most 60 ray job submit -- true >"$log" 2>&1; then break; fi
    if ((attempt == 20)); then
        cat "$log" >&2
        exit 1
    fi
    sleep 1
done
rm "$log"

cat <<END
Ray runs; stop it with: ray stop
In a new shell, before \`ray job submit -- python experiments/agc_sweep.py\`:

export PATH=$(printf %q "$PATH")
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$(printf %q "$RAY_AUTH_TOKEN_PATH")
export RAY_API_SERVER_ADDRESS=$RAY_API_SERVER_ADDRESS
END
