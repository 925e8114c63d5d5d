"""Which layers does adaptive gradient clipping have to clip?

Trains a normalizer-free network with every subset of {stem, each stage, head} clipped, or with the
subsets given, over seeds, at a batch size where training fails without clipping. Run again, it
trains only what is missing.

Example:
  python experiments/agc_layers.py --subsets none stem+stage1+stage2+stage3 stage1+stage2+stage3
"""

import _start  # noqa: F401

from nflab.learning.validation import validate
from nflab.settings.errors import require
from nflab.settings.leaves import replace
from nflab.settings.studies import LayersConfig
from nflab.terminal import command_line


def main(config: LayersConfig, resume: bool) -> None:
    """Trains the grid, then shows what clipping each part gives."""
    from nflab.analysis import layers  # takes seconds: a wrong flag is answered sooner
    from nflab.studies.grid import open_grid
    from nflab.studies.presentation import present, title_of, with_finals

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
        settled = with_finals(layers.ranked(rows), found, config, grid)
        present(settled, layers.PAPER, rows, config, grid)


if __name__ == "__main__":
    command_line.main(LayersConfig, main, __doc__, recipe="digits_large_batch")
