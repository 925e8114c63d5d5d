"""An emulated AWS whose instances are hosts of a network here (see `hosts`)."""

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.request import urlopen

import boto3

from tests.cluster.hosts import Network
from tests.cluster.shortage import Front

REGION = "us-east-1"

SUBNET = "172.31.0.0/16"
"""Of every account's default network, in which the emulator hands addresses out."""

PORT = 5055

FRONT_PORT = 5056


class Cloud:
    """A server of AWS's API, and a watcher that gives each instance a host as long as it runs."""

    def __init__(self, network: Network, image: Callable[[Path], None]) -> None:
        """
        Args:
            image: of every instance (see `Network.add`).
        """
        self.network, self._image = network, image
        self.folder = network.folder
        self.launched: list[dict[str, Any]] = []
        """Every instance there ever was, as it was described when it started."""
        self.error: BaseException | None = None
        """What ended the watcher before its time."""
        self.boots = threading.Event()
        """While it is cleared, instances are launched but none becomes a host."""
        self.boots.set()
        self._booted: set[str] = set()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="cloud")

    @property
    def env(self) -> dict[str, str]:
        """What makes a program talk to this cloud, from this machine or a host."""
        return {
            "AWS_ENDPOINT_URL": f"http://{self.network.gateway}:{PORT}",
            "AWS_ENDPOINT_URL_EC2": f"http://{self.network.gateway}:{FRONT_PORT}",
            "AWS_ENDPOINT_URL_SERVICE_QUOTAS": f"http://{self.network.gateway}:{FRONT_PORT}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing-secret-key-0123456789",
            "AWS_DEFAULT_REGION": REGION,
        }

    def client(self, service: str) -> Any:
        """boto3's client of a service."""
        return boto3.client(
            service,
            region_name=REGION,
            endpoint_url=self.env["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )

    def __enter__(self) -> "Cloud":
        log = (self.folder / "moto.log").open("ab")
        # The kernel ends it with this process, however that ends.
        command = f"setpriv --pdeathsig KILL {sys.executable} -m moto.server"
        self._server = subprocess.Popen(
            [*command.split(), "-H", self.network.gateway, "-p", str(PORT)],
            env={**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        deadline = time.monotonic() + 60
        while not self._answers():
            assert self._server.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        gateway = self.network.gateway
        self.front = Front((gateway, FRONT_PORT), (gateway, PORT))
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._watcher.is_alive():
            self._watcher.join(60)
        self.front.shutdown()
        self.front.server_close()
        self._server.kill()
        self._server.wait(20)

    def log(self) -> str:
        """What the server has said."""
        return (self.folder / "moto.log").read_text()

    def instances(self) -> list[dict[str, Any]]:
        """The instances that are being started or run."""
        states = {"Name": "instance-state-name", "Values": ["pending", "running"]}
        found = self.client("ec2").describe_instances(Filters=[states])
        return [i for r in found["Reservations"] for i in r["Instances"]]

    def _answers(self) -> bool:
        try:
            urlopen(f"{self.env['AWS_ENDPOINT_URL']}/moto-api/", timeout=2).close()
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        try:
            while not self._ended.wait(0.5):
                running = {i["PrivateIpAddress"]: i for i in self.instances()}
                for address in self._booted - set(running):
                    self._booted.remove(address)
                    self.network.remove(address)
                for address in set(running) - self._booted if self.boots.is_set() else ():
                    self._start(address, running[address])
        except BaseException as error:
            self.error = error
            raise

    def _start(self, address: str, instance: dict[str, Any]) -> None:
        self.launched.append(instance)
        self._booted.add(address)
        keys = self.client("ec2").describe_key_pairs(
            KeyNames=[instance["KeyName"]], IncludePublicKey=True
        )
        public_key = keys["KeyPairs"][0]["PublicKey"]
        self.network.add(address, public_key, self.env, self._image)


def installed(checkout: Path) -> Callable[[Path], None]:
    """An image with the pinned environment of a checkout, so that nothing is downloaded."""
    python = f"python{sys.version_info.major}.{sys.version_info.minor}\n".encode()
    files = (checkout / name for name in ("constraints.txt", "pyproject.toml"))
    pinned = python + b"".join(file.read_bytes() for file in files)

    def image(home: Path) -> None:
        venv = home / "nflab" / ".venv"
        venv.mkdir(parents=True)
        for part in ("bin", "lib", "pyvenv.cfg"):
            (venv / part).symlink_to(checkout / ".venv" / part)
        (venv / "installed").write_text(f"{hashlib.sha256(pinned).hexdigest()}  -\n")

    return image
