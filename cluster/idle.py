"""Ends a cluster on AWS that was forgotten: one that has run no job for so many hours.

A sweep, grid or training that has not done a step for two hours counts as none: its machines never
come, say, or hang. Any other job counts as long as it runs, whatever it does.

`python idle.py start` starts the timer on the head, or begins its time anew; the hours stand in the
launcher file, as NFLAB_IDLE_HOURS. First what only the head's disk holds is copied to the other
results, as `make down` does; until that succeeds the cluster stays. An open tunnel is no job.
"""

import fcntl
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import launcher
from backup import Backup
from down import instances
from ray.job_submission import JobSubmissionClient

from nflab.cluster import trained

POLL_SECONDS = 10.0

JOBS = "http://127.0.0.1:8265"
"""Ray's dashboard, on this machine."""

GCS = "127.0.0.1:6379"
"""Ray's own service there."""

STALLED_SECONDS = 7200.0
"""What is there to train and has not for so long does not work any more."""

FOLDER = Path.home() / "idle"

USED = FOLDER / "used"
"""Says after how many hours to end; its time is when the cluster was last seen at work."""

CONFIG = Path.home() / "ray_bootstrap_config.yaml"
"""The launcher file, as Ray leaves it on the head."""


def start() -> None:
    """Begins to count from now, in the background."""
    hours = float(os.environ["NFLAB_IDLE_HOURS"])
    FOLDER.mkdir(exist_ok=True)
    USED.write_text(str(hours), encoding="utf-8")
    with (FOLDER / "log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, __file__, "run"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run() -> None:
    """Waits until the time is over, unless another process does, then ends all machines."""
    lock = (FOLDER / ".lock").open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    while True:
        time.sleep(POLL_SECONDS)
        try:
            if working():
                os.utime(USED)
            limit = timedelta(hours=float(USED.read_text(encoding="utf-8")))
            if timedelta(seconds=time.time() - USED.stat().st_mtime) > limit:
                print(f"no job that gets on for {limit}: the cluster ends", flush=True)
                end()
        except Exception as error:  # a timer that ends costs money
            print(f"{type(error).__name__}: {error}", flush=True)


def working() -> bool:
    """Whether a job runs and gets on; a Ray that does not answer runs none."""
    try:
        jobs = JobSubmissionClient(JOBS).list_jobs()
    except Exception as error:  # Ray's own kinds, and those of its client
        print(f"Ray does not answer: {error}", flush=True)
        return False
    running = {job.job_id for job in jobs if not job.status.is_terminal()}
    if not running:
        return False
    try:
        trains = trained.by_job(GCS)
    except Exception as error:  # likewise; then a job that runs counts
        print(f"Ray does not tell what trains: {error}", flush=True)
        return True
    # Of a job of several scripts Ray names one.
    recent = any(time.time() - when < STALLED_SECONDS for when in trains.values())
    return recent or not running <= trains.keys()


def end() -> None:
    """Copies what only this machine has, then terminates all machines, this one too.

    Raises:
        OSError, sqlite3.Error: it cannot be copied.
        BotoCoreError, ClientError: AWS refuses.
    """
    Backup(os.environ["NFLAB_RESULTS"]).save()
    cluster = launcher.read(str(CONFIG))
    cluster.client("ec2").terminate_instances(InstanceIds=instances(cluster))


if __name__ == "__main__":
    {"start": start, "run": run}[sys.argv[1]]()
