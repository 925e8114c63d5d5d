"""The promise: one configuration has one curve, however its batches are cut and read.

The table in docs/promises.md names these tests.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from nflab.data.batches import standardise
from nflab.learning import evaluation, loop, network
from nflab.learning.network import Network
from nflab.learning.worker import Worker
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.storage.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

ALL = replace(
    RECIPES["digits"].config,
    epochs=1,
    batch_size=51,
    base_learning_rate=0.1,
    warmup_epochs=0.25,
    augmentation_level=3,
    mixup=True,
    cutmix=True,
    drop_rate=0.2,
    stochdepth_rate=0.2,
    sam_rho=0.05,
    ema_decay=0.9,
)
"""21 steps, in which all is on."""

CUTS: dict[str, dict[str, Any]] = {
    "micro-batches of 1": {"micro_batch_size": 1},
    "micro-batches of 7": {"micro_batch_size": 7},
    "3 loaders": {"loaders": 3},
    "augmented elsewhere": {"loaders": 2, "augment_on": "device", "micro_batch_size": 20},
}

WORKERS: dict[str, dict[str, Any]] = {  # of 2 workers the first alone
    "workers": {},
    "workers and micro-batches of 5": {"micro_batch_size": 5},
}

Curve = tuple[list[float], dict[str, Tensor]]
"""Loss of each step, summed over workers, and the weights at the end."""


def curve(config: Config, folder: Path, **worker: Any) -> Curve:
    losses: list[float] = []
    original = Network.add_gradient

    def watched(self: Network, *args: Any) -> Tensor:
        loss = original(self, *args)
        total = loss.clone()
        if self._world_size > 1:
            dist.all_reduce(total)
        losses.append(float(total))
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "add_gradient", watched)
        checkpoints = Checkpoints(str(folder))
        loop.train(config, Worker(report=lambda _: None, checkpoints=checkpoints, **worker))
    if worker.get("rank"):
        return losses, {}
    saved = max(folder.glob("epoch-*")) / "state.pt"
    return losses, torch.load(saved, weights_only=True)["model"]


def _worker(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet{world_size}", rank=rank, world_size=world_size
    )
    for name, cut in list(WORKERS.items())[: world_size - 1]:
        place = folder / f"{world_size} {name}"
        found = curve(replace(ALL, **cut), place, rank=rank, world_size=world_size)
        if rank == 0:
            torch.save(found, place.with_suffix(".pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """The curve of ALL, cut in each way."""
    folder = tmp_path_factory.mktemp("curves")
    for world_size in (2, 3):
        mp.spawn(_worker, (world_size, folder), nprocs=world_size)
    found = {p.stem: torch.load(p, weights_only=True) for p in folder.glob("*.pt")}
    for name, cut in {"whole": {}, **CUTS}.items():
        found[name] = curve(replace(ALL, **cut), folder / name)
    return found


@pytest.mark.parametrize("cut", [*CUTS, "2 workers", *(f"3 {name}" for name in WORKERS)])
def test_no_cut_changes_the_curve(curves: dict[str, Curve], cut: str) -> None:
    (losses, weights), (theirs, their_weights) = curves["whole"], curves[cut]
    assert len(losses) == 42  # SAM looks twice
    assert theirs == pytest.approx(losses, rel=1e-5)
    assert weights.keys() == their_weights.keys()
    for name, value in weights.items():
        assert torch.allclose(value, their_weights[name], rtol=1e-4, atol=1e-5), name


def test_in_float64_it_holds_where_float32_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe's own rate is near divergence: after four epochs cuts part in the third digit."""
    config = replace(RECIPES["digits"].config, epochs=5, batch_size=64, ema_decay=None)
    cut = replace(config, micro_batch_size=16)
    ((plain, _), (parted, _)) = (
        curve(one, tmp_path / f"float32 {i}") for i, one in enumerate((config, cut))
    )
    assert plain != pytest.approx(parted, rel=1e-4)
    build = loop.build_model
    monkeypatch.setattr(loop, "build_model", lambda *a, **k: build(*a, **k).double())
    for module in (network, evaluation):
        monkeypatch.setattr(module, "standardise", lambda *args: standardise(*args).double())
    ((losses, weights), (theirs, their_weights)) = (
        curve(one, tmp_path / f"float64 {i}") for i, one in enumerate((config, cut))
    )
    assert theirs == pytest.approx(losses, rel=1e-6)  # the loss itself is of float32
    for name, value in weights.items():
        assert value.dtype == torch.float64
        assert torch.allclose(value, their_weights[name], rtol=1e-5, atol=1e-7), name
