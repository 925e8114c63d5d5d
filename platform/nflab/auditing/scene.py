"""What MLflow, Optuna's study and the disk say of one run, sweep or grid."""

from collections.abc import Sequence
from functools import cached_property
from typing import cast

from nflab.auditing.run_folder import RunFolder
from nflab.recording.archive import RecordedRun
from nflab.recording.outbox import Outbox
from nflab.recording.tables import STATUS
from nflab.recording.tracker import Tracker
from nflab.searching.study import StudyFile, Trial
from nflab.searching.trial_ledger import trial_folder
from nflab.settings.outcomes import Outcome, Standing, front, standing
from nflab.storage.checkpoints import Checkpoints, Mark

_ENDS = ("finished", "pruned", "diverged", "failed")


class Scene:
    """The three places, read once, and the ways in which they are changed."""

    def __init__(
        self,
        uri: str,
        storage: str,
        experiment: str | None,
        name: str,
        roots: Sequence[RecordedRun],
        children: Sequence[RecordedRun],
        bare: set[str],
    ) -> None:
        """Reads the disk and the study.

        Args:
            experiment: whose run it is; None if nothing says so.
            roots: MLflow's runs of that name, the oldest first: one, if all is well, of the same id
                as the folder.
            children: MLflow's runs of its trials and cells.
            bare: ids of those runs that lack their `config.json`.
        """
        self._uri, self._storage = uri, storage
        self.experiment, self.name = experiment, name
        self.folder = RunFolder(storage, name)
        identity = self.folder.identity
        own = [run for run in roots if identity and run.tags.get("record") == identity.id]
        self.roots = [*own, *(run for run in roots if run not in own)]
        self.children, self.bare = list(children), bare
        self.study = StudyFile(self.folder.own / "study.db", name)
        self.trials: dict[int, Trial] = {}
        self.unreadable: str | None = None
        if self.study.exists:
            try:
                self.trials = {trial.number: trial for trial in self.study.trials()}
            except OSError as error:
                self.unreadable = str(error)

    @property
    def root(self) -> RecordedRun | None:
        """MLflow's run of the whole."""
        return self.roots[0] if self.roots else None

    @cached_property
    def runs(self) -> list[RecordedRun]:
        """Whole, trials and cells."""
        return [*self.roots, *self.children]

    @cached_property
    def places(self) -> dict[str, RecordedRun]:
        """Folder of a run, below that of the whole -> MLflow's run."""
        return {self.place(run): run for run in reversed(self.runs)}

    def place(self, run: RecordedRun) -> str:
        """Where a run keeps its checkpoints, below the folder of the whole; "" is itself."""
        if "cell" in run.tags:
            return "/".join(run.tags["folder"].split("/")[-2:])
        number = number_of(run)
        return "" if number is None else place_of_trial(number)

    def label(self, run: RecordedRun) -> str:
        """How a person calls a run."""
        if "cell" in run.tags:
            return f"{self.name}, cell {run.tags['cell']}"
        number = number_of(run)
        return self.name if number is None else f"{self.name}, trial {number}"

    def trial(self, run: RecordedRun) -> Trial | None:
        """What the study says of a run, if it makes sense."""
        found = self.trials.get(number_of(run) or 0)
        return found if found is not None and found.is_sound else None

    def outcome(self, run: RecordedRun) -> Outcome:
        """What a run became, now that no process runs it: as the study says, else as MLflow's own
        record does."""
        said = run.tags.get("outcome")
        trial = self.trial(run)
        if trial is not None and not (closed(run) and not trial.has_ended):
            said = trial.outcome if trial.has_ended else "interrupted"
        if said in STATUS:
            return said
        if said != "running" and run.status == "FINISHED":
            return "finished"
        return "failed" if said != "running" and run.status == "FAILED" else "interrupted"

    @cached_property
    def winners(self) -> list[int]:
        """Numbers of the trials that no other of their sweep beats: of one aim, of the best; none
        as long as the study lacks the end of one that finished."""
        for run in self.children:
            trial = self.trial(run)
            if trial is not None and not trial.has_ended and closed(run):
                return []
        done = [t for t in self.trials.values() if t.is_sound and t.outcome == "finished"]
        ended = {t.number: t.standing for t in done if t.has_ended}
        return front({number: one for number, one in ended.items() if one is not None})

    @cached_property
    def finished_cells(self) -> dict[str, list[RecordedRun]]:
        """List of cells that compete -> those that finished, the best first."""
        found: dict[str, list[RecordedRun]] = {}
        for run in sorted(self.children, key=standing_of):
            rivals = run.tags.get("rivals")
            if rivals and self.outcome(run) == "finished":
                found.setdefault(rivals, []).append(run)
        return found

    @cached_property
    def kept_cells(self) -> dict[str, RecordedRun]:
        """List of cells that compete -> the best of those that have a checkpoint, if any has."""
        return {
            rivals: kept[0]
            for rivals, runs in self.finished_cells.items()
            if (kept := [r for r in runs if "superseded" not in r.tags and self.has_checkpoint(r)])
        }

    def has_checkpoint(self, run: RecordedRun) -> bool:
        """Whether a run has one that it could go on from."""
        return any(saved.complete for saved in self.folder.checkpoints.get(self.place(run), []))

    @cached_property
    def tracker(self) -> Tracker:
        """What changes MLflow's runs."""
        assert self.experiment is not None
        return Tracker(self._uri, self._storage, self.experiment)

    def checkpoints(self, place: str) -> Checkpoints:
        """What changes a run's checkpoints."""
        return Checkpoints.of_run(f"{self.folder.address}/{place}".rstrip("/"))

    def finish(self, run: RecordedRun, outcome: Outcome) -> None:
        """Closes a run in MLflow."""
        self.tracker.finish(run.run_id, outcome, when=run.ended)

    def add_config(self, run: RecordedRun, text: str) -> None:
        """Stores the configuration of a run in MLflow."""
        self.tracker.add_text(run.run_id, text, "config.json")

    def add_top1s(self, run: RecordedRun, top1s: dict[int, float]) -> None:
        """Records the validation top-1 of epochs in MLflow."""
        for epoch, value in top1s.items():
            self.tracker.log(run.run_id, {"epoch": epoch, "val_top1": value}, epoch)

    def keep_last_and_best(self, run: RecordedRun, marks: Sequence[Mark]) -> None:
        """Deletes all other checkpoints of a run."""
        top1s = dict(self.tracker.history(run.run_id, "val_top1"))
        epochs = [epoch for epoch, step in marks if step == 0] or [max(marks)[0]]
        best = min(epochs, key=lambda epoch: standing(top1s.get(epoch, -1.0), epoch))
        self.checkpoints(self.place(run)).purge({max(marks), best})

    def send(self) -> None:
        """Sends what waits for MLflow.

        Raises:
            ConfigError: MLflow does not answer, or will never take it.
        """
        outbox = Outbox(self.tracker, self.folder.own / "unsent")
        try:
            outbox.drain()
        finally:
            outbox.close()


def number_of(run: RecordedRun) -> int | None:
    """Which trial a run is, from 1; None if it is none."""
    return int(run.tags["trial"]) if "trial" in run.tags else None


def standing_of(run: RecordedRun) -> Standing:
    """How a run stands among those that it competes with."""
    return standing(top1(run), run.tags.get("cell", ""))


def top1(run: RecordedRun) -> float:
    """Its last validation top-1; -1 if it has none."""
    return run.metrics.get("val_top1", -1.0)


def place_of_trial(number: int) -> str:
    """Where a trial keeps its checkpoints, below the folder of its sweep."""
    return trial_folder("", number).lstrip("/")


def closed(run: RecordedRun) -> bool:
    """Whether MLflow shows the end of a run, without a contradiction and with its result."""
    outcome = run.tags.get("outcome")
    if outcome not in _ENDS or (outcome == "finished" and "val_top1" not in run.metrics):
        return False
    return run.status == STATUS[cast(Outcome, outcome)]
