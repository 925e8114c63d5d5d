"""Ends a cluster on AWS that was forgotten: one that has run no job for so many hours.

`python idle.py start` starts the timer on the head, or begins its time anew; the hours stand in the
launcher file, as NFLAB_IDLE_HOURS. First what only the head's disk holds is copied to the other
results, as `make down` does; until that succeeds the cluster stays. An open tunnel is no job.
"""

import fcntl
import os
import sqlite3
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import launcher
from backup import Backup
from botocore.exceptions import BotoCoreError, ClientError
from down import instances
from ray._raylet import GcsClient

POLL_SECONDS = 10.0

GCS = "127.0.0.1:6379"
"""Ray's head process, on this machine."""

FOLDER = Path.home() / "idle"

USED = FOLDER / "used"
"""Its time is when the cluster was last seen at work."""

CONFIG = Path.home() / "ray_bootstrap_config.yaml"
"""The launcher file, as Ray leaves it on the head."""


def start() -> None:
    """Begins to count from now, in the background."""
    FOLDER.mkdir(exist_ok=True)
    USED.touch()
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
    limit = timedelta(hours=float(os.environ["NFLAB_IDLE_HOURS"]))
    while True:
        time.sleep(POLL_SECONDS)
        if working():
            USED.touch()
        elif timedelta(seconds=time.time() - USED.stat().st_mtime) > limit:
            print(f"no job for {limit}: the cluster ends", flush=True)
            try:
                end()
            except (OSError, sqlite3.Error, BotoCoreError, ClientError) as error:
                print(f"it cannot yet: {error}", flush=True)


def working() -> bool:
    """Whether a job runs, or whether one runs cannot be known."""
    try:
        jobs = GcsClient(GCS).get_all_job_info(
            skip_submission_job_info_field=True, skip_is_running_tasks_field=True
        )
    except Exception as error:  # Ray's own kinds; its head may be starting
        print(f"Ray does not answer: {error}", flush=True)
        return True
    # Ray's dashboard is one too.
    names = [job.config.ray_namespace for job in jobs.values() if not job.is_dead]
    return any(not name.startswith("_ray_internal") for name in names)


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
