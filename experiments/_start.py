"""What every script does before it imports anything large.

Puts the packages of the checkout that holds this script first on the path: a job submitted with
`--working-dir .` runs in an uploaded copy, whose `nflab` and `nfnet` are to run, not the installed
ones. And ends at once, without a traceback, if interrupted while nothing has been started.
"""

import os
import signal
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT), str(_ROOT / "platform")]


def _leave(number: int, frame: object) -> None:
    os.write(2, b"interrupted before anything was started\n")
    os._exit(130)


for _number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(_number, _leave)
