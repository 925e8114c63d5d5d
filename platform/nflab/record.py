"""What MLflow is told of one run while it trains, by whoever listens to it."""

from typing import Any

from nflab.config import Config, flat, to_json
from nflab.tracking import Outcome, Tracker

ERROR_LENGTH = 5000
"""Characters of an error that a run is tagged with."""


class RunRecord:
    """One training's run in MLflow: its configuration, each epoch once, and how it ended."""

    def __init__(self, tracker: Tracker, run_id: str, config: Config) -> None:
        """Opens the run, or opens it again: epochs that it has are not written a second time."""
        self._tracker, self.run_id = tracker, run_id
        tracker.reopen(run_id)
        tracker.log_params(run_id, flat(config))
        tracker.add_text(run_id, to_json(config), "config.json")
        self._epoch = int(tracker.metrics(run_id).get("epoch", -1))

    def report(self, metrics: dict[str, Any]) -> None:
        """Writes down what a run reports of an epoch, unless it stands there already, and how far
        the run has come."""
        new = metrics["epoch"] > self._epoch
        self._tracker.log(self.run_id, metrics if new else {}, metrics["epoch"], metrics["outcome"])
        self._epoch = max(self._epoch, metrics["epoch"])

    def finish(self, outcome: Outcome, error: str | None = None) -> None:
        """Writes down how the run ended, and why if it failed."""
        tags = None if error is None else {"error": error[:ERROR_LENGTH]}
        self._tracker.finish(self.run_id, outcome, tags)
