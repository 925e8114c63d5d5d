"""Configurations as JSON files."""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import C, replace


def to_json(config: Config) -> str:
    """`config` as JSON, nested as the dataclasses are; `from_json` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(kind: type[C], text: str) -> C:
    """Reads what `to_json` wrote; a part or leaf left out keeps its default.

    Raises:
        ConfigError: not JSON, or an unknown or mistyped key.
    """
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the configuration is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError("the configuration must be a JSON object of sections")
    return kind(**_read(kind, tree, "", _read_part))


def load(kind: type[C], path: str) -> C:
    """Reads a configuration file for another run: all but the old run's name and locations.

    Raises:
        ConfigError: the file cannot be read, or is no configuration.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, RuntimeError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"cannot read the configuration {path!r}: {reason}") from None
    try:
        config = from_json(kind, text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return replace(config, name=None, tracking_uri=None, storage=None)


def _read(
    kind: type, tree: Mapping[str, Any], where: str, read: Callable[[Any, Any, str], Any]
) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(tree) - set(hints))
    if unknown:
        raise ConfigError(f"unknown key {where + unknown[0]!r}: expected one of {', '.join(hints)}")
    return {key: read(hints[key], value, where + key) for key, value in tree.items()}


def _read_part(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ConfigError(f"{where!r} must be a section of settings, not {value!r}")
    return kind(**_read(kind, value, f"{where}.", read_leaf))


def read_leaf(hint: Any, value: Any, where: str) -> Any:
    """A value from JSON or YAML as a setting of type `hint`.

    Raises:
        ConfigError: it is of another type; the message names `where` it stands.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if isinstance(value, list):
            return tuple(read_leaf(kind, item, where) for item in value)
    elif float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) in kinds:
        return value
    expected = " or ".join("null" if k is type(None) else getattr(k, "__name__", "") for k in kinds)
    raise ConfigError(f"{where!r} must be {expected}, not {value!r}")
