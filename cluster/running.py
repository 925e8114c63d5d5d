"""The head of a cluster that is there: what runs on it, and whether `ray up` would replace it."""

import copy
import hashlib
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import down
import tokens
from launcher import TOKEN, Launcher
from ray.autoscaler._private import commands
from ray.autoscaler._private.providers import _get_node_provider
from ray.autoscaler._private.util import hash_launch_conf
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from nflab.settings.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]

ANSWER = "nflab-head:"
"""Begins the line that a head says."""

ASK = f"""
import hashlib, json, os, subprocess
from pathlib import Path
from ray.job_submission import JobSubmissionClient

names = ".ray/auth_token", "nflab/.venv/installed", "ray_bootstrap_config.yaml"
token, installed, launcher = (Path.home() / name for name in names)
told = {{"jobs": []}}
if token.exists():
    told["token"] = hashlib.sha256(token.read_bytes().strip()).hexdigest()
if installed.exists():
    told["environment"] = installed.read_text().split()[0]
if launcher.exists():
    told["types"] = json.loads(launcher.read_text())["available_node_types"]
find = ["pgrep", "-x", "-u", str(os.getuid()), "gcs_server"]
told["runs"] = subprocess.run(find, stdout=subprocess.DEVNULL).returncode == 0
if told["runs"]:
    try:
        for job in JobSubmissionClient("http://127.0.0.1:8265").list_jobs():
            if not job.status.is_terminal():
                told["jobs"].append((job.submission_id or job.job_id) + ": " + job.entrypoint)
    except Exception as error:
        told["silent"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
print("{ANSWER}", json.dumps(told))
"""
"""Code for a head, which may have an earlier checkout than this."""


@dataclass(frozen=True)
class Head:
    """What a head that is there says of itself."""

    token: str | None
    """Digest of its token; None if it has none yet."""
    environment: str | None
    """Digest of what its packages were installed from; None if there are none yet."""
    working: str | None
    """Which jobs run on the cluster, in a sentence; None if none does."""
    types: dict[str, dict[str, Any]]
    """Node types of the launcher file that it was given; empty if it has none yet."""
    replaced: bool
    """Whether `ray up` would end it for another machine, whatever its flags."""


def find(cluster: Launcher) -> Head | None:
    """Asks the head of a cluster; None if there is none.

    Raises:
        ConfigError: it cannot be asked.
    """
    if cluster.on_aws and not down.heads(cluster):
        return None
    try:
        # As `ray up` does: what Ray has found out already, such as subnets, is part of the hash.
        config = commands._bootstrap_config(copy.deepcopy(cluster.content))
    except (click.ClickException, RuntimeError) as error:
        raise ConfigError(f"Ray refuses {cluster.path}: {error}") from None
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    kind = config["head_node_type"]
    launched = hash_launch_conf(
        {**config.get("head_node", {}), **config["available_node_types"][kind]["node_config"]},
        config["auth"],
    )
    found = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD})
    if found:
        replaced = commands._should_create_new_head(found[0], launched, kind, provider)
        return _head(cluster, _ask(cluster), replaced)
    if cluster.on_aws:
        return None
    return _met_anew(cluster, provider, launched, kind)


def _met_anew(cluster: Launcher, provider: Any, launched: str, kind: str) -> Head | None:
    """The head of one's own machines that another laptop has brought up, or this one before its
    /tmp was emptied, where Ray notes it; Ray would restart it whatever its flags."""
    tags = {
        TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
        TAG_RAY_USER_NODE_TYPE: kind,
        TAG_RAY_NODE_NAME: f"ray-{cluster.name}-head",
        TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
        TAG_RAY_LAUNCH_CONFIG: launched,
    }
    provider.create_node({}, tags, 1)
    told: dict[str, Any] = {}
    try:
        told = _ask(cluster)
    finally:
        if not told.get("runs"):
            for node in provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_HEAD}):
                provider.terminate_node(node)  # in its notes alone
    return _head(cluster, told, False) if told.get("runs") else None


def _ask(cluster: Launcher) -> dict[str, Any]:
    """What the head says.

    Raises:
        ConfigError: it says nothing.
    """
    python = "~/nflab/.venv/bin/python"
    ask = f"[ -x {python} ] || {{ echo '{ANSWER} {{}}'; exit; }}; {python} -c {shlex.quote(ASK)}"
    ray = str(Path(sys.executable).parent / "ray")
    done = subprocess.run(
        [ray, "exec", str(cluster.path), ask],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        if line.startswith(ANSWER):
            return dict(json.loads(line.removeprefix(ANSWER)))
    said = (done.stdout + done.stderr).strip().splitlines() or ["it says nothing"]
    raise ConfigError(
        f"the head of {cluster.name} cannot be asked what runs on it ({said[-1]}): try again when "
        f"ray exec {cluster.path} uptime answers; to go on all the same, ray up {cluster.path}"
    )


def _head(cluster: Launcher, told: dict[str, Any], replaced: bool) -> Head:
    jobs, silent = told.get("jobs", []), told.get("silent")
    working = None
    if silent:
        working = f"Ray on {cluster.name} does not say what runs ({silent})"
    elif jobs:
        told_all = "; ".join(job if len(job) < 120 else f"{job[:117]}..." for job in jobs)
        verb = "1 job runs" if len(jobs) == 1 else f"{len(jobs)} jobs run"
        working = f"{verb} on {cluster.name} ({told_all})"
    types = told.get("types", {})
    return Head(told.get("token"), told.get("environment"), working, types, replaced)


def environment(cluster: Launcher) -> str:
    """Digest of what packages would be installed from now (see install.sh)."""
    wanted = f"python{cluster.python}\n".encode()
    for name in ("constraints.txt", "pyproject.toml"):
        wanted += (ROOT / name).read_bytes()
    return hashlib.sha256(wanted).hexdigest()


def bring_token(cluster: Launcher) -> None:
    """Copies the head's token to where the launcher file names it here.

    Raises:
        ConfigError: it cannot be.
    """
    tokens.make(cluster.token)  # whose place it takes, read by nobody else
    try:
        down.ray(cluster, "rsync-down", TOKEN, str(cluster.token))
    except BaseException:  # Ctrl-C, too
        cluster.token.unlink()
        raise
    cluster.token.chmod(0o600)
