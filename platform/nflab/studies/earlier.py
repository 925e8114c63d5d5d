"""What earlier studies have found, read back from MLflow."""

from collections.abc import Sequence

import pandas as pd

from nflab.analysis import clipping
from nflab.analysis.findings import as_computed, groups
from nflab.data import load_dataset
from nflab.recording.archive import Archive
from nflab.recording.tables import one_each
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text, flat

_EXPERIMENT = "clipping_vs_batch_size"


def best_clippings(config: Config, batch_sizes: Sequence[int]) -> tuple[float, ...]:
    """The clipping that did best on validation at each batch size, of the cells of
    clipping_vs_batch_size.py that differ from a configuration in these two alone.

    Raises:
        ConfigError: at one of them nothing was trained with clipping.
    """
    archive = Archive(locations.tracking_uri(config.run))
    found: dict[int, float] = {}
    if _EXPERIMENT in archive.experiments():
        rows = archive.rows(_EXPERIMENT)
        base = locations.located(config.base())
        written = pd.DataFrame([{key: as_text(value) for key, value in flat(base).items()}])
        own = as_computed(written).iloc[0].to_dict()
        own["dataset_fingerprint"] = load_dataset(base).fingerprint
        for common, group in groups(one_each(rows[rows.cell.notna()]), clipping.VARIED):
            if all(own.get(key) == value for key, value in common.items()):
                found = clipping.best_clippings(clipping.analyse(group, "").table)
    missing = [str(size) for size in batch_sizes if size not in found]
    if missing:
        raise ConfigError(
            f"which clipping does best at batch {' and '.join(missing)} is not recorded: run "
            f"experiments/{_EXPERIMENT}.py with the same flags first, or give --clippings"
        )
    return tuple(found[size] for size in batch_sizes)
