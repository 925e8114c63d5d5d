#!/usr/bin/env bash
# Installs the pinned environment into ~/nflab/.venv unless it is there, for every shell of a node.
set -euo pipefail
cd ~/nflab
. ~/.nflab

profile='. ~/nflab/cluster/env.sh'
# At the top: the rest is not for shells without a terminal.
grep -qxF "$profile" ~/.bashrc 2>/dev/null || sed -i "1i $profile" ~/.bashrc

python=python$NFLAB_PYTHON
wanted=$( (echo "$python" && cat constraints.txt pyproject.toml) | sha256sum)
if [ -f .venv/installed ] && [ "$(cat .venv/installed)" = "$wanted" ]; then
    exit 0
fi
apt() {
    # The image's own updates may hold the lock of the package manager for minutes.
    sudo apt-get -o DPkg::Lock::Timeout=300 -qq "$@"
}
if ! "$python" -m ensurepip --version >/dev/null 2>&1; then
    for _ in {1..60}; do # that of its lists apt does not wait for
        apt update && break
        sleep 5
    done
    if ! apt install -y "$python-venv"; then # not Ubuntu's own Python
        sudo add-apt-repository -y ppa:deadsnakes/ppa
        apt install -y "$python-venv"
    fi
fi
[ -x ".venv/bin/$python" ] || rm -rf .venv # another Python's
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster]'
echo "$wanted" >.venv/installed
