"""What Ray Tune's own state on disk says of trials, without Ray and without unpickling."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Tried:
    """A trial as Tune has it."""

    number: int
    place: str
    """Its folder below that of the sweep or grid, as `trials/0001`."""
    status: str
    """Tune's: PENDING, RUNNING, PAUSED, TERMINATED or ERROR."""
    outcome: str | None
    """The last that it reported."""


def read_tune(texts: Iterable[str]) -> list[Tried]:
    """The trials of Tune's state files.

    Args:
        texts: what each `experiment_state-*.json` says, the oldest first; of a trial that is in
            several the last one counts.
    """
    found: dict[str, Tried] = {}
    for text in texts:
        try:
            pairs = json.loads(text)["trial_data"]
        except (json.JSONDecodeError, KeyError):  # torn by a kill; nothing goes on from it
            continue
        for trial_text, metadata_text in pairs:
            trial, metadata = json.loads(trial_text), json.loads(metadata_text)
            number, folder = trial["config"]["number"], PurePosixPath(trial["config"]["folder"])
            outcome = (metadata.get("last_result") or {}).get("outcome")
            place = f"{folder.parent.name}/{folder.name}"
            found[place] = Tried(number, place, trial["status"], outcome)
    return list(found.values())
