import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import nfnet
from nflab.config import Config, from_json, replace, to_json
from nflab.data import load_dataset
from nflab.loop import Worker, train
from nflab.recipes import RECIPES

SMALL = replace(
    RECIPES["digits"].config, epochs=2, batch_size=96, seed=3, drop_rate=0.2, stochdepth_rate=0.2
)


class Reports:
    """Keeps every report's metrics, and its checkpoint in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: list[dict[str, Any]] = []

    def __call__(self, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        self.metrics.append({k: v for k, v in metrics.items() if k != "images_per_second"})
        if checkpoint is not None:
            shutil.copytree(checkpoint, self.checkpoint(metrics["epoch"]))

    def checkpoint(self, epoch: int) -> Path:
        return self.folder / f"epoch{epoch}"


def run(config: Config, folder: Path, **worker: Any) -> Reports:
    reports = Reports(folder)
    train(config, Worker(report=reports, **worker))
    return reports


def test_reports_each_epoch_and_ends_finished(tmp_path: Path) -> None:
    reports = run(SMALL, tmp_path)
    assert [m["epoch"] for m in reports.metrics] == [1, 2]
    assert [m["outcome"] for m in reports.metrics] == ["running", "finished"]
    first, last = reports.metrics
    assert "test_top1" not in first
    assert set(last) >= {"train_loss", "val_loss", "val_top1", "test_loss", "test_top1"}
    assert {name for name in last if name.startswith("clipped_fraction/")} == {
        f"clipped_fraction/{group}" for group in ("stem", "stage1", "stage2", "stage3", "head")
    }


def test_recorded_weights_give_the_recorded_accuracy(tmp_path: Path) -> None:
    reports = run(SMALL, tmp_path)
    checkpoint = reports.checkpoint(2)
    config = from_json(Config, (checkpoint / "config.json").read_text())
    assert config == SMALL
    model = nfnet.create_model(config.model.model).eval()
    model.load_state_dict(torch.load(checkpoint / "weights.pt", weights_only=True))
    digits = load_dataset("digits")
    images, labels = digits.eval_images("test", torch.arange(digits.sizes["test"]))
    pixels = (images.float() / 255 - digits.mean) / digits.std
    top1 = 100 * (model(pixels).argmax(1) == labels).double().mean()
    assert float(top1) == pytest.approx(reports.metrics[-1]["test_top1"])


@pytest.mark.parametrize("ema_decay", [None, 0.99])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, ema_decay: float | None) -> None:
    config = replace(
        SMALL, ema_decay=ema_decay, augmentation_level=3, mixup=True, cutmix=True, epochs=3
    )
    whole = run(config, tmp_path / "whole")
    rest = run(config, tmp_path / "rest", resume_from=whole.checkpoint(1))
    assert rest.metrics == whole.metrics[1:]
    for file in ("state.pt", "weights.pt"):
        states = [torch.load(r.checkpoint(3) / file, weights_only=True) for r in (whole, rest)]
        assert_same(*states)


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_learning_rate_warms_up_to_its_peak_and_ends_near_0(tmp_path: Path) -> None:
    config = replace(SMALL, epochs=4, warmup_epochs=2.0, base_learning_rate=0.4)
    rates = [m["learning_rate"] for m in run(config, tmp_path).metrics]
    steps, peak = 1071 // 96, 0.4 * 96 / 256
    # The last step of epoch e is step e * steps - 1.
    assert rates[0] == pytest.approx(peak * (steps - 1) / (2 * steps))
    assert rates[1] == pytest.approx(peak * (2 * steps - 1) / (2 * steps))
    last = (2 * steps - 1) / (2 * steps)
    assert rates[3] == pytest.approx(peak * (1 + math.cos(math.pi * last)) / 2, abs=1e-9)


def test_a_loss_that_is_no_longer_finite_ends_the_run_as_diverged(tmp_path: Path) -> None:
    config = replace(SMALL, base_learning_rate=1e6, clipping=None, warmup_epochs=0.0)
    reports = run(config, tmp_path)
    assert [m["outcome"] for m in reports.metrics] == ["diverged"]
    assert reports.metrics[0]["val_top1"] == 0
    assert not any(name.startswith("clipped_fraction/") for name in reports.metrics[0])


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    losses = [
        run(replace(SMALL, epochs=1, warmup_epochs=0.5, seed=seed), tmp_path / str(i)).metrics[0][
            "train_loss"
        ]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def _worker(rank: int, world_size: int, folder: Path, text: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    reports = run(from_json(Config, text), folder / "reports", rank=rank, world_size=world_size)
    torch.save(reports.metrics, folder / f"metrics{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("model", ["dm_nf_resnet_digits", "preact_resnet_digits"])
def test_the_number_of_workers_changes_nothing_but_rounding(tmp_path: Path, model: str) -> None:
    # 100 images a step over 3 workers: slices of 33, 33 and 34.
    # A rate at which rounding is not amplified as it is near divergence.
    config = replace(
        SMALL,
        model=model,
        batch_size=100,
        base_learning_rate=0.1,
        mixup=True,
        augmentation_level=2,
    )
    alone = run(config, tmp_path / "alone").metrics
    mp.spawn(_worker, (3, tmp_path, to_json(config)), nprocs=3)
    for rank in range(3):
        together = torch.load(tmp_path / f"metrics{rank}.pt", weights_only=True)
        assert len(together) == len(alone)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.keys() == theirs.keys()
            for name in ("train_loss", "val_loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
            assert abs(ours["val_top1"] - theirs["val_top1"]) < 0.6  # two images
            assert ours["learning_rate"] == theirs["learning_rate"]
