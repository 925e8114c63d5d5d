"""Which layers does adaptive gradient clipping have to clip?

Trains a normalizer-free network with every subset of {stem, each stage, head} clipped, or with the
subsets given, over seeds, at a batch size where training fails without clipping. Run again, it
trains only what is missing.

Example:
  python experiments/agc_layers.py --subsets none stem+stage1+stage2+stage3 stage1+stage2+stage3
"""

import _start  # noqa: F401

from nflab import cli
from nflab.config import LayersConfig, replace, require
from nflab.validate import validate


def main(config: LayersConfig, resume: bool) -> None:
    """Trains the grid, then shows what clipping each part gives."""
    from nflab.ablations import layers  # takes seconds: a wrong flag is answered sooner
    from nflab.grid import open_grid
    from nflab.present import finals, present, title_of

    base = config.base()
    require(base.optimizer.clipping is not None, "clipping none leaves nothing to compare")
    parts = layers.parts_of(base.model.model)
    subsets = [layers.read_subset(text, parts) for text in config.cells.subsets]
    cells = layers.settings(parts, subsets or layers.every_subset(parts), config.seeds())
    for settings in cells:
        validate(replace(base, **settings))
    with open_grid(config, "agc_layers") as grid:
        rows = grid.run(base, cells)
        title = f"{title_of(config)}, batch {base.optimizer.batch_size}"
        found = layers.analyse(rows, f"{title}, clipping {base.optimizer.clipping:g}")
        settled = finals(layers.ranked(rows), found, config, grid)
        present(settled, layers.PAPER, rows, config, grid)


if __name__ == "__main__":
    cli.main(LayersConfig, main, __doc__, recipe="digits_large_batch")
