"""Cells and their ledger, against a real MLflow store, without Ray."""

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from nflab.cluster.placement import Placement
from nflab.recording.outbox import Outbox
from nflab.recording.tracker import Tracker
from nflab.running.budget import Budget
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.ownership import Ownership
from nflab.storage.run_folder import Identity
from nflab.studies.cell_ledger import CellLedger
from nflab.studies.cells import Cell
from nflab.studies.life_cycle import LiveRun
from nflab.studies.session import Session
from tests.nflab.test_ledger import epoch

SETTINGS: list[dict[str, Any]] = [{"clipping": c, "seed": s} for s in (0, 1) for c in (None, 0.08)]


class Store:
    """An MLflow store in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.tracker = Tracker(f"sqlite:///{folder}/mlflow.db", str(folder), "test")
        self.parent = self.tracker.start("grid", {})
        placement = Placement(1, 1.0, 0.0, 2)
        identity = Identity("5" * 32, "grid", "test")
        self.session = Session(
            Config(), str(folder), self.tracker, placement, (), {}, identity, Ownership()
        )
        self.outbox = Outbox(self.tracker, self.session.outbox_folder)

    def open(
        self,
        settings: list[dict[str, Any]] = SETTINGS,
        force: bool = False,
        keep_weights: bool = False,
        **base: Any,
    ) -> CellLedger:
        """A ledger of a new process."""
        self.outbox.close()
        self.outbox = Outbox(self.tracker, self.session.outbox_folder)
        base_config = replace(Config(), **base)
        run = LiveRun(self.session, self.outbox, self.parent, Budget())
        return CellLedger(run, base_config, settings, force, keep_weights)

    def cells(self) -> pd.DataFrame:
        self.outbox.drain()
        return self.tracker.cells()

    def outcomes(self) -> list[tuple[str, str]]:
        """Outcome and status of each run, in the order of their start."""
        client = MlflowClient(self.tracker.uri)
        runs = [client.get_run(run_id) for run_id in self.cells().run_id]
        return [(run.data.tags["outcome"], run.info.status) for run in runs]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def save(folder: Path) -> None:
    """A checkpoint of a run."""
    with tempfile.TemporaryDirectory() as content:
        Checkpoints.of_run(str(folder)).save(Path(content), 2)


def finish(ledger: CellLedger, outcome: Any = "finished") -> int:
    proposal = ledger.propose()
    ledger.started(proposal)
    assert not ledger.reported(proposal.number, epoch(1, 50))
    if outcome != "failed":
        assert not ledger.reported(proposal.number, epoch(2, 60, outcome))
    ledger.ended(proposal.number, outcome, {"val_top1": 60})
    return proposal.number


def test_a_cell_changes_with_what_is_computed_and_with_nothing_else(tmp_path: Path) -> None:
    cell = Cell(Config()).id
    moved = replace(Config(), name="x", storage="y", tracking_uri="z", num_workers=2)
    assert Cell(replace(moved, micro_batch_size=4, recipe="finetune")).id == cell
    for change in ({"seed": 1}, {"clipping": None}, {"dataset": "digits:0-4"}, {"epochs": 3}):
        assert Cell(replace(Config(), **change)).id != cell
    weights = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    for path, content in zip(weights, (0, 0, 1), strict=True):
        path.write_bytes(bytes([content]))
    a, b, c = (Cell(replace(Config(), pretrained=str(path))).id for path in weights)
    assert a == b != c
    assert a != cell


@pytest.mark.slow
def test_what_has_a_result_is_not_proposed_again(store: Store) -> None:
    ledger = store.open()
    assert ledger.missing == 4
    assert finish(ledger) == 1
    assert finish(ledger, "diverged") == 2
    assert finish(ledger, "failed") == 3
    proposal = ledger.propose()
    ledger.started(proposal)
    ledger.reported(proposal.number, epoch(1, 40))  # and then the process is killed
    after = store.open()
    assert store.outcomes() == [
        ("finished", "FINISHED"),
        ("diverged", "FINISHED"),
        ("failed", "FAILED"),
        ("interrupted", "KILLED"),
    ]
    assert after.missing == 2
    assert [finish(after), finish(after)] == [3, 4]
    assert store.open().missing == 0
    assert store.outcomes().count(("finished", "FINISHED")) == 3
    points = store.tracker.history(store.cells().run_id[3], "val_top1")
    assert points == [(1, 40.0), (2, 60.0)]


def test_one_that_ended_before_it_was_written_down_has_its_result(store: Store) -> None:
    ledger = store.open()
    proposal = ledger.propose()
    ledger.started(proposal)
    ledger.reported(proposal.number, epoch(1, 60, "finished"))
    assert store.open().missing == 3
    assert store.outcomes() == [("finished", "FINISHED")]


def test_other_settings_are_other_cells_beside_the_first(store: Store) -> None:
    ledger = store.open()
    for _ in SETTINGS:
        finish(ledger)
    assert store.open(epochs=3).missing == 4
    more = [*SETTINGS, {"clipping": 0.08, "seed": 2}]
    wider = store.open(more)
    assert wider.missing == 1
    assert wider.propose().settings == more[-1]


def test_what_is_repeated_takes_the_place_of_the_old_result_when_it_has_one(store: Store) -> None:
    ledger = store.open(SETTINGS[:2])
    first, second = (finish(ledger) for _ in range(2))
    old = store.cells().run_id
    folders = list(store.cells().folder)
    for folder in folders:
        save(Path(folder))
    forced = store.open(SETTINGS[:2], force=True)
    assert forced.missing == 2
    proposal = forced.propose()
    assert proposal.folder.endswith("-2")
    forced.started(proposal)
    forced.reported(proposal.number, epoch(1, 10))  # and then the process is killed
    assert store.open(SETTINGS[:2]).results().run_id.tolist() == list(old)  # they still count

    resumed = store.open(SETTINGS[:2])
    assert resumed.repeats and resumed.missing == 2
    assert Checkpoints.of_run(folders[0]).last_mark() == (2, 0)
    again = resumed.propose()
    assert again == proposal  # goes on
    resumed.started(again)
    resumed.reported(again.number, epoch(2, 70, "finished"))
    resumed.ended(again.number, "finished", {"val_top1": 70})
    resumed.release()
    rows = resumed.results()
    assert rows.val_top1.tolist() == [70, 60]
    assert rows.run_id[first - 1] not in set(old)
    assert rows.run_id[second - 1] == old[second - 1]
    assert Checkpoints.of_run(folders[0]).last_mark() is None

    forced = store.open(SETTINGS[:2], force=True)
    assert forced.repeats and forced.missing == 1  # what the last one left
    finish(forced)
    assert store.open(SETTINGS[:2]).missing == 0
    forced = store.open(SETTINGS[:2], force=True)
    assert not forced.repeats and forced.missing == 2


def test_of_a_cell_with_two_results_both_are_superseded(store: Store) -> None:
    finish(store.open(SETTINGS[:1]))
    store.outbox.drain()
    (first,) = store.tracker.cells().itertuples()
    tags = {"cell": first.cell, "folder": first.folder, "outcome": "finished"}
    twin = store.tracker.start("trained by another grid meanwhile", tags, store.parent)
    store.tracker.tag(twin, "outcome", "finished")
    forced = store.open(SETTINGS[:1], force=True)
    assert forced.missing == 1
    finish(forced)
    (left,) = store.cells().itertuples()
    assert left.run_id not in (first.run_id, twin)


def test_where_weights_are_needed_a_result_without_them_is_none(store: Store) -> None:
    ledger = store.open(SETTINGS[:2])
    for _ in range(2):
        finish(ledger)
    save(Path(store.cells().folder[1]))
    needed = store.open(SETTINGS[:2], keep_weights=True)
    assert needed.missing == 1
    assert needed.propose().number == 1
    assert store.open(SETTINGS[:2]).missing == 0


def test_a_checkpoint_of_a_run_that_mlflow_has_forgotten_is_not_gone_on_with(
    store: Store,
) -> None:
    proposal = store.open(SETTINGS[:1]).propose()
    save(Path(proposal.folder))
    assert store.open(SETTINGS[:1]).propose().folder == f"{proposal.folder}-2"


def test_a_cell_that_is_asked_for_twice_is_run_once(store: Store) -> None:
    ledger = store.open([SETTINGS[0], SETTINGS[0]])
    assert ledger.missing == 1
    finish(ledger)
    after = store.open([SETTINGS[0], SETTINGS[0]])
    assert after.missing == 0
    assert len(set(after.rows.run_id)) == 1


def test_folders_are_of_cells(store: Store, tmp_path: Path) -> None:
    ledger = store.open()
    folders = [ledger.propose().folder for _ in SETTINGS]
    assert folders == [f"{tmp_path}/cells/{cell.id}" for cell in ledger.cells]
    assert len(set(folders)) == 4


def test_results_of_an_earlier_version_are_taken_over_under_their_new_names(store: Store) -> None:
    settings: list[dict[str, Any]] = [{"clipping": 0.08, "seed": seed} for seed in (0, 1)]
    ledger = store.open(settings, augmentation_layers=2)
    proposal = ledger.propose()
    ledger.started(proposal)
    ledger.reported(1, epoch(1, 90.0, "finished"))
    ledger.ended(1, "finished", {"val_top1": 90.0})
    ids = [cell.id for cell in ledger.cells]
    store.outbox.drain()
    (run,) = store.cells().run_id
    client = MlflowClient(store.tracker.uri)
    client.set_tag(run, "cell", ledger.cells[0].earlier_id)  # as if it had been recorded then
    again = store.open(settings, augmentation_layers=2)
    assert again.rows.outcome.tolist() == ["finished", "missing"]
    assert (again.missing, again.rows.cell.tolist()) == (1, ids)
    store.outbox.drain()
    tags = client.get_run(run).data.tags
    assert (tags["cell"], tags["earlier_cell"]) == (ids[0], ledger.cells[0].earlier_id)
    assert ids[0] != ledger.cells[0].earlier_id
