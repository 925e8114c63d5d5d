#!/usr/bin/env bash
# Installs the pinned environment into ~/nflab/.venv unless it is there, for every shell of a node.
#
# Usage: install.sh [keep]
#   keep: puts the environment into the bucket, from which machines like this one unpack it then.
set -euo pipefail
cd ~/nflab
. ~/.nflab

profile='. ~/nflab/cluster/env.sh'
# At the top: the rest is not for shells without a terminal.
grep -qxF "$profile" ~/.bashrc 2>/dev/null || sed -i "1i $profile" ~/.bashrc

python=python$NFLAB_PYTHON
wanted=$( (echo "$python" && cat constraints.txt pyproject.toml) | sha256sum)
# A machine of another system could not run what this one has.
kept=$NFLAB_RESULTS/environments/$( (
    . /etc/os-release
    echo "$wanted $ID $VERSION_ID $(uname -m)"
) | sha256sum | cut -c1-16).tar.zst

keep() {
    if [[ $kept != s3://* ]]; then
        echo "error: an environment is kept in a bucket, and results go to $NFLAB_RESULTS" >&2
        exit 2
    fi
    tar --use-compress-program='zstd -T0' -c .venv | aws s3 cp --only-show-errors - "$kept"
    echo "$kept: new machines unpack it"
}
unpack() {
    [[ $kept = s3://* ]] && command -v "$python" >/dev/null && aws s3 ls "$kept" &>/dev/null || return
    rm -rf .venv
    aws s3 cp --only-show-errors "$kept" - | tar --zstd -x || rm -rf .venv # a part of it
}
apt() {
    # The image's own updates may hold the lock of the package manager for minutes.
    sudo apt-get -o DPkg::Lock::Timeout=300 -qq "$@"
}
make_new() {
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
    local pip=".venv/bin/python -m pip install --quiet --constraint constraints.txt"
    $pip uv
    # uv reads none of pip's settings, such as an index of one's own: where it fails, pip has them.
    UV_HTTP_TIMEOUT=300 .venv/bin/uv pip install --quiet --python .venv/bin/python \
        --constraint constraints.txt --editable '.[cluster]' || $pip --editable '.[cluster]'
    echo "$wanted" >.venv/installed
}
is_there() {
    [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]
}

is_there || unpack || true # whatever the bucket says
is_there || make_new
[ "${1:-}" != keep ] || keep
