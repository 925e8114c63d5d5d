"""The flat face of a configuration: its leaves by name."""

import dataclasses
from typing import Any, TypeVar

from nflab.settings.config import Config
from nflab.settings.errors import ConfigError

C = TypeVar("C", bound=Config)


def flat(config: Config) -> dict[str, Any]:
    """Leaf name -> value over all parts of `config`."""
    return {
        leaf.name: getattr(getattr(config, part.name), leaf.name)
        for part in dataclasses.fields(config)
        for leaf in dataclasses.fields(getattr(config, part.name))
    }


def replace(config: C, **leaves: Any) -> C:
    """`config` with the named leaves changed, wherever they are nested.

    Raises:
        ConfigError: a name is no leaf of `config`.
    """
    unknown = sorted(set(leaves) - set(flat(config)))
    if unknown:
        raise ConfigError(f"unknown setting {unknown[0]!r}: choose from {', '.join(flat(config))}")
    parts = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        changed = {f.name: leaves[f.name] for f in dataclasses.fields(value) if f.name in leaves}
        parts[part.name] = dataclasses.replace(value, **changed)
    return type(config)(**parts)


def as_text(value: Any) -> str:
    """How a parameter is written: as on the command line, where the absent one reads `none`."""
    if isinstance(value, list | tuple):
        return " ".join(value) or "none"
    return "none" if value is None else str(value)
