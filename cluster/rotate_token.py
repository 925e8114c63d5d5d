"""Gives a cluster a new token: whoever has the old one alone is refused from then on.

Ray's processes read the token when they start, so Ray is restarted, which ends all jobs. That is
asked before; where nobody can be asked, --yes says so, and --end-jobs too where jobs run.

Example:
  python cluster/rotate_token.py cluster/gpu.yaml
"""

import argparse

import down
import launcher
import running
import tokens
from launcher import Launcher, told_in_a_sentence
from up import confirmed

from nflab.settings.errors import ConfigError


def main() -> None:
    """Gives it, or ends with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--yes", action="store_true", help="restart Ray unasked if no job runs")
    parser.add_argument("--end-jobs", action="store_true", help="restart Ray unasked in any case")
    asked = parser.parse_args()
    with told_in_a_sentence():
        rotate(launcher.read(asked.file), asked.yes, asked.end_jobs)


def rotate(cluster: Launcher, yes: bool, end_jobs: bool) -> None:
    """Puts a new token in the place of the cluster's, on all its machines and here.

    Raises:
        ConfigError: it may not be, or `ray up` fails.
    """
    tokens.require_own(cluster)
    head = running.find(cluster)
    if head is not None:
        if head.replaced:
            raise ConfigError(
                f"the head or `auth` in {cluster.path} is not that of the head of {cluster.name} "
                "that runs: run make up first"
            )
        ask(cluster, head.working, yes, end_jobs)
    tokens.renew(cluster.token)
    if head is not None:
        try:
            down.ray(cluster, "up", "--yes")
        except (ConfigError, KeyboardInterrupt) as error:
            raise ConfigError(
                f"{str(error) or 'interrupted'}; {cluster.token} is new, and perhaps not the "
                "cluster's: run make rotate-token again"
            ) from None
    print(f"{cluster.name} has a new token, in {cluster.token}: give it to those who may have it")


def ask(cluster: Launcher, working: str | None, yes: bool, end_jobs: bool) -> None:
    """Returns if Ray may be restarted.

    Raises:
        ConfigError: it may not.
    """
    if end_jobs or (yes and working is None):
        return
    told = "" if working is None else f"{working}, and would end: "
    if confirmed(f"{told}Ray on {cluster.name} restarts for its new token. Go on?", []):
        return
    if working is not None:
        raise ConfigError(
            f"{working}, and the restart for a new token would end that: wait, or say "
            "make rotate-token ARGS=--end-jobs"
        )
    raise ConfigError(
        f"{cluster.name} keeps its token, for nobody said yes: say make rotate-token ARGS=--yes"
    )


if __name__ == "__main__":
    main()
