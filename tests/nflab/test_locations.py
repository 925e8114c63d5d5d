"""Addresses of stores and storages, which every run records."""

import pytest

from nflab.settings import locations
from nflab.settings.config import RunConfig
from nflab.settings.errors import ConfigError

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    "uri",
    [
        f"http://user:{SECRET}@mlflow.example:5000",
        f"https://:{SECRET}@mlflow.example",
        f"postgresql+psycopg://user:{SECRET}@database.example/mlflow",
        f"postgresql://database.example/mlflow?user=me&password={SECRET}",
        f"postgresql://database.example/mlflow?sslpassword={SECRET}",
        f"postgresql://user:{SECRET}/x@database.example/mlflow",
    ],
)
def test_a_store_whose_address_holds_a_password_is_refused(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for run in (RunConfig(), RunConfig(tracking_uri=uri)):
        with pytest.raises(ConfigError, match=r"holds a password.*MLFLOW_TRACKING_USER") as caught:
            locations.tracking_uri(run)
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri", [f"s3://AKIA:{SECRET}/x@bucket/x", f"s3://bucket?secret_key={SECRET}"]
)
def test_a_storage_whose_address_holds_a_key_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"holds a password.*AWS_ACCESS_KEY_ID") as caught:
        locations.storage(RunConfig(storage=uri))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:5000",
        "http://[::1]:5000/mlflow",
        "postgresql://user@database.example:5432/mlflow?sslmode=require",
        "sqlite:////data/a:b@c/mlflow.db",
        "databricks://profile",
    ],
)
def test_other_stores_are_taken_as_they_are(uri: str) -> None:
    assert locations.tracking_uri(RunConfig(tracking_uri=uri)) == uri


def test_other_storages_are_taken_as_they_are() -> None:
    for uri in ("s3://bucket/runs?endpoint_override=127.0.0.1:9000", "/data/a:b@c"):
        assert locations.storage(RunConfig(storage=uri)) == uri
