"""Hosts on one machine: network namespaces on a bridge, with processes and a home of their own.

Their only way out is the bridge, and this machine forwards nothing: no packet leaves it.
"""

import ipaddress
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

USER = "ubuntu"
"""Who logs in; an alias of root, for the files of this machine are shared."""

_PREFIX = "nflab"

TOOLS = ("ip", "nsenter", "rsync", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")


def missing() -> str | None:
    """Why there can be no hosts here, in a sentence; None if there can."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path=_path()) is None]
    if os.geteuid() != 0:
        return "hosts in network namespaces need root"
    if absent:
        return f"install {', '.join(absent)}: apt-get install -y iproute2 openssh-server rsync"
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "0":
        return "this machine forwards packets: those of the hosts could leave it"
    probe = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount", "--uts", "--ipc", "true"],
        capture_output=True,
        check=False,
    )
    return None if probe.returncode == 0 else "this machine allows no namespaces"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def run(*words: str, check: bool = True) -> str:
    """What a command prints."""
    env = {**os.environ, "PATH": _path()}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass
class Host:
    """A machine that answers SSH at its address."""

    name: str
    address: str
    folder: Path
    server: "subprocess.Popen[bytes]"
    """The first process of its namespaces: with it all others end."""

    @property
    def home(self) -> Path:
        """The home of its user, seen from outside."""
        return self.folder / "home" / USER

    @property
    def _cable(self) -> str:
        return f"v{self.name}"

    def cut(self) -> None:
        """Pulls the cable."""
        run("ip", "link", "set", self._cable, "down")

    def restore(self) -> None:
        """Plugs it in again."""
        run("ip", "link", "set", self._cable, "up")

    def processes(self, word: str) -> list[int]:
        """Ids, on this machine, of its processes with a word in their command lines."""
        namespace = Path(f"/proc/{self.init}/ns/pid").readlink()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                inside = (folder / "ns/pid").readlink() == namespace
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if inside and word in " ".join(words):
                    found.append(int(folder.name))
            except OSError:  # it has ended
                continue
        return found

    @property
    def init(self) -> int:
        """Id, on this machine, of the first process inside."""
        pid = self.server.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def close(self) -> None:
        """Ends all that runs on it and takes it off the bridge."""
        self.server.kill()
        self.server.wait(20)
        run("ip", "link", "delete", self._cable, check=False)
        run("ip", "netns", "delete", self.name, check=False)


@dataclass
class Network:
    """A bridge with hosts; a context that takes all away again.

    Args:
        folder: where hosts keep their files; must be short-lived.
        subnet: of the addresses; no other network of this machine may have it.
    """

    folder: Path
    subnet: str
    bridge: str = "nflab0"
    hosts: dict[str, Host] = field(default_factory=dict)

    @property
    def gateway(self) -> str:
        """This machine's own address on the bridge: the last of the subnet."""
        return str(ipaddress.ip_network(self.subnet)[-2])

    def __enter__(self) -> "Network":
        self._clear()
        assert not run("ip", "route", "show", "root", self.subnet), f"{self.subnet} is in use"
        size = self.subnet.split("/")[1]
        # Its address would else be that of a host, and change when that one goes.
        run("ip", "link", "add", self.bridge, "address", "02:00:00:00:00:01", "type", "bridge")
        run("ip", "link", "set", self.bridge, "alias", str(os.getpid()))
        run("ip", "address", "add", f"{self.gateway}/{size}", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for address in list(self.hosts):
            self.remove(address)
        run("ip", "link", "delete", self.bridge)

    def _clear(self) -> None:
        """Takes away what a process that was killed has left; its hosts ended with it."""
        owner = Path(f"/sys/class/net/{self.bridge}/ifalias")
        if not owner.exists():
            return
        pid = owner.read_text().strip()
        assert not Path(f"/proc/{pid}").exists(), f"process {pid} uses {self.bridge}"
        for line in run("ip", "netns", "list").splitlines():
            if line.startswith(_PREFIX):
                run("ip", "netns", "delete", line.split()[0])
        run("ip", "link", "delete", self.bridge)

    def add(
        self,
        address: str,
        public_key: str,
        env: dict[str, str] | None = None,
        image: Callable[[Path], None] | None = None,
    ) -> Host:
        """Starts a host, and waits until it answers.

        Args:
            public_key: of who may log in.
            env: what is set for everyone who does.
            image: given the home of its user, lays down what the host is to have there.
        """
        name = _PREFIX + "-".join(address.split(".")[2:])
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        home = folder / "home" / USER
        shutil.copytree("/etc/skel", home)
        if image is not None:
            image(home)
        self._describe(folder, address, public_key, env or {})
        self._connect(name, address)
        log = (folder / "host.log").open("ab")
        # The kernel ends it with this process, however that ends.
        command = f"setpriv --pdeathsig KILL ip netns exec {name} unshare --pid --fork --kill-child"
        command += f" --mount --uts --ipc --mount-proc bash {folder}/boot.sh"
        server = subprocess.Popen(
            command.split(),
            env={"PATH": _path()},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        host = self.hosts[address] = Host(name, address, folder, server)
        deadline = time.monotonic() + 30
        while b"listening" not in (folder / "host.log").read_bytes():
            said = (folder / "host.log").read_text()
            assert server.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.1)
        return host

    def remove(self, address: str) -> None:
        """Ends a host, as a cloud terminates a machine."""
        self.hosts.pop(address).close()

    def _connect(self, name: str, address: str) -> None:
        size = self.subnet.split("/")[1]
        inside = ["ip", "netns", "exec", name]
        run("ip", "netns", "add", name)
        cable = ["ip", "link", "add", f"v{name}", "type", "veth"]
        run(*cable, "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", f"v{name}", "master", self.bridge, "up")
        run(*inside, "ip", "address", "add", f"{address}/{size}", "dev", "eth0")
        run(*inside, "ip", "link", "set", "lo", "up")
        run(*inside, "ip", "link", "set", "eth0", "up")
        # Ray takes the address of the way out for the machine's own.
        run(*inside, "ip", "route", "add", "default", "via", self.gateway)

    def _describe(self, folder: Path, address: str, public_key: str, env: dict[str, str]) -> None:
        """Writes what the host boots from."""
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
        (folder / "authorized_keys").write_text(public_key.strip() + "\n")
        (folder / "passwd").write_text(
            f"{USER}:x:0:0::/home/{USER}:/bin/bash\n" + Path("/etc/passwd").read_text()
        )
        # As Debian and Ubuntu write it.
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {folder.name}\n")
        (folder / "sshd_config").write_text(
            f"ListenAddress {address}\nHostKey {folder}/host_key\nPidFile none\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nPasswordAuthentication no\n"
            "PermitRootLogin prohibit-password\nStrictModes no\nUsePAM no\nMaxStartups 100\n"
            + ("SetEnv " + " ".join(f"{k}={v}" for k, v in env.items()) + "\n" if env else "")
        )
        (folder / "boot.sh").write_text(
            "set -e\n"
            "mount --make-rprivate /\n"
            # Ray's sessions, and its shared memory, are a machine's own.
            "mkdir -p /tmp/ray /run/sshd\n"
            "mount -t tmpfs tmpfs /tmp/ray\nmount -t tmpfs tmpfs /dev/shm\n"
            f"mount --bind {folder}/home /home\nmount --bind {folder}/passwd /etc/passwd\n"
            f"mount --bind {folder}/hosts /etc/hosts\n"
            f"hostname {folder.name}\n"
            f"exec $(command -v sshd) -D -e -f {folder}/sshd_config\n"
        )
