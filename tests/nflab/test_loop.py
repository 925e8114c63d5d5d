import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nflab.learning.loop
import nfnet
import nfnet.model
from nflab.data import DatasetError, load_dataset
from nflab.data.batches import Batch, cut
from nflab.data.feed import Part
from nflab.learning.evaluation import evaluate, evaluate_pretrained, open_feed
from nflab.learning.loop import train
from nflab.learning.network import part_of_batch
from nflab.learning.worker import Worker
from nflab.settings.config import Config
from nflab.settings.leaves import replace
from nflab.settings.recipes import RECIPES
from nflab.settings.serialization import from_json
from nflab.storage.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

SMALL = replace(
    RECIPES["digits"].config, epochs=2, batch_size=96, seed=3, drop_rate=0.2, stochdepth_rate=0.2
)

TIMES = ("images_per_second", "seconds", "data_wait_fraction", "checkpoint_seconds", "system")


class Reports:
    """Keeps every report's metrics but the times, and optionally what was saved by then."""

    def __init__(self, folder: Path, copies: Path | None = None) -> None:
        self.folder, self.copies = folder, copies
        self.metrics: list[dict[str, Any]] = []

    def __call__(self, metrics: dict[str, Any]) -> None:
        self.metrics.append({k: v for k, v in metrics.items() if k.split("/")[0] not in TIMES})
        if self.copies is not None:
            shutil.copytree(self.folder, self.copies / str(metrics["epoch"]))

    @property
    def saved(self) -> Path:
        """The folder of the last checkpoint."""
        return max(self.folder.glob("epoch-*"))


def run(config: Config, folder: Path, copies: Path | None = None, **worker: Any) -> Reports:
    reports = Reports(folder, copies)
    train(config, Worker(report=reports, checkpoints=Checkpoints(str(folder)), **worker))
    return reports


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """A finished run of SMALL, which tests only read."""
    return run(SMALL, tmp_path_factory.mktemp("small"))


def test_reports_each_epoch_and_ends_finished(small: Reports) -> None:
    assert [m["epoch"] for m in small.metrics] == [1, 2]
    assert [m["outcome"] for m in small.metrics] == ["running", "finished"]
    first, last = small.metrics
    assert "test_top1" not in first
    assert set(last) >= {"train_loss", "val_loss", "val_top1", "test_loss", "test_top1"}
    assert {name for name in last if name.startswith("clipped_fraction/")} == {
        f"clipped_fraction/{group}" for group in ("stem", "stage1", "stage2", "stage3", "head")
    }


def test_recorded_weights_give_the_recorded_accuracy(small: Reports) -> None:
    checkpoint = small.saved
    config = from_json(Config, (checkpoint / "config.json").read_text())
    assert config == SMALL
    model = nfnet.create_model(config.model.model).eval()
    model.load_state_dict(torch.load(checkpoint / "weights.pt", weights_only=True))
    digits = load_dataset(Config())
    images, labels = digits.eval_images("test", torch.arange(digits.sizes["test"]))
    pixels = (images.float() / 255 - digits.mean) / digits.std
    top1 = 100 * (model(pixels).argmax(1) == labels).double().mean()
    assert float(top1) == pytest.approx(small.metrics[-1]["test_top1"])


@pytest.mark.parametrize(("precision", "rounds"), [("float32", False), ("tf32", True)])
def test_products_are_rounded_if_asked_for_and_never_in_an_evaluation(
    precision: str, rounds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(module: nn.Module, given: Any) -> None:
        allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        seen.append((module.training, *allowed))

    build = nflab.learning.loop.build_model

    def watched(*args: Any, **named: Any) -> nn.Module:
        model = build(*args, **named)
        model.register_forward_pre_hook(look)
        return model

    monkeypatch.setattr(nflab.learning.loop, "build_model", watched)
    run(replace(SMALL, epochs=1, precision=precision, ema_decay=None), tmp_path)
    assert set(seen) == {(True, rounds, rounds), (False, False, False)}


def test_deterministic_algorithms_change_nothing_on_a_cpu(small: Reports, tmp_path: Path) -> None:
    try:
        assert run(replace(SMALL, deterministic=True), tmp_path).metrics == small.metrics
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    run(replace(SMALL, epochs=1), tmp_path / "next")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("ema_decay", [None, 0.99])
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, ema_decay: float | None) -> None:
    config = replace(
        SMALL, ema_decay=ema_decay, augmentation_level=3, mixup=True, cutmix=True, epochs=3
    )
    whole = run(config, tmp_path / "whole", copies=tmp_path / "copies")
    rest = run(config, tmp_path / "copies" / "1")
    # What had been reported before is reported again, for whoever was lost before writing it down.
    assert rest.metrics == whole.metrics
    for file in ("state.pt", "weights.pt"):
        states = [torch.load(r.saved / file, weights_only=True) for r in (whole, rest)]
        for state in states:
            for metrics in state.get("history", []):
                for name in [name for name in metrics if name.split("/")[0] in TIMES]:
                    del metrics[name]
        assert_same(*states)


def test_a_finished_run_that_starts_again_only_repeats_its_reports(small: Reports) -> None:
    written = (small.saved / "state.pt").stat().st_mtime_ns
    assert run(SMALL, small.folder).metrics == small.metrics
    assert (small.saved / "state.pt").stat().st_mtime_ns == written


def test_a_run_goes_on_from_the_checkpoint_before_one_that_is_damaged(tmp_path: Path) -> None:
    """PyTorch's reader does not look at the checksums of a file's parts."""
    config = replace(SMALL, epochs=3)
    whole = run(config, tmp_path / "whole", copies=tmp_path / "copies")
    state = tmp_path / "copies" / "2" / "epoch-000002" / "state.pt"
    with zipfile.ZipFile(state) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    data = bytearray(state.read_bytes())
    begin = largest.header_offset + 1000  # past the part's name: numbers alone
    for place in range(begin, begin + largest.file_size // 2, 499):
        data[place] ^= 64
    state.write_bytes(data)
    torch.load(state, weights_only=True)
    rest = run(config, tmp_path / "copies" / "2")
    assert [m.pop("remark", None) for m in rest.metrics] == [
        "the checkpoint of epoch 2 is left aside, for state.pt is not what was written",
        None,
        None,
    ]
    assert rest.metrics == whole.metrics


def test_a_test_image_that_cannot_be_read_costs_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(SMALL, tmp_path / "whole")
    evaluate = nflab.learning.loop.evaluate

    def unreadable(*args: Any) -> dict[str, float]:
        if args[3] == "test":
            raise DatasetError("cannot read the image")
        return evaluate(*args)

    monkeypatch.setattr(nflab.learning.loop, "evaluate", unreadable)
    broken = Reports(tmp_path / "run")
    with pytest.raises(DatasetError):
        train(SMALL, Worker(report=broken, checkpoints=Checkpoints(str(tmp_path / "run"))))
    assert [m["epoch"] for m in broken.metrics] == [1]
    monkeypatch.undo()
    written = max((tmp_path / "run").glob("epoch-*/state.pt")).stat().st_mtime_ns
    rest = run(SMALL, tmp_path / "run")
    assert rest.metrics == whole.metrics
    assert (rest.saved / "state.pt").stat().st_mtime_ns == written  # nothing was trained again


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_accuracy_is_told_of_weights_that_do_not_answer_with_numbers(
    small: Reports, tmp_path: Path, value: float
) -> None:
    weights = torch.load(small.saved / "weights.pt", weights_only=True)
    weights["head.fc.bias"][3] = value  # of one class: each image has nine finite logits
    torch.save(weights, tmp_path / "broken.pt")
    config = replace(SMALL, pretrained=str(tmp_path / "broken.pt"))
    asked = Reports(tmp_path)
    evaluate_pretrained(config, Worker(report=asked))
    (told,) = asked.metrics
    assert told["outcome"] == "diverged"
    assert not {"test_top1", "test_top5"} & told.keys()


def test_fine_tuning_of_features_that_are_no_numbers_has_diverged(
    small: Reports, tmp_path: Path
) -> None:
    weights = torch.load(small.saved / "weights.pt", weights_only=True)
    weights["stem.conv.weight"][0] = math.nan
    torch.save(weights, tmp_path / "broken.pt")
    tuned = run(replace(SMALL, pretrained=str(tmp_path / "broken.pt")), tmp_path)
    (told,) = tuned.metrics
    assert (told["outcome"], told["val_top1"]) == ("diverged", 0)
    assert not {"val_top5", "test_top1", "test_top5"} & told.keys()


def test_evaluation_is_in_float32_whatever_the_training_is_in(small: Reports) -> None:
    plain = replace(SMALL, pretrained=str(small.saved / "weights.pt"))
    told = []
    for precision in ("float32", "bfloat16"):
        asked = Reports(small.folder)
        evaluate_pretrained(replace(plain, precision=precision), Worker(report=asked))
        told += asked.metrics
    assert told[0] == told[1]


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


def test_a_network_that_breaks_in_the_last_step_has_diverged_too(tmp_path: Path) -> None:
    config = replace(
        SMALL, epochs=1, batch_size=1071, base_learning_rate=1e30, clipping=None, warmup_epochs=0.0
    )
    assert [m["outcome"] for m in run(config, tmp_path).metrics] == ["diverged"]


@pytest.mark.parametrize("name", ["drop_rate", "stochdepth_rate", "label_smoothing"])
def test_each_regulariser_reaches_the_loss(tmp_path: Path, name: str) -> None:
    config = replace(SMALL, epochs=1, drop_rate=0.0, stochdepth_rate=0.0, label_smoothing=0.0)
    losses = [
        run(replace(config, **{name: rate}), tmp_path / str(rate)).metrics[0]["train_loss"]
        for rate in (0.0, 0.5)
    ]
    assert losses[0] != losses[1]


def test_masks_of_the_model_differ_from_step_to_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    forward = nfnet.model.ResNet.forward

    def spy(self: Any, x: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
        if keys is not None:
            seen.append(keys)
        return forward(self, x, keys)

    monkeypatch.setattr(nfnet.model.ResNet, "forward", spy)
    run(SMALL, tmp_path)
    keys = torch.cat(seen)
    assert len(keys) == 2 * (1071 // 96) * 96
    assert len(keys.unique()) == len(keys)


@pytest.mark.parametrize("model", ["dm_nf_resnet50", "preact_resnet50"])
def test_models_made_for_large_images_learn_small_ones(tmp_path: Path, model: str) -> None:
    config = replace(SMALL, model=model, dataset="digits:0-1", epochs=1, batch_size=128)
    assert run(config, tmp_path).metrics[0]["outcome"] == "finished"


def test_seeds_differ_and_repeat(tmp_path: Path) -> None:
    losses = [
        run(replace(SMALL, epochs=1, warmup_epochs=0.5, seed=seed), tmp_path / str(i)).metrics[0][
            "train_loss"
        ]
        for i, seed in enumerate((1, 1, 2))
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


# 100 images a step over 3 workers: slices of 33, 33 and 34.
# A rate at which rounding is not amplified as it is near divergence.
SPLIT = replace(SMALL, batch_size=100, base_learning_rate=0.1, mixup=True, augmentation_level=2)

SPLITS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "batch norm": ({"model": "preact_resnet_digits"}, {}),
    # A part of 2 images of the batch leaves a worker without any.
    "sam": ({"sam_rho": 0.05, "sam_fraction": 0.02}, {"micro_batch_size": 10}),
    "sam of batch norm": ({"sam_rho": 0.05, "model": "preact_resnet_digits"}, {}),
}
"""Settings of a run, and those that it has on several workers only."""

ROUNDING = {"sam of batch norm": 2e-4}
"""How far losses may lie apart where rounding is amplified: SAM divides by a gradient's norm, over
statistics of the batch. 5e-5 was seen on one kind of CPU, less than 1e-5 on another."""


def _worker(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    for kind, (settings, pieces) in SPLITS.items():
        config = replace(SPLIT, **settings, **pieces)
        reports = run(config, folder / kind, rank=rank, world_size=world_size)
        torch.save(reports.metrics, folder / f"{kind}{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each of three processes reported, of each of SPLITS."""
    folder = tmp_path_factory.mktemp("split")
    mp.spawn(_worker, (3, folder), nprocs=3)
    return folder


@pytest.mark.parametrize("kind", SPLITS)
def test_the_number_of_workers_changes_nothing_but_rounding(
    tmp_path: Path, split: Path, kind: str
) -> None:
    alone = run(replace(SPLIT, **SPLITS[kind][0]), tmp_path).metrics
    for rank in range(3):
        together = torch.load(split / f"{kind}{rank}.pt", weights_only=True)
        assert len(together) == len(alone)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.keys() == theirs.keys()
            for name in ("train_loss", "val_loss"):
                expected = pytest.approx(theirs[name], rel=ROUNDING.get(kind, 1e-5))
                assert ours[name] == expected, name
            assert abs(ours["val_top1"] - theirs["val_top1"]) < 0.6  # two images
            assert ours["learning_rate"] == theirs["learning_rate"]


def test_sam_changes_the_loss(small: Reports, tmp_path: Path) -> None:
    """Else the test above would pass without it."""
    sharp = run(replace(SMALL, sam_rho=0.05), tmp_path)
    losses = [reports.metrics[-1]["train_loss"] for reports in (small, sharp)]
    assert abs(losses[0] - losses[1]) > 1e-4 * losses[0]


def test_batch_norm_follows_each_batch_once_with_sam(tmp_path: Path) -> None:
    config = replace(SMALL, model="preact_resnet_digits", sam_rho=1e-9, sam_fraction=0.2, epochs=1)
    found = []
    for rho in (None, 1e-9):  # which moves the weights by nothing
        reports = run(replace(config, sam_rho=rho), tmp_path / str(rho))
        found.append(torch.load(reports.saved / "weights.pt", weights_only=True))
    names = [name for name in found[0] if name.endswith(("running_mean", "running_var"))]
    assert names
    for name in names:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-3, atol=1e-4)


def test_evaluation_leaves_what_was_frozen_as_it_is() -> None:
    dataset = load_dataset(SMALL)
    model = nfnet.create_model("preact_resnet_digits").train()
    model.stem.eval()
    before = {name: module.training for name, module in model.named_modules()}
    worker = Worker(report=lambda _: None)
    feed = open_feed(SMALL, dataset, worker, [Part("val")])
    evaluate(SMALL, model, dataset, "val", worker, feed)
    assert {name: module.training for name, module in model.named_modules()} == before


@given(st.integers(1, 60), st.integers(1, 5), st.floats(0.001, 1))
def test_a_part_of_a_batch_is_the_same_however_it_is_cut(
    batch_size: int, world_size: int, fraction: float
) -> None:
    places = torch.arange(batch_size)
    parts = []
    for rank in range(world_size):
        own = places[cut(batch_size, rank, world_size)]
        part, size = part_of_batch(Batch(own, own, own), batch_size, fraction)
        assert torch.equal(part.images_NCHW, part.places_N)
        parts.append(part.places_N)
    whole, _ = part_of_batch(Batch(places, places, places), batch_size, fraction)
    assert torch.equal(torch.cat(parts), whole.places_N)
    assert len(whole.places_N) == size == max(1, int(batch_size * fraction))


ARITHMETIC = replace(SMALL, epochs=2, base_learning_rate=0.2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """A run in the usual arithmetic."""
    return run(ARITHMETIC, tmp_path_factory.mktemp("plain"))


def losses(reports: Reports) -> list[float]:
    return [m[name] for m in reports.metrics for name in ("train_loss", "val_loss")]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"precision": "bfloat16"}, 0.02),  # 8 bits of mantissa
        # Rounding, which the steps make larger.
        ({"channels_last": True}, 1e-4),
        pytest.param({"compile": True}, 1e-4, marks=pytest.mark.slow),
        pytest.param(
            {"precision": "bfloat16", "channels_last": True, "compile": True},
            0.02,
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_another_arithmetic_leaves_the_loss_where_it_was(
    plain: Reports, tmp_path: Path, settings: dict[str, Any], tolerance: float
) -> None:
    other = run(replace(ARITHMETIC, **settings), tmp_path)
    assert losses(other) != losses(plain)  # the setting is not without effect
    assert losses(other) == pytest.approx(losses(plain), rel=tolerance)
    state = torch.load(other.saved / "state.pt", weights_only=True)
    assert all(p.dtype == torch.float32 for p in state["model"].values())


def test_a_worker_with_another_copy_of_the_dataset_is_refused_before_it_trains() -> None:
    asked = Reports(Path())
    with pytest.raises(DatasetError, match=r"^the dataset on .+ is not the driver's: its fingerp"):
        train(SMALL, Worker(report=asked, fingerprint="0" * 16))
    assert asked.metrics == []
    with pytest.raises(DatasetError, match="is not the driver's"):
        evaluate_pretrained(SMALL, Worker(report=asked, fingerprint="0" * 16))


def test_that_it_goes_on_is_told_within_epochs_and_evaluations(tmp_path: Path) -> None:
    told: list[None] = []
    run(replace(SMALL, epochs=1, warmup_epochs=0.0), tmp_path, progressed=lambda: told.append(None))
    sizes = load_dataset(SMALL).sizes
    evaluated = sum(math.ceil(sizes[split] / 96) for split in ("val", "test"))
    assert len(told) > evaluated
