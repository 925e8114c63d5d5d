"""Datasets on disk: folders of images and CIFAR's files."""

import dataclasses
import hashlib
import io
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

import nfnet
from nflab import data
from nflab.data import Dataset, DatasetError, load_dataset
from nflab.data.crop import random_crops
from nflab.data.dataset import changes
from nflab.data.folder import ImageFolder, random_crop
from nflab.learning.computation import OtherComputation, made_by, require_same
from nflab.learning.loop import train
from nflab.learning.validation import validate
from nflab.learning.worker import Worker
from nflab.recording.metrics import to_record
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.settings.streams import Stream, keys
from nflab.storage.checkpoints import Checkpoints
from nflab.storage.run_folder import new_identity
from nflab.studies.session import CONTENTS, _of_same_contents
from tests.feeds import eval_batches, train_batches
from tests.photos import write_photos

TENSORFLOW = json.loads(
    (Path(__file__).parents[1] / "golden" / "random_crop.json").read_text(encoding="utf-8")
)
SIZES = nfnet.Preprocessing(train_size=24, test_size=32, crop=32 / 40, squash=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), {"train": 20, "val": 5})


@pytest.fixture
def own(photos: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def test_without_a_test_folder_val_is_the_test_split_and_a_tenth_of_train_is_held_out(
    photos: Path,
) -> None:
    dataset = ImageFolder(photos, SIZES)
    assert dataset.class_names == ("china", "flower")
    assert dataset.sizes == {"train": 36, "val": 4, "test": 10}
    for split, each in (("val", 2), ("test", 5)):
        _, labels = dataset.eval_images(split, torch.arange(dataset.sizes[split]))  # type: ignore[arg-type, index]
        assert torch.bincount(labels).tolist() == [each, each]


def test_with_a_test_folder_the_splits_are_the_folders(own: Path) -> None:
    shutil.copytree(own / "val", own / "test")
    assert ImageFolder(own, SIZES).sizes == {"train": 40, "val": 10, "test": 10}


def test_the_evaluation_crop_is_the_models(photos: Path) -> None:
    dataset = ImageFolder(photos, SIZES)
    images, _ = dataset.eval_images("test", torch.tensor([3]))
    with Image.open(photos / "val" / "china" / "003.jpg") as image:
        expected = image.resize((40, 40), Image.Resampling.BICUBIC).crop((4, 4, 36, 36))
    assert torch.equal(images[0], torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_the_shorter_side_is_resized_where_the_model_does_not_squash(photos: Path) -> None:
    sizes = dataclasses.replace(SIZES, squash=False)
    image = Image.new("RGB", (100, 50))
    image.paste((255, 255, 255), (40, 0, 60, 50))
    cropped = np.array(sizes.crop_image(image))
    assert cropped.shape == (32, 32, 3)
    # 20 of 100 columns, of which the crop keeps 32 of 80.
    assert cropped[16, :, 0].mean() / 255 == pytest.approx(16 / 32, abs=0.03)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**31))
def test_a_random_crop_lies_within_the_image(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = random_crop(width, height, nfnet.hash_keys(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize("shape", TENSORFLOW)
def test_random_crops_follow_tensorflows_law(shape: str) -> None:
    """Quantiles of 40,000 draws: TensorFlow's, of the authors' arguments, and ours."""
    golden = TENSORFLOW[shape]
    height, width = map(int, shape.split("x"))
    keys = nfnet.hash_keys(7, torch.arange(golden["draws"]))
    boxes = random_crops(torch.tensor([[width, height]]).expand(len(keys), 2), keys).double()
    left, top, right, bottom = boxes.unbind(1)
    w, h = right - left, bottom - top
    area = w * h / (width * height)
    room_down, room_across = height - h, width - w
    ours = {
        "area": area,
        "ratio": w / h,
        "height": h / height,
        "top_share": (top / room_down)[room_down > 0],
        "left_share": (left / room_across)[room_across > 0],
    }
    at = torch.tensor(golden["quantiles"], dtype=torch.float64)
    for name, drawn in ours.items():
        assert drawn.quantile(at).tolist() == pytest.approx(golden[name], abs=0.01), name
    assert float(area.mean()) == pytest.approx(golden["area_mean"], abs=0.005)
    assert float((area == 1).double().mean()) == golden["whole_image"]
    assert float((area < 0.25).double().mean()) == pytest.approx(
        golden["area_below_quarter"], abs=0.01
    )


def test_crops_are_the_same_however_many_are_drawn_together() -> None:
    sizes = torch.tensor([[400, 400], [800, 200], [30, 1], [1, 1], [1000, 3]])
    keys = nfnet.hash_keys(3, torch.arange(5))
    alone = [random_crop(*size, key) for size, key in zip(sizes.tolist(), keys, strict=True)]
    assert random_crops(sizes, keys).tolist() == [list(box) for box in alone]
    # Nothing of its area and ratio fits into a line of pixels: the centre.
    assert alone[4] == (499, 1, 501, 3)


def test_training_images_are_functions_of_their_keys(photos: Path) -> None:
    dataset = ImageFolder(photos, SIZES)
    index, keys = torch.full((60,), 7), nfnet.hash_keys(1, torch.arange(60))
    images, labels = dataset.train_images(index, keys)
    assert images.shape == (60, 3, 24, 24)
    assert labels.tolist() == [0] * 60
    again, _ = dataset.train_images(index[:2], keys[[5, 40]])
    assert torch.equal(again, images[[5, 40]])
    assert len({image.numpy().tobytes() for image in images}) == 60


def swap_contents(own: Path) -> None:
    """Of one size, between two classes; times are put back."""
    files = [own / "train" / name / "0.bmp" for name in ("china", "flower")]
    data, times = [f.read_bytes() for f in files], [f.stat().st_mtime_ns for f in files]
    for file, other, time in zip(files, reversed(data), times, strict=True):
        file.write_bytes(other)
        os.utime(file, ns=(time, time))


def turn(own: Path) -> None:
    """Upside down: of the same size, and of the same pixels."""
    file = own / "val" / "china" / "000.jpg"
    file.write_bytes(file.read_bytes()[:-2] + b"\x00\x00")


def exchange_names(own: Path) -> None:
    first, second = (own / "train" / "china" / name for name in ("000.jpg", "001.jpg"))
    first.rename(own / "x")
    second.rename(first)
    (own / "x").rename(second)


def move_to_another_class(own: Path) -> None:
    (own / "train" / "china" / "000.jpg").rename(own / "train" / "flower" / "zzz.jpg")


def move_to_another_split(own: Path) -> None:
    (own / "train" / "china" / "000.jpg").rename(own / "val" / "china" / "zzz.jpg")


def rename_a_class(own: Path) -> None:
    for split in ("train", "val"):
        (own / split / "flower").rename(own / split / "rose")


@pytest.mark.parametrize(
    "change",
    [
        swap_contents,
        turn,
        exchange_names,
        move_to_another_class,
        move_to_another_split,
        rename_a_class,
    ],
    ids=lambda change: change.__name__,
)
def test_the_fingerprint_changes_with_every_byte_label_and_split(
    own: Path, change: Callable[[Path], None]
) -> None:
    for name, colour in (("china", "red"), ("flower", "blue")):
        Image.new("RGB", (20, 20), colour).save(own / "train" / name / "0.bmp")
    before = ImageFolder(own, SIZES)
    assert ImageFolder(own, SIZES).fingerprint == before.fingerprint
    change(own)
    after = ImageFolder(own, SIZES)
    assert after.fingerprint != before.fingerprint
    assert after.contents != before.contents


def test_the_fingerprint_is_of_contents_wherever_they_are(photos: Path, own: Path) -> None:
    here, there = ImageFolder(photos, SIZES), ImageFolder(own, SIZES)
    assert here.fingerprint == there.fingerprint
    (own / "train" / "china" / "000.jpg").rename(own / "train" / "china" / "000.jpeg")
    assert ImageFolder(own, SIZES).fingerprint == there.fingerprint


def test_what_changed_is_named() -> None:
    before = {"train/a": "3 images 11", "train/b": "4 images 22", "val/a": "2 images 33"}
    now = {"train/a": "3 images 44", "train/c": "4 images 22", "val/a": "2 images 33"}
    assert changes(before, now) == (
        "train/a (other contents), train/b (4 images -> no images), train/c (no images -> 4 images)"
    )
    assert changes(before, now, most=1) == "train/a (other contents), and 2 more"


def test_half_of_the_training_images_are_mirrored(tmp_path: Path) -> None:
    small_folder(tmp_path, "ab")
    brighter = np.arange(0, 200, 2, dtype=np.uint8)[None].repeat(100, 0)  # to the right
    for path in (tmp_path / "train").glob("*/*"):
        Image.fromarray(brighter).convert("RGB").save(path)
    n = 1000
    dataset = ImageFolder(tmp_path, SIZES)
    images, _ = dataset.train_images(
        torch.zeros(n, dtype=torch.long), nfnet.hash_keys(2, torch.arange(n))
    )
    left, right = images.float().split(12, dim=3)
    difference = right.mean((1, 2, 3)) - left.mean((1, 2, 3))
    assert difference.abs().min() > 1  # however it is cropped
    assert abs(int((difference < 0).sum()) - n / 2) < 5 * math.sqrt(n / 4)


def config_of(folder: Path) -> Config:
    return replace(
        Config(), dataset=str(folder), image_size=24, batch_size=8, mixup=True, cutmix=True
    )


def test_processes_that_read_ahead_change_nothing(photos: Path) -> None:
    config = config_of(photos)
    dataset = load_dataset(config)
    plain, ahead = (list(train_batches(dataset, config, 1, 0, 2, n)) for n in (0, 2))
    assert len(plain) == len(ahead) == 36 // 8
    for a, b in zip(plain, ahead, strict=True):
        assert torch.equal(a.images_NCHW, b.images_NCHW)
        assert torch.equal(a.targets_NK, b.targets_NK)
        assert torch.equal(a.places_N, b.places_N)
    found = [list(eval_batches(dataset, "test", 3, 1, 2, n)) for n in (0, 2)]
    for of_all in zip(*(zip(*of_feed, strict=True) for of_feed in found), strict=True):
        assert torch.equal(*(torch.cat(tensors) for tensors in of_all))


def test_the_fingerprint_follows_the_files(own: Path) -> None:
    before = ImageFolder(own, SIZES).fingerprint
    assert ImageFolder(own, SIZES).fingerprint == before
    (own / "train" / "china" / "000.jpg").unlink()
    assert ImageFolder(own, SIZES).fingerprint != before


def break_folder(root: Path, how: str) -> None:
    if how == "no val":
        shutil.rmtree(root / "val")
    elif how == "empty class":
        shutil.rmtree(root / "val" / "flower")
        (root / "val" / "flower").mkdir()
    elif how == "another class":
        (root / "train" / "tiger").mkdir()
    elif how == "no classes":
        for folder in root.glob("*/*"):
            shutil.rmtree(folder)
    elif how == "no image":
        (root / "train" / "china" / "003.jpg").write_text("no image")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no val", "has no folder 'val'"),
        ("empty class", "class 'flower' has no images in .*val/flower"),
        ("another class", "different classes: tiger is in one of them only"),
        ("no classes", "holds no folders"),
        ("no image", r"1 files cannot be read as images: .*train/china/003\.jpg \(cannot identify"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(own: Path, how: str, message: str) -> None:
    break_folder(own, how)
    with pytest.raises(DatasetError, match=message) as caught:
        load_dataset(config_of(own))
    assert "\n" not in str(caught.value)


def damage(path: Path) -> Path:
    """An image in the place of another whose ends are whole, and whose middle is not."""
    damaged = path.with_suffix(".png")
    Image.open(path).save(damaged)
    data = bytearray(damaged.read_bytes())
    at = data.index(b"IDAT") + 40
    data[at : at + 400] = bytes(400)
    damaged.write_bytes(data)
    path.unlink()
    return damaged


def test_an_image_that_cannot_be_read_is_named_when_it_is_needed(own: Path) -> None:
    damage(own / "train" / "flower" / "007.jpg")
    config = replace(config_of(own), batch_size=36)  # all of them
    dataset = load_dataset(config)  # its ends are whole
    for loaders in (0, 2):
        with pytest.raises(DatasetError, match=r"cannot read the image .*flower/007\.png"):
            list(train_batches(dataset, config, 0, 0, 1, loaders))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_a_file_that_is_cut_off_is_refused_before_anything_starts(own: Path, ending: str) -> None:
    path = own / "train" / "flower" / "007.jpg"
    Image.open(path).save(own / "train" / "flower" / f"cut.{ending}")
    cut = own / "train" / "flower" / f"cut.{ending}"
    whole = cut.read_bytes()
    cut.write_bytes(whole + b"\0\0after it")  # which does no harm
    load_dataset(config_of(own))
    data._load.cache_clear()
    cut.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DatasetError, match=rf"1 files cannot be .*cut\.{ending} \((T|.*t)runcated"):
        load_dataset(config_of(own))
    told = load_dataset(replace(config_of(own), bad_images="skip")).left_out
    assert told.startswith("1 files that cannot be read as images (")


def paths(dataset: Any, split: str) -> list[Path]:
    """Of the images of a split, in their order."""
    part, places = dataset._places[split]
    return [Path(dataset._files[part][place]) for place in places.tolist()]


@pytest.mark.slow
@pytest.mark.parametrize("partners", [None, "batch", "fresh"])
def test_the_next_image_of_the_order_takes_the_place_of_a_damaged_one(
    own: Path, capsys: pytest.CaptureFixture[str], partners: str | None
) -> None:
    config = replace(config_of(own), bad_images="skip", mixup=False, cutmix=partners is not None)
    config = replace(config, partners=partners or "batch", label_smoothing=0.0)
    before = list(train_batches(load_dataset(config), config, 0, 0, 1))
    damaged = [damage(own / "train" / name) for name in ("china/003.jpg", "flower/007.jpg")]
    data._load.cache_clear()
    dataset = load_dataset(config)
    whole = list(train_batches(dataset, config, 0, 0, 1))
    order = keys(config.run.seed, Stream.ORDER, 0, torch.arange(36)).argsort().tolist()
    files = paths(dataset, "train")
    lost = [place for place in range(32) if files[order[place]] in damaged]
    assert sum(batch.replaced for batch in whole) == len(lost) > 0
    for loaders in (0, 2):
        parts = [list(train_batches(dataset, config, 0, rank, 3, loaders)) for rank in range(3)]
        for batch, *cut in zip(whole, *parts, strict=True):
            assert torch.equal(batch.images_NCHW, torch.cat([part.images_NCHW for part in cut]))
            assert torch.equal(batch.targets_NK, torch.cat([part.targets_NK for part in cut]))
            assert batch.replaced == sum(part.replaced for part in cut)
    if partners is None:  # all others are as they were
        images = torch.cat([batch.images_NCHW for batch in whole])
        as_before = torch.cat([batch.images_NCHW for batch in before])
        for place in range(31):
            assert torch.equal(images[place], as_before[place + (place in lost)])
    told = capsys.readouterr().out
    assert all(f"cannot read the image {files[order[place]]}" in told for place in lost)


@pytest.mark.slow
def test_the_example_of_a_model_is_an_image_that_can_be_read(own: Path) -> None:
    config = replace(config_of(own), bad_images="skip")
    files = paths(load_dataset(config), "val")
    damage(files[0])
    data._load.cache_clear()
    image = Image.open(io.BytesIO(data.example_image(config)))
    second, _ = load_dataset(config).eval_images("val", torch.tensor([1]))
    assert np.array_equal(np.asarray(image), second[0].permute(1, 2, 0).numpy())
    with pytest.raises(DatasetError, match="cannot read the image"):
        data.example_image(replace(config, bad_images="fail"))


@pytest.mark.slow
def test_a_run_counts_what_it_skips_and_evaluates_the_rest(own: Path) -> None:
    config = replace(
        small_config(str(own)), model="dm_nf_resnet_digits", epochs=2, bad_images="skip"
    )
    damage(own / "train" / "china" / "003.jpg")
    for number in range(4):
        damage(own / "val" / "flower" / f"00{number}.jpg")
    reports: list[dict[str, Any]] = []
    train(config, Worker(report=reports.append))
    assert [to_record(report)["replaced_images"] for report in reports] == [1.0, 1.0]
    # Of the ten six are left: accuracies are sixths of 100 %.
    share = reports[-1]["test_top1"] * 6 / 100
    assert share == pytest.approx(round(share))
    with pytest.raises(DatasetError, match="cannot read the image"):
        train(replace(config, bad_images="fail"), Worker(report=reports.append))


def write_cifar(folder: Path, per_file: int = 40) -> None:
    """CIFAR-10's files, in its format, with fewer images."""
    rng = np.random.default_rng(0)
    files = folder / "cifar-10-batches-py"
    files.mkdir(parents=True)
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (per_file, 3072), dtype=np.uint8),
            "labels": [n % 10 for n in range(per_file)],
        }
        (files / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {n}" for n in range(10)]}
    (files / "batches.meta").write_bytes(pickle.dumps(names))


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    write_cifar(tmp_path)
    # The checksums are those of the real files.
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    return load_dataset(replace(Config(), dataset=str(tmp_path)))


def test_cifar_is_split_by_class_and_cropped_with_flips(cifar: Dataset) -> None:
    assert cifar.sizes == {"train": 180, "val": 20, "test": 40}
    assert cifar.image_shape == (3, 32, 32)
    assert cifar.class_names[3] == "class 3"
    _, labels = cifar.eval_images("val", torch.arange(20))
    assert torch.bincount(labels).tolist() == [2] * 10
    images, _ = cifar.eval_images("train", torch.zeros(200, dtype=torch.long))
    crops, _ = cifar.train_images(
        torch.zeros(200, dtype=torch.long), nfnet.hash_keys(1, torch.arange(200))
    )
    padded = torch.nn.functional.pad(images[0], (4, 4, 4, 4))
    windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
    found = {
        flip: (crops[:, None] == (windows.flip(-1) if flip else windows)).all((2, 3, 4)).any(1)
        for flip in (False, True)
    }
    assert (found[False] ^ found[True]).all()
    assert 60 < found[True].sum() < 140


def test_cifar_files_that_are_not_the_real_ones_are_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    with pytest.raises(DatasetError, match="cifar-10-batches-py are not whole"):
        load_dataset(replace(Config(), dataset=str(tmp_path)))


def small_folder(root: Path, classes: str, mode: str = "RGB") -> str:
    """Four images of 20 x 20 pixels for each class and split."""
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                Image.new(mode, (20, 20)).save(root / split / name / f"{number}.png")
    return str(root)


def small_config(folder: str) -> Config:
    return replace(Config(), dataset=folder, image_size=8, batch_size=2)


def test_pixels_whose_white_is_unknown_are_refused(tmp_path: Path) -> None:
    small_folder(tmp_path, "ab")
    for path in (tmp_path / "train").rglob("*.png"):
        Image.new("F", (20, 20)).save(path.with_suffix(".tif"))
        path.unlink()
    with pytest.raises(
        ConfigError,
        match=r"8 files cannot be read as images: .*0\.tif \(its pixels are 32-bit numbers",
    ):
        validate(small_config(str(tmp_path)))


def test_even_a_small_folder_has_validation_images(tmp_path: Path) -> None:
    config = small_config(small_folder(tmp_path, "ab"))
    validate(config)
    assert dict(load_dataset(config).sizes) == {"train": 7, "val": 1, "test": 8}


def test_one_class_is_nothing_to_learn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has one class"):
        validate(small_config(small_folder(tmp_path, "a")))


def test_a_folder_without_training_images_cannot_be_trained_on(tmp_path: Path) -> None:
    folder = small_folder(tmp_path, "ab")
    shutil.rmtree(tmp_path / "train")
    validate(small_config(folder), trains=False)
    with pytest.raises(ConfigError, match="has no training images"):
        validate(small_config(folder))


def test_a_run_goes_on_that_knows_its_dataset_by_the_earlier_fingerprint(own: Path) -> None:
    """Of names and sizes: of old checkpoints and runs. What changed since is named."""
    config = replace(small_config(str(own)), model="dm_nf_resnet_digits", epochs=1)
    reports: list[dict[str, Any]] = []
    checkpoints = Checkpoints(str(own / "checkpoints"))
    train(config, Worker(report=reports.append, checkpoints=checkpoints))
    dataset = load_dataset(config)
    names = [path for split in ("train", "val", "test") for path in paths(dataset, split)]
    splits = [split for split in ("train", "val", "test") for _ in range(dataset.sizes[split])]  # type: ignore[index]
    told = "".join(
        f"{split} {path.relative_to(own)} {path.stat().st_size}\n"
        for split, path in zip(splits, names, strict=True)
    )
    earlier = hashlib.sha256(told.encode()).hexdigest()[:16]
    assert dataset.earlier_fingerprint == earlier != dataset.fingerprint

    folder = own / "checkpoints" / "epoch-000001"
    made = json.loads((folder / "made_by.json").read_text())
    for fingerprint, goes_on in ((earlier, True), ("0" * 16, False)):
        made["computed"]["dataset"] = fingerprint
        (folder / "made_by.json").write_text(json.dumps(made))
        (folder / "complete").write_bytes(b"")
        with nullcontext() if goes_on else pytest.raises(OtherComputation, match="dataset's cont"):
            require_same(folder, 1, made_by(config), dataset)


def test_a_session_names_what_changed_in_its_dataset(own: Path, tmp_path: Path) -> None:
    config = small_config(str(own))
    begun = _of_same_contents(new_identity("t", "train"), config, load_dataset(config), "")
    assert begun.dataset == load_dataset(config).fingerprint
    run = tmp_path / "run"
    run.mkdir()
    (run / CONTENTS).write_text(json.dumps(load_dataset(config).contents))
    old = dataclasses.replace(begun, dataset=load_dataset(config).earlier_fingerprint)
    again = _of_same_contents(old, config, load_dataset(config), str(run))
    assert again.dataset == begun.dataset
    (own / "train" / "flower" / "003.jpg").unlink()
    data._load.cache_clear()
    with pytest.raises(ConfigError) as refused:
        _of_same_contents(begun, config, load_dataset(config), str(run))
    assert str(refused.value) == (
        f"{own} is not what 't' was begun with: train/flower (20 images -> 19 images); put it back "
        "as it was, or start anew under another --name"
    )
    (run / CONTENTS).unlink()
    with pytest.raises(ConfigError, match=r"its fingerprint is \w{16} and was \w{16}; put it back"):
        _of_same_contents(begun, config, load_dataset(config), str(run))
