"""Optuna's study of a sweep: how the end of a trial is told to it, and what it says of each."""

import errno
import json
import platform
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from nflab.settings.errors import ConfigError
from nflab.settings.outcomes import Outcome
from nflab.storage.files import patiently, read_text, write_text
from nflab.storage.run_folder import Identity

T = TypeVar("T")

_ENDS: dict[str, tuple[str, ...]] = {
    # One that ran out of memory is told as a bad result, so that the place is avoided.
    "COMPLETE": ("finished", "diverged", "failed"),
    "PRUNED": ("pruned",),
    "FAIL": ("failed",),
}
"""State in the study -> outcomes that it stands for."""


@dataclass(frozen=True)
class Trial:
    """What a study says of one trial."""

    number: int
    """From 1."""
    state: str
    """Optuna's: RUNNING, WAITING, COMPLETE, PRUNED or FAIL."""
    outcome: str | None
    """What it is marked with; holds only when it has ended."""
    value: float | None
    settings: dict[str, Any] | None
    """None if it was never proposed whole."""
    top1s: tuple[float, ...]
    """Validation top-1 of each epoch trained, in order."""

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDS

    @property
    def is_sound(self) -> bool:
        """Whether its state fits its outcome."""
        return not self.has_ended or self.outcome in _ENDS[self.state]


RUN = "run"
"""Attribute of a study: the id of the sweep that it belongs to."""

MARKER = "study.json"
"""File of a sweep's folder that says where its study is."""


def open_study(file: Path, identity: Identity, folder: str, begun: bool) -> optuna.Study:
    """The study of a sweep, which is made if the sweep is new.

    Args:
        file: on the machine of the sweep's driver.
        folder: path or address of the sweep.
        begun: whether MLflow has trials of it.

    Raises:
        ConfigError: the sweep has trials, and no study is here; or it is another sweep's; or it
            cannot be read.
    """
    marker = read_text(f"{folder}/{MARKER}")
    if not file.is_file() and (begun or marker is not None):
        raise ConfigError(
            f"the study of {identity.name!r} is not there, without which its trials cannot be told "
            f"from new ones: put {file} back{_whereabouts(marker)}, or start anew under another "
            "--name"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(
            study_name=identity.name,
            storage=RDBStorage(f"sqlite:///{file}"),
            direction="maximize",
            load_if_exists=True,
        )
        owner = study.user_attrs.get(RUN)
        empty = not study.get_trials(deepcopy=False)
        # An empty one, and one of another name, cannot be that of a sweep that has trials.
        if owner is None and (marker is None or empty) and not (begun and empty):
            study.set_user_attr(RUN, identity.id)  # new, or from before studies said whose they are
            owner = identity.id
    except Exception as error:  # drivers of databases raise their own kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"cannot open the study {file}: {reason}") from None
    if owner != identity.id:
        raise ConfigError(
            f"{file} is the study of another sweep than {identity.name!r}: put its own back"
            f"{_whereabouts(marker)}, or start anew under another --name"
        )
    if marker is None:
        where = {"run": identity.id, "host": platform.node(), "file": str(file)}
        write_text(f"{folder}/{MARKER}", json.dumps(where) + "\n")
    return study


def _whereabouts(marker: str | None) -> str:
    """Where a study was written, in words."""
    try:
        where = json.loads(marker or "")
        return f" (it was written as {where['file']} on {where['host']})"
    except (ValueError, KeyError, TypeError):
        return ""


def kept(file: Path, call: Callable[[], T]) -> T:
    """What `call` returns, which writes into the study; done again while its disk takes nothing.

    Raises:
        Away: the disk goes on taking nothing.
    """

    def ask() -> T:
        try:
            return call()
        except StorageInternalError as error:
            raise OSError(errno.EIO, str(error.__cause__).splitlines()[0], str(file)) from error

    return patiently(str(file), ask)


def tell(
    study: optuna.Study,
    trial: optuna.Trial,
    outcome: Outcome,
    value: float | None,
    error: str | None,
) -> None:
    """Closes a running trial.

    A diverged trial, or one that ran out of memory, tells the sampler to avoid the place; one
    that failed for another reason tells it nothing.

    Args:
        value: the last result of a finished trial.
        error: why it failed.
    """
    trial.set_user_attr("outcome", outcome)
    too_large = outcome == "failed" and "out of memory" in (error or "").lower()
    if outcome == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    elif outcome == "diverged" or too_large:
        trial.set_constraint("infeasible", 1.0)
        study.tell(trial, 0.0)
    elif outcome == "failed":
        study.tell(trial, state=TrialState.FAIL)
    else:
        trial.set_constraint("infeasible", 0.0)
        study.tell(trial, value)


def let_failed_wait(file: Path) -> None:
    """Trials that failed are to be proposed again, under their numbers, as if they had not.

    Optuna itself changes no trial that has ended, so this is told to its database.
    """
    failed = """
        select trials.trial_id from trials join trial_user_attributes using (trial_id)
        where state in ('FAIL', 'COMPLETE') and key = 'outcome' and value_json = '"failed"'
    """
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(f"delete from trial_values where trial_id in ({failed})")
        database.execute(
            "delete from trial_system_attributes "
            f"where key like 'constraints:%' and trial_id in ({failed})"
        )
        database.execute(
            "update trials set state = 'WAITING', datetime_complete = null "
            f"where trial_id in ({failed})"
        )


class StudyFile:
    """The study of a sweep that no process runs."""

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name

    @property
    def exists(self) -> bool:
        return self._file.is_file()

    def trials(self) -> list[Trial]:
        """All of them, by number.

        Raises:
            OSError: it cannot be read.
        """
        with self._opened() as study:
            found = study.get_trials(deepcopy=False)
        return [
            Trial(
                trial.number + 1,
                trial.state.name,
                trial.user_attrs.get("outcome"),
                trial.values[0] if trial.values else None,
                trial.user_attrs.get("settings"),
                # At 0 samples stands what pre-trained weights give.
                tuple(v for step, v in sorted(trial.intermediate_values.items()) if step > 0),
            )
            for trial in found
        ]

    def let_wait(self, number: int) -> None:
        """A trial that no process runs is to be proposed again."""
        with self._opened() as study:
            trial = study.get_trials(deepcopy=False)[number - 1]
            study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    def tell(self, number: int, outcome: Outcome, value: float | None, error: str | None) -> None:
        """Closes a trial that has not ended, see `tell`."""
        with self._opened() as study:
            found = study.get_trials(deepcopy=False)[number - 1]
            if found.state == TrialState.WAITING:
                study._storage.set_trial_state_values(found._trial_id, TrialState.RUNNING)
            tell(study, optuna.Trial(study, found._trial_id), outcome, value, error)

    @contextmanager
    def _opened(self) -> Iterator[optuna.Study]:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            storage = RDBStorage(f"sqlite:///{self._file}")
            study = optuna.load_study(study_name=self._name, storage=storage)
        except Exception as error:  # drivers of databases raise their own kinds
            raise OSError(f"cannot read {self._file}: {str(error).splitlines()[0]}") from None
        try:
            yield study
        finally:
            storage.remove_session()
            storage.engine.dispose()
