"""Checkpoints within an epoch: what goes on from them is what was never interrupted."""

import itertools
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nflab.learning import due, state
from nflab.learning.due import Due
from nflab.learning.loop import train
from nflab.learning.worker import Worker
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.storage import checkpoints as kept
from nflab.storage.checkpoints import Checkpoints, read_mark
from tests.nflab.test_loop import TIMES, Reports, assert_same, run

pytestmark = pytest.mark.slow

# 11 steps an epoch, of which every fourth has a checkpoint.
SMALL = replace(
    RECIPES["digits"].config,
    epochs=2,
    batch_size=96,
    seed=3,
    drop_rate=0.2,
    stochdepth_rate=0.2,
    checkpoint_minutes=0.0,
    diagnostics=True,
)

KINDS: dict[str, dict[str, Any]] = {
    "all of it": {
        "ema_decay": 0.9,
        "augmentation_level": 3,
        "mixup": True,
        "cutmix": True,
        "sam_rho": 0.05,
        "micro_batch_size": 20,
    },
    "batch norm": {"model": "preact_resnet_digits", "clipping": None},
    "loaders": {"loaders": 1, "ema_decay": None},
}


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(due, "MOST_STEPS", 4)
    monkeypatch.setattr(due, "LOOK_SECONDS", 1e9)


def run_with_copies(
    config: Config, folder: Path, copies: Path, patch: Any, **worker: Any
) -> Reports:
    """A run, of whose checkpoints each is copied, with those beside it, when it is whole."""
    save = Checkpoints.save

    def copying(self: Checkpoints, content: Path, epoch: int, *rest: Any) -> None:
        save(self, content, epoch, *rest)
        shutil.copytree(folder, copies / max(p.name for p in folder.glob("epoch-*")))

    patch.setattr(Checkpoints, "save", copying)
    reports = run(config, folder, **worker)
    patch.setattr(Checkpoints, "save", save)
    return reports


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_within_an_epoch_is_the_same_to_the_bit(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(SMALL, **KINDS[kind])
    whole = run_with_copies(config, tmp_path / "whole", tmp_path / "copies", monkeypatch)
    plain = run(replace(config, checkpoint_minutes=None), tmp_path / "plain")
    assert plain.metrics == whole.metrics  # nor do checkpoints themselves change anything
    marks = sorted(path.name for path in (tmp_path / "copies").iterdir())
    # Steps 0, 4, 8 of the first epoch, then 12, 16, 20 of the whole.
    assert [read_mark(name) for name in marks] == [
        *((0, step) for step in (1, 5, 9)),
        (1, 0),
        *((1, step) for step in (2, 6, 10)),
        (2, 0),
    ]
    for name in marks[1::3]:
        rest = run(config, tmp_path / "copies" / name)
        assert rest.metrics == whole.metrics, name
        states = [torch.load(r.saved / "state.pt", weights_only=True) for r in (whole, rest)]
        for one in states:
            for metrics in one["history"]:
                for measured in [key for key in metrics if key.split("/")[0] in TIMES]:
                    del metrics[measured]
        assert_same(*states)


def test_two_are_kept_and_at_the_end_the_last_and_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with_copies(SMALL, tmp_path / "run", tmp_path / "copies", monkeypatch)
    for copy in (tmp_path / "copies").iterdir():
        assert len(list(copy.glob("epoch-*"))) <= 3  # the best epoch's too
    assert all(read_mark(p.name)[1] == 0 for p in (tmp_path / "run").glob("epoch-*"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_with_copies(SMALL, tmp_path / "whole", tmp_path / "copies", monkeypatch)
    file = tmp_path / "copies/epoch-000001-00000006/epoch-000001-00000006/state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    rest = run(SMALL, tmp_path / "copies/epoch-000001-00000006")
    assert "the checkpoint of epoch 1 and 6 steps is left aside" in capsys.readouterr().out
    assert [
        {key: value for key, value in metrics.items() if key != "remark"}
        for metrics in rest.metrics
    ] == whole.metrics


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is written as long as no second is due; what it holds is of its own step."""
    held, steps = threading.Event(), []
    save = Checkpoints.save

    def slow(self: Checkpoints, content: Path, epoch: int, *rest: Any) -> None:
        if rest[1:] == (1,):
            assert held.wait(60)
        save(self, content, epoch, *rest)

    def due_once(self: Due) -> bool:
        steps.append(len(steps))
        if len(steps) == 3:
            held.set()
        return len(steps) == 1

    monkeypatch.setattr(Checkpoints, "save", slow)
    monkeypatch.setattr(Due, "now", due_once)
    config = replace(SMALL, epochs=1)
    whole = run(config, tmp_path / "run", copies=None)
    assert len(steps) == 11  # it did not wait
    assert whole.metrics == run(replace(config, checkpoint_minutes=None), tmp_path / "b").metrics


def test_an_error_of_writing_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise PermissionError("not here")

    monkeypatch.setattr(Checkpoints, "save", fails)
    with pytest.raises(PermissionError, match="not here"):
        run(SMALL, tmp_path / "run")


def test_the_time_that_training_stands_still_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = state.save_state

    def slow(*args: Any) -> None:
        time.sleep(0.2)
        write(*args)

    monkeypatch.setattr(state, "save_state", slow)
    told: list[float] = []
    train(
        SMALL,
        Worker(
            report=lambda metrics: told.append(metrics["checkpoint_seconds"]),
            checkpoints=Checkpoints(str(tmp_path)),
        ),
    )
    assert told[1] > 0.2  # the end of the first epoch is written before the second begins


def test_a_notice_makes_one_checkpoint_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks: list[int] = []

    def ends() -> str | None:
        looks.append(len(looks))
        return "it ends" if len(looks) > 1 else None  # after the fifth step, not after the first

    config = replace(SMALL, checkpoint_minutes=None)
    folders = tmp_path / "run", tmp_path / "copies"
    whole = run_with_copies(config, *folders, monkeypatch, ends=ends)
    marks = sorted(read_mark(path.name) for path in folders[1].iterdir())
    assert marks == [(0, 5), (1, 0), (2, 0)]
    assert capsys.readouterr().out.count("it ends: a checkpoint is made") == 1
    assert run(config, folders[1] / "epoch-000000-00000005").metrics == whole.metrics


def test_looks_are_as_far_apart_as_steps_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(due, "LOOK_SECONDS", 5.0)
    monkeypatch.setattr(due, "MOST_STEPS", 16)
    clock = 0.0
    monkeypatch.setattr(due.time, "monotonic", lambda: clock)
    looks: list[float] = []

    def ends() -> str | None:
        looks.append(clock)
        return None

    worker = Worker(report=lambda _: None, checkpoints=Checkpoints("/nowhere"), ends=ends)
    asked = Due(replace(SMALL, checkpoint_minutes=None), worker, None)
    for seconds in [10.6] * 3 + [1.0] * 12 + [0.01] * 40:
        clock += seconds
        assert not asked.now()
    # Each step; once steps are shorter, after about five seconds; at last each 16 of them.
    gaps = [round(b - a, 2) for a, b in itertools.pairwise(looks)]
    assert gaps[:6] == [10.6, 10.6, 1.0, 5.0, 5.0, 1.04]
    assert gaps[-1] == 0.16


TWO = replace(SMALL, base_learning_rate=0.1, mixup=True, batch_size=97)


def _worker(rank: int, world_size: int, folder: Path) -> None:
    """Trains, and goes on from what there was after the second checkpoint of epoch 2."""
    torch.set_num_threads(1)
    due.MOST_STEPS, due.LOOK_SECONDS = 4, 1e9
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    purge = kept.Checkpoints.purge

    def lost(self: Checkpoints, marks: Any = ()) -> None:
        purge(self, marks)
        if (1, 6) in marks and not (folder / "again").exists():
            for name in ("again", "alone"):
                shutil.copytree(folder / "run", folder / name)

    kept.Checkpoints.purge = lost  # type: ignore[method-assign]
    for name in ("run", "again"):
        reports = run(TWO, folder / name, rank=rank, world_size=world_size)
        torch.save(reports.metrics, folder / f"{name}{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def test_two_workers_go_on_to_the_bit_and_one_in_their_place_up_to_rounding(tmp_path: Path) -> None:
    mp.spawn(_worker, (2, tmp_path), nprocs=2)
    whole, *others = (
        torch.load(tmp_path / f"{name}{rank}.pt", weights_only=True)
        for name in ("run", "again")
        for rank in range(2)
    )
    marks = [read_mark(path.name) for path in (tmp_path / "alone").glob("epoch-*")]
    assert max(marks) == (1, 6)
    for metrics in others:
        assert metrics == whole
    for ours, theirs in zip(run(TWO, tmp_path / "alone").metrics, whole, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
