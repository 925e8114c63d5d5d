"""Who may ask an MLflow server that others than this machine can reach: one user, with a password.

MLflow's clients on this machine, jobs among them, read it from `~/.mlflow/credentials`, and so does
a person: `ray exec cluster/gpu.yaml 'cat .mlflow/credentials'`. It stands in files alone, for their
owner alone: processes show their arguments, and logs their environment.
"""

import os
import secrets
from configparser import RawConfigParser
from pathlib import Path

USER = "nflab"

CREDENTIALS = Path.home() / ".mlflow" / "credentials"
"""Where MLflow's clients look for it. Delete it, and start the server again, for another one."""


def protect(folder: Path) -> Path:
    """Makes the password unless there is one, and writes what the server must know.

    Args:
        folder: for the server's list of users and its settings.

    Returns:
        The file of settings, for $MLFLOW_AUTH_CONFIG_PATH.
    """
    users = folder / "users.db"
    if not CREDENTIALS.exists():
        password = secrets.token_urlsafe(24)  # 32 characters
        users.unlink(missing_ok=True)  # it knows the one before
        given = {"mlflow_tracking_username": USER, "mlflow_tracking_password": password}
        _write(CREDENTIALS, given)
    found = RawConfigParser()
    found.read(CREDENTIALS, encoding="utf-8")
    settings = folder / "password.ini"
    _write(
        settings,
        {
            "admin_username": found["mlflow"]["mlflow_tracking_username"],
            "admin_password": found["mlflow"]["mlflow_tracking_password"],
            "database_uri": f"sqlite:///{users}",
            "default_permission": "NO_PERMISSIONS",
            # Else every request costs the time that slows down who guesses.
            "auth_cache_ttl_seconds": "60",
        },
    )
    return settings


def _write(path: Path, section: dict[str, str]) -> None:
    """A file that only its owner can read, from its first moment."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    written = RawConfigParser()
    written["mlflow"] = section
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        written.write(file)
    part.replace(path)
