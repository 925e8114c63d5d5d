"""Which software runs, as every run is tagged with it."""

import subprocess
from pathlib import Path

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
