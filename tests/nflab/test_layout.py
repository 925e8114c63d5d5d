"""What of a folder is its dataset, and what is left out."""

import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from nflab.data.dataset import DatasetError
from nflab.data.layout import scan


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two images of each of two classes in three splits."""
    for split in ("train", "val", "test"):
        for name in ("ant", "bee"):
            for number in range(2):
                write(tmp_path / split / name / f"{number}.png")
    return tmp_path


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (2, 2)).save(path)


def count(root: Path) -> dict[str, int]:
    return {split: len(files) for split, files in scan(root).files.items()}


def test_what_is_no_part_of_it_is_left_out_and_counted(root: Path) -> None:
    assert scan(root).left_out == ""
    before = scan(root).files
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "val" / ".DS_Store").touch()
    for number in range(3):
        shutil.copy(root / "train" / "ant" / "0.png", root / "train" / "ant" / f"._{number}.png")
    (root / "train" / "ant" / "boxes.txt").touch()
    (root / "train" / "ant" / "sizes.csv").touch()
    (root / "val" / "labels.txt").touch()
    (root / "train" / "bee" / "README").touch()
    shutil.copy(root / "train" / "ant" / "0.png", root / "train" / "outside.png")
    layout = scan(root)
    assert layout.left_out == (
        "4 files that are no images (.csv, .txt), 5 hidden files or folders, "
        "1 images outside of the classes' folders"
    )
    assert layout.files == before
    assert layout.class_names == ("ant", "bee")


def test_images_below_a_class_are_of_it_as_in_tiny_imagenet(root: Path) -> None:
    for split in ("train", "val", "test"):
        for name in ("ant", "bee"):
            folder = root / split / name
            (folder / "images").mkdir()
            (folder / "0.png").rename(folder / "images" / "0.png")
    assert count(root) == {"train": 4, "val": 4, "test": 4}
    assert [os.path.relpath(path, root) for path, label in scan(root).files["train"] if label] == [
        "train/bee/1.png",
        "train/bee/images/0.png",
    ]


def test_classes_that_are_numbers_have_their_order(tmp_path: Path) -> None:
    for number in range(12):
        write(tmp_path / "val" / str(number) / "0.png")
    layout = scan(tmp_path)
    assert layout.class_names == tuple(str(number) for number in range(12))
    assert [Path(path).parent.name for path, _ in layout.files["val"]] == list(layout.class_names)
    write(tmp_path / "val" / "none" / "0.png")
    assert scan(tmp_path).class_names[:3] == ("0", "1", "10")


def test_a_name_is_its_letters_however_they_are_coded(root: Path) -> None:
    for split, form in (("train", "NFC"), ("val", "NFD"), ("test", "NFC")):
        (root / split / "bee").rename(root / split / unicodedata.normalize(form, "bée"))  # type: ignore[arg-type]
    layout = scan(root)
    assert layout.class_names == ("ant", unicodedata.normalize("NFC", "bée"))
    assert count(root) == {"train": 4, "val": 4, "test": 4}
    (root / "val" / unicodedata.normalize("NFC", "bée")).mkdir()
    with pytest.raises(DatasetError, match="val has two folders called 'bée'"):
        scan(root)


def spoil(root: Path, how: str) -> None:
    if how == "flat test":
        shutil.rmtree(root / "test")
        write(root / "test" / "0.png")
    elif how == "flat val":
        shutil.rmtree(root / "val")
        write(root / "val" / "0.png")
    elif how == "class of test":
        write(root / "test" / "cow" / "0.png")
    elif how == "tiny imagenet":
        shutil.rmtree(root / "val")
        write(root / "val" / "images" / "0.png")
    elif how == "unread kind":
        (root / "train" / "bee" / "2.HEIC").touch()
    elif how == "broken link":
        (root / "train" / "bee" / "2.png").symlink_to(root / "gone.png")
    elif how == "circle":
        (root / "train" / "bee" / "all").symlink_to(root / "train")
    elif how == "link to itself":
        (root / "train" / "bee" / "all").symlink_to(root / "train" / "bee" / "all")
    elif how == "no text":
        (root / "val" / os.fsdecode(b"b\xff")).mkdir()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flat test", "test holds images without folders of their classes"),
        ("flat val", "val holds images without folders of their classes"),
        ("class of test", "test in .* has classes that val has not: cow"),
        ("tiny imagenet", r"ant, bee, images are in one of them only, as in Tiny-ImageNet: sort"),
        ("unread kind", r"bee/2\.HEIC is an image of a kind that is not read: convert all \.heic"),
        ("broken link", r"the link .*bee/2\.png leads nowhere"),
        ("circle", "the link .*bee/all leads back to a folder above it"),
        ("link to itself", "bee/all"),
        ("no text", r"the name of the folder .*val/b\\xff' is no text"),
    ],
)
def test_what_would_be_another_dataset_is_refused(root: Path, how: str, message: str) -> None:
    spoil(root, how)
    with pytest.raises(DatasetError, match=message) as caught:
        scan(root)
    assert "\n" not in str(caught.value)


def test_folders_and_files_may_be_links(
    root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(root / "train" / "bee", elsewhere / "bees")
    (root / "train" / "bee").symlink_to(elsewhere / "bees")
    (root / "train" / "ant" / "linked.png").symlink_to(elsewhere / "bees" / "0.png")
    assert count(root) == {"train": 5, "val": 4, "test": 4}
