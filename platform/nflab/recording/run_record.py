"""What MLflow is told of one run while it trains, by whoever listens to it."""

import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from nflab.analysis.figures import draw_agc
from nflab.data import load_dataset
from nflab.learning.diagnostics import Trace, verdict
from nflab.recording.metrics import to_record
from nflab.recording.outbox import Outbox
from nflab.settings.config import Config
from nflab.settings.leaves import as_text, flat, replace
from nflab.settings.outcomes import Outcome
from nflab.settings.serialization import to_json

PROFILE = "profile.json.gz"
"""Artifact of a run that was profiled; https://ui.perfetto.dev shows it."""

ERROR_LENGTH = 5000
"""Characters of an error that a run is tagged with."""


def dataset_entry(config: Config) -> dict[str, Any]:
    """What `Tracker.log_dataset` is told of a configuration's dataset, of all of it: MLflow keeps
    one entry of a digest, whoever trains on a part."""
    dataset = load_dataset(replace(config, subset=1.0))
    return {
        "name": config.data.dataset,
        "fingerprint": dataset.fingerprint,
        "sizes": dict(dataset.sizes),
    }


class RunRecord:
    """One training's run in MLflow: its configuration, each epoch once, and how it ended."""

    def __init__(self, outbox: Outbox, run: str, config: Config, epoch: int | None = None) -> None:
        """Begins the record of a run that is open, or goes on with it.

        Args:
            run: its id, or what `Outbox.start` returned.
            epoch: the last one that MLflow has; None if it has none.
        """
        self._outbox, self._run = outbox, run
        self._clipping = config.optimizer.clipping
        self._trace: dict[int, Trace] = {}
        self._epoch = -1 if epoch is None else epoch
        self._cost = 0.0
        params = {key: as_text(value) for key, value in flat(config).items()}
        outbox.put("log_params", run, params=params)
        outbox.put("log_dataset", run, **dataset_entry(config))
        outbox.put("add_text", run, text=to_json(config), file="config.json")

    def report(self, metrics: dict[str, Any]) -> float:
        """Writes down what a run reports of an epoch, unless it stands there already, and how far
        the run has come; a report's `remark` as the tag `continued_with`, and its `gpu`.

        Returns:
            USD that the epoch cost, as far as it is known; 0 if it stood there already.
        """
        epoch = metrics["epoch"]
        before, self._cost = self._cost, metrics.get("cost_usd", 0.0)
        spent = self._cost - before if epoch > self._epoch else 0.0
        if "agc" in metrics:
            self._trace[epoch] = metrics["agc"]
        if "profile" in metrics:
            self._outbox.put_file(self._run, PROFILE, partial(_write, metrics["profile_trace"]))
            self._outbox.put("tag", self._run, key="profile", value=metrics["profile"])
        if "gpu" in metrics:
            self._outbox.put("tag", self._run, key="gpu", value=metrics["gpu"])
        if "remark" in metrics:
            self._outbox.put("tag", self._run, key="continued_with", value=metrics["remark"])
        self._outbox.put(
            "log",
            self._run,
            metrics=to_record(metrics) if epoch > self._epoch else {},
            step=epoch,
            when=int(time.time() * 1000),
            outcome=metrics["outcome"],
        )
        self._epoch = max(self._epoch, epoch)
        return spent

    def finish(self, outcome: Outcome, error: str | None = None) -> None:
        """Writes down how the run ended, and why if it failed."""
        tags = {} if error is None else {"error": error[:ERROR_LENGTH]}
        trace = pd.DataFrame(row for epoch in sorted(self._trace) for row in self._trace[epoch])
        if len(trace) and self._clipping is not None:
            said = verdict(trace, self._clipping)
            tags["agc_verdict"] = said
            drawing = partial(draw_agc, trace, self._clipping, said)
            try:
                self._outbox.put_file(self._run, "agc.png", drawing)
            except Exception:  # a figure is no reason to lose a result
                print(f"the figure agc.png could not be drawn:\n{traceback.format_exc()}")
            self._outbox.put_file(self._run, "agc.parquet", trace.to_parquet)
        when = int(time.time() * 1000)
        self._outbox.put("finish", self._run, outcome=outcome, tags=tags, when=when)


def _write(content: bytes, file: Path) -> None:
    file.write_bytes(content)
