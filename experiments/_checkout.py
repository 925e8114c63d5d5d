"""Puts the packages of the checkout that holds this script first on the path.

A job submitted with `--working-dir .` runs in an uploaded copy: the copy's `nflab` and `nfnet` are
to run, not the installed ones.
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "platform")]
