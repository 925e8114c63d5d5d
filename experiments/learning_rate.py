"""Does a network without clipping survive a large batch with a smaller learning rate?

Trains a normalizer-free network without clipping and with the clipping that does best, and its
batch-normalised twin, over base learning rates, at the smallest and the largest batch size. Which
clipping does best is read from what clipping_vs_batch_size.py recorded of the same recipe, or
given. Run again, it trains only what is missing.

Example:
  python experiments/learning_rate.py --batch-sizes 16 128 --clippings 0.32 0.08 --seeds 3
"""

import _start  # noqa: F401

from nflab.learning.validation import validate
from nflab.settings.errors import require
from nflab.settings.leaves import replace
from nflab.settings.recipes import space_of
from nflab.settings.studies import LearningRateConfig
from nflab.terminal import command_line


def main(config: LearningRateConfig, resume: bool) -> None:
    """Trains the grid, then shows top-1 over the learning rate."""
    from nflab.analysis import learning_rate  # takes seconds: a wrong flag is answered sooner
    from nflab.studies.earlier import best_clippings
    from nflab.studies.grid import open_grid
    from nflab.studies.presentation import present, title_of

    base, cells = config.base(), config.cells
    sizes = space_of(config).batch_sizes()
    batch_sizes = cells.batch_sizes or (sizes[0], sizes[-1])
    clippings = cells.clippings or best_clippings(config, batch_sizes)
    require(
        len(clippings) == len(batch_sizes),
        f"{len(clippings)} clippings for {len(batch_sizes)} batch sizes: give one for each",
    )
    rates = cells.base_learning_rates or tuple(
        base.optimizer.base_learning_rate * 2.0**power for power in range(-4, 2)
    )
    chosen = dict(zip(batch_sizes, clippings, strict=True))
    grid_cells = learning_rate.settings(base.model.model, chosen, rates, config.seeds())
    for settings in grid_cells:
        validate(replace(base, **settings))
    resolved = replace(
        config, batch_sizes=batch_sizes, clippings=clippings, base_learning_rates=rates
    )
    with open_grid(resolved, "learning_rate") as grid:
        rows = grid.run(base, grid_cells)
        found = learning_rate.analyse(rows, title_of(config))
        present(found, learning_rate.PAPER, rows, config, grid)


if __name__ == "__main__":
    command_line.main(LearningRateConfig, main, __doc__)
