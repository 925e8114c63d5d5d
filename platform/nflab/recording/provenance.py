"""Which software runs on which machine, as every run is tagged with it."""

import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import nflab
from nflab.learning.provenance import software


def software_tags() -> dict[str, str]:
    """What code runs: its git commit where it is a checkout, a fingerprint of both packages, which
    is all there is of a submitted copy, and the version of torch."""
    folder = Path(nflab.__path__[0])

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    edited = "-edited" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {"git_commit": commit + edited, **software()}


def driver() -> str:
    """The machine of this process: its processor, cores and GPUs. It trains unless a cluster does.

    Returns:
        such as "AMD EPYC, 2 cores" or "AMD EPYC, 16 cores, NVIDIA H100 80GB HBM3".
    """
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    named = re.search(r"^model name\s*: (.+)$", told, re.MULTILINE)
    processor = named[1].strip() if named else platform.processor() or platform.machine()
    gpus = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    cores = os.cpu_count() or 1
    return ", ".join([processor, f"{cores} core{'s' if cores > 1 else ''}", *gpus])
