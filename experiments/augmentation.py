"""What does augmentation give networks without normalisation, and how much of it do they stand?

The paper's ladder (baseline, + MixUp, + RandAugment, + CutMix) and a curve of RandAugment's
strength, for a normalizer-free network and its batch-normalised twin, over seeds. Run again, it
trains only what is missing.

Example:
  python experiments/augmentation.py --levels 0 5 10 15 --ladder-level 5 --seeds 3
"""

import _start  # noqa: F401

from nflab import cli
from nflab.config import AugmentationConfigs, replace, require
from nflab.validate import validate


def main(config: AugmentationConfigs, resume: bool) -> None:
    """Trains the grid, then shows what each step gives."""
    from nflab.ablations import augmentation  # takes seconds: a wrong flag is answered sooner
    from nflab.ablations.findings import twins
    from nflab.grid import open_grid
    from nflab.present import finals, present, title_of

    base, levels, ladder_level = config.base(), config.cells.levels, config.cells.ladder_level
    require(ladder_level >= 1, f"ladder_level {ladder_level} must be at least 1")
    networks = list(twins(base).values())
    cells = augmentation.settings(networks, levels, ladder_level, config.seeds())
    for settings in cells:
        validate(replace(base, **settings))
    with open_grid(config, "augmentation") as grid:
        rows = grid.run(base, cells)
        found = augmentation.analyse(rows, title_of(config))
        settled = finals(augmentation.ranked(rows, base.model.model), found, config, grid)
        present(settled, augmentation.PAPER, rows, config, grid)


if __name__ == "__main__":
    cli.main(AugmentationConfigs, main, __doc__)
