"""A recorded run again, from what MLflow holds of it, and whether it comes out the same."""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from nflab.data import load_dataset
from nflab.data.dataset import is_called
from nflab.learning.evaluation import evaluate_pretrained
from nflab.learning.loop import train
from nflab.learning.validation import validate
from nflab.learning.worker import Worker
from nflab.recording.archive import Archive, RecordedRun
from nflab.recording.metrics import METRICS
from nflab.recording.provenance import software_tags
from nflab.running.worker_group import Task
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.serialization import from_json
from nflab.studies.training import run_training

TIMES = (
    *("world_size", "images_at_once"),
    *("seconds", "images_per_second", "data_wait_fraction", "checkpoint_seconds"),
    "cost_usd",
    "system",
)
"""Metrics that are of the machine, which no repetition repeats."""


@dataclass(frozen=True)
class Replay:
    """How a run came out when it was repeated."""

    name: str
    """Of the recorded run."""
    points: int
    """Recorded points of all metrics that were compared."""
    differences: list[str]
    """In words, one for each point that is not the same to the last bit."""
    remarks: list[str]
    """What else is not as it was."""
    run_id: str
    """The repetition's run in MLflow."""


def replay(run_id: str, uri: str, storage: str) -> Replay:
    """Repeats a recorded run without Tune, up to its last recorded epoch, and compares them.

    Args:
        uri: MLflow store or server of both.
        storage: folder or address for what the repetition keeps.

    Raises:
        ConfigError: there is no such run, it is no training, or what it used has changed.
    """
    archive = Archive(uri)
    recorded = archive.find(run_id)
    if recorded.tags["outcome"] == "running":
        raise ConfigError(
            f"run {run_id} ({recorded.name}) is still running: wait for its end, or let "
            "experiments/audit.py close it if its process has gone"
        )
    config = replace(_config(archive, recorded), name=None, tracking_uri=uri, storage=storage)
    if "epoch" not in recorded.metrics:
        raise ConfigError(f"run {run_id} ({recorded.name}) recorded no epoch: nothing to compare")
    validate(config, trains=recorded.experiment != "evaluate")
    was, dataset = recorded.tags["dataset_fingerprint"], load_dataset(config)
    if not is_called(dataset, was):
        raise ConfigError(
            f"{config.data.dataset} is not what run {run_id} was trained on: its fingerprint is "
            f"{dataset.fingerprint} and was {was}"
        )
    result = run_training(config, "replay", task=_task(recorded))
    if result.outcome == "failed":
        raise ConfigError(f"the repetition failed:\n{result.error}\nlogs: {result.logs}")
    points, differences = compare(_histories(archive, recorded), archive, result.run_id)
    return Replay(
        recorded.name, points, differences, _remarks(recorded, archive, result), result.run_id
    )


def _config(archive: Archive, recorded: RecordedRun) -> Config:
    with archive.artifact(recorded.run_id, "config.json") as file:
        text = None if file is None else file.read_text(encoding="utf-8", errors="replace")
    if text is None:
        raise ConfigError(f"run {recorded.run_id} ({recorded.name}) has no config.json to repeat")
    try:
        return from_json(Config, text)
    except ConfigError:
        raise ConfigError(
            f"run {recorded.run_id} ({recorded.name}) is no single training: give one of its "
            "children"
        ) from None


def _task(recorded: RecordedRun) -> Task:
    if recorded.experiment == "evaluate":
        return evaluate_pretrained
    return partial(_train_until, int(recorded.metrics["epoch"]))


class _Reached(Exception):
    """The last epoch that was recorded."""


def _train_until(epoch: int, config: Config, worker: Worker) -> None:
    """Trains as far as the recorded run came; a longer schedule is not shortened by that."""

    def report(metrics: dict[str, Any]) -> None:
        cut = metrics["epoch"] == epoch and metrics["outcome"] == "running"
        worker.report({**metrics, "outcome": "pruned"} if cut else metrics)
        if cut:
            raise _Reached

    with suppress(_Reached):
        train(config, dataclasses.replace(worker, report=report, checkpoints=None))


Histories = Mapping[str, list[tuple[int, float]]]
"""Metric -> (step, value) of every point, by step."""


def _histories(archive: Archive, run: RecordedRun) -> Histories:
    names = [name for name in run.metrics if name.split("/")[0] in {*METRICS} - {*TIMES}]
    return {name: archive.history(run.run_id, name) for name in sorted(names)}


def compare(recorded: Histories, archive: Archive, run_id: str) -> tuple[int, list[str]]:
    """How many points are recorded, and in which of them a run differs, in words."""
    repeated = _histories(archive, archive.find(run_id))
    differences = []
    points = 0
    for name in sorted({*recorded, *repeated}):
        was, now = dict(recorded.get(name, [])), dict(repeated.get(name, []))
        points += len(was)
        for step in sorted({*was, *now}):
            before, after = was.get(step), now.get(step)
            both_nan = before != before and after != after
            if before != after and not both_nan:
                differences.append(f"{name}, epoch {step}: {before!r} was, {after!r} is")
    return points, differences


def _remarks(recorded: RecordedRun, archive: Archive, result: Any) -> list[str]:
    """What differs between both runs beside their results."""
    now = {**archive.find(result.run_id).tags, **software_tags()}
    told = {
        "code_fingerprint": "the code has changed",
        "git_commit": "the commit is another",
        "world_size": "the number of workers is another",
        "placement": "the hardware is used in another way",
        "driver": "the machine is another",
    }
    return [
        f"{words}: {recorded.tags[tag]} was, {now[tag]} is"
        for tag, words in told.items()
        if tag in recorded.tags and recorded.tags[tag] != now.get(tag)
    ]
