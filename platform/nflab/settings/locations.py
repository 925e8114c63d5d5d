"""Where results go, as absolute addresses that mean the same in every process of a run."""

import os
import re
from pathlib import Path
from typing import TypeVar

from nflab.settings.config import RunConfig
from nflab.settings.errors import ConfigError, require

T = TypeVar("T", str, str | None)


def check_name(name: str) -> None:
    """Refuses a name of a run that is no name of a folder.

    Raises:
        ConfigError: likewise.
    """
    require(
        re.fullmatch(r"[A-Za-z0-9][\w .+-]{0,99}", name) is not None,
        f"name {name!r} must name a folder: up to 100 letters, digits, spaces and . _ + -",
    )


def checkout() -> Path:
    """The checkout this package is imported from; the working folder if it is installed."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def tracking_uri(run: RunConfig) -> str:
    """MLflow's store or server: the configuration's, the environment's, or the checkout's file.

    Raises:
        ConfigError: it holds a password.
    """
    given = run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    _refuse_password(
        given,
        "the tracking store",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; a database has its own file, "
        "such as ~/.pgpass",
    )
    if given is None:
        return f"sqlite:///{checkout() / 'mlflow.db'}"
    file = given.removeprefix("sqlite:///")
    if "://" in file or file == "databricks":
        return given
    return f"sqlite:///{Path(file).resolve()}"


def storage(run: RunConfig) -> str:
    """Folder or URI of checkpoints and results, likewise.

    Raises:
        ConfigError: it holds a key.
    """
    given = run.storage or os.environ.get("NFLAB_STORAGE") or str(checkout() / "runs")
    _refuse_password(given, "the storage", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return given if "://" in given else str(Path(given).resolve())


def of_drivers() -> Path:
    """Where on this machine the drivers of runs in object storage keep what is their own: the
    environment's folder, so that a copy of the checkout finds it too, or the checkout's."""
    return Path(os.environ.get("NFLAB_OF_DRIVERS", checkout() / "runs")).absolute()


def _refuse_password(uri: str | None, what: str, instead: str) -> None:
    """Addresses are recorded with every run, and shown."""
    named = r"\w*passw(or)?d|\w*secret\w*|\w+_key|\w*token"
    secret = rf"[^/?#@]*:(?!\d+([/?]|$))[^@]*@|[^?#]*\?(.*&)?({named})="
    if uri is not None and re.match(rf"[\w+.-]+://({secret})", uri, re.IGNORECASE):
        raise ConfigError(
            f"the address of {what} holds a password, which every run would record: leave it out "
            f"and {instead}"
        )


def absolute(word: T) -> T | str:
    """The absolute path of what is a file or folder here; other words as they are."""
    if isinstance(word, str) and Path(word).exists():
        return str(Path(word).resolve())
    return word


def browse(run: RunConfig) -> str:
    """The command that shows a person the recorded runs."""
    uri = tracking_uri(run)
    if uri.startswith("http"):
        return f"open {uri}"
    if run.tracking_uri is None and uri == f"sqlite:///{checkout() / 'mlflow.db'}":
        return "make ui"
    return f"mlflow ui --backend-store-uri {uri}"
