"""Does a recorded run come out the same again?

Repeats any training, trial or cell from what MLflow holds of it, without Tune, up to the last
epoch that it recorded, and compares every metric of every epoch bit for bit. Exit code 1 if one
differs.

Example:
  python experiments/replay.py 0a1b2c3d4e5f60718293a4b5c6d7e8f9
"""

from dataclasses import dataclass

import _start  # noqa: F401
import tyro

from nflab.settings import locations
from nflab.settings.config import RunConfig
from nflab.terminal import command_line
from nflab.terminal.wording import console

SHOWN = 10
"""Differences that are printed."""


@dataclass(frozen=True)
class Replayed:
    """Which run, and where it is recorded."""

    run_id: tyro.conf.Positional[str]
    """MLflow's id of the run."""
    tracking_uri: str | None = None
    """MLflow store or server; default: $MLFLOW_TRACKING_URI, else mlflow.db in the checkout."""
    storage: str | None = None
    """Where the repetition keeps its logs; default: $NFLAB_STORAGE, else runs/ in the checkout."""


def main(asked: Replayed) -> None:
    """Repeats the run, then says whether it came out the same."""
    from nflab.studies.replay import replay  # takes seconds: a wrong flag is answered sooner

    run = RunConfig(tracking_uri=asked.tracking_uri, storage=asked.storage)
    found = replay(asked.run_id, locations.tracking_uri(run), locations.storage(run))
    out = console()
    out.print(*found.remarks, sep="\n", markup=False)
    if not found.differences:
        out.print(f"{found.name}: the same in all {found.points} points, bit for bit", markup=False)
        return
    out.print(*found.differences[:SHOWN], sep="\n", markup=False)
    more = len(found.differences) - SHOWN
    if more > 0:
        out.print(f"... and {more} more")
    differ = f"{len(found.differences)} of {found.points} points differ"
    out.print(f"{found.name}: {differ}", markup=False)
    raise SystemExit(1)


if __name__ == "__main__":
    command_line.command(Replayed, main, __doc__)
