"""MLflow: what is recorded of every run, written in batches from one place, and read back.

One parent run a sweep, one child run a trial; a single training is a run of its own.
"""

import json
import math
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType
from mlflow.entities.lifecycle_stage import LifecycleStage
from mlflow.exceptions import MlflowException

from nflab.learning.classifier import DESCRIPTION
from nflab.recording import registry
from nflab.recording.board import RunBoard
from nflab.recording.client import artifact_root, connect, history, search, unusable
from nflab.recording.notes import VIEW_TAG
from nflab.recording.serving import log_model
from nflab.recording.tables import STATUS, rows
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import as_text
from nflab.settings.locations import WEIGHTS
from nflab.settings.outcomes import Outcome

SORTED = ("kind", "parent", "trial", "cell")
"""Tags that are parameters too, for MLflow's table of runs sorts by those alone."""

DIGEST_LENGTH = 36
"""Characters of a fingerprint that MLflow's datasets hold."""

PARENT = "mlflow.parentRunId"
"""Tag of a run that is another's child."""


class Tracker:
    """Writes and reads the runs of one MLflow experiment."""

    def __init__(self, uri: str, storage: str, experiment: str) -> None:
        """Opens the store, and makes the experiment if it is new.

        Args:
            uri: MLflow store or server.
            storage: where artifacts go if `uri` is a local store; a server decides for itself.

        Raises:
            ConfigError: store or artifacts cannot be opened, or no server answers within 2 seconds.
        """
        # A store that is a file would put artifacts beside the process's working folder.
        root = artifact_root(uri, storage, experiment)
        self.uri = uri
        self.experiment = experiment
        self._client = connect(uri)
        try:
            found = self._client.get_experiment_by_name(experiment)
            self.experiment_id = (
                found.experiment_id
                if found
                else self._client.create_experiment(experiment, artifact_location=root)
            )
            if found is not None and found.lifecycle_stage == LifecycleStage.DELETED:
                self._client.restore_experiment(self.experiment_id)
                print(f"the experiment {experiment}, which was deleted in MLflow, is restored")
        except Exception as error:  # drivers of stores raise their own kinds
            raise unusable(uri, error) from None

    def __getstate__(self) -> dict[str, Any]:
        # A store's connections stay in the process that opened them.
        return {key: value for key, value in vars(self).items() if key != "_client"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._client = MlflowClient(self.uri)

    def introduce(self, tags: Mapping[str, str]) -> None:
        """Sets the tags of the experiment that it lacks, and how its runs are listed; raises
        ConfigError if the store cannot be used."""
        try:
            known = self._client.get_experiment(self.experiment_id).tags
            for key, text in tags.items():
                if key not in known or (key == VIEW_TAG and known[key] != text):
                    self._client.set_experiment_tag(self.experiment_id, key, text)
        except Exception as error:  # drivers of stores raise their own kinds
            raise unusable(self.uri, error) from None

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
        found = self.marked(key)
        if not found:
            tags = {**tags, "outcome": "running", "record": key}
            if parent is not None:
                tags[PARENT] = parent
            self._client.create_run(self.experiment_id, start_time=when, run_name=name, tags=tags)
            found = self.marked(key)
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
        return str(self._first(self.marked(key)).info.run_id)

    def marked(self, key: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        """The runs that were created with this mark: one, if all is well."""
        return self.search(f"tags.record = '{key}'", view)

    def _first(self, marked: list[Run]) -> Run:
        if not marked:
            raise ConfigError("it was deleted")
        return marked[0]

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

    def log_anew(self, run_id: str, metrics: Mapping[str, float]) -> None:
        """Records those metrics of a whole, at step 0, whose last value is another: what is
        concluded twice is recorded once."""
        known = self.metrics(run_id)
        new = {
            key: value
            for key, value in metrics.items()
            if known.get(key) != value and not (math.isnan(value) and math.isnan(known.get(key, 0)))
        }
        if new:
            self.log(run_id, new, 0)

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
        found = self.search(f"tags.`{PARENT}` = '{parent}' AND tags.trial != ''")
        return rows(found).assign(number=[int(run.data.tags["trial"]) for run in found])

    def cells(self) -> pd.DataFrame:
        """One row for each run of a cell, of any grid of the experiment, likewise; `cell` is its
        identity, `folder` its checkpoints and logs, `parent` its grid; `to_supersede` says that
        its result is to be repeated; `code_fingerprint` and `torch` are those that it was computed
        with. Those that were repeated on purpose are left out."""
        found = [r for r in self.search("tags.cell != ''") if "superseded" not in r.data.tags]
        told = ("cell", "folder", "code_fingerprint", "torch")
        return rows(found).assign(
            **{key: [run.data.tags.get(key) for run in found] for key in told},
            parent=[run.data.tags[PARENT] for run in found],
            to_supersede=pd.Series(["to_supersede" in run.data.tags for run in found], dtype=bool),
        )

    def children(self, parent: str) -> pd.DataFrame:
        """One row for each run below `parent`, those that were repeated too, with its `gpu`."""
        found = self.search(f"tags.`{PARENT}` = '{parent}'")
        return rows(found).assign(gpu=[run.data.tags.get("gpu") for run in found])

    def attempts(self) -> Counter[str]:
        """How many runs of each cell there are, of any outcome."""
        return Counter(run.data.tags["cell"] for run in self.search("tags.cell != ''"))

    def search(self, filter_string: str, view: int = ViewType.ACTIVE_ONLY) -> list[Run]:
        """All runs of the experiment that a filter lets pass, in the order of their start."""
        return search(self._client, self.experiment_id, filter_string, view)

    def board(self, name: str, run_id: str) -> RunBoard:
        """Where processes claim the runs of a name, this one `run_id`."""
        return RunBoard(self._client, self.experiment_id, name, run_id)

    def withdraw(self, run_id: str) -> None:
        """Deletes a run that has only begun."""
        self._client.delete_run(run_id)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of every point of a metric, by step."""
        return history(self._client, run_id, metric)
