"""MLflow: what is recorded of every run, written in batches from one place, and read back.

One parent run a sweep, one child run a trial; a single training is a run of its own.
"""

import hashlib
import json
import logging
import os
import subprocess
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast
from urllib.request import urlopen

import pandas as pd
import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

import nflab
import nfnet
from nflab import registry
from nflab.classifier import DESCRIPTION, WEIGHTS
from nflab.config import ConfigError
from nflab.serving import log_model

Outcome = Literal["finished", "pruned", "diverged", "failed", "interrupted"]

STATUS: dict[Outcome, str] = {
    "finished": "FINISHED",
    "diverged": "FINISHED",  # a result, not an error
    "pruned": "KILLED",
    "failed": "FAILED",
    "interrupted": "KILLED",  # until it is continued
}

DONE = ("finished", "diverged")
"""Outcomes that are results."""

METRICS = (
    "epoch",
    "train_loss",
    "val_loss",
    "val_top1",
    "val_top5",
    "test_loss",
    "test_top1",
    "test_top5",
    "learning_rate",
    "images_per_second",
    "seconds",
    "cost_usd",
    "clipped_fraction",
)
"""What is recorded of a report."""

# The client's own patience with a server that is away: half a minute, not four.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")
# Not for a person: bars of short downloads, where each run is, how a new store was laid out.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
logging.getLogger("mlflow").setLevel(logging.WARNING)

SORTED = ("kind", "parent", "trial", "cell")
"""Tags that are parameters too, for MLflow's table of runs sorts by those alone."""

DIGEST_LENGTH = 36
"""Characters of a fingerprint that MLflow's datasets hold."""

_PARENT = "mlflow.parentRunId"

_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
"""What MLflow's client says of a server that cannot be reached, or cannot answer now."""


def connect(uri: str) -> MlflowClient:
    """A client of an MLflow store or server.

    Raises:
        ConfigError: the store cannot be opened, or no server answers within 2 seconds.
    """
    try:
        if uri.startswith("http"):
            urlopen(f"{uri.rstrip('/')}/health", timeout=2).close()
        elif uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # drivers of stores raise their own kinds
        raise _unusable(uri, error) from None
    return client


def _unusable(uri: str, error: Exception) -> ConfigError:
    if isinstance(error, MlflowException) and error.error_code == "UNAUTHENTICATED":
        return ConfigError(
            f"the tracking store {uri} refuses the user and password: set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or write them into ~/.mlflow/credentials"
        )
    return ConfigError(f"cannot open the tracking store {uri}: {str(error).splitlines()[0]}")


def search(client: MlflowClient, experiment_id: str, filter_string: str = "") -> list[Run]:
    """All runs of an experiment that a filter lets pass, in the order of their start."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            filter_string=filter_string,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        runs += page
        token = page.token
        if not token:
            return runs


def history(client: MlflowClient, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric, by step."""
    points = client.get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in points)


class Tracker:
    """Writes and reads the runs of one MLflow experiment."""

    def __init__(self, uri: str, storage: str, experiment: str) -> None:
        """Opens the store, and makes the experiment if it is new.

        Args:
            uri: MLflow store or server.
            storage: where artifacts go if `uri` is a local store; a server decides for itself.

        Raises:
            ConfigError: the store cannot be opened, or no server answers within 2 seconds.
        """
        self.uri = uri
        self.experiment = experiment
        self._client = connect(uri)
        try:
            found = self._client.get_experiment_by_name(experiment)
            # A store that is a file would put artifacts beside the process's working folder.
            root = None if uri.startswith("http") else f"{storage}/mlflow-artifacts/{experiment}"
            self.experiment_id = (
                found.experiment_id
                if found
                else self._client.create_experiment(experiment, artifact_location=root)
            )
        except Exception as error:  # drivers of stores raise their own kinds
            raise _unusable(uri, error) from None

    def __getstate__(self) -> dict[str, Any]:
        # A store's connections stay in the process that opened them.
        return {key: value for key, value in vars(self).items() if key != "_client"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._client = MlflowClient(self.uri)

    def introduce(self, tags: Mapping[str, str]) -> None:
        """Sets those tags of the experiment that it does not have.

        Raises:
            ConfigError: the store cannot be used.
        """
        try:
            known = self._client.get_experiment(self.experiment_id).tags
            for key in set(tags) - set(known):
                self._client.set_experiment_tag(self.experiment_id, key, tags[key])
        except Exception as error:  # drivers of stores raise their own kinds
            raise _unusable(self.uri, error) from None

    def start(
        self,
        name: str,
        tags: Mapping[str, str],
        parent: str | None = None,
        key: str | None = None,
        when: int | None = None,
    ) -> str:
        """Creates a run with its tags, all at once; returns its id.

        Args:
            key: marks the run; if one has this mark, it is that one, and no other is created.
                Default: a new one.
            when: ms since 1970; default: now.
        """
        key = key or uuid.uuid4().hex
        found = self._marked(key)
        if not found:
            tags = {**tags, "outcome": "running", "record": key}
            if parent is not None:
                tags[_PARENT] = parent
            self._client.create_run(self.experiment_id, start_time=when, run_name=name, tags=tags)
            found = self._marked(key)
        # The client asks again by itself when an answer is lost, and each time makes a run.
        for twin in found[1:]:
            self._client.delete_run(twin.info.run_id)
        run = self._first(found)
        self._add_params(run, {name: tags[name] for name in SORTED if name in tags})
        return str(run.info.run_id)

    def started(self, key: str) -> str:
        """The id of the run that was created with this mark.

        Raises:
            ConfigError: it was deleted.
        """
        return str(self._first(self._marked(key)).info.run_id)

    def _marked(self, key: str) -> list[Run]:
        return self._search(f"tags.record = '{key}'")

    def _first(self, marked: list[Run]) -> Run:
        if not marked:
            raise ConfigError("it was deleted")
        return marked[0]

    def find(self, name: str) -> Run | None:
        """The run of that name that is no other's child; None if there is none."""
        found = self._search(f"attributes.run_name = '{name}'")
        return next((run for run in found if _PARENT not in run.data.tags), None)

    def begin(self, name: str, tags: Mapping[str, str]) -> str:
        """The id of the run that `find` finds; of a new one if it finds none.

        What a first try that failed in its midst has begun is completed.
        """
        known = self.find(name)
        if known is not None and "record" not in known.data.tags:  # not made here
            return str(known.info.run_id)
        return self.start(name, tags, key=None if known is None else known.data.tags["record"])

    def reopen(self, run_id: str) -> None:
        """A run goes on that had been interrupted, or may have been."""
        if "error" in self._client.get_run(run_id).data.tags:
            try:
                self._client.delete_tag(run_id, "error")
            except MlflowException as error:
                # The client asks again by itself when an answer is lost.
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        self._client.set_tag(run_id, "outcome", "running")
        self._client.update_run(run_id, status="RUNNING")

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Records the parameters that the run does not have yet, in one request."""
        self._add_params(self._client.get_run(run_id), params)

    def _add_params(self, run: Run, params: Mapping[str, Any]) -> None:
        known = run.data.params
        written = [Param(key, as_text(value)) for key, value in params.items() if key not in known]
        self._client.log_batch(run.info.run_id, params=written)

    def log(
        self,
        run_id: str,
        metrics: Mapping[str, float],
        step: int,
        when: int | None = None,
        outcome: Outcome | None = None,
    ) -> None:
        """Records metrics at `step`, and the outcome so far, in one request.

        Args:
            when: ms since 1970; default: now. A point that is sent again with the same is one.
        """
        now = int(time.time() * 1000) if when is None else when
        points = [Metric(key, value, now, step) for key, value in metrics.items()]
        tags = [] if outcome is None else [RunTag("outcome", outcome)]
        self._client.log_batch(run_id, metrics=points, tags=tags)

    def tag(self, run_id: str, key: str, value: str) -> None:
        """Sets one tag of a run."""
        self._client.set_tag(run_id, key, value)

    def describe(self, run_id: str, text: str) -> None:
        """Sets what MLflow shows as the description of a run, as Markdown."""
        self.tag(run_id, "mlflow.note.content", text)

    def outcome(self, run_id: str) -> Outcome:
        """The outcome that a run is tagged with."""
        return cast(Outcome, self._client.get_run(run_id).data.tags["outcome"])

    def finish(
        self,
        run_id: str,
        outcome: Outcome,
        tags: Mapping[str, str] | None = None,
        when: int | None = None,
    ) -> None:
        """Ends a run with its outcome and the status that matches it.

        Args:
            when: ms since 1970; default: now.
        """
        written = {**(tags or {}), "outcome": outcome}
        self._client.log_batch(run_id, tags=[RunTag(k, v) for k, v in written.items()])
        self._client.set_terminated(run_id, status=STATUS[outcome], end_time=when)

    def add_file(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Stores a local file as an artifact of the run."""
        self._client.log_artifact(run_id, str(path), folder)

    def add_model(
        self,
        run_id: str,
        checkpoint: Path,
        example: bytes,
        folder: str | None = None,
        trained_by: str | None = None,
    ) -> None:
        """Stores the network of a checkpoint, also as a model that answers images, once.

        Args:
            checkpoint: its folder.
            example: bytes of an image file, as an example of the model's input.
            folder: where the network's files go among the run's artifacts.
            trained_by: the run that trained it, if that is another, which may change.
        """
        for file in (WEIGHTS, DESCRIPTION, "config.json"):
            self.add_file(run_id, checkpoint / file, folder)
        tags = self._client.get_run(run_id).data.tags
        if "model_uri" not in tags or tags.get("model_of") != trained_by:
            name = "model" if trained_by is None else f"model-of-{trained_by[:8]}"
            uri = log_model(self.uri, self.experiment_id, run_id, checkpoint, example, name)
            self.tag(run_id, "model_uri", uri)
            if trained_by is not None:
                self.tag(run_id, "model_of", trained_by)

    def register_model(self, run_id: str, dataset: str, fingerprint: str, settings: str) -> None:
        """Makes the run's model a version of its dataset's model (see `registry.register`)."""
        run = self._client.get_run(run_id)
        uri, metrics = run.data.tags["model_uri"], run.data.metrics
        registry.register(self._client, run_id, uri, dataset, fingerprint, metrics, settings)

    def add_text(self, run_id: str, text: str, file: str) -> None:
        """Stores text as an artifact of the run."""
        self._client.log_text(run_id, text, file)

    def text(self, run_id: str, file: str) -> str | None:
        """An artifact of the run, at the top, as text; None if it has none of that name."""
        if file not in [listed.path for listed in self._client.list_artifacts(run_id)]:
            return None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(self._client.download_artifacts(run_id, file, folder))
            return path.read_text(encoding="utf-8")

    def log_dataset(
        self, run_id: str, name: str, fingerprint: str, sizes: Mapping[str, int]
    ) -> None:
        """Records what a run is trained and judged on, as an MLflow dataset.

        Args:
            name: as in the configuration.
            fingerprint: of all images, labels and splits.
            sizes: images in each split.
        """
        entity = Dataset(
            name=Path(name).name,
            digest=fingerprint[:DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": name}),
            profile=json.dumps({f"{split}_images": n for split, n in sizes.items()}),
        )
        self._client.log_inputs(run_id, [DatasetInput(entity)])

    def last_epoch(self, run_id: str) -> int | None:
        """The last epoch that a run has recorded; None if it has none."""
        epoch = self.metrics(run_id).get("epoch")
        return None if epoch is None else int(epoch)

    def metrics(self, run_id: str) -> dict[str, float]:
        """The last value of each metric of a run."""
        return dict(self._client.get_run(run_id).data.metrics)

    def trials(self, parent: str) -> pd.DataFrame:
        """One row for each trial below `parent`, in the order of their start: `run_id`, `name`,
        `number`, `outcome`, `status`, each parameter as text and the last value of each metric."""
        found = self._search(f"tags.`{_PARENT}` = '{parent}' AND tags.trial != ''")
        return rows(found).assign(number=[int(run.data.tags["trial"]) for run in found])

    def cells(self) -> pd.DataFrame:
        """One row for each run of a cell, of any grid of the experiment, likewise; `cell` is its
        identity, `folder` its checkpoints and logs, `parent` its grid; `to_supersede` says that
        its result is to be repeated. Those that were repeated on purpose are left out."""
        found = [r for r in self._search("tags.cell != ''") if "superseded" not in r.data.tags]
        return rows(found).assign(
            **{key: [run.data.tags[key] for run in found] for key in ("cell", "folder")},
            parent=[run.data.tags[_PARENT] for run in found],
            to_supersede=pd.Series(["to_supersede" in run.data.tags for run in found], dtype=bool),
        )

    def children(self, parent: str) -> pd.DataFrame:
        """One row for each run below `parent`, likewise, those that were repeated too."""
        return rows(self._search(f"tags.`{_PARENT}` = '{parent}'"))

    def attempts(self) -> Counter[str]:
        """How many runs of each cell there are, of any outcome."""
        return Counter(run.data.tags["cell"] for run in self._search("tags.cell != ''"))

    def _search(self, filter_string: str) -> list[Run]:
        """All runs of the experiment that a filter lets pass, in the order of their start."""
        return search(self._client, self.experiment_id, filter_string)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every point of a metric, by step."""
        return history(self._client, run_id, metric)


def rows(runs: list[Run]) -> pd.DataFrame:
    """A row for each run: its parameters, last metrics, `run_id`, `name`, `outcome`, `status`."""
    found = [
        {
            **run.data.params,
            **run.data.metrics,
            "run_id": run.info.run_id,
            "name": run.info.run_name,
            "outcome": run.data.tags["outcome"],
            "status": run.info.status,
        }
        for run in runs
    ]
    return pd.DataFrame(found or {"run_id": [], "name": [], "outcome": [], "status": []})


def one_each(runs: pd.DataFrame) -> pd.DataFrame:
    """Of the rows of cells' runs one for each cell: its result if it has one, else its latest."""
    ordered = runs.assign(done=runs.outcome.isin(DONE)).sort_values("done", kind="stable")
    return ordered.drop_duplicates("cell", keep="last").drop(columns="done")


def has_ended(row: Any, outcome: Outcome) -> bool:
    """Whether the run of a row is closed, with this outcome."""
    return (row.status, row.outcome) == (STATUS[outcome], outcome)


def last_epoch(row: Any) -> int | None:
    """The last epoch that a run has recorded; None if it has none."""
    epoch = getattr(row, "epoch", float("nan"))
    return None if epoch != epoch else int(epoch)


def recorded(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What of a report is recorded: METRICS, and what is below one of them."""
    return {k: float(v) for k, v in metrics.items() if k.split("/")[0] in METRICS}


def is_away(error: BaseException) -> bool:
    """Whether an error says that MLflow cannot be reached or cannot answer now."""
    if isinstance(error, MlflowException):
        return error.error_code in _AWAY
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return error.response.status_code >= 500
    return isinstance(error, requests.RequestException) or _bucket_is_away(error)


def _bucket_is_away(error: BaseException) -> bool:
    """Whether the bucket that a local store's artifacts go to cannot be reached or answer now."""
    # Of an upload boto3 raises an error of its own, whose context is the answer.
    if type(error).__module__ == "boto3.exceptions" and error.__context__ is not None:
        error = error.__context__
    if type(error).__module__ != "botocore.exceptions":
        return False
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError  # an extra

    if isinstance(error, ClientError):
        return bool(error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500)
    return isinstance(error, ConnectionError | HTTPClientError)


def code_tags() -> dict[str, str]:
    """What code runs: its git commit where it is a checkout, and a fingerprint of both packages
    where it is not (a submitted copy), or was edited."""
    folders = [Path(package.__path__[0]) for package in (nflab, nfnet)]
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(folders[0]), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD") or "unknown"
    edited = "-edited" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {"git_commit": commit + edited, "code_fingerprint": digest.hexdigest()[:16]}


def as_text(value: Any) -> str:
    """How a parameter is written: as on the command line, where the absent one reads `none`."""
    if isinstance(value, list | tuple):
        return " ".join(value) or "none"
    return "none" if value is None else str(value)
