"""Keys, tokens and passwords stay where they were put; for those of a head see `test_head.py`."""

import re
import subprocess

from tests.conftest import ROOT

KEYS = re.compile(
    r"\b(AKIA|ASIA)[0-9A-Z]{16}\b|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{64}\b"
    r"|\bgh[pousr]_\w{36}|\bhf_\w{30}"
)
"""AWS's, SSH's, a token of Ray, GitHub's, Hugging Face's."""


def test_no_committed_file_holds_a_key() -> None:
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in filter(None, names.split("\0")):
        path = ROOT / name
        if path.is_file():
            found = KEYS.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert found is None, (name, found)
