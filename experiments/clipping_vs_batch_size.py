"""How does adaptive gradient clipping carry networks without normalisation to large batches?

The paper's figure 2: a normalizer-free network without clipping and with several clippings, and
its batch-normalised twin, over batch sizes and seeds. Nothing but these varies: the learning rate
follows the linear rule, and no cell is tuned by itself. Run again, it trains only what is missing.

Example:
  python experiments/clipping_vs_batch_size.py --batch-sizes 16 64 --clippings 0.04 0.16 --seeds 3
"""

import _start  # noqa: F401

from nflab.learning.validation import validate
from nflab.settings.leaves import replace
from nflab.settings.recipes import space_of
from nflab.settings.studies import ClippingConfig
from nflab.terminal import command_line


def main(config: ClippingConfig, resume: bool) -> None:
    """Trains the grid, then shows figure 2 and whether the paper's findings hold."""
    from nflab.analysis import clipping  # takes seconds: a wrong flag is answered sooner
    from nflab.studies.grid import open_grid
    from nflab.studies.presentation import present, title_of, with_finals

    base, space = config.base(), space_of(config)
    batch_sizes = config.cells.batch_sizes or tuple(space.batch_sizes())
    clippings = config.cells.clippings or space.clippings
    model = config.model.model
    cells = clipping.settings(model, batch_sizes, clippings, config.seeds())
    for settings in cells:
        validate(replace(base, **settings))
    holds = True
    with open_grid(config, "clipping_vs_batch_size") as grid:
        rows = grid.run(base, cells)
        found = clipping.analyse(rows, title_of(config))
        settled = with_finals(clipping.ranked(found.table, model), found, config, grid)
        present(settled, clipping.PAPER, rows, config, grid)
        holds = all(line.startswith("holds") for line in found.text)
    if config.cells.check and not holds:
        raise SystemExit(1)


if __name__ == "__main__":
    command_line.main(ClippingConfig, main, __doc__)
