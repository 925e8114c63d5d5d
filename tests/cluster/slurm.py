"""A small Slurm on hosts of a network (see `hosts`): its own daemons, without accounts."""

import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

from tests.cluster.hosts import Host
from tests.cluster.laptop import Laptop

TOOLS = ("slurmctld", "slurmd", "sbatch", "scontrol")

CONF = """
ClusterName=test
SlurmctldHost={head.name}({head.address})
AuthType=auth/none
CredType=cred/none
# A job that goes back into the queue begins again when its old credential is out of date.
AuthInfo=cred_expire=5
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=normal Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=9
"""


def missing() -> str | None:
    """Why there can be no Slurm here, in a sentence; None if there can."""
    absent = [tool for tool in TOOLS if shutil.which(tool, path="/usr/bin:/usr/sbin") is None]
    return f"install {', '.join(absent)}: apt-get install -y slurm-wlm" if absent else None


class Slurm:
    """A controller on the first of some hosts, and a node on each; ends with the hosts."""

    def __init__(self, folder: Path, hosts: list[Host]) -> None:
        """
        Args:
            folder: seen by all hosts alike.
        """
        self.folder = folder
        folder.mkdir()
        for name in ("state", *(f"spool-{host.name}" for host in hosts)):
            (folder / name).mkdir()
        # It bounds nothing here, and version 2 would want systemd.
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.conf = folder / "slurm.conf"
        nodes = [f"NodeName={h.name} NodeAddr={h.address} CPUs=1 RealMemory=4000" for h in hosts]
        text = CONF.format(head=hosts[0], folder=folder)
        self.conf.write_text(text + "\n".join(nodes) + "\n")
        self.shell = Laptop(hosts[0], {"SLURM_CONF": str(self.conf)})
        """Where a person types."""
        self._daemons = [self._start(hosts[0], "slurmctld -D")]
        self._daemons += [self._start(host, f"slurmd -D -N {host.name}") for host in hosts]

    def __enter__(self) -> "Slurm":
        deadline = time.monotonic() + 60
        while self.shell.attempt("sinfo --noheader --states idle --format %D")[1].strip() != str(
            len(self._daemons) - 1
        ):
            assert not any(daemon.poll() for daemon in self._daemons), self.logs()
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.5)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shell.attempt("scancel --full --signal KILL --state RUNNING")
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait(20)

    def logs(self) -> str:
        """What its daemons have said."""
        return "".join(path.read_text() for path in self.folder.glob("*.log"))

    def state(self, job: str) -> dict[str, str]:
        """What Slurm tells of a job."""
        told = self.shell.run(f"scontrol --oneliner show job {job}")
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def _start(self, host: Host, command: str) -> "subprocess.Popen[bytes]":
        enter = f"setpriv --pdeathsig KILL nsenter --target {host.init} --all"
        env = {
            "SLURM_CONF": str(self.conf),
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        }
        log = (self.folder / "daemons.log").open("ab")
        daemon = subprocess.Popen(
            [*enter.split(), *command.split()], env=env, stdout=log, stderr=log
        )
        log.close()
        return daemon
