"""New databases of MLflow: copies of one that MLflow made, for it takes seconds to make each."""

import shutil
import sqlite3
import tempfile
from functools import cache
from pathlib import Path

import mlflow.store.db.utils
import pytest
import sqlalchemy


def new_database(path: Path) -> None:
    """Writes an empty database of MLflow."""
    shutil.copy(_made(), path)


def new_store(folder: Path) -> dict[str, str]:
    """Environment that puts a run's results into a folder, with a database in it."""
    new_database(folder / "mlflow.db")
    return {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "NFLAB_STORAGE": str(folder / "runs"),
    }


def fill_by_copy(patch: pytest.MonkeyPatch) -> None:
    """In this process too, MLflow fills a new database from the copy, while `patch` lasts."""
    _made()
    patch.setattr(mlflow.store.db.utils, "_initialize_tables", _fill)


@cache
def _made() -> Path:
    """An empty database of MLflow."""
    folder = Path(tempfile.mkdtemp(prefix="nflab-test-store-"))
    engine = sqlalchemy.create_engine(f"sqlite:///{folder}/mlflow.db")
    mlflow.store.db.utils._initialize_tables(engine)
    engine.dispose()
    return folder / "mlflow.db"


def _fill(engine: sqlalchemy.Engine) -> None:
    opened = engine.raw_connection()
    try:
        with sqlite3.connect(_made()) as made:
            made.backup(opened.driver_connection)  # type: ignore[arg-type]
    finally:
        opened.close()
