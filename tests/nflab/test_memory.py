"""When memory is full: fewer images at once, and the same result."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from nflab.cluster.placement import Placement
from nflab.data import load_dataset
from nflab.data.feed import Feed, Part
from nflab.learning.evaluation import evaluate
from nflab.learning.memory import OutOfMemory
from nflab.learning.models import build_model
from nflab.learning.network import Network
from nflab.learning.worker import Worker
from nflab.running import trial_process
from nflab.running.mailbox import Listener, mailbox
from nflab.running.worker_group import fit
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.storage.checkpoints import Checkpoints
from tests.nflab.test_loop import Reports, run

pytestmark = pytest.mark.slow

SMALL = replace(RECIPES["digits"].config, batch_size=96, epochs=3, seed=3)


def holding(images: int, config: Config = SMALL, world_size: int = 1) -> tuple[Network, nn.Module]:
    """A network whose device's memory holds so many images, and its model."""
    dataset = load_dataset(config)
    model = build_model(config, dataset, new_head=True)

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        if len(given[0]) > images:
            raise torch.OutOfMemoryError(f"{len(given[0])} images")

    network = Network(config, dataset, model, torch.device("cpu"), world_size)
    model.register_forward_pre_hook(look)
    return network, model


@pytest.mark.parametrize(
    ("holds", "given", "size"),
    [(96, None, 96), (95, None, 48), (13, None, 12), (1, None, 1), (50, 40, 40), (20, 40, 20)],
)
def test_a_slice_is_halved_until_it_fits(holds: int, given: int | None, size: int) -> None:
    network, model = holding(holds, replace(SMALL, micro_batch_size=given))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    network.fit_into_memory(copies=2)
    assert network.micro_batch_size == size
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(chance, torch.get_rng_state())


def test_a_memory_without_room_for_one_image_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="1 images"):
        holding(0)[0].fit_into_memory(copies=2)


def test_memory_for_the_optimizer_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    network, model = holding(96)
    asked = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **k: asked.append(size) or empty(*size, **k))
    network.fit_into_memory(copies=3)
    assert (3 * sum(p.numel() for p in model.parameters()),) in asked


def test_another_error_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network, _ = holding(96)
    monkeypatch.setattr(network, "_prepared", lambda _: torch.zeros(1, 2) @ torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        network.fit_into_memory(copies=2)


def test_only_a_gpu_adapts_and_batch_norm_never(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not holding(96)[0].adapts
    for model, adapts in (("dm_nf_resnet_digits", True), ("preact_resnet_digits", False)):
        network, _ = holding(96, replace(SMALL, model=model, clipping=None))
        monkeypatch.setattr(network, "_device", torch.device("cuda"))
        assert network.adapts == adapts


def test_a_trial_whose_memory_is_full_later_goes_on_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(SMALL, tmp_path / "whole")
    original, calls = Network.add_gradient, []

    def full(self: Network, *args: Any) -> Tensor:
        calls.append(self.micro_batch_size)
        if self.micro_batch_size > 30 and len(calls) > 15:  # in the second epoch
            raise torch.OutOfMemoryError
        return original(self, *args)

    monkeypatch.setattr(Network, "add_gradient", full)
    monkeypatch.setattr(Network, "adapts", True)
    reports = Reports(tmp_path / "run")
    worker = Worker(report=reports, checkpoints=Checkpoints(str(tmp_path / "run")))
    trial_process._train(SMALL, worker)
    sizes = [metrics["images_at_once"] for metrics in reports.metrics]
    # Each process tells again what led to its checkpoint.
    assert sizes == [96, 96, 96, 24, 24]
    told = capsys.readouterr().out
    assert "memory ran out: from now on 48 images are computed at once" in told
    assert "from now on 24 images" in told
    for ours, theirs in zip(reports.metrics[2:], whole.metrics, strict=True):
        assert ours["epoch"] == theirs["epoch"]
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)


def test_an_evaluation_takes_as_many_images_as_memory_holds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset, worker = load_dataset(SMALL), Worker(report=lambda _: None)
    found, sizes = [], []
    for holds in (96, 30):
        _, model = holding(holds)
        model.register_forward_hook(lambda _, given, __: sizes.append(len(given[0])))
        feed = Feed(dataset, SMALL, [Part("val")])
        found.append(evaluate(SMALL, model, dataset, "val", worker, feed))
    images = dataset.sizes["val"]
    assert sizes[0] == 96
    of_second = sizes[math.ceil(images / 96) :]
    assert sum(of_second) == images
    assert max(of_second) == 24
    told = capsys.readouterr().out.splitlines()
    assert told == [f"memory ran out: {size} images are evaluated at once" for size in (48, 24)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize("where", ["nflab.learning.loop.evaluate", "nfnet.SGD_AGC.step"])
def test_memory_that_is_full_elsewhere_is_helped_too(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(where, full)
    monkeypatch.setattr(Network, "adapts", True)
    with pytest.raises(OutOfMemory) as caught:
        run(SMALL, tmp_path)
    assert caught.value.micro_batch_size == 48


@pytest.mark.parametrize(("adapts", "at_once"), [(False, None), (True, 1)])
def test_full_memory_that_cannot_be_helped_is_an_error(
    adapts: bool, at_once: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("nfnet.SGD_AGC.step", full)
    monkeypatch.setattr(Network, "adapts", adapts)
    with pytest.raises(torch.OutOfMemoryError):
        run(replace(SMALL, micro_batch_size=at_once), tmp_path)


def _worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    network, model = holding(100 if rank else 13, world_size=2)
    network.fit_into_memory(copies=2)
    assert network.micro_batch_size == math.ceil(48 / 4)
    images = torch.zeros(48, 1, 8, 8, dtype=torch.uint8)
    keys_N = torch.arange(48)
    logits_NK = model(network._prepared(images[:12]), keys_N[:12])
    assert logits_NK.shape == (12, 10)
    dist.destroy_process_group()


def test_all_workers_take_the_pieces_that_the_smallest_memory_holds(tmp_path: Path) -> None:
    mp.spawn(_worker, (tmp_path,), nprocs=2)


def test_a_group_of_workers_begins_again_with_fewer_images_at_once(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "asked"

    def task(config: Config, worker: Worker) -> None:
        size = config.scale.micro_batch_size
        if worker.rank == 0:
            with asked.open("a") as file:
                file.write(f"{size}\n")
        if size is None or size > 12:
            raise OutOfMemory(48 if size is None else size // 2)

    placement = Placement(2, 0.5, 0.0, 1)
    fit(SMALL, placement, str(tmp_path / "run"), Listener(mailbox()), task)
    assert asked.read_text().split() == ["None", "48", "24", "12"]
    assert capsys.readouterr().out.count("images are computed at once") == 3
