"""Optuna's study of a sweep: how the end of a trial is told to it, and what it says of each."""

import errno
import json
import math
import platform
import sqlite3
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from nflab.settings.errors import ConfigError
from nflab.settings.objectives import DEFAULT, OBJECTIVES, losses
from nflab.settings.outcomes import Outcome, Standing
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

_INFEASIBLE = "constraints:infeasible"
"""System attribute in which Optuna holds a constraint of a trial, violated above 0."""


@dataclass(frozen=True)
class Trial:
    """What a study says of one trial."""

    number: int
    """From 1."""
    state: str
    """Optuna's: RUNNING, WAITING, COMPLETE, PRUNED or FAIL."""
    outcome: str | None
    """What it is marked with; holds only when it has ended."""
    standing: Standing | None
    """How its result stands among others; None if it has none."""
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


def open_study(
    file: Path,
    identity: Identity,
    folder: str,
    begun: bool,
    objectives: Sequence[str] = DEFAULT,
) -> optuna.Study:
    """The study of a sweep, which is made if the sweep is new.

    Args:
        file: on the machine of the sweep's driver.
        folder: path or address of the sweep.
        objectives: what it aims at.
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
            directions=[OBJECTIVES[name].direction for name in objectives],
            load_if_exists=True,
        )
        owner = study.user_attrs.get(RUN)
        empty = not study.get_trials(deepcopy=False)
        # An empty one, and one of another name, cannot be that of a sweep that has trials.
        if owner is None and (marker is None or empty) and not (begun and empty):
            if len(objectives) > 1:
                with warnings.catch_warnings():  # it may change in Optuna, which a test would tell
                    warnings.simplefilter("ignore", ExperimentalWarning)
                    study.set_metric_names(list(objectives))
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


def objectives_of(study: optuna.Study) -> Sequence[str]:
    """What the trials of a study are compared by, in the order of their values."""
    return study.metric_names or DEFAULT


def standing_of(study: optuna.Study, trial: FrozenTrial) -> Standing | None:
    """How a trial stands among others (see `outcomes.beats`); None if it has not finished."""
    if trial.user_attrs.get("outcome") != "finished" or trial.values is None:
        return None
    names = objectives_of(study)
    return losses(dict(zip(names, trial.values, strict=True)), names), trial.number + 1


def as_compared(
    study: optuna.Study, outcome: Outcome, result: Mapping[str, Any], error: str | None
) -> tuple[Outcome, str | None]:
    """What a trial counts as, and why it failed: one that lacks an aim compares with no other."""
    unknown = [n for n in objectives_of(study) if not math.isfinite(result.get(n, math.nan))]
    if outcome == "finished" and unknown:
        return "failed", f"{unknown[0]} is not known, by which trials are compared"
    return outcome, error


def tell(
    study: optuna.Study,
    trial: optuna.Trial,
    outcome: Outcome,
    result: Mapping[str, Any],
    error: str | None,
) -> None:
    """Closes a running trial, of which `as_compared` has said the outcome.

    A diverged trial, or one that ran out of memory, tells the sampler to avoid the place; one
    that failed for another reason tells it nothing.

    Args:
        result: the last metrics of a finished trial.
        error: why it failed.
    """
    names = objectives_of(study)
    trial.set_user_attr("outcome", outcome)
    too_large = outcome == "failed" and "out of memory" in (error or "").lower()
    infeasible = outcome == "diverged" or too_large
    # `Trial.set_constraint` keeps what stands there: of an end that a kill has interrupted, say.
    study._storage.set_trial_system_attr(trial._trial_id, _INFEASIBLE, float(infeasible))
    if outcome == "pruned":
        study.tell(trial, state=TrialState.PRUNED)
    elif infeasible:
        study.tell(trial, [0.0] * len(names))  # nobody looks at what is infeasible
    elif outcome == "failed":
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, [result[name] for name in names])


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
            f"where key = '{_INFEASIBLE}' and trial_id in ({failed})"
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
                standing_of(study, trial),
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

    def tell(
        self, number: int, outcome: Outcome, result: Mapping[str, Any], error: str | None
    ) -> None:
        """Closes a trial that has not ended, see `tell`."""
        with self._opened() as study:
            found = study.get_trials(deepcopy=False)[number - 1]
            if found.state == TrialState.WAITING:
                study._storage.set_trial_state_values(found._trial_id, TrialState.RUNNING)
            outcome, error = as_compared(study, outcome, result, error)
            tell(study, optuna.Trial(study, found._trial_id), outcome, result, error)

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
