"""The Slurm job that this process is part of, and the Ray of that job."""

import os
from contextlib import suppress

import psutil

from nflab.settings.errors import ConfigError


def ray_of_job() -> str | None:
    """Address of the Ray that was started for this process's Slurm job, on its machine.

    `ray symmetric-run` tells the command that it runs of no address.

    Returns:
        HOST:PORT; None outside of a Slurm job, or if its only machine has no Ray yet.

    Raises:
        ConfigError: a job of several machines has none here, or a job has more than one.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    found = sorted(set(_started_for(job)))
    if len(found) == 1:
        return found[0]
    machines = int(os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    if not found and machines == 1:
        return None
    has = f"has {machines} machines and no Ray here" if not found else f"has {' and '.join(found)}"
    raise ConfigError(
        f"Slurm's job {job} {has}: submit with sbatch cluster/slurm.sbatch, or set RAY_ADDRESS to "
        "the HOST:PORT of its Ray, or to local to train on this machine alone"
    )


def _started_for(job: str) -> list[str]:
    """Addresses of what `ray start` has started for a job on this machine; a Ray that a driver has
    started for itself is that driver's."""
    flag = "--gcs-address="
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or is another user's
            if process.name() != "raylet" or process.environ().get("SLURM_JOB_ID") != job:
                continue
            parent = process.parent()
            words = [] if parent is None else parent.cmdline()
            if any("python" in word for word in words[:1]) and "start" not in words:
                continue
            found += [w.removeprefix(flag) for w in process.cmdline() if w.startswith(flag)]
    return found
