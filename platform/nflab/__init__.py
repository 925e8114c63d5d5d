"""nflab: exact, distributed experiments with normalizer-free networks.

The names below are for scripts of one's own; each is loaded when it is first used, so that
`import nflab` takes no time. `docs/architecture.md` says which room holds what.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nflab.data import load_dataset
    from nflab.settings.config import Config
    from nflab.settings.leaves import replace
    from nflab.settings.recipes import RECIPES
    from nflab.settings.studies import GridOfConfigs, SweepConfig
    from nflab.studies.grid import open_grid
    from nflab.studies.sweep import run_sweep
    from nflab.studies.training import run_training

__all__ = [
    "RECIPES",
    "Config",
    "GridOfConfigs",
    "SweepConfig",
    "load_dataset",
    "open_grid",
    "replace",
    "run_sweep",
    "run_training",
]

_HOMES = {
    "RECIPES": "settings.recipes",
    "Config": "settings.config",
    "GridOfConfigs": "settings.studies",
    "SweepConfig": "settings.studies",
    "load_dataset": "data",
    "open_grid": "studies.grid",
    "replace": "settings.leaves",
    "run_sweep": "studies.sweep",
    "run_training": "studies.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
