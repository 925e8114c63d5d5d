"""Recipes of one's own, as YAML or JSON files.

    settings:
      batch_size: {value: 512, source: "as many as fit"}
      clipping: {value: 0.04, source: "arXiv 2102.06171, figure 2"}
    search: ["clipping=0.01..0.16:log,none", "batch_size=256..4096:pow2"]
    clippings: [0.02, 0.04]
    lookahead: 8

Settings that are left out keep nflab's defaults; what is searched, and the rest, is the paper's.
"""

import functools
import hashlib
import re
import typing
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nflab.settings.config import Config
from nflab.settings.errors import ConfigError, known, require
from nflab.settings.search_space import Scale, SearchSpace, scales
from nflab.settings.serialization import read_leaf

ENDINGS = (".yaml", ".yml", ".json")

_PARTS = ("settings", "search", "clippings", "lookahead")

_OF_A_RUN = ("recipe", "name", "tracking_uri", "storage")
"""What a recipe cannot say."""


@dataclass(frozen=True)
class RecipeFile:
    """What a file says."""

    settings: Mapping[str, tuple[Any, str]]
    """Leaf name -> (value, where it comes from)."""
    space: Mapping[str, Any]
    """Fields of `SearchSpace` that it names."""


def is_file(recipe: str) -> bool:
    """Whether a recipe's name is that of a file, with or without the digest of its contents."""
    return recipe.partition("#")[0].lower().endswith(ENDINGS)


def located(recipe: str) -> str:
    """A recipe's file as it is recorded: `/PATH#DIGEST`, with 16 hex digits of its contents.

    Raises:
        ConfigError: it cannot be read.
    """
    path = Path(recipe.partition("#")[0]).expanduser().absolute()
    return f"{path}#{hashlib.sha256(_bytes(path)).hexdigest()[:16]}"


@functools.lru_cache
def read(recipe: str) -> RecipeFile:
    """What a recipe's file says.

    Args:
        recipe: as `located` returns it.

    Raises:
        ConfigError: it cannot be read, is no recipe, or is another than its digest says.
    """
    if located(recipe) != recipe:
        raise ConfigError(
            f"the recipe {recipe.partition('#')[0]} has changed since the run was recorded: put "
            "back what its recipe.yaml in MLflow holds, or start anew under another --name"
        )
    path = Path(recipe.partition("#")[0])
    try:
        return _parsed(_bytes(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def text(recipe: str) -> str:
    """A recipe's file as it is, to be kept with a run.

    Raises:
        ConfigError: as `read` does.
    """
    read(recipe)
    return _bytes(Path(recipe.partition("#")[0])).decode()


def write(settings: Mapping[str, tuple[Any, str]], space: SearchSpace) -> str:
    """A recipe as YAML; `read` reads it back."""
    told = {
        "settings": {
            name: {"value": list(value) if isinstance(value, tuple) else value, "source": source}
            for name, (value, source) in settings.items()
            if name not in _OF_A_RUN
        },
        "search": [_text(name, scale) for name, scale in space.scales.items()],
        "clippings": list(space.clippings),
        "lookahead": space.lookahead,
    }
    return yaml.dump(told, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _parsed(content: bytes) -> RecipeFile:
    try:
        tree = _Loader(content.decode("utf-8-sig")).get_single_data()
    except ConfigError:
        raise
    # What tags such as !!int construct of a text raises errors of any kind.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())
        raise ConfigError(f"the recipe is neither YAML nor JSON: {told}") from None
    require(isinstance(tree, dict), "a recipe has the parts " + ", ".join(_PARTS))
    for part in tree:
        known("part of a recipe", str(part), list(_PARTS))
    of_settings = tree.get("settings")
    require(
        isinstance(of_settings, dict) and bool(of_settings),
        "a recipe needs settings, each as NAME: {value: ..., source: ...}",
    )
    hints = _hints()
    settings = {}
    for name, told in of_settings.items():
        known("setting", str(name), list(hints))
        require(
            isinstance(told, dict) and set(told) <= {"value", "source"} and "value" in told,
            f"{name} must be written as {{value: ..., source: ...}}, not {told!r}",
        )
        source = told.get("source")
        require(
            isinstance(source, str) and bool(source.strip()),
            f"{name} has no source: say in words where {told['value']!r} comes from",
        )
        settings[name] = read_leaf(hints[name], told["value"], name), " ".join(source.split())
    return RecipeFile(settings, _space(tree))


def _space(tree: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "search" in tree:
        found["scales"] = scales(read_leaf(tuple[str, ...], tree["search"], "search"))
        require("batch_size" in found["scales"], "search must have batch_size: ablations vary it")
    if "clippings" in tree:
        found["clippings"] = read_leaf(tuple[float, ...], tree["clippings"], "clippings")
        for one in found["clippings"]:
            require(0 < one < float("inf"), f"clippings {one} must be finite and above 0")
    if "lookahead" in tree:
        found["lookahead"] = read_leaf(int, tree["lookahead"], "lookahead")
        require(found["lookahead"] >= 1, f"lookahead {found['lookahead']} must be at least 1")
    return found


def _hints() -> dict[str, Any]:
    """The type of each setting that a recipe may name."""
    parts = typing.get_type_hints(Config).values()
    found = {name: hint for part in parts for name, hint in typing.get_type_hints(part).items()}
    return {name: hint for name, hint in found.items() if name not in _OF_A_RUN}


def _text(name: str, scale: Scale) -> str:
    """A scale as `--search` takes it."""
    if not scale.ordered:
        if scale.choices == (False, True):
            return name
        return f"{name}=" + ",".join("none" if one is None else str(one) for one in scale.choices)
    how = scale.spacing if scale.spacing != "even" else scale.step
    text = f"{scale.low}..{scale.high}" + (f":{how}" if how is not None else "")
    ends = {"low": f"none,{text}", "high": f"{text},none", None: text}
    return f"{name}={ends[scale.none]}"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {str(path)!r}: {error.strerror}") from None


# YAML 1.2's words, which are JSON's. By PyYAML's own, of 1.1, 1:4 is 64, 010 is 8, `no` is false.
_WORDS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _kind, _form, _first in (
    ("bool", r"true|false", [*"tf"]),
    ("null", r"null|~|", [*"n~", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", [*"-+0123456789"]),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", [*"-+.0123456789"]),
):
    for _character in _first:
        _word = (f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_form})$"))
        _WORDS.setdefault(_character, []).append(_word)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in which no key is given twice."""

    yaml_implicit_resolvers = _WORDS

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        keys = [str(key.value) for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"{twice[0]} is given twice")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Each setting in a line."""

    yaml_implicit_resolvers = _WORDS  # quotes what the loader would not read as text


def _line(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.Node:
    flow = "value" in data and "source" in data
    return dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=flow)


_Dumper.add_representer(dict, _line)
