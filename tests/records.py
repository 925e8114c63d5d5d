"""What MLflow has recorded, as tests read it."""

from mlflow import MlflowClient
from mlflow.entities import Run


def family(uri: str, experiment: str) -> tuple[Run, list[Run]]:
    """The one parent of an experiment and its children, in the order of their names."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    runs = client.search_runs([found.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} <= {parent.info.run_id}
    return parent, sorted(children, key=lambda run: str(run.info.run_name))


def children_of(client: MlflowClient, parent: Run) -> list[Run]:
    """The runs below a parent, where its experiment may have several."""
    below = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    return list(client.search_runs([parent.info.experiment_id], below))
