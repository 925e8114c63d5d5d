"""The connection to an MLflow store or server, and what its errors mean."""

import fcntl
import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import requests
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType
from mlflow.exceptions import MlflowException

from nflab.settings.errors import ConfigError

_AWAY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
"""What MLflow's client says of a server that cannot be reached, or cannot answer now."""

# The client's own patience with a server that is away: half a minute, not four.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")

# Not for a person: bars of short downloads, where each run is, how a new store was laid out.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

logging.getLogger("mlflow").setLevel(logging.WARNING)

_REJECTED = (
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)
"""What MLflow says of a request that it will never take."""

_NOT_ITS_WORDS = "API request to "
"""How MLflow's client begins to tell of an answer that is not in MLflow's own form."""


def connect(uri: str) -> MlflowClient:
    """A client of an MLflow store or server.

    Raises:
        ConfigError: the store cannot be opened, or no server answers within 2 seconds.
    """
    try:
        if uri.startswith("http"):
            urlopen(f"{uri.rstrip('/')}/health", timeout=2).close()
        elif uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        with _alone(uri):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
    except Exception as error:  # drivers of stores raise their own kinds
        raise unusable(uri, error) from None
    return client


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """While in use, no other process lays out the tables of a store that is a file: MLflow does so
    when it first opens one, and two at once fail."""
    file = uri.removeprefix("sqlite:///")
    if file == uri:
        yield
        return
    lock = Path(f"{file}.lock")
    with lock.open("a") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


def artifact_root(uri: str, storage: str, experiment: str) -> str | None:
    """Where the artifacts of an experiment go; None if a server decides.

    Raises:
        ConfigError: they could not be written there.
    """
    if uri.startswith("http"):
        return None
    if storage.startswith("gs://"):
        try:
            importlib.import_module("google.cloud.storage")  # an extra, with which MLflow writes
        except ImportError:
            raise ConfigError(
                f"artifacts cannot be kept in {storage} without Google's own client: pip install "
                "google-cloud-storage, or give a tracking server, which keeps them itself"
            ) from None
    return f"{storage}/mlflow-artifacts/{experiment}"


def unusable(uri: str, error: Exception) -> ConfigError:
    if isinstance(error, MlflowException) and error.error_code == "UNAUTHENTICATED":
        return ConfigError(
            f"the tracking store {uri} refuses the user and password: set MLFLOW_TRACKING_USERNAME "
            "and MLFLOW_TRACKING_PASSWORD, or write them into ~/.mlflow/credentials"
        )
    return ConfigError(f"cannot open the tracking store {uri}: {str(error).splitlines()[0]}")


def search(
    client: MlflowClient,
    experiment_id: str,
    filter_string: str = "",
    view: int = ViewType.ACTIVE_ONLY,
) -> list[Run]:
    """All runs of an experiment that a filter lets pass, in the order of their start."""
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs(
            [experiment_id],
            filter_string=filter_string,
            run_view_type=view,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        runs += page
        token = page.token
        if not token:
            return runs


def history(client: MlflowClient, run_id: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric, by step."""
    points = client.get_metric_history(run_id, metric)
    return sorted((point.step, point.value) for point in points)


def is_rejected(error: BaseException) -> bool:
    """Whether MLflow itself says, in its own words, that it will never take a request.

    What stands between here and MLflow (a gateway, a proxy, a login that has run out) may answer
    with the same status, and take the request a minute later.
    """
    if isinstance(error, MlflowException):
        return error.error_code in _REJECTED and not str(error).startswith(_NOT_ITS_WORDS)
    if isinstance(error, requests.HTTPError) and error.response is not None:
        with suppress(ValueError, AttributeError):
            return error.response.json().get("error_code") in _REJECTED
    return False


def is_away(error: BaseException) -> bool:
    """Whether an error says that MLflow cannot be reached or cannot answer now."""
    if isinstance(error, MlflowException):
        return error.error_code in _AWAY or str(error).startswith(_NOT_ITS_WORDS)
    if isinstance(error, requests.HTTPError):
        return not is_rejected(error)
    return isinstance(error, requests.RequestException) or _bucket_is_away(error)


def _bucket_is_away(error: BaseException) -> bool:
    """Whether the bucket that a local store's artifacts go to cannot be reached or answer now."""
    # Of an upload boto3 raises an error of its own, whose context is the answer.
    if type(error).__module__ == "boto3.exceptions" and error.__context__ is not None:
        error = error.__context__
    if type(error).__module__ == "google.api_core.exceptions":
        code = getattr(error, "code", None)  # none if it gave up trying
        return code is None or code == 429 or code >= 500
    if type(error).__module__ != "botocore.exceptions":
        return False
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError  # an extra

    if isinstance(error, ClientError):
        return bool(error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500)
    return isinstance(error, ConnectionError | HTTPClientError)
