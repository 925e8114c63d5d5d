"""What a run computes, as a digest, and whether a checkpoint is of the same.

A run is what it computes: every setting that its result depends on, the contents of its dataset and
of its pre-trained weights. Where they lie, and on what hardware it runs, does not count. A
checkpoint says what it is of in `made_by.json`. Configurations that are written differently and
compute the same are one: see `settings.canonical`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nflab.data import Dataset, load_dataset
from nflab.data.dataset import is_called
from nflab.learning.provenance import software
from nflab.settings.canonical import canonical
from nflab.settings.config import Config, ScaleConfig
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text, flat
from nflab.settings.serialization import from_json
from nflab.storage.files import read_bytes

MADE_BY = "made_by.json"
"""File of a checkpoint that says what it is of."""

CONFIG = "config.json"
"""File of a checkpoint with its configuration; all that one from before MADE_BY says."""

ELSEWHERE = ("name", "tracking_uri", "storage", "recipe", "diagnostics", "profile")
"""Settings that say where results go, where settings come from and what is watched, not what is
computed."""

_CONTENTS = {"dataset": "the dataset's contents", "pretrained": "the pre-trained weights' contents"}
"""Settings that are known by what stands there, not by where."""


_SOFTWARE = {"code_fingerprint": "other code ({} -> {})", "torch": "torch {} -> {}"}
"""What may differ, and how it is told."""


class OtherComputation(ConfigError):
    """A checkpoint is of something else than the run that was to go on from it."""


def computed(config: Config) -> dict[str, Any]:
    """All that a result depends on, but for the software (see `provenance.software`).

    Returns:
        setting -> value, as JSON has it; `dataset` is the fingerprint of the dataset, `pretrained`
        the SHA-256 of the weights' file, or the word given where that is no file.

    Raises:
        DatasetError: the dataset cannot be used.
        OSError: the weights cannot be read.
    """
    return {**canonical(_settings(config)), **_contents(config)}


def _contents(config: Config) -> dict[str, Any]:
    """Those of _CONTENTS."""
    given = config.model.pretrained
    weights = None if given is None else read_bytes(given)
    return {
        "dataset": load_dataset(config).fingerprint,
        "pretrained": given if weights is None else hashlib.sha256(weights).hexdigest(),
    }


def digest(config: Config) -> str:
    """16 hex digits that change whenever something does that the result depends on: a setting, an
    image of the dataset, a pre-trained weight; not with the hardware.

    Raises:
        DatasetError, OSError: as `computed` does.
    """
    return _digest(computed(config))


def digests(config: Config) -> tuple[str, str]:
    """`digest`, and what earlier versions called it: they told apart what is the same.

    Raises:
        DatasetError, OSError: as `computed` does.
    """
    settings, contents = _settings(config), _contents(config)  # large weights are read once
    return _digest({**canonical(settings), **contents}), _digest({**settings, **contents})


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In what two computations differ, in words: 'clipping 0.16 -> 0.01'.

    Args:
        a, b: as `computed` returns them, or read from JSON.
    """
    found, default = [], flat(Config())
    for key in dict.fromkeys((*a, *b)):
        before, after = (of.get(key, default.get(key)) for of in (a, b))
        if before == after:
            continue
        if key in _CONTENTS and before is not None and after is not None:
            found.append(_CONTENTS[key])
        elif key in _CONTENTS:
            words = ["none" if value is None else "given" for value in (before, after)]
            found.append(f"{key} {' -> '.join(words)}")
        else:
            found.append(f"{key} {as_text(before)} -> {as_text(after)}")
    return found


def made_by(config: Config) -> dict[str, Any]:
    """What a checkpoint of this process says of itself: `digest`, `computed`, and `software`.

    Raises:
        DatasetError, OSError: as `computed` does.
    """
    found = computed(config)
    return {"digest": _digest(found), "computed": found, **software()}


def require_same(folder: Path, epoch: int, own: Mapping[str, Any], dataset: Dataset) -> str | None:
    """Refuses to go on from a checkpoint of another computation.

    Compared are all settings that count, the dataset's contents and those of the pre-trained
    weights. A setting that a checkpoint does not name, since it is older, had its default. A
    checkpoint from before MADE_BY is compared by the settings in its CONFIG alone; one without
    that too is not compared.

    Args:
        folder: of the checkpoint.
        epoch: its epoch.
        own: `made_by` of the run that is to go on.
        dataset: of the run, which an older checkpoint may call by its earlier fingerprint.

    Returns:
        a sentence if other code or another version of torch goes on than made it; else None.

    Raises:
        OtherComputation: it is of another; what differs is named.
        ConfigError: the checkpoint's files cannot be read.
    """
    made = _made_by(folder)
    if made is None:  # of contents it says nothing
        before = _older(folder)
        now = {k: v for k, v in own["computed"].items() if before and k not in _CONTENTS}
    else:
        before, now = canonical({**_settings(Config()), **made["computed"]}), own["computed"]
        if is_called(dataset, before["dataset"]):
            before["dataset"] = now["dataset"]
    # Not the digests: they differ with what is written 1 or 1.0, and with a setting that is new.
    if found := differences(before, now):
        raise OtherComputation(
            f"the checkpoint of epoch {epoch} is of another computation than this run "
            f"({', '.join(found)}): go on from it with what it was made with, or start anew "
            "under another name"
        )
    if made is None:
        return f"continues after epoch {epoch} with other code: its checkpoint does not say which"
    others = [
        words.format(made[key], own[key])
        for key, words in _SOFTWARE.items()
        if made[key] != own[key]
    ]
    return f"continues after epoch {epoch} with {' and '.join(others)}" if others else None


def _settings(config: Config) -> dict[str, Any]:
    """The settings that count, as JSON has them."""
    found = flat(config.base())
    for name in (*ELSEWHERE, *(f.name for f in dataclasses.fields(ScaleConfig))):
        del found[name]
    if not (config.augmentation.mixup or config.augmentation.cutmix):
        del found["partners"]  # so that results from before there was this setting have their name
    if config.data.bad_images == "fail":
        del found["bad_images"]  # likewise
    if config.data.subset == 1:
        del found["subset"]  # likewise
    return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()}


def _digest(found: Mapping[str, Any]) -> str:
    text = json.dumps(found, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _made_by(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself; None if it is from before MADE_BY."""
    if not (folder / MADE_BY).exists():
        return None
    try:
        made = json.loads((folder / MADE_BY).read_bytes())
        sound = all(isinstance(made[key], str) for key in ("digest", *_SOFTWARE))
        sound = sound and all(_is_setting(value) for value in made["computed"].values())
    except (ValueError, TypeError, KeyError, AttributeError):
        sound = False
    if not sound:
        raise _damaged(MADE_BY)
    return made


def _is_setting(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(word, str) for word in value)
    return value is None or isinstance(value, str | int | float)


def _older(folder: Path) -> dict[str, Any]:
    """The settings of a checkpoint from before MADE_BY that can be compared."""
    if not (folder / CONFIG).exists():
        return {}
    try:
        config = from_json(Config, (folder / CONFIG).read_text(encoding="utf-8"))
    except ValueError:
        raise _damaged(CONFIG) from None
    found = canonical(_settings(config))
    return {key: value for key, value in found.items() if key not in _CONTENTS}


def _damaged(file: str) -> ConfigError:
    return ConfigError(
        f"{file} of the last checkpoint is damaged: delete that checkpoint to go on from the one "
        "before it"
    )
