"""Where results go, as absolute addresses that mean the same in every process of a run."""

import os
import re
from pathlib import Path

from nflab.settings.config import Config, RunConfig
from nflab.settings.errors import ConfigError, require
from nflab.settings.leaves import C, flat, replace
from nfnet.pretrained import find_in_folder

WEIGHTS = "weights.pt"
"""File of a checkpoint with the network's weights."""

_NAME_BYTES = 200
"""A folder's name may have 255 bytes, and files in it are named after it."""


def check_name(name: str) -> None:
    """Refuses a name of a run that is no name of a folder.

    Raises:
        ConfigError: likewise.
    """
    short = len(name.encode(errors="surrogateescape")) <= _NAME_BYTES
    require(
        short and re.fullmatch(r"[A-Za-z0-9][\w .+-]{0,99}", name) is not None,
        f"name {name!r} must name a folder: up to 100 letters (half as many, or fewer, of scripts "
        "other than Latin), digits, spaces and . _ + -",
    )


def checkout() -> Path:
    """The checkout this package is imported from; the working folder if it is installed."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() else Path.cwd()


def tracking_uri(run: RunConfig) -> str:
    """MLflow's store or server: the configuration's, the environment's, or the checkout's file.

    Raises:
        ConfigError: it holds a password, or is a folder.
    """
    given = run.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not given:
        return f"sqlite:///{checkout() / 'mlflow.db'}"
    refuse_password(
        given,
        "the tracking store",
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD; a database has its own file, "
        "such as ~/.pgpass",
    )
    file = given.removeprefix("sqlite:///")
    if "://" in file or file == "databricks":
        return given
    path = _absolute(file)
    require(
        not path.is_dir(), f"the tracking store {path} is a folder: give a file, such as mlflow.db"
    )
    return f"sqlite:///{path}"


def storage(run: RunConfig) -> str:
    """Folder or URI of checkpoints and results, likewise.

    Raises:
        ConfigError: it holds a key, or is in a store that keeps no file whole.
    """
    given = run.storage or os.environ.get("NFLAB_STORAGE") or str(checkout() / "runs")
    refuse_password(given, "the storage", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    # pyarrow empties a file of Azure before it writes it anew, and moves none there.
    require(
        re.match(r"(abfss?|wasbs?|az|azure)://", given) is None,
        f"the storage {given} cannot be in Azure's object storage, where a run that is ended while "
        "it writes a file would lose it: mount the container (blobfuse2) and give its path",
    )
    return given if "://" in given else str(_absolute(given))


def of_drivers() -> Path:
    """Where on this machine the drivers of runs in object storage keep what is their own: the
    environment's folder, so that a copy of the checkout finds it too, or the checkout's."""
    return Path(os.environ.get("NFLAB_OF_DRIVERS") or checkout() / "runs").absolute()


def refuse_passwords(config: Config) -> None:
    """Refuses a configuration with an address that holds a password or a token, before it is shown.

    Raises:
        ConfigError: likewise; it does not show it.
    """
    for name, value in flat(config).items():
        if isinstance(value, str) and name not in ("tracking_uri", "storage"):
            refuse_password(value, name, "fetch what is there, to give its path")
    tracking_uri(config.run)
    storage(config.run)


def refuse_password(address: str, what: str, instead: str) -> None:
    """Refuses an address that holds a password or a token: addresses are recorded and shown.

    A user's name alone is none, but of a web server's it may be a token.

    Raises:
        ConfigError: likewise.
    """
    named = r"\w*passw(or)?d|\w*secret\w*|(\w+[_-])?(key|token|signature|credentials?)|apikey|sig"
    secret = rf"[^/?#@]*:(?!\d+([/?]|$))[^@]*@|[^?#]*\?(.*&)?({named})="
    token = r"(https?|ray)://[^/?#]*@"
    if re.match(rf"{token}|[\w.+-]+://({secret})", address, re.IGNORECASE):
        raise ConfigError(
            f"the address of {what} holds a password, or a token, which every run would record: "
            f"leave it out and {instead}"
        )


def masked(text: str) -> str:
    """A text without what stands before the @ of addresses in it."""
    return re.sub(r"(\w://)[^/\s@'\"]+@", r"\1***@", text)


def located(config: C) -> C:
    """A configuration that means the same in every folder: all paths in it are absolute.

    Raises:
        ConfigError: an address holds a password, or is none.
    """
    refuse_passwords(config)
    run = config.run
    return replace(
        config,
        dataset=absolute(config.data.dataset),
        pretrained=None if config.model.pretrained is None else _weights(config.model.pretrained),
        tracking_uri=tracking_uri(run) if run.tracking_uri else None,
        storage=storage(run) if run.storage else None,
    )


def place(word: str, what: str) -> str:
    """The absolute path of a file or folder that is there or is to be made; an address as it is.

    Args:
        what: is at it, in words.

    Raises:
        ConfigError: it holds a password.
    """
    refuse_password(word, what, "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    return word.rstrip("/") if "://" in word else str(_absolute(word))


def absolute(word: str) -> str:
    """The absolute path of what is a file or folder here; other words, and names that are those of
    no file, as they are."""
    known = re.fullmatch(r"digits(:\d-\d)?|fashion-mnist|hub", word) is not None or "://" in word
    return word if known or not _absolute(word).exists() else str(_absolute(word))


def _weights(word: str) -> str:
    """The file of weights: that of a checkpoint, if it is its folder that is given."""
    require(
        not word.startswith("models:/"),
        f"fetch {word} first, so that it is known by its contents: mlflow artifacts download "
        f"--artifact-uri {word} --dst-path FOLDER; then give FOLDER/artifacts",
    )
    found = absolute(word)
    if "://" in found or not Path(found).is_dir():
        return found
    try:
        return str(find_in_folder(Path(found)))
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _absolute(path: str) -> Path:
    """Of one place always the same: `~` is the home, links are followed."""
    try:
        return Path(path).expanduser().resolve()
    except RuntimeError as error:  # there is no such user; a circle of links
        raise ConfigError(f"{path} is no path: {error}") from None


def browse(run: RunConfig) -> str:
    """The command that shows a person the recorded runs."""
    uri = tracking_uri(run)
    if uri.startswith("http"):
        return f"open {uri}"
    if run.tracking_uri is None and uri == f"sqlite:///{checkout() / 'mlflow.db'}":
        return "make ui"
    return f"mlflow ui --backend-store-uri {uri}"
