"""All that MLflow holds of nflab's runs, of every experiment, read back."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd

from nflab.tracking import connect, rows, search

TAGS = {
    "cell": "cell",
    "trial": "trial",
    "folder": "folder",
    "superseded": "superseded",
    "agc_verdict": "agc_verdict",
    "mlflow.parentRunId": "parent",
}
"""Tag -> column of `Archive.rows`."""


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
        what `tracking.rows` gives, and the columns of TAGS, empty where a run has no such tag.
        Runs that were repeated on purpose are left out."""
        found = search(self._client, self._experiment_ids()[experiment])
        told = [r for r in found if "outcome" in r.data.tags and "superseded" not in r.data.tags]
        columns = {column: [r.data.tags.get(tag) for r in told] for tag, column in TAGS.items()}
        return rows(told).assign(**columns)

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
