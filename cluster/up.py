"""Brings a cluster up, or one that runs up to date, without ending jobs unasked.

`ray up` restarts Ray on a head that is there, which ends all jobs. While some run this gives it
--no-restart, unless a person at a terminal says otherwise; what that leaves undone is told in
docs/clusters.md. It makes the cluster's token, or brings that of one that runs.

Example:
  python cluster/up.py cluster/gpu.yaml --yes  # what follows the file is for `ray up`
"""

import argparse
import re
import sys

import down
import launcher
import running
import tokens
from launcher import Launcher, told_in_a_sentence
from running import Head

from nflab.settings.errors import ConfigError


def main() -> None:
    """Brings it up, or ends with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    asked, flags = parser.parse_known_args()
    with told_in_a_sentence():
        bring_up(launcher.read(asked.file), flags)


def bring_up(cluster: Launcher, flags: list[str]) -> None:
    """Runs `ray up` with these flags, and --no-restart where jobs run.

    Raises:
        ConfigError: it failed, or would end jobs or break the token.
    """
    for flag in flags:
        if re.match(r"-[A-Za-z]*n|--cluster-name", flag):  # -yn NAME and -nNAME are, too
            raise ConfigError(f"{flag} would be another cluster: say cluster_name in a file of it")
    head = running.find(cluster)
    if head is not None and head.token is not None:
        agree_on_token(cluster, head)
    tokens.make(cluster.token)
    if head is not None:
        flags = [*flags, *spare_jobs(cluster, head, flags)]
    down.ray(cluster, "up", *flags)


def agree_on_token(cluster: Launcher, head: Head) -> None:
    """Brings the token of a cluster that runs, if there is none here.

    Raises:
        ConfigError: there is another one here: Ray's processes keep the one that they started with,
            so that with it the cluster would fall apart.
    """
    if not cluster.token.exists():
        running.bring_token(cluster)
        print(f"the token of {cluster.name}, which runs, is now in {cluster.token}")
    elif tokens.digest(cluster.token) != head.token:
        raise ConfigError(
            f"{cluster.token} is not the token of {cluster.name}, which runs with another one: "
            "make rotate-token gives it a new one; to take the cluster's, move that file away and "
            "run make up again"
        )


def spare_jobs(cluster: Launcher, head: Head, flags: list[str]) -> list[str]:
    """What `ray up` needs besides these flags so that jobs that run are not ended unasked.

    Raises:
        ConfigError: they would be all the same.
    """
    if head.working is None:
        return []
    reason = None
    if head.replaced:
        reason = f"the head or `auth` in {cluster.path} is not that of the head that runs"
    elif head.environment not in (None, running.environment(cluster)):
        reason = "constraints.txt or pyproject.toml would change the packages that they run with"
    elif others := other_types(cluster, head):
        reason = (
            f"without a restart Ray would launch {', '.join(others)} of {cluster.path}, new or "
            "with other resources or labels, and could not use the machines"
        )
    elif "--restart-only" in flags and not {"--yes", "-y"} & {*flags}:
        reason = "--restart-only would end them"
    if reason is not None:
        if confirmed(f"{head.working}, and {reason}. End what runs?", flags):
            return []
        raise ConfigError(f"{head.working}, and {reason}: run make up when none does, or undo that")
    if {"--no-restart", "--restart-only"} & {*flags}:
        return []
    print(f"{head.working}: Ray is not restarted, and what needs that waits for the next make up")
    if confirmed("Restart it all the same, which ends what runs?", flags):
        return []
    return ["--no-restart"]


def other_types(cluster: Launcher, head: Head) -> list[str]:
    """Worker types that the autoscaler would launch and set up by what it knew when it started."""
    others = []
    for name, node_type in cluster.content.get("available_node_types", {}).items():
        if head.types and name != cluster.content["head_node_type"]:
            known = head.types.get(name)
            if known is None or any(
                (known.get(what) or {}).get(key) != value
                for what in ("resources", "labels")
                for key, value in (node_type.get(what) or {}).items()
            ):
                others.append(name)
    return others


def confirmed(question: str, flags: list[str]) -> bool:
    """Whether a person at a terminal, who has not said `--yes` to all, says yes."""
    if {"--yes", "-y"} & {*flags} or not sys.stdin.isatty():
        return False
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False


if __name__ == "__main__":
    main()
