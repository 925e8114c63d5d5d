"""What does augmentation give networks without normalisation, and how much of it do they stand?

The paper's ladder (baseline, + MixUp, + RandAugment, + CutMix) and a curve of RandAugment's
strength, for a normalizer-free network and its batch-normalised twin, over seeds. Run again, it
trains only what is missing.

Example:
  python experiments/augmentation.py --levels 0 5 10 15 --ladder-level 5 --seeds 3
"""

import _start  # noqa: F401

from nflab.learning.validation import validate
from nflab.settings.errors import require
from nflab.settings.leaves import replace
from nflab.settings.studies import AugmentationConfigs
from nflab.terminal import command_line


def main(config: AugmentationConfigs, resume: bool) -> None:
    """Trains the grid, then shows what each step gives."""
    from nflab.analysis import augmentation  # takes seconds: a wrong flag is answered sooner
    from nflab.analysis.findings import twins
    from nflab.studies.grid import open_grid
    from nflab.studies.presentation import present, title_of, with_finals

    base, levels, ladder_level = config.base(), config.cells.levels, config.cells.ladder_level
    require(ladder_level >= 1, f"ladder_level {ladder_level} must be at least 1")
    networks = list(twins(base).values())
    cells = augmentation.settings(networks, levels, ladder_level, config.seeds())
    for settings in cells:
        validate(replace(base, **settings))
    with open_grid(config, "augmentation") as grid:
        rows = grid.run(base, cells)
        found = augmentation.analyse(rows, title_of(config))
        settled = with_finals(augmentation.ranked(rows, base.model.model), found, config, grid)
        present(settled, augmentation.PAPER, rows, config, grid)


if __name__ == "__main__":
    command_line.main(AugmentationConfigs, main, __doc__)
