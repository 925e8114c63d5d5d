"""Recorded runs as tables, a row each."""

from typing import Any

import pandas as pd
from mlflow.entities import Run

from nflab.settings.outcomes import DONE, Outcome

STATUS: dict[Outcome, str] = {
    "finished": "FINISHED",
    "diverged": "FINISHED",  # a result, not an error
    "pruned": "KILLED",
    "failed": "FAILED",
    "interrupted": "KILLED",  # until it is continued
}


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
