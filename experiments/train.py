"""Train one configuration, on one to many workers, and evaluate it on the test split.

The result does not depend on the number of workers: each takes its slice of every batch.

Example:
  python experiments/train.py --clipping 0.08 --batch-size 64 --num-workers 2
"""

import _start  # noqa: F401

from nflab.settings import locations
from nflab.settings.config import Config
from nflab.terminal import command_line
from nflab.terminal.wording import console


def main(config: Config, resume: bool) -> None:
    """Trains, then says how it ended."""
    from nflab.studies.training import (
        run_training,  # takes seconds: a wrong flag is answered sooner
    )

    result = run_training(config, "train", resume)
    out = console()
    if result.outcome == "finished":
        out.print(f"test top-1 {result.metrics['test_top1']:.2f} %")
    elif result.outcome == "diverged":
        out.print("the run diverged: its loss is no longer finite")
    else:
        out.print(f"the run failed:\n{result.error}\nlogs: {result.logs}", markup=False)
    out.print(f"Browse:  {locations.browse(config.run)}")
    if result.outcome == "failed":
        raise SystemExit(1)


if __name__ == "__main__":
    command_line.main(Config, main, __doc__)
