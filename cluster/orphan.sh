#!/usr/bin/env bash
# Shuts a worker on AWS down, which ends it, when it has had no Ray for half an hour: the head that
# would end it has gone. `bash orphan.sh` goes on in the background; one a machine.
#
# Usage: orphan.sh [SECONDS]
set -euo pipefail
patience=${1:-1800}
exec 9>"$HOME/.orphan.lock"
flock -n 9 || exit 0
since=$SECONDS
while sleep $((patience < 60 ? 1 : 10)); do
    if pgrep -x raylet >/dev/null; then
        since=$SECONDS
    elif ((SECONDS - since > patience)); then
        sudo shutdown -h now
    fi
done
