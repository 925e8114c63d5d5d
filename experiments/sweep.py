"""Which values of any settings train best?

Searches what --search names with Optuna's TPE, ending poor trials early (ASHA): ranges, powers,
choices, and none beside a range. Every trial is a child run in MLflow; figures and the best trial's
weights are with the parent run. A search is a function of its configuration: the same on any
cluster, also when it was interrupted.

Example:
  python experiments/sweep.py --search base_learning_rate=0.4..6.4:log clipping=0.02..0.64:log,none
"""

import _start  # noqa: F401
from _sweep import sweep

from nflab.settings.errors import require
from nflab.settings.studies import SweepConfig
from nflab.terminal import command_line


def main(config: SweepConfig, resume: bool) -> None:
    """Sweeps, then says what was found."""
    require(bool(config.search.search), "name what to search, as --search clipping=0.02..0.64:log")
    sweep(config, "sweep", resume)


if __name__ == "__main__":
    command_line.main(SweepConfig, main, __doc__)
