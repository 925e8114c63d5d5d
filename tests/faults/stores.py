"""What a test reads of a run: MLflow, Optuna's study and the logs."""

from pathlib import Path

import optuna
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import TrialState

STATES = {
    "finished": (TrialState.COMPLETE, "FINISHED"),
    "diverged": (TrialState.COMPLETE, "FINISHED"),
    "pruned": (TrialState.PRUNED, "KILLED"),
    "failed": (TrialState.FAIL, "FAILED"),
    "interrupted": (TrialState.WAITING, "KILLED"),
}


class Stores:
    """The stores of a run called `name`, in a temporary folder."""

    def __init__(self, folder: Path, experiment: str, name: str, uri: str | None = None) -> None:
        """`uri`: of a server; else MLflow's store is a file in the folder."""
        self.folder, self.experiment, self.name = folder, experiment, name
        self.uri = uri or f"sqlite:///{folder}/mlflow.db"
        self.env = {"MLFLOW_TRACKING_URI": self.uri, "NFLAB_STORAGE": str(folder / "runs")}

    def runs(self) -> list[Run]:
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name(self.experiment)
        return list(client.search_runs([experiment.experiment_id])) if experiment else []

    def parent(self) -> Run:
        (parent,) = [run for run in self.runs() if "mlflow.parentRunId" not in run.data.tags]
        return parent

    def children(self) -> dict[int, Run]:
        """A sweep's trials; fails if one of them has two runs."""
        found = [run for run in self.runs() if "mlflow.parentRunId" in run.data.tags]
        children = {int(run.data.tags["trial"]): run for run in found}
        assert len(children) == len(found)
        return children

    def outcome(self) -> tuple[str, str]:
        """Status and outcome of the run, or of the sweep's parent."""
        parent = self.parent()
        return parent.info.status, parent.data.tags["outcome"]

    def outcomes(self) -> dict[int, str]:
        return {number: run.data.tags["outcome"] for number, run in self.children().items()}

    def tags(self, number: int) -> dict[str, str]:
        return dict(self.children()[number].data.tags)

    def steps(self, run: Run, metric: str = "val_top1") -> list[int]:
        points = MlflowClient(self.uri).get_metric_history(run.info.run_id, metric)
        return sorted(point.step for point in points)

    def study(self) -> optuna.Study:
        url = f"sqlite:///{self.folder}/runs/{self.name}/study.db"
        return optuna.load_study(study_name=self.name, storage=url)

    def agree(self, trials: int) -> None:
        """MLflow and the study hold the same trials, with the same ends, each epoch once."""
        children = self.children()
        assert sorted(children) == list(range(1, trials + 1))
        studied = self.study().trials
        assert len(studied) == trials
        for trial in studied:
            run = children[trial.number + 1]
            assert (trial.state, run.info.status) == STATES[run.data.tags["outcome"]]
            steps = self.steps(run)
            assert steps == list(range(1, len(steps) + 1))
            if run.data.tags["outcome"] in ("finished", "pruned"):
                assert len(trial.intermediate_values) == len(steps)

    def logs(self) -> dict[int, str]:
        """What rank 0 of each trial has logged."""
        return {
            int(path.parts[-3]): path.read_text()
            for path in (self.folder / "runs" / self.name).glob("trials/*/logs/rank-0.log")
        }
