"""The models worth keeping, in MLflow's registry: a registered model for each dataset."""

import re
from collections.abc import Mapping
from pathlib import PurePath

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from nflab.settings.outcomes import Standing, standing

BEST = "best"
"""Alias of the version with the highest validation top-1."""

_FINGERPRINT = "dataset_fingerprint"


def register(
    client: MlflowClient,
    run_id: str,
    model_uri: str,
    dataset: str,
    fingerprint: str,
    metrics: Mapping[str, float],
    settings: str,
) -> ModelVersion:
    """Makes a model of a run a version of its dataset's registered model, once; the alias BEST
    moves to it if its validation top-1 is higher than that of the version that has it.

    Args:
        model_uri: `models:/m-...`, of the model that the run logged.
        dataset: as in the configuration.
        fingerprint: of all images, labels and splits.
        metrics: `val_top1` and `test_top1` in percent.
        settings: what distinguishes the model, in words.
    """
    name = _home(client, dataset, fingerprint)
    figures = {key: f"{metrics[key]:.4f}" for key in ("val_top1", "test_top1")}
    said = (
        f"{settings}: validation top-1 {metrics['val_top1']:.2f} %, "
        f"test top-1 {metrics['test_top1']:.2f} %"
    )
    if not _of_model(client, name, run_id, model_uri):
        client.create_model_version(
            name,
            model_uri,
            run_id,
            tags={**figures, "settings": settings},
            description=said,
            model_id=model_uri.removeprefix("models:/"),
        )
    # The client asks again by itself when an answer is lost, and each time makes a version.
    version, *twins = _of_model(client, name, run_id, model_uri)
    for twin in twins:
        client.delete_model_version(name, twin.version)
    best = client.get_registered_model(name).aliases.get(BEST)
    if best is None or _standing(version) < _standing(client.get_model_version(name, str(best))):
        client.set_registered_model_alias(name, BEST, version.version)
    return version


def registered_name(dataset: str) -> str:
    """What the registered model of a dataset is called, as in `nflab-digits`."""
    return "nflab-" + re.sub(r"[^A-Za-z0-9._-]+", "-", PurePath(dataset).name)


def _home(client: MlflowClient, dataset: str, fingerprint: str) -> str:
    """The name of a registered model for these very images, which is made if it is new."""
    plain = registered_name(dataset)
    for name in (plain, f"{plain}-{fingerprint[:8]}"):
        try:
            client.create_registered_model(
                name,
                tags={_FINGERPRINT: fingerprint},
                description=f"Networks that nflab trained on {PurePath(dataset).name}. "
                f"`models:/{name}@{BEST}` is the best on validation.",
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if client.get_registered_model(name).tags.get(_FINGERPRINT) == fingerprint:
            break
    return name


def _of_model(client: MlflowClient, name: str, run_id: str, model_uri: str) -> list[ModelVersion]:
    """The versions that are a model of a run, the oldest first."""
    found = client.search_model_versions(f"name = '{name}' AND run_id = '{run_id}'")
    same = [version for version in found if version.source == model_uri]
    return sorted(same, key=lambda version: int(version.version))


def _standing(version: ModelVersion) -> Standing:
    return standing(float(version.tags["val_top1"]), int(version.version))
