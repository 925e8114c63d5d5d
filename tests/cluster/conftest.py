"""A network of hosts for the tests of clusters; they are skipped where there can be none."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ec2 import SUBNET, Cloud, installed
from tests.cluster.hosts import Network, missing, run
from tests.cluster.laptop import Laptop
from tests.conftest import ROOT

LAPTOP = "172.31.255.2"


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    """A bridge without hosts."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    # pytest's own folders have paths too long for the sockets of SSH.
    with tempfile.TemporaryDirectory() as folder, Network(Path(folder), SUBNET) as bridge:
        yield bridge


def key_pair(path: Path) -> tuple[Path, str]:
    """A new private key, and its public one as text."""
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path))
    return path, path.with_suffix(".pub").read_text()


@pytest.fixture(scope="module")
def cloud(network: Network) -> Iterator[Cloud]:
    """An empty account of an emulated AWS."""
    with Cloud(network, installed(ROOT)) as account:
        yield account


@pytest.fixture(scope="module")
def laptop(network: Network, cloud: Cloud) -> Iterator[Laptop]:
    """Where a person types, with credentials of the account."""
    _, public = key_pair(network.folder / "laptop")
    host = network.add(LAPTOP, public)
    yield Laptop(host, cloud.env)
    network.remove(LAPTOP)
    for path in network.folder.glob("laptop*"):
        path.unlink()
