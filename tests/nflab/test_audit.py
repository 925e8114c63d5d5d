"""Each store damaged by itself, through its own library, and the audit of it read back."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from dataclasses import replace as replace_in
from pathlib import Path
from typing import Any

import optuna
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState

from nflab.auditing.audit import LEFT, MENDABLE, MENDED, Audit, run_audit
from nflab.cluster.placement import Placement
from nflab.recording.board import RunBoard
from nflab.recording.outbox import Outbox
from nflab.recording.roots import begin_root
from nflab.recording.run_record import RunRecord
from nflab.recording.tracker import Tracker
from nflab.running.budget import Budget
from nflab.searching.trial_ledger import TrialLedger
from nflab.settings import locations
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.serialization import to_json
from nflab.settings.studies import SweepConfig
from nflab.storage import ownership
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.ownership import Claim, Ownership
from nflab.storage.run_folder import new_identity, write_config, write_identity
from nflab.studies.cell_ledger import CellLedger
from nflab.studies.life_cycle import LiveRun
from nflab.studies.session import Session
from tests.conftest import run_script
from tests.nflab.test_ledger import SAMPLES, epoch

pytestmark = pytest.mark.slow  # each test has three runs of its own

SWEEP = replace(SweepConfig(), name="s", epochs=8, warmup_epochs=1.0, trials=6, seed=3)
CELLS: list[dict[str, Any]] = [{"seed": seed} for seed in range(1, 6)]


class Store:
    """A sweep `s`, a grid `g` and a training `t`, as runs that were interrupted leave them."""

    def __init__(self, folder: Path, address: str = "") -> None:
        self.folder = folder
        self.storage = f"{address}{folder}/runs"
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(self.uri)

    def build(self) -> None:
        self.sweep()
        self.grid()
        self.training()

    def begin(self, config: Config, experiment: str) -> Session[Any]:
        """What a session writes before anything runs."""
        config = replace(config, storage=self.storage, tracking_uri=self.uri)
        name = str(config.run.name)
        own = locations.checkout() / "runs" / name if "://" in self.storage else self.at(name)
        for folder in {own, self.at(name)}:
            folder.mkdir(parents=True)
        address = f"{self.storage}/{name}"
        identity = new_identity(name, experiment, "the digits")
        write_identity(address, identity)
        write_config(address, config)
        tracker = Tracker(self.uri, str(self.folder / "artifacts"), experiment)
        placement = Placement(1, 1.0, 0.0, 2)
        return Session(config, address, tracker, placement, (), {}, identity, Ownership())

    def live(self, config: Config, experiment: str) -> LiveRun[Any]:
        """The run of such a session, as it begins in MLflow."""
        session = self.begin(config, experiment)
        run_id, _ = begin_root(session.tracker, session.identity, session.folder, {})
        session.tracker.add_text(run_id, to_json(session.config), "config.json")
        outbox = Outbox(session.tracker, session.outbox_folder)
        return LiveRun(session, outbox, run_id, Budget())

    def sweep(self) -> None:
        run = self.live(SWEEP, "agc_sweep")
        session, tracker, parent, outbox = run.session, run.tracker, run.run_id, run.outbox
        study = session.local_folder / "study.db"
        ledger = TrialLedger(
            session.config,
            session.identity,
            session.folder,
            study,
            tracker,
            outbox,
            parent,
            {},
            SAMPLES,
        )
        for top1, outcome, epochs in (
            (90, "finished", 8),
            (70, "finished", 8),
            (10, "pruned", 2),
            (0, "diverged", 1),
            (20, "failed", 1),
            (30, "interrupted", 1),
        ):
            proposal = ledger.propose()
            ledger.started(proposal)
            for e in range(1, epochs + 1):
                save(proposal.folder, e)
                said = outcome if outcome in ("finished", "diverged") and e == epochs else "running"
                ledger.reported(proposal.number, epoch(e, top1, said))
            if outcome != "interrupted":
                ledger.ended(proposal.number, outcome, {"val_top1": top1})  # type: ignore[arg-type]
        outbox.drain()
        ledger.release()
        outbox.drain()
        outbox.close()
        tracker.finish(parent, "interrupted")

    def grid(self) -> None:
        run = self.live(replace(Config(), name="g"), "layers")
        tracker, parent, outbox = run.tracker, run.run_id, run.outbox
        base = replace(Config(), storage=self.storage, tracking_uri=self.uri)
        ledger = CellLedger(run, base, CELLS)
        for top1, outcome in (
            (60, "finished"),
            (50, "finished"),
            (0, "diverged"),
            (20, "failed"),
            (30, "interrupted"),
        ):
            proposal = ledger.propose()
            ledger.started(proposal)
            save(proposal.folder, 1)
            said = outcome if outcome in ("finished", "diverged") else "running"
            ledger.reported(proposal.number, epoch(1, top1, said))
            if outcome != "interrupted":
                ledger.ended(proposal.number, outcome, {"val_top1": top1})  # type: ignore[arg-type]
        outbox.drain()
        ledger.release()
        outbox.drain()
        outbox.close()
        tracker.finish(parent, "interrupted")

    def training(self) -> None:
        run = self.live(replace(Config(), name="t"), "train")
        outbox, folder = run.outbox, run.session.folder
        record = RunRecord(outbox, run.run_id, run.config)
        for e in (1, 2):
            save(folder, e)
            record.report(epoch(e, 50 + e, "finished" if e == 2 else "running"))
        record.finish("finished")
        outbox.drain()
        outbox.close()

    def at(self, *parts: str) -> Path:
        return Path(self.folder, "runs", *parts)

    def runs(self) -> list[Run]:
        found: list[Run] = []
        for experiment in self.client.search_experiments():
            found += self.client.search_runs([experiment.experiment_id])
        return found

    def run(self, name: str) -> Run:
        """`s`, `g`, `t`, a trial of `s` as `s3`, or a cell of `g` as `g2`."""
        for run in self.runs():
            tags = run.data.tags
            if run.info.run_name == name:
                return run
            if "trial" in tags and name == f"s{int(tags['trial'])}":
                return run
            if "cell" in tags and name == f"g{run.data.params['seed']}":
                return run
        raise LookupError(name)

    def ended(self, name: str) -> tuple[str, str]:
        run = self.run(name)
        return run.info.status, run.data.tags["outcome"]

    def end(self, name: str, status: str, outcome: str) -> None:
        run_id = self.run(name).info.run_id
        self.client.set_tag(run_id, "outcome", outcome)
        self.client.update_run(run_id, status=status)

    def trial(self, number: int) -> FrozenTrial:
        url = f"sqlite:///{self.at('s', 'study.db')}"
        return optuna.load_study(study_name="s", storage=url).trials[number - 1]

    def checkpoints(self, name: str) -> Path:
        if name == "t":
            return self.at("t", "checkpoints")
        if name[0] == "s":
            return self.at("s", "trials", f"000{name[1]}", "checkpoints")
        folder = Path(self.run(name).data.tags["folder"])
        return self.at("g", "cells", folder.name, "checkpoints")

    def epochs(self, name: str) -> list[int]:
        """Of the checkpoints on disk."""
        return sorted(int(path.name[-6:]) for path in self.checkpoints(name).glob("epoch-*"))

    def artifact(self, name: str) -> Path:
        return Path(self.run(name).info.artifact_uri) / "config.json"

    def sql(self, file: Path, *commands: str) -> None:
        with closing(sqlite3.connect(file)) as database, database:
            for command in commands:
                assert database.execute(command).rowcount > 0, command

    def study_sql(self, *commands: str) -> None:
        self.sql(self.at("s", "study.db"), *commands)

    def audit(self, dry_run: bool = False) -> Audit:
        return run_audit(self.uri, self.storage, dry_run)

    def dump(self) -> dict[str, str]:
        """All that stands anywhere."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            content = path.read_bytes() if path.is_file() else b""
            if content.startswith(b"SQLite"):
                with closing(sqlite3.connect(path)) as database:
                    content = "\n".join(database.iterdump()).encode()
            found[str(path)] = hashlib.sha256(content).hexdigest()
        return found


def save(folder: str, number: int, complete: bool = True, best: int | None = None) -> None:
    """A checkpoint as training saves it, though smaller."""
    checkpoints = Checkpoints.of_run(folder)
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary, "weights.pt").write_bytes(b"0" * 300_000)
        checkpoints.save(Path(temporary), number, best)
    checkpoints.purge({number, number if best is None else best})  # as a run does at its end
    if not complete:
        Path(folder, "checkpoints", f"epoch-{number:06d}", "complete").unlink()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """The stores, and a copy of them."""
    folder = tmp_path_factory.mktemp("audit")
    store = Store(folder / "stores")
    store.folder.mkdir(exist_ok=True)
    store.build()
    shutil.copytree(store.folder, folder / "copy")
    return store, folder / "copy"


@pytest.fixture
def store(built: tuple[Store, Path]) -> Iterator[Store]:
    """The stores as they were built."""
    store, copy = built
    yield store
    for name in ("runs", "artifacts"):
        shutil.rmtree(store.folder / name)
        shutil.copytree(copy / name, store.folder / name)
    # MLflow keeps the file open: it is written into.
    with (
        closing(sqlite3.connect(copy / "mlflow.db")) as source,
        closing(sqlite3.connect(store.folder / "mlflow.db")) as target,
    ):
        source.backup(target)


def test_stores_that_agree_are_left_alone(store: Store) -> None:
    before = store.dump()
    audit = store.audit()
    assert (audit.told, audit.skipped, audit.left) == ([], {}, 0)
    assert (audit.runs, audit.folders) == (14, 3)
    assert store.dump() == before


@dataclass
class Damage:
    """One way in which a store is damaged, and what is expected of the audit."""

    do: Callable[[Store], Any]
    where: str
    what: str
    after: Callable[[Store], bool] | None = None
    """Holds when it was mended; None if it is for a person to mend."""


def keeps(store: Store, name: str, *numbers: int, complete: bool = True) -> None:
    """Puts more checkpoints on disk than a run had, without forgetting any."""
    for number in numbers:
        target = store.checkpoints(name) / f"epoch-{number:06d}"
        target.mkdir(parents=True, exist_ok=True)
        (target / "weights.pt").write_bytes(b"1" * 300_000)
        if complete:
            (target / "complete").touch()


def lose_epoch(store: Store) -> None:
    run_id = store.run("s2").info.run_id
    store.sql(
        store.folder / "mlflow.db",
        f"delete from metrics where run_uuid = '{run_id}' and step = 8",
        f"update latest_metrics set value = 7, step = 7 where run_uuid = '{run_id}' "
        "and key = 'epoch'",
        f"update latest_metrics set value = 70, step = 7 where run_uuid = '{run_id}' "
        "and key = 'val_top1'",
    )


def unsend(store: Store, **request: Any) -> None:
    file = store.at("t", "unsent", "requests.jsonl")
    file.write_text(json.dumps({"run": store.run("t").info.run_id, **request}) + '\n{"call": "ta')


def repeat(store: Store, test_top1: float) -> None:
    """The first cell once more, in another grid, at the same time."""
    run = store.run("g1")
    store.client.log_metric(run.info.run_id, "test_top1", 61, step=1)
    tags = {**run.data.tags, "record": "other"}
    del tags["mlflow.runName"]
    experiment = run.info.experiment_id
    parent = store.client.create_run(experiment, run_name="h", tags={"outcome": "finished"})
    store.client.log_text(parent.info.run_id, '{"run": {"storage": "elsewhere"}}', "config.json")
    store.client.set_terminated(parent.info.run_id)
    tags["mlflow.parentRunId"] = parent.info.run_id
    twin = store.client.create_run(experiment, run_name="twin", tags=tags)
    store.client.log_metric(twin.info.run_id, "test_top1", test_top1, step=1)
    store.client.log_param(twin.info.run_id, "storage", "elsewhere")
    store.client.log_param(twin.info.run_id, "seed", "none")
    store.client.set_terminated(twin.info.run_id)


DAMAGES = {
    "a trial still running in MLflow": Damage(
        lambda s: s.end("s6", "RUNNING", "running"),
        "s, trial 6",
        "MLflow has it running, and no process runs it",
        lambda s: s.ended("s6") == ("KILLED", "interrupted"),
    ),
    "a finished trial still running in MLflow": Damage(
        lambda s: s.end("s2", "RUNNING", "running"),
        "s, trial 2",
        "MLflow has it running, and no process runs it",
        lambda s: s.ended("s2") == ("FINISHED", "finished"),
    ),
    "a sweep still running": Damage(
        lambda s: s.end("s", "RUNNING", "running"),
        "s",
        "MLflow has it running, and no process runs it",
        lambda s: s.ended("s") == ("KILLED", "interrupted"),
    ),
    "a training whose last report was the last": Damage(
        lambda s: s.end("t", "RUNNING", "finished"),
        "t",
        "MLflow has it running, and no process runs it",
        lambda s: s.ended("t") == ("FINISHED", "finished"),
    ),
    "a cell reopened and killed at once": Damage(
        lambda s: s.end("g5", "KILLED", "running"),
        "g, cell ",
        "MLflow has it running, and no process runs it",
        lambda s: s.ended("g5") == ("KILLED", "interrupted"),
    ),
    "status and outcome differ": Damage(
        lambda s: s.end("t", "FAILED", "finished"),
        "t",
        "MLflow's status is FAILED, and its outcome finished",
        lambda s: s.ended("t") == ("FINISHED", "finished"),
    ),
    "study and MLflow differ": Damage(
        lambda s: s.end("s2", "KILLED", "pruned"),
        "s, trial 2",
        "MLflow says pruned, and the study finished",
        lambda s: s.ended("s2") == ("FINISHED", "finished"),
    ),
    "a trial still running in the study": Damage(
        lambda s: s.study_sql("update trials set state = 'RUNNING' where number = 5"),
        "s, trial 6",
        "the study has it running, and no process runs it",
        lambda s: s.trial(6).state == TrialState.WAITING,
    ),
    "a trial whose end the study lost": Damage(
        lambda s: s.study_sql("update trials set state = 'RUNNING' where number = 1"),
        "s, trial 2",
        "MLflow says finished, and the study has it RUNNING",
        lambda s: (s.trial(2).state, s.trial(2).value) == (TrialState.COMPLETE, 70),
    ),
    "a winner whose end the study lost": Damage(
        lambda s: s.study_sql("update trials set state = 'RUNNING' where number = 0"),
        "s, trial 1",
        "MLflow says finished, and the study has it RUNNING",
        lambda s: (s.trial(1).state, s.epochs("s1")) == (TrialState.COMPLETE, [8]),
    ),
    "a state that is not the outcome's": Damage(
        lambda s: s.study_sql("update trials set state = 'COMPLETE' where number = 2"),
        "s, trial 3",
        "the study's state is COMPLETE, and its outcome pruned",
    ),
    "a trial that MLflow lost": Damage(
        lambda s: s.client.delete_run(s.run("s3").info.run_id),
        "s, trial 3",
        "the study has it (pruned), and MLflow has not",
    ),
    "a trial that the study lost": Damage(
        lambda s: s.study_sql("delete from trials where number = 5"),
        "s, trial 6",
        "MLflow has it (interrupted), and the study has not",
    ),
    "no study": Damage(
        lambda s: s.at("s", "study.db").unlink(),
        "s",
        "MLflow has 6 trials, and the study is gone",
    ),
    "a broken study": Damage(
        lambda s: s.at("s", "study.db").write_bytes(b"broken" * 1000),
        "s",
        "cannot read ",
    ),
    "an epoch that MLflow lost": Damage(
        lose_epoch,
        "s, trial 2",
        "MLflow has 7 epochs of it, and the study 8",
        lambda s: (
            s.run("s2").data.metrics["epoch"] == 8
            and [
                (p.step, p.value)
                for p in s.client.get_metric_history(s.run("s2").info.run_id, "val_top1")
            ]
            == [(step, 70) for step in range(1, 9)]
        ),
    ),
    "an epoch that the study lost": Damage(
        lambda s: s.study_sql(
            "delete from trial_intermediate_values where step = 8192 and trial_id = "
            "(select trial_id from trials where number = 1)"
        ),
        "s, trial 2",
        "MLflow has 8 epochs of it, and the study 7",
    ),
    "another result": Damage(
        lambda s: s.client.log_metric(s.run("s1").info.run_id, "val_top1", 91, step=8),
        "s, trial 1",
        "its last validation top-1 is 91.0 in MLflow, and 90.0 in the study",
    ),
    "requests not sent": Damage(
        lambda s: unsend(s, call="tag", arguments={"key": "late", "value": "came"}),
        "t",
        "2 requests to MLflow never sent",
        lambda s: (
            s.run("t").data.tags["late"] == "came"
            and s.at("t", "unsent", "requests.jsonl").read_text() == ""
        ),
    ),
    "checkpoints of no trial": Damage(
        lambda s: save(str(s.at("s", "trials", "0009")), 3),
        "s",
        "1 checkpoint (0.3 MB) in trials/0009, and no run of it in MLflow",
    ),
    "checkpoints of no run": Damage(
        lambda s: save(str(s.at("old")), 3),
        "old",
        "1 checkpoint (0.3 MB) on disk, and no run of them in MLflow",
    ),
    "checkpoints of a worse trial": Damage(
        lambda s: keeps(s, "s2", 7, 8),
        "s, trial 2",
        "2 checkpoints (0.6 MB) on disk, though it is not the best of its sweep",
        lambda s: s.epochs("s2") == [] and s.epochs("s1") == [8],
    ),
    "checkpoints of a pruned trial": Damage(
        lambda s: keeps(s, "s3", 2),
        "s, trial 3",
        "1 checkpoint (0.3 MB) on disk, though it was pruned",
        lambda s: s.epochs("s3") == [],
    ),
    "checkpoints of a worse cell": Damage(
        lambda s: keeps(s, "g2", 1),
        "g, cell ",
        "1 checkpoint (0.3 MB) on disk, though it is not the best of its grid",
        lambda s: s.epochs("g2") == [] and s.epochs("g1") == [1],
    ),
    "checkpoints of a cell that diverged": Damage(
        lambda s: keeps(s, "g3", 1),
        "g, cell ",
        "1 checkpoint (0.3 MB) on disk, though it diverged",
        lambda s: s.epochs("g3") == [],
    ),
    "a checkpoint half saved": Damage(
        lambda s: keeps(s, "s5", 2, complete=False),
        "s, trial 5",
        "1 checkpoint (0.3 MB) on disk that no process finished saving",
        lambda s: s.epochs("s5") == [1],
    ),
    "the best one's checkpoint without its mark": Damage(
        lambda s: (s.checkpoints("s1") / "epoch-000008" / "complete").unlink(),
        "s, trial 1",
        "1 checkpoint (0.3 MB) on disk without the mark that they are complete",
    ),
    "more checkpoints than two": Damage(
        lambda s: (
            keeps(s, "t", 3, 4),
            s.client.log_metric(run_id(s, "t"), "val_top1", 55, step=3),
        ),
        "t",
        "3 checkpoints (0.9 MB) on disk, where the last and the best are enough",
        lambda s: s.epochs("t") == [3, 4],
    ),
    "the best trial's checkpoint lost": Damage(
        lambda s: shutil.rmtree(s.checkpoints("s1")),
        "s, trial 1",
        "has no checkpoint, though it is the best of its sweep",
    ),
    "the best cell's checkpoint lost": Damage(
        lambda s: shutil.rmtree(s.checkpoints("g1")),
        "g, cell ",
        "has no checkpoint, though it is the best of its grid or its weights are used",
    ),
    "the checkpoint of one that goes on lost": Damage(
        lambda s: shutil.rmtree(s.checkpoints("s6")),
        "s, trial 6",
        "has no checkpoint, though 1 epoch ran",
    ),
    "a trial without its configuration": Damage(
        lambda s: s.artifact("s2").unlink(),
        "s, trial 2",
        "MLflow has no config.json of it",
        lambda s: json.loads(s.artifact("s2").read_text())["run"]["storage"] == s.storage,
    ),
    "a training without its configuration": Damage(
        lambda s: s.artifact("t").unlink(),
        "t",
        "MLflow has no config.json of it",
        lambda s: s.artifact("t").read_text() == s.at("t", "config.json").read_text(),
    ),
    "a cell without its configuration": Damage(
        lambda s: s.artifact("g2").unlink(), "g, cell ", "MLflow has no config.json of it"
    ),
    "one result of a cell twice": Damage(
        lambda s: repeat(s, 61),
        "layers, cell ",
        "MLflow has two results of it, ",
        lambda s: (
            s.run("g1").data.tags["superseded"] == "true"
            and "superseded" not in s.run("twin").data.tags
        ),
    ),
    "two results of a cell": Damage(
        lambda s: repeat(s, 62), "layers, cell ", "MLflow has two results of it, "
    ),
    "no folder": Damage(lambda s: shutil.rmtree(s.at("t")), "t", "MLflow has it, and its folder "),
    "a second run of the name": Damage(
        lambda s: s.client.set_terminated(
            s.client.create_run(
                s.run("t").info.experiment_id, run_name="t", tags={"outcome": "finished"}
            ).info.run_id
        ),
        "t",
        "MLflow has a second run of this name, ",
    ),
}


def run_id(store: Store, name: str) -> str:
    return str(store.run(name).info.run_id)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_told_and_what_is_safe_is_mended(store: Store, name: str) -> None:
    damage = DAMAGES[name]
    damage.do(store)
    damaged = store.dump()
    foreseen = store.audit(dry_run=True)
    assert store.dump() == damaged
    audit = store.audit()
    for found in (foreseen, audit):
        (told,) = found.told
        assert told.where.startswith(damage.where) and told.what.startswith(damage.what), told
    again = store.audit()
    if damage.after is None:
        assert (foreseen.told[0].fate, audit.told[0].fate) == (LEFT, LEFT)
        assert again.told == audit.told
    else:
        assert (foreseen.told[0].fate, audit.told[0].fate) == (MENDABLE, MENDED)
        assert damage.after(store)
        assert again.told == []


def test_a_configuration_stored_again_is_what_it_was(store: Store) -> None:
    before = {name: store.artifact(name).read_text() for name in ("s1", "s6", "s", "g", "t")}
    for name in before:
        store.artifact(name).unlink()
    assert [one.fate for one in store.audit().told] == [MENDED] * 5
    assert {name: store.artifact(name).read_text() for name in before} == before


def test_what_a_living_process_runs_is_left_alone(store: Store) -> None:
    for name in ("s", "s6", "g5"):
        store.end(name, "RUNNING", "running")
    keeps(store, "s3", 2)
    keeps(store, "g2", 1)
    code = (
        "from nflab.storage.ownership import FolderBoard, Ownership; "
        f"Ownership().take(FolderBoard({str(store.at('s'))!r}), 's'); print(); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = store.dump()
        foreseen = store.audit(dry_run=True)
        assert store.dump() == before
        audit = store.audit()
        assert audit.skipped == foreseen.skipped == {"s": "is being run"}
        assert [one.fate for one in audit.told] == [MENDED] * 2
        assert {one.where[0] for one in audit.told} == {"g"}
        assert store.ended("s") == store.ended("s6") == ("RUNNING", "running")
        assert store.epochs("s3") == [2]
        process.kill()
    audit = store.audit()
    assert audit.skipped == {}
    assert [one.fate for one in audit.told] == [MENDED] * 3
    assert store.ended("s") == store.ended("s6") == ("KILLED", "interrupted")
    assert store.audit().told == []


def test_what_another_machine_runs_is_left_alone_while_its_heart_beats(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "WATCH_SECONDS", 2.0)
    store.end("t", "RUNNING", "running")
    keeps(store, "t", 1, 3)
    claim = Claim("f" * 32, "node-7", "another boot", 1, "1", owns=True)
    board = RunBoard(
        store.client, store.run("t").info.experiment_id, "t", store.run("t").info.run_id
    )
    board.put(claim)
    ended = threading.Event()

    def beat() -> None:
        number = 0
        while not ended.wait(0.1):
            number += 1
            board.put(replace_in(claim, beat=number))

    thread = threading.Thread(target=beat)
    thread.start()
    audit = store.audit()
    ended.set()
    thread.join()
    assert (audit.skipped, audit.told) == ({"t": "is being run"}, [])
    assert store.ended("t") == ("RUNNING", "running")
    assert store.epochs("t") == [1, 2, 3]
    audit = store.audit()  # which watches it stand still
    assert audit.skipped == {}
    assert [one.where for one in audit.told] == ["t"]
    assert store.ended("t") == ("KILLED", "interrupted")


def test_a_folder_of_another_run_is_told_and_nothing_else_of_it(store: Store) -> None:
    shutil.copytree(store.at("t"), store.at("u"))
    before = store.dump()
    (told,) = store.audit().told
    assert (told.where, told.fate) == ("u", LEFT)
    assert told.what == "its folder holds the run 't', copied or renamed"
    assert store.dump() == before


def test_a_killed_sweep_of_which_nothing_was_sent_is_mended_at_once(store: Store) -> None:
    """What was not sent is sent first: it may be all that disagrees."""
    store.end("s2", "RUNNING", "running")
    store.study_sql("update trials set state = 'RUNNING' where number = 5")
    store.end("s6", "RUNNING", "running")
    arguments = {"outcome": "finished", "tags": {"told": "late"}, "when": 1_700_000_000_000}
    request = {"call": "finish", "run": run_id(store, "s2"), "arguments": arguments}
    store.at("s", "unsent", "requests.jsonl").write_text(json.dumps(request) + "\n")
    assert store.audit().left == 0
    assert store.run("s2").data.tags["told"] == "late"
    assert store.run("s2").info.end_time == 1_700_000_000_000
    assert store.ended("s6") == ("KILLED", "interrupted")
    assert store.trial(6).state == TrialState.WAITING
    assert store.audit().told == []


def test_a_grid_of_which_no_cell_has_a_result_is_audited(store: Store) -> None:
    gone = [r for r in store.runs() if "cell" in r.data.tags and "val_top1" in r.data.metrics]
    for run in gone:
        if run.data.tags["outcome"] in ("finished", "diverged"):
            store.client.delete_run(run.info.run_id)
    told = [one for one in store.audit().told if one.where == "g"]
    assert [one.fate for one in told] == [LEFT]
    assert "no run of" in told[0].what


def test_what_mlflow_will_never_take_is_told(store: Store) -> None:
    unsend(store, run="0" * 32, call="tag", arguments={"key": "a", "value": "b"})
    first, second = store.audit().told, store.audit().told
    assert {(one.where, one.fate) for one in (*first, *second)} == {("t", LEFT)}
    assert "MLflow refused 'tag'" in first[0].cure
    (told,) = second  # until the file is looked at and removed
    assert told.what == "1 request that MLflow rejected"
    assert told.cure.startswith("see ")
    assert "rejected.jsonl" in told.cure


def test_a_sweep_that_mlflow_lost_is_told_and_kept(store: Store) -> None:
    parent = run_id(store, "s")
    store.client.delete_run(parent)
    before = store.dump()
    audit = store.audit()
    assert [(one.where, one.what, one.fate) for one in audit.told] == [
        ("s", "the study has 6 trials, and MLflow has no run of the sweep", LEFT),
        ("s", "3 checkpoints (0.9 MB) on disk, and no run of them in MLflow", LEFT),
        ("agc_sweep", f"MLflow has 6 runs, and not their parent {parent}", LEFT),
    ]
    assert store.dump() == before


def test_runs_of_another_storage_are_not_looked_at(store: Store, tmp_path: Path) -> None:
    store.end("s", "RUNNING", "running")
    audit = run_audit(store.uri, str(tmp_path), dry_run=False)
    assert (audit.told, audit.runs) == ([], 0)
    assert audit.skipped == {"runs of other storages": "not in this --storage"}
    assert store.ended("s") == ("RUNNING", "running")


def test_a_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no tracking store"):
        run_audit(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path), dry_run=False)
    assert list(tmp_path.iterdir()) == []


def test_a_storage_by_address_is_audited_where_it_was_driven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locations, "checkout", lambda: tmp_path / "checkout")
    store = Store(tmp_path / "stores", address="file://")
    store.training()
    assert store.audit().told == []
    store.end("t", "RUNNING", "running")
    keeps(store, "t", 1, 3)
    own = tmp_path / "checkout" / "runs" / "t"
    own.rename(tmp_path / "elsewhere")  # as on another machine
    assert store.audit().skipped == {"t": "was run from another machine, which has its study"}
    (tmp_path / "elsewhere").rename(own)
    assert [(one.where, one.fate) for one in store.audit().told] == [("t", MENDED)]
    assert store.ended("t") == ("KILLED", "interrupted")
    assert store.audit().told == []


def test_a_sweep_of_ray_is_audited_by_the_script(ray_address: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    env = {"MLFLOW_TRACKING_URI": store.uri, "NFLAB_STORAGE": store.storage}
    flags = "--name s --trials 3 --epochs 1 --seed 5".split()
    done = run_script(tmp_path, {**env, "RAY_ADDRESS": ray_address}, "agc_sweep.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    before = store.dump()
    done = run_script(tmp_path, env, "audit.py")
    assert (done.returncode, done.stdout) == (
        0,
        "everything agrees; runs in MLflow: 4, folders: 1\n",
    )
    assert store.dump() == before

    assert not store.at("s", "ray").exists()  # Tune's own state is scratch
    store.end("s", "RUNNING", "running")
    winner = max((1, 2, 3), key=lambda number: (store.trial(number).value, -number))
    loser = winner % 3 + 1
    shutil.copytree(
        store.checkpoints(f"s{winner}"), store.checkpoints(f"s{loser}"), dirs_exist_ok=True
    )
    size = sum(f.stat().st_size for f in store.checkpoints(f"s{winner}").rglob("*") if f.is_file())
    done = run_script(tmp_path, env, "audit.py", "--dry-run")
    assert done.returncode == 1
    assert done.stdout.count("can be mended: ") == 2
    assert store.ended("s") == ("RUNNING", "running")
    done = run_script(tmp_path, env, "audit.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [
        "s: MLflow has it running, and no process runs it",
        "  mended: closed as interrupted: it can be resumed",
        f"s, trial {loser}: 1 checkpoint ({size / 1e6:.1f} MB) on disk, "
        "though it is not the best of its sweep",
        "  mended: deleted",
        "disagreements: 2 (mended 2, left 0); runs in MLflow: 4, folders: 1",
    ]
    assert store.epochs(f"s{loser}") == []
    assert store.epochs(f"s{winner}") == [1]
    assert run_script(tmp_path, env, "audit.py").returncode == 0
