"""The tokens of clusters: whoever holds one can run any command on its cluster, and on no other.

Each cluster has a file of its own, `~/.ray/nflab/NAME.token`, for Ray's $RAY_AUTH_TOKEN_PATH. It is
made once, its owner alone may read it, and what it holds is never shown.

Example:
  python cluster/tokens.py NAME       makes it unless it is there, and prints its path
  python cluster/tokens.py --of FILE  prints the path that a launcher file names
"""

import argparse
import hashlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import launcher
from launcher import TOKEN, Launcher

from nflab.settings.errors import ConfigError, require


def main() -> None:
    """Prints a path, or ends with one sentence and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("name", nargs="?", help="what the cluster is called")
    which.add_argument("--of", metavar="FILE", help="a launcher file")
    asked = parser.parse_args()
    try:
        if asked.of:
            cluster = launcher.read(asked.of)
            path = cluster.token
            require(
                path.exists(),
                f"there is no token of {cluster.name} at {path}: make up makes it, or brings it "
                "from the cluster if that runs",
            )
        else:
            path = named(asked.name)
            make(path)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(path)


def named(name: str) -> Path:
    """Where the token of a cluster is, here.

    Raises:
        ConfigError: it is no name of a file.
    """
    require(
        re.fullmatch(r"\w[\w.-]*", name) is not None,
        f"{name!r} is no name for a cluster's token: use letters, digits, - and _",
    )
    return Path(f"~/.ray/nflab/{name}.token").expanduser()


def require_own(cluster: Launcher) -> None:
    """A cluster's token is not another cluster's too.

    Raises:
        ConfigError: its launcher file names another one.
    """
    require(
        cluster.token == named(cluster.name),
        f"{cluster.path} gives {cluster.name!r} the token {cluster.token}, which would be another "
        f"cluster's too: write {TOKEN}: ~/.ray/nflab/{cluster.name}.token in its file_mounts",
    )


def make(path: Path) -> None:
    """Makes a token unless there is one, whole or not at all.

    Raises:
        ConfigError: the one that is there is empty.
        OSError: it cannot be written.
    """
    with _new(path) as made, suppress(FileExistsError):
        os.link(made, path)
    path.chmod(0o600)  # Ray's own, of before, everyone may read
    require(
        path.stat().st_size > 0,
        f"{path} is empty: put back the cluster's token, or delete the file for a new one",
    )


def renew(path: Path) -> None:
    """Puts a new token in the place of the one that is there, if there is one."""
    with _new(path) as made:
        made.replace(path)


def digest(path: Path) -> str | None:
    """By which a token is told from others without being shown; None if there is none."""
    if not path.exists():
        return None
    return hashlib.sha256(path.read_bytes().strip()).hexdigest()


@contextmanager
def _new(path: Path) -> Iterator[Path]:
    """A file with a new token, beside the place that it is for."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "token"
        with os.fdopen(os.open(made, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        yield made


if __name__ == "__main__":
    main()
