"""What a launcher file says, for the checks before and after a cluster."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import yaml
from botocore.exceptions import BotoCoreError, ClientError

from nflab.settings.errors import ConfigError

TOKEN = "~/.ray/auth_token"
"""Where Ray looks for the token by itself, on a cluster's machines."""


@dataclass(frozen=True)
class Launcher:
    """A launcher file of a cluster."""

    path: Path
    content: dict[str, Any]
    """As Ray reads it."""
    results: str
    """Address of where everything is kept."""
    python: str
    """The cluster's Python, as 3.12."""
    idle_hours: float | None
    """Hours without a job after which it ends by itself; None if that is not stated."""

    @property
    def name(self) -> str:
        """Of the cluster; all it has is tagged with it."""
        return str(self.content["cluster_name"])

    @property
    def on_aws(self) -> bool:
        """Whether its machines are AWS's, or ones that are there anyway."""
        return bool(self.content["provider"]["type"] != "local")

    @property
    def bucket(self) -> str:
        """The S3 bucket of the results.

        Raises:
            ConfigError: they are kept elsewhere.
        """
        if not self.results.startswith("s3://"):
            raise ConfigError(
                f"{self.path} keeps results in {self.results}, which a machine on AWS does not "
                "have: name a bucket, as s3://NAME"
            )
        return self.results.removeprefix("s3://").split("/")[0]

    @property
    def token(self) -> Path:
        """The file here with the token that every request to the cluster's Ray must carry.

        Raises:
            ConfigError: its machines are given none.
        """
        mounts = self.content.get("file_mounts") or {}
        if not mounts.get(TOKEN):
            raise ConfigError(
                f"{self.path} gives the machines of {self.name!r} no token: write "
                f"{TOKEN}: ~/.ray/nflab/{self.name}.token in its file_mounts"
            )
        return Path(str(mounts[TOKEN])).expanduser()

    @property
    def region(self) -> str:
        """Where it is launched."""
        return str(self.content["provider"]["region"])

    @property
    def node_types(self) -> dict[str, dict[str, Any]]:
        """The head's and the workers'."""
        return dict(self.content["available_node_types"])

    def client(self, service: str) -> Any:
        """boto3's client of a service in the cluster's region."""
        return boto3.client(service, region_name=self.region)


def read(path: str) -> Launcher:
    """Reads a launcher file.

    Raises:
        ConfigError: there is none, it is no launcher file of AWS or of machines that are there, or
            it does not say where results are kept, and the Python version.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        kind = content["provider"]["type"]
        commands = "\n".join(content["setup_commands"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"cannot read the launcher file {path}: {reason}") from None
    if kind not in ("aws", "external", "local"):
        raise ConfigError(f"{path} launches on {kind!r}: only AWS and `local` are known here")
    found = re.search(r"NFLAB_RESULTS=(\S+) NFLAB_PYTHON=(\d+\.\d+)", commands)
    if found is None:
        raise ConfigError(
            f"{path} does not say where results go and with which Python: its first setup command "
            "must be echo 'export NFLAB_RESULTS=... NFLAB_PYTHON=...' > ~/.nflab"
        )
    if found[1].endswith("/"):
        raise ConfigError(f"NFLAB_RESULTS={found[1]} in {path} ends with a slash: leave it out")
    hours = re.search(r"NFLAB_IDLE_HOURS=(\d+(?:\.\d+)?)\b", commands)
    return Launcher(Path(path), content, found[1], found[2], float(hours[1]) if hours else None)


@contextmanager
def told_in_a_sentence() -> Iterator[None]:
    """Ends this process with one sentence where the block cannot go on: with exit code 2, or 130
    if a person has interrupted it."""
    try:
        yield
    except (BotoCoreError, ClientError) as error:
        print(f"error: AWS refused: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
