"""Which code runs."""

import hashlib
import subprocess
from pathlib import Path

import nflab
import nfnet


def code_tags() -> dict[str, str]:
    """What code runs: its git commit where it is a checkout, and a fingerprint of both packages
    where it is not (a submitted copy), or was edited."""
    folders = [Path(package.__path__[0]) for package in (nflab, nfnet)]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(folders[0]), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    edited = "-edited" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {"git_commit": commit + edited, "code_fingerprint": digest.hexdigest()[:16]}
