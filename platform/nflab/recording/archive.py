"""All that MLflow holds of nflab's runs, of every experiment, read back."""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from nflab.recording.board import RunBoard
from nflab.recording.client import connect, history, search
from nflab.recording.tables import rows
from nflab.settings.errors import ConfigError
from nflab.storage.files import exists
from nflab.storage.ownership import Board

TAGS = {
    "cell": "cell",
    "earlier_cell": "earlier_cell",
    "trial": "trial",
    "folder": "folder",
    "superseded": "superseded",
    "to_supersede": "to_supersede",
    "agc_verdict": "agc_verdict",
    "dataset_fingerprint": "dataset_fingerprint",
    "code_fingerprint": "code_fingerprint",
    "git_commit": "git_commit",
    "torch": "torch",
    "driver": "driver",
    "gpu": "gpu",
    "placement": "placement",
    "machines": "machines",
    "mlflow.parentRunId": "parent",
}
"""Tag -> column of `Archive.rows`."""


@dataclass(frozen=True)
class RecordedRun:
    """One run as MLflow holds it."""

    run_id: str
    name: str
    experiment: str
    tags: dict[str, str]
    metrics: dict[str, float]
    """The last value of each."""
    status: str
    """MLflow's: RUNNING, FINISHED, FAILED or KILLED."""
    ended: int | None
    """When it was closed, in ms since 1970; None while it is not."""
    params: dict[str, str]
    artifacts: str
    """Address of its artifacts."""

    @property
    def parent(self) -> str | None:
        """The run of its sweep or grid; None if it is no other's child."""
        return self.tags.get("mlflow.parentRunId")


_MARKS = {"outcome", "code_fingerprint"}
"""A run with one of these tags is nflab's."""


class Archive:
    """Reads the runs of all experiments; changes nothing."""

    def __init__(self, uri: str) -> None:
        """Opens the store.

        Raises:
            ConfigError: it cannot be opened.
        """
        self.uri = uri
        self._client = connect(uri)

    def experiments(self) -> list[str]:
        """Names of all experiments, the oldest first."""
        return list(self._experiment_ids())

    def rows(self, experiment: str) -> pd.DataFrame:
        """A row for each run that nflab recorded in an experiment, in the order of their start:
        what `tables.rows` gives, and the columns of TAGS, empty where a run has no such tag.
        Runs that were repeated on purpose are left out."""
        found = search(self._client, self._experiment_ids()[experiment])
        told = [r for r in found if "outcome" in r.data.tags and "superseded" not in r.data.tags]
        columns = {column: [r.data.tags.get(tag) for r in told] for tag, column in TAGS.items()}
        return rows(told).assign(**columns)

    def find(self, run_id: str) -> RecordedRun:
        """A run by its id.

        Raises:
            ConfigError: nflab has recorded no such run.
        """
        try:
            run = self._client.get_run(run_id)
        except MlflowException:
            raise ConfigError(f"there is no run {run_id!r} in {self.uri}") from None
        if "outcome" not in run.data.tags:
            raise ConfigError(f"run {run_id} in {self.uri} is none of nflab's")
        return _recorded(run, self._client.get_experiment(run.info.experiment_id).name)

    def runs(self, experiment: str) -> list[RecordedRun]:
        """All runs of an experiment that nflab recorded, in the order of their start."""
        found = search(self._client, self._experiment_ids()[experiment])
        return [_recorded(run, experiment) for run in found if _MARKS & run.data.tags.keys()]

    def family(self, root: RecordedRun) -> list[RecordedRun]:
        """A run and its children, as they are now."""
        run = self._client.get_run(root.run_id)
        below = f"tags.`mlflow.parentRunId` = '{root.run_id}'"
        children = search(self._client, run.info.experiment_id, below)
        return [_recorded(one, root.experiment) for one in (run, *children)]

    def without(self, runs: Sequence[RecordedRun], file: str) -> set[str]:
        """Ids of those runs that lack an artifact at the top."""

        def lacks(run: RecordedRun) -> bool:
            if run.artifacts.startswith(("mlflow-artifacts:", "dbfs:", "http")):
                listed = self._client.list_artifacts(run.run_id)
                return file not in [entry.path for entry in listed]
            return not exists(f"{run.artifacts.removeprefix('file://')}/{file}")

        with ThreadPoolExecutor(max_workers=16) as pool:
            lacking = list(pool.map(lacks, runs))
        return {run.run_id for run, lacks_it in zip(runs, lacking, strict=True) if lacks_it}

    def board(self, run: RecordedRun) -> Board:
        """Where processes claim a run."""
        experiment_id = self._client.get_run(run.run_id).info.experiment_id
        return RunBoard(self._client, experiment_id, run.name, run.run_id)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every point of a metric, by step."""
        return history(self._client, run_id, metric)

    @contextmanager
    def artifact(self, run_id: str, path: str) -> Iterator[Path | None]:
        """A local copy of a file of a run, while in use; None if the run has no such file."""
        folder, _, name = path.rpartition("/")
        listed = self._client.list_artifacts(run_id, folder or None)
        if name not in [file.path.rpartition("/")[2] for file in listed]:
            yield None
            return
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(self._client.download_artifacts(run_id, path, temporary))

    def _experiment_ids(self) -> dict[str, str]:
        found = self._client.search_experiments(order_by=["creation_time ASC"])
        return {experiment.name: experiment.experiment_id for experiment in found}


def _recorded(run: Run, experiment: str) -> RecordedRun:
    info, data = run.info, run.data
    return RecordedRun(
        run_id=info.run_id,
        name=info.run_name,
        experiment=experiment,
        tags=dict(data.tags),
        metrics=dict(data.metrics),
        status=info.status,
        ended=info.end_time,
        params=dict(data.params),
        artifacts=info.artifact_uri,
    )
