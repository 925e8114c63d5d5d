"""Results that are trained again: what becomes of the old ones."""

import pandas as pd

from nflab.recording.outbox import Outbox
from nflab.settings.outcomes import DONE
from nflab.storage.checkpoints import Checkpoints


class Supersession:
    """Which results of a grid's cells are to be replaced, and when they are.

    A result that is to be trained again is first marked in MLflow (tag `to_supersede`), so that a
    command that is killed is gone on with. It counts until its successor has ended; then it is set
    aside (tag `superseded`) and its checkpoints are forgotten. A result whose weights are needed
    and gone has to be replaced too, by this command alone: it bears no mark.
    """

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._without_weights: set[str] = set()
        self._old = pd.DataFrame(columns=["cell", "run_id", "folder"])

    def look(self, runs: pd.DataFrame) -> pd.DataFrame:
        """Of the rows of cells' runs (see `Tracker.cells`) those that nothing is to replace."""
        old = runs.to_supersede | runs.run_id.isin(self._without_weights)
        old &= runs.outcome.isin(DONE)
        self._old = runs[old]
        return runs[~old]

    @property
    def under_way(self) -> bool:
        """Whether results that `look` saw are to be replaced."""
        return len(self._old) > 0

    def demand_all(self, runs: pd.DataFrame) -> None:
        """Marks all results."""
        for run in runs[runs.outcome.isin(DONE) & ~runs.to_supersede].itertuples():
            self._outbox.put("tag", run.run_id, key="to_supersede", value="true")

    def demand_weights(self, runs: pd.DataFrame) -> None:
        """Notes the results of which no checkpoint is left."""
        finished = runs[(runs.outcome == "finished") & ~runs.to_supersede]
        without = [has_no_checkpoint(folder) for folder in finished.folder]
        self._without_weights = set(finished.run_id[without])

    def ended(self, cell: str) -> None:
        """A cell has a new result: it takes the place of all old ones."""
        for run in self._old[self._old.cell == cell].drop_duplicates("run_id").itertuples():
            self._outbox.put("tag", run.run_id, key="superseded", value="true")
            Checkpoints.of_run(run.folder).purge()


def has_no_checkpoint(folder: str) -> bool:
    """Whether a run that keeps all it has in `folder` has no checkpoint."""
    return Checkpoints.of_run(folder).last_mark() is None
