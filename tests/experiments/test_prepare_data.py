"""Stores are made, looked at and trained on as a user does it; and a dataset of one's own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from nflab.data.store import read_manifest
from tests.conftest import ROOT, Script
from tests.photos import write_photos

FLAGS = "--model dm_nf_resnet_digits --image-size 16 --batch-size 8 --epochs 1 --name".split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"), {"train": 20, "val": 6})


def test_a_store_is_made_shown_and_trained_on_as_its_folder_is(
    script: Script, ray_address: str, photos: Path, tmp_path: Path, store: dict[str, str]
) -> None:
    def run(name: str, *arguments: str) -> str:
        done = script(name, *arguments, RAY_ADDRESS=ray_address)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    kept = str(tmp_path / "kept")
    printed = run("prepare_data.py", str(photos), kept, "--shard-mb", "0.05")
    assert "2 classes" in printed
    assert "train: 40 images (20 to 20 a class)" in printed
    assert len(read_manifest(kept).shards["train"]) > 1
    again = run("prepare_data.py", str(photos), kept, "--shard-mb", "0.05")
    assert "pieces" not in again
    shown = run("prepare_data.py", "--inspect", kept, "--sheet", str(tmp_path / "sheet.png"))
    assert f"fingerprint {read_manifest(kept).fingerprint}" in shown
    drawn = Image.open(tmp_path / "sheet.png").convert("RGB")
    assert drawn.size[0] > 1000
    assert len(drawn.getcolors(1 << 24)) > 10_000  # photographs, not an empty page
    # That it is the folder's run is shown in tests/nflab/test_store.py.
    assert re.search(r"test top-1 [\d.]+ %", run("train.py", "--dataset", kept, *FLAGS, "kept"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "give SOURCE and DEST, or --inspect"),
        ("a b --quality 0", "quality 0 must be 1 to 100"),
        ("a b --shorter-side 0", "shorter_side 0 must be at least 1"),
        ("a b --shard-mb 0", "shard_mb 0.0 must be above 0"),
        ("a b --max-bad 1", "max_bad 1.0 must be in"),
        ("--inspect .", "holds no store of images"),
        ("https://me:secret@host/x b", "the address of the source holds a password"),
    ],
)
def test_what_cannot_be_prepared_is_told_in_a_sentence(
    script: Script, arguments: str, told: str
) -> None:
    done = script("prepare_data.py", *arguments.split())
    assert done.returncode == 2
    assert told in done.stderr
    assert "secret" not in done.stderr + done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_source_that_is_none_is_told_on_a_cluster_too(
    script: Script, ray_address: str, tmp_path: Path
) -> None:
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "train.tar").write_bytes(b"x" * 2000)
    source, dest = str(tmp_path / "tars"), str(tmp_path / "kept")
    done = script("prepare_data.py", source, dest, RAY_ADDRESS=ray_address)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*train.tar is damaged: .*\n", done.stderr)


def test_a_preparation_that_was_killed_goes_on(
    script: Script, ray_address: str, photos: Path, tmp_path: Path, store: dict[str, str]
) -> None:
    source, dest, other = str(photos), tmp_path / "kept", str(tmp_path / "whole")
    size = ("--shard-mb", "0.01")
    command = [sys.executable, str(ROOT / "experiments/prepare_data.py"), source, str(dest), *size]
    env = {**os.environ, **store, "RAY_ADDRESS": ray_address}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.match(r"\[2/", line):
                process.send_signal(signal.SIGKILL)
                break
    assert not (dest / "manifest.json").exists()
    time.sleep(1)  # tasks of the killed driver end with it
    done = script("prepare_data.py", source, str(dest), *size, RAY_ADDRESS=ray_address)
    assert done.returncode == 0, done.stderr
    before = re.search(r"(\d+) pieces, (\d+) of them done before", done.stdout)
    assert before
    assert int(before[2]) >= 2
    whole = script("prepare_data.py", source, other, *size, RAY_ADDRESS=ray_address)
    assert whole.returncode == 0, whole.stderr
    kept = [
        {f.name: f.read_bytes() for f in Path(folder).iterdir()} for folder in (dest, Path(other))
    ]
    assert kept[0] == kept[1]


def test_a_dataset_of_ones_own_is_trained_on(
    script: Script, ray_address: str, tmp_path: Path
) -> None:
    text = (ROOT / "docs/data.md").read_text()
    (code,) = re.findall(r"```python run\n(.*?)```", text, re.DOTALL)
    assert len(code.strip().splitlines()) <= 35
    (tmp_path / "stripes.py").write_text(code)
    own = {"PYTHONPATH": str(tmp_path), "RAY_ADDRESS": ray_address}
    done = script("train.py", "--dataset", "stripes:make", "--epochs", "3", cold=True, **own)
    assert done.returncode == 0, done.stderr
    top1 = re.search(r"test top-1 ([\d.]+) %", done.stdout)
    assert top1
    assert float(top1[1]) > 90
