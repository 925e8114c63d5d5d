"""Stores of images: what they hold, in which order, made from what, read from where."""

import hashlib
import io
import json
import random
import re
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import nfnet
from nflab.data import _load, load_dataset
from nflab.data.dataset import Dataset, DatasetError
from nflab.data.making import Making, begin, finish, make_piece
from nflab.data.sources import open_source
from nflab.data.store import ImageStore, Manifest, read_manifest
from nflab.settings.config import Config
from nflab.settings.errors import ConfigError
from nflab.settings.leaves import replace
from nflab.storage.cache import Cache
from nflab.storage.files import is_away
from tests.buckets import Bucket
from tests.conftest import ROOT
from tests.feeds import train_batches
from tests.nflab.test_folder import write_cifar
from tests.photos import write_photos

CONFIG = replace(Config(), model="dm_nf_resnet50", image_size=32, batch_size=8, epochs=1)


SMALL = Making(shard_bytes=20_000)


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    _load.cache_clear()
    yield
    _load.cache_clear()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes called 0 and 1, 24 training images, 6 to evaluate on."""
    root = write_photos(tmp_path_factory.mktemp("photos"), {"train": 12, "val": 3})
    for number, name in enumerate(("china", "flower")):
        for split in ("train", "val"):
            (root / split / name).rename(root / split / str(number))
    return root


def make(
    source: Path | str,
    dest: Path | str,
    making: Making = SMALL,
    max_bad: float = 0.0,
    shuffle: int | None = None,
) -> Manifest:
    """A store, made in this process, its pieces in a random order if `shuffle` seeds one."""
    opened = open_source(str(source))
    pieces = opened.pieces(making.shard_bytes)
    waiting = begin(str(dest), str(source), pieces, making)
    assert waiting is not None
    if shuffle is not None:
        random.Random(shuffle).shuffle(waiting)
    for piece in waiting:
        make_piece(opened, piece, making, str(dest))
    return finish(opened, pieces, str(dest), max_bad)


def load(address: Path | str, **settings: Any) -> Dataset:
    return load_dataset(replace(CONFIG, dataset=str(address), **settings))


def require_same(one: Dataset, other: Dataset) -> None:
    assert one.fingerprint == other.fingerprint
    assert one.contents == other.contents
    assert one.class_names == other.class_names
    assert one.sizes == other.sizes
    keys = nfnet.hash_keys(3, torch.arange(one.sizes["train"]))
    every = torch.arange(len(keys))
    found = [dataset.train_images(every, keys) for dataset in (one, other)]
    for split in ("train", "val", "test"):
        indices = torch.arange(one.sizes[split])  # type: ignore[index]
        found += [dataset.eval_images(split, indices) for dataset in (one, other)]  # type: ignore[arg-type]
    for ours, theirs in zip(found[::2], found[1::2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_store_is_the_dataset_that_its_folder_is(photos: Path, tmp_path: Path) -> None:
    manifest = make(photos, tmp_path / "store")
    folder, store = load(photos), load(tmp_path / "store")
    assert isinstance(store, ImageStore)
    require_same(folder, store)
    require_same(load(photos, subset=0.4), load(tmp_path / "store", subset=0.4))
    assert len(manifest.shards["train"]) > 2
    assert manifest.counts == {"train": (12, 12), "val": (3, 3)}
    config = replace(CONFIG, mixup=True, augmentation_level=3)
    batches = [list(train_batches(dataset, config, 0, 0, 1)) for dataset in (folder, store)]
    assert len(batches[0]) == 2
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images_NCHW, other.images_NCHW)
        assert torch.equal(one.targets_NK, other.targets_NK)


def test_a_test_split_and_images_below_folders_keep_their_order(
    photos: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(photos, tmp_path / "own")
    shutil.copytree(root / "val", root / "test")
    (root / "train/0/sub").mkdir()
    for name in ("001.jpg", "005.jpg"):  # "sub" comes after all of them
        (root / "train/0" / name).rename(root / "train/0/sub" / name)
    (root / "train/0/004.jpg").rename(root / "train/0/t.jpg")  # and this after "sub"
    make(root, tmp_path / "store")
    require_same(load(root), load(tmp_path / "store"))


def test_it_is_the_same_bytes_in_whatever_order_pieces_are_made(
    photos: Path, tmp_path: Path
) -> None:
    stores = [tmp_path / f"store{n}" for n in range(3)]
    for shuffle, store in enumerate(stores):
        make(photos, store, shuffle=shuffle)
    assert files(stores[0]) == files(stores[1]) == files(stores[2])
    assert set(files(stores[0])) >= {"manifest.json", "order.arrow", "bad.json"}


def test_what_was_begun_goes_on_and_is_the_same(photos: Path, tmp_path: Path) -> None:
    make(photos, tmp_path / "whole")
    dest, making = str(tmp_path / "store"), Making(shard_bytes=20_000)
    source = open_source(str(photos))
    pieces = source.pieces(making.shard_bytes)
    assert begin(dest, str(photos), pieces, making) == pieces
    for piece in pieces[:2]:
        make_piece(source, piece, making, dest)
    # What was being written when the process was killed.
    (tmp_path / "store" / "train-00002-00.arrow").write_bytes(b"half")
    with pytest.raises(DatasetError, match=r"holds no store of images"):
        read_manifest(dest)
    assert begin(dest, str(photos), pieces, making) == pieces[2:]
    with pytest.raises(DatasetError, match=r"was made from another source .* or with other sett"):
        begin(dest, str(photos), pieces, changed(making, quality=50))
    make(photos, dest)
    assert files(tmp_path / "store") == files(tmp_path / "whole")
    assert begin(dest, str(photos), pieces, making) is None
    with pytest.raises(DatasetError, match="give another folder, or delete it"):
        begin(dest, str(photos), pieces[1:], making)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x").touch()
    with pytest.raises(DatasetError, match="holds other files"):
        begin(str(tmp_path / "other"), str(photos), pieces, making)


def write_tars(photos: Path, folder: Path, per_tar: int = 5) -> Path:
    """The photos as WebDataset has them, in a random order."""
    folder.mkdir()
    for split in ("train", "val"):
        images = sorted((photos / split).rglob("*.jpg"))
        random.Random(1).shuffle(images)
        for start in range(0, len(images), per_tar):
            with tarfile.open(folder / f"photos-{split}-{start:03d}.tar", "w") as tar:
                for image in images[start : start + per_tar]:
                    key = f"{image.parent.name}_{image.stem}"
                    for ending, data in (
                        ("cls", image.parent.name.encode()),
                        ("jpg", image.read_bytes()),
                        ("json", b"{}"),
                    ):
                        info = tarfile.TarInfo(f"{key}.{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return folder


def write_parquet(photos: Path, folder: Path, names: list[str] | None = None) -> Path:
    """The photos as Hugging Face's `datasets` writes them, in a random order."""
    (folder / "data").mkdir(parents=True)
    for split, word in (("train", "train"), ("val", "validation")):
        images = sorted((photos / split).rglob("*.jpg"))
        random.Random(2).shuffle(images)
        table = pa.table(
            {
                "image": [
                    {"bytes": i.read_bytes(), "path": f"{i.parent.name}_{i.name}"} for i in images
                ],
                "label": pa.array([int(image.parent.name) for image in images], pa.int64()),
            }
        )
        if names is not None:
            told = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
        pq.write_table(table, folder / f"data/{word}-00000-of-00001.parquet", row_group_size=4)
    return folder


@pytest.mark.parametrize("write", [write_tars, write_parquet])
def test_the_same_images_are_the_same_dataset_from_whatever_they_come(
    write: Callable[[Path, Path], Path], photos: Path, tmp_path: Path
) -> None:
    make(write(photos, tmp_path / "source"), tmp_path / "store")
    require_same(load(photos), load(tmp_path / "store"))


def test_classes_have_the_names_that_parquet_files_give_them(photos: Path, tmp_path: Path) -> None:
    source = write_parquet(photos, tmp_path / "source", ["china", "flower"])
    make(source, tmp_path / "store")
    assert load(tmp_path / "store").class_names == ("china", "flower")
    make(source / "data", tmp_path / "again")
    require_same(load(tmp_path / "again"), load(tmp_path / "store"))
    few = write_parquet(photos, tmp_path / "few", ["china"])
    with pytest.raises(DatasetError, match="has a label 1, and 1 classes"):
        make(few, tmp_path / "third")


def test_cifar_in_a_store_is_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    write_cifar(tmp_path)
    make(tmp_path, tmp_path / "store")
    one, other = load(tmp_path), load(tmp_path / "store")
    require_same(one, other)
    assert one.sizes["train"] == 180
    assert torch.equal(one.mean, other.mean)


def test_unreadable_images_are_left_out_and_named(photos: Path, tmp_path: Path) -> None:
    root = shutil.copytree(photos, tmp_path / "own")
    bad = root / "train/0/003.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"1 of 30 images cannot be read, the first train/0/003"):
        make(root, tmp_path / "store", max_bad=0.01)
    finish_again = make(root, tmp_path / "store", max_bad=0.1)
    assert list(json.loads((tmp_path / "store/bad.json").read_text())) == ["train/0/003.jpg"]
    assert finish_again.counts["train"] == (11, 12)
    bad.unlink()
    require_same(load(root), load(tmp_path / "store"))


def test_larger_images_are_resized_and_others_kept(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "large", {"train": 3, "val": 3}, pixels=96)
    Image.new("L", (20, 40), 7).save(root / "val/china/small.png")
    make(root, tmp_path / "store", Making(shorter_side=48, quality=80))
    with pa.memory_map(str(tmp_path / "store/val-00001-00.arrow")) as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    sizes = {row["key"]: Image.open(io.BytesIO(row["image"])).size for row in rows}
    assert all(min(size) == 48 for key, size in sizes.items() if "small" not in key)
    assert sizes["china/small.png"] == (20, 40)
    small = next(row["image"] for row in rows if "small" in row["key"])
    assert small == (root / "val/china/small.png").read_bytes()
    for row in rows:
        before = Image.open(root / "val" / row["key"])
        width, height = sizes[row["key"]]
        assert abs(width / height - before.width / before.height) < 0.03


def spoil(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda s: spoil(s / "train-00001-00.arrow"), r"train-00001-00.arrow is damaged, or of"),
        (lambda s: (s / "train-00001-00.arrow").unlink(), r"cannot read .*train-00001-00.arrow"),
        (
            lambda s: shutil.copy(s / "train-00000-00.arrow", s / "train-00001-00.arrow"),
            r"train-00001-00.arrow is damaged, or of another store: its digest is",
        ),
        (lambda s: spoil(s / "order.arrow"), r"order.arrow is damaged"),
        (lambda s: (s / "manifest.json").write_text("{"), r"manifest.json is damaged"),
        (lambda s: rewrite(s, format=9), r"has format 9, and this version of nflab reads 1"),
        (lambda s: rewrite(s, shards=3), r"manifest.json is damaged"),
    ],
)
def test_a_damaged_store_is_told_in_a_sentence(
    harm: Callable[[Path], object], told: str, photos: Path, tmp_path: Path
) -> None:
    make(photos, tmp_path / "store")
    load(tmp_path / "store")
    _load.cache_clear()
    harm(tmp_path / "store")
    with pytest.raises(DatasetError, match=told) as error:
        load(tmp_path / "store")
    assert "\n" not in str(error.value)


def rewrite(store: Path, **values: Any) -> None:
    told = json.loads((store / "manifest.json").read_text())
    (store / "manifest.json").write_text(json.dumps({**told, **values}))


def untold(lines: dict[str, bytes]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        folder.mkdir()
        with tarfile.open(folder / "train.tar", "w") as tar:
            for name, data in lines.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    return write


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (untold({"a.jpg": b""}), r"has no label \(.cls\) for a, and for 1 in all"),
        (untold({"a.cls": b"1"}), "has no image for a"),
        (untold({"a.cls": b"x", "a.jpg": b""}), "the label of a in .* is no number: b'x'"),
        (lambda f: (f.mkdir(), (f / "train.tar").write_bytes(b"x" * 600)), "is damaged"),
        (lambda f: (f.mkdir(), (f / "pictures.tar").touch()), "neither train nor val nor test"),
        (lambda f: (f.mkdir(), (f / "train.parquet").write_bytes(b"x")), "is damaged"),
        (
            lambda f: (f.mkdir(), pq.write_table(pa.table({"a": [1]}), f / "train.parquet")),
            "has the columns a: expected image and label",
        ),
        (lambda f: f.mkdir(), "holds neither"),
        (lambda f: None, "there is no "),
        (untold({}), "the source has no images of val"),
    ],
)
def test_a_source_that_cannot_be_read_is_told_in_a_sentence(
    write: Callable[[Path], object], told: str, tmp_path: Path
) -> None:
    write(tmp_path / "source")
    with pytest.raises(DatasetError, match=told):
        make(tmp_path / "source", tmp_path / "store")


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    with Bucket() as bucket:
        yield bucket


@pytest.fixture
def bucket(server: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bucket:
    for key, value in server.env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("NFLAB_CACHE", str(tmp_path / "cache"))
    return server


@pytest.fixture
def remote(bucket: Bucket, photos: Path, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A store in the bucket."""
    name = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    make(photos, tmp_path / "made")
    for file, data in files(tmp_path / "made").items():
        bucket.behind.put_object(Bucket=bucket.name, Key=f"{name}/{file}", Body=data)
    return f"s3://{bucket.name}/{name}"


def test_a_store_in_a_bucket_is_made_and_read_as_one_on_a_disk(
    bucket: Bucket, photos: Path, tmp_path: Path
) -> None:
    for file in photos.rglob("*.jpg"):
        key = f"photos/{file.relative_to(photos)}"
        bucket.behind.put_object(Bucket=bucket.name, Key=key, Body=file.read_bytes())
    address = f"s3://{bucket.name}/store"
    make(f"s3://{bucket.name}/photos", address)
    make(photos, tmp_path / "local")
    assert {name: bucket.read(f"store/{name}") for name in bucket.files("store/")} == files(
        tmp_path / "local"
    )
    require_same(load(photos), load(address))


def cached(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if len(file.name) == 64]


def test_shards_are_fetched_when_they_are_needed_and_once(
    remote: str, photos: Path, tmp_path: Path, bucket: Bucket
) -> None:
    dataset = load(remote)
    assert len(cached(tmp_path / "cache")) == 1  # the order alone
    dataset.eval_images("test", torch.tensor([0]))
    assert len(cached(tmp_path / "cache")) == 2
    require_same(load(photos), dataset)
    times = {file: file.stat().st_mtime_ns for file in cached(tmp_path / "cache")}
    _load.cache_clear()
    with bucket.failing("refuses"):  # nothing is asked of it but the manifest
        pass
    require_same(load(photos), load(remote))
    assert {f: f.stat().st_mtime_ns for f in cached(tmp_path / "cache")} == times


def test_a_damaged_file_of_the_cache_is_fetched_again(
    remote: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_same(load(photos), load(remote))
    for file in cached(tmp_path / "cache"):
        spoil(file)
    _load.cache_clear()
    require_same(load(photos), load(remote))
    assert "is damaged: it is fetched again" in capsys.readouterr().out


def test_a_damaged_shard_in_the_bucket_is_told(remote: str, bucket: Bucket) -> None:
    key = f"{remote.rpartition('/')[2]}/val-"
    (name,) = [f for f in bucket.files() if f.startswith(key)]
    bucket.behind.put_object(Bucket=bucket.name, Key=name, Body=b"x" * 99)
    dataset = load(remote)
    with pytest.raises(DatasetError, match=r"val-0000\d-00.arrow is damaged, or of another store"):
        dataset.eval_images("test", torch.tensor([0]))
    bucket.behind.delete_object(Bucket=bucket.name, Key=name)
    with pytest.raises(ConfigError, match="there is no file s3://"):
        dataset.eval_images("test", torch.tensor([0]))


def test_a_bucket_that_is_away_is_waited_for(
    remote: str, photos: Path, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = load(remote)
    with bucket.failing("answers 503"):
        timer = threading.Timer(3, bucket._front.recover)
        timer.start()
        dataset.eval_images("test", torch.tensor([0]))
    timer.join()
    assert "which cannot be used now" in capsys.readouterr().out
    require_same(load(photos), dataset)


@pytest.mark.parametrize("write", [write_tars, write_parquet])
def test_a_source_in_a_bucket_that_is_away_is_not_called_damaged(
    write: Callable[[Path, Path], Path], bucket: Bucket, photos: Path, tmp_path: Path
) -> None:
    for file, data in files(write(photos, tmp_path / "source")).items():
        key = f"{write.__name__}/{file}"
        bucket.behind.put_object(Bucket=bucket.name, Key=key, Body=data)
    source = open_source(f"s3://{bucket.name}/{write.__name__}")
    piece = source.pieces(1000)[0]
    with bucket.failing("answers 503"), pytest.raises(OSError, match="AWS Error") as error:
        list(source.read(piece))
    assert is_away(error.value)
    assert list(source.read(piece))


def test_a_damaged_row_group_is_told_in_a_sentence(photos: Path, tmp_path: Path) -> None:
    folder = write_parquet(photos, tmp_path / "source")
    source = open_source(str(folder))
    file = folder / "data/train-00000-of-00001.parquet"
    data = bytearray(file.read_bytes())
    data[4:200] = bytes(196)
    file.write_bytes(data)
    with pytest.raises(DatasetError, match=r"train-00000-of-00001\.parquet is damaged"):
        list(source.read(source.pieces(1000)[0]))


def fill(cache: Cache, bucket: Bucket, name: str, size: int) -> tuple[str, str, int]:
    """Puts a file of so many bytes into the bucket; what `Cache.fetch` takes."""
    data = random.Random(name).randbytes(size)
    bucket.behind.put_object(Bucket=bucket.name, Key=name, Body=data)
    return f"s3://{bucket.name}/{name}", hashlib.sha256(data).hexdigest(), size


def test_the_oldest_unused_files_make_room(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NFLAB_CACHE_GB", "0.00001")  # 10 kB
    cache = Cache()
    a, b, c = (fill(cache, bucket, name, 4000) for name in ("ca", "cb", "cc"))
    first = cache.fetch(*a)
    mapped = pa.memory_map(str(first)).read_buffer()
    cache.fetch(*b)
    cache.fetch(*a)  # now b is the older one
    cache.fetch(*c)
    assert {file.name for file in cached(cache.folder)} == {a[1], c[1]}
    d = fill(cache, bucket, "cd", 8000)
    cache.fetch(*d)
    assert {file.name for file in cached(cache.folder)} == {d[1]}
    assert hashlib.sha256(mapped).hexdigest() == a[1]  # who has mapped it still reads it
    with pytest.raises(ConfigError, match=r"may hold 0.0 GB, and a file of .* name another folder"):
        cache.fetch(*fill(cache, bucket, "ce", 20_000))


def test_a_store_that_does_not_fit_the_cache_is_told_before_anything_starts(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFLAB_CACHE_GB", "0.00001")
    with pytest.raises(DatasetError, match="allow more by NFLAB_CACHE_GB"):
        load(remote)
    monkeypatch.setenv("NFLAB_CACHE_GB", "many")
    with pytest.raises(ConfigError, match="NFLAB_CACHE_GB is 'many'"):
        load(remote)


def test_several_who_ask_at_once_fetch_it_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = fill(Cache(), bucket, "once", 3_000_000)
    fetched = []
    original = Cache._download

    def download(self: Cache, uri: str, file: Path) -> str:
        fetched.append(uri)
        return original(self, uri, file)

    monkeypatch.setattr(Cache, "_download", download)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(Cache().fetch(*wanted))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(fetched) == 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("own_stripes:images", r"cannot be made: TypeError: images\(\) missing"),
        ("own_stripes:CLASSES", "cannot be made: TypeError: 'tuple' object is not callable"),
        ("own_stripes:nothing", "cannot be made: AttributeError"),
        ("elsewhere:make", "No module named 'elsewhere'"),
        ("builtins:str", "is no Dataset: it has no class_names, contents"),
    ],
)
def test_what_makes_no_dataset_of_ones_own_is_told(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python run\n(.*?)```", (ROOT / "docs/data.md").read_text(), re.DOTALL)
    (tmp_path / "own_stripes.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("own_stripes:make").sizes["train"] == 400
    with pytest.raises(DatasetError, match=told):
        load(name)
