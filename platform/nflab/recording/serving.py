"""A trained network as an MLflow model, which `mlflow models serve` and `load_model` understand."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import mlflow.pyfunc
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

import nflab
import nfnet
from nflab.learning.classifier import DESCRIPTION, ImageClassifier
from nflab.settings.locations import WEIGHTS

_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec(DataType.binary, "image")]),
    outputs=Schema(
        [
            ColSpec(DataType.string, "class"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Array(DataType.double), "probabilities"),
        ]
    ),
)

_NEEDED = ("numpy", "pandas", "pillow", "safetensors", "torch", "torchvision")


class Served(PythonModel):
    """Takes a table with a column `image` (bytes of image files; base64 over HTTP), returns the
    likeliest class, its probability, and the probabilities of all classes in their order."""

    def load_context(self, context: Any) -> None:
        """Loads the network, once."""
        self._classifier = ImageClassifier(Path(context.artifacts["weights"]).parent)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """One row of answers for each row of images."""
        rows = self._classifier.probabilities(list(model_input["image"]))
        best = rows.argmax(dim=1).tolist()
        return pd.DataFrame(
            {
                "class": [self._classifier.class_names[index] for index in best],
                "probability": rows.max(dim=1).values.double().tolist(),
                "probabilities": rows.double().tolist(),
            }
        )


def log_model(
    uri: str, experiment_id: str, run_id: str, folder: Path, example: bytes, name: str = "model"
) -> str:
    """Records the network of a checkpoint as a model of a run, of each name once.

    Args:
        uri: MLflow store or server.
        experiment_id, run_id: of the run.
        folder: of the checkpoint.
        example: an image file's bytes, shown with the model as an example of its input.
        name: what distinguishes it among the run's.

    Returns:
        The model's address for `mlflow.pyfunc.load_model` and `mlflow models serve -m`.
    """
    client = MlflowClient(uri)
    mine = f"source_run_id = '{run_id}'"
    for earlier in client.search_logged_models([experiment_id], filter_string=mine):
        if earlier.name != name:
            continue
        if earlier.status == LoggedModelStatus.READY:
            return str(earlier.model_uri)
        client.delete_logged_model(earlier.model_id)  # its files came to no end
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment_id=experiment_id)
    logged = Model.log(
        artifact_path=None,
        name=name,
        flavor=mlflow.pyfunc,
        run_id=run_id,
        # As code: a pickle would run whatever is in it where it is loaded.
        python_model=__file__,
        artifacts={"weights": str(folder / WEIGHTS), "description": str(folder / DESCRIPTION)},
        code_paths=[str(Path(package.__path__[0])) for package in (nfnet, nflab)],
        signature=_SIGNATURE,
        input_example=pd.DataFrame({"image": [example]}),
        # Without the tag of a build, which no registry knows.
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in _NEEDED],
    )
    return str(logged.model_uri)


# What MLflow loads when it runs this file as a model's code.
mlflow.models.set_model(Served())
