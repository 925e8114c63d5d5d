"""Which clipping threshold, batch size and augmentation strength train best?

Searches adaptive gradient clipping's threshold, the batch size and RandAugment's strength with
Optuna's TPE, ending poor trials early (ASHA). Every trial is a child run in MLflow; figures and
the best trial's weights are with the parent run.

What is searched stands in nflab/settings/recipes.py; to fix one of the three, give its flag. To
search others, see sweep.py.

Example:
  python experiments/agc_sweep.py --trials 24 --epochs 30 --batch-size 128
"""

import _start  # noqa: F401
from _sweep import sweep

from nflab.settings.studies import SweepConfig
from nflab.terminal import command_line


def main(config: SweepConfig, resume: bool) -> None:
    """Sweeps, then says what was found."""
    sweep(config, "agc_sweep", resume)


if __name__ == "__main__":
    command_line.main(SweepConfig, main, __doc__)
