"""Which software runs."""

import hashlib
from pathlib import Path

import torch

import nflab
import nfnet


def code_fingerprint() -> str:
    """16 hex digits that change with every line of both packages."""
    digest = hashlib.sha256()
    for package in (nflab, nfnet):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def software() -> dict[str, str]:
    """What a result also depends on, beside what is computed: `code_fingerprint`, and the version
    of `torch`."""
    return {"code_fingerprint": code_fingerprint(), "torch": str(torch.__version__)}
