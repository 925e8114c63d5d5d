"""ImageNet's layout on a disk: which files are images of which class, and what is left out."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import nfnet
from nflab.data.dataset import DatasetError

SPLITS = ("train", "val", "test")

_UNREAD = frozenset(
    {
        *(".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".exr", ".hdr", ".tga"),
        *(".dng", ".cr2", ".nef", ".arw", ".raw", ".npy", ".dcm", ".ico"),
    }
)
"""Of the names of images that are not read; without them it would be another dataset."""

_HIDDEN = "hidden files or folders"
_OUTSIDE = "images outside of the classes' folders"
_OTHERS = "files that are no images"

Files = list[tuple[str, int]]
"""Paths of images, each with its label. As text: a million `Path`s take half a gigabyte more."""


@dataclass(frozen=True)
class Layout:
    """What a folder holds."""

    class_names: tuple[str, ...]
    """In the order of the labels: sorted, as numbers if all are."""
    files: dict[str, Files]
    """Of those of SPLITS that are there, class by class, in the order of their names."""
    left_out: str
    """What is there beside, counted, in words; empty if nothing is."""


def scan(root: Path) -> Layout:
    """Finds the images in `root/SPLIT/CLASS/`, and in folders below that, as torchvision does.

    Hidden files and folders (`.ipynb_checkpoints`, `._x.jpg`) are left out, and so are files whose
    ending is not that of an image.

    Raises:
        DatasetError: the layout is another; the splits have different classes; a class has no
            images, or some of a kind that is not read; a link leads nowhere or in a circle.
    """
    if not (root / "val").is_dir():
        raise DatasetError(
            f"{root} has no folder 'val': expected {root}/train/CLASS/... and "
            f"{root}/val/CLASS/..., or torchvision's CIFAR files"
        )
    left_out: Counter[str] = Counter()
    try:
        folders = {
            split: _class_folders(root / split, left_out)
            for split in SPLITS
            if (root / split).is_dir()
        }
        names = _class_names(root, {split: set(found) for split, found in folders.items()})
        files: dict[str, Files] = {split: [] for split in folders}
        for split, found in folders.items():
            for label, name in enumerate(names):
                folder = found.get(name, root / split / name)
                paths = list(_images(str(folder), left_out)) if folder.is_dir() else []
                if not paths:
                    raise DatasetError(
                        f"class {name!r} has no images in {folder}: "
                        "add some, or remove the class from every split"
                    )
                files[split] += [(path, label) for path in paths]
    except OSError as error:
        raise DatasetError(f"cannot read {error.filename}: {error.strerror}") from None
    return Layout(names, files, _in_words(left_out))


def scan_names(
    root: str, names: Iterable[str]
) -> tuple[tuple[str, ...], dict[str, list[tuple[str, int]]], str]:
    """As `scan`, from the names of all files below an address, such as train/CLASS/a.jpg.

    Returns:
        the class names, of each of SPLITS that is there (name, label) in their order, and what is
        left out in words.

    Raises:
        DatasetError: likewise.
    """
    left_out: Counter[str] = Counter()
    found: dict[str, dict[str, list[tuple[str, ...]]]] = {}
    for name in names:
        split, *parts = name.split("/")
        ending = Path(name).suffix.lower()
        if split not in SPLITS:
            continue
        if any(part.startswith(".") for part in parts):
            left_out[_HIDDEN] += 1
        elif ending in _UNREAD:
            raise DatasetError(
                f"{root}/{name} is an image of a kind that is not read: convert all {ending} "
                "files, to PNG for example, or remove them"
            )
        elif ending not in nfnet.IMAGE_ENDINGS:
            left_out[_other(name)] += 1
        elif len(parts) < 2:
            left_out[_OUTSIDE] += 1
        else:
            of_class = found.setdefault(split, {}).setdefault(parts[0], [])
            of_class.append(tuple(parts))
    if "val" not in found:
        raise DatasetError(f"{root} has no images in val/CLASS/...")
    classes = _class_names(root, {split: set(of) for split, of in found.items()})
    if lacking := [name for name in classes if name not in found.get("test", classes)]:
        raise DatasetError(
            f"class {lacking[0]!r} has no images in {root}/test: add some, or remove the class "
            "from every split"
        )
    files = {
        split: [
            (f"{split}/{'/'.join(parts)}", label)
            for label, name in enumerate(classes)
            for parts in sorted(of.get(name, ()))
        ]
        for split, of in ((split, found[split]) for split in SPLITS if split in found)
    }
    return classes, files, _in_words(left_out)


def _class_folders(split: Path, left_out: Counter[str]) -> dict[str, Path]:
    """Name of each class -> its folder. A name is known by its letters, however they are coded."""
    found: dict[str, Path] = {}
    for entry in _entries(split):
        if entry.name.startswith("."):
            left_out[_HIDDEN] += 1
        elif entry.is_dir():
            name = unicodedata.normalize("NFC", entry.name)
            if not _is_text(name):
                raise DatasetError(
                    f"the name of the folder {os.fsencode(entry.path)!r} is no text in UTF-8: "
                    "rename it"
                )
            if name in found:
                raise DatasetError(f"{split} has two folders called {name!r}: make them one")
            found[name] = Path(entry.path)
        else:
            is_image = Path(entry.name).suffix.lower() in nfnet.IMAGE_ENDINGS
            left_out[_OUTSIDE if is_image else _other(entry.name)] += 1
    if not found and left_out[_OUTSIDE]:
        raise DatasetError(
            f"{split} holds images without folders of their classes, so they have no labels: "
            f"sort them into {split}/CLASS/..., or move {split} away"
        )
    return found


def _class_names(root: Path | str, names: dict[str, set[str]]) -> tuple[str, ...]:
    """The classes, which are the same in every split."""
    of_val = names["val"]
    if not of_val:
        raise DatasetError(f"{root}/val holds no folders: expected one for each class")
    differ = sorted(of_val ^ names.get("train", of_val))
    if differ:
        hint = (
            ", as in Tiny-ImageNet: sort its images into folders by val_annotations.txt"
            if of_val == {"images"}
            else ""
        )
        raise DatasetError(
            f"train and val in {root} have different classes: {', '.join(differ[:3])} "
            f"{'are' if len(differ) > 1 else 'is'} in one of them only{hint}"
        )
    unknown = sorted(names.get("test", of_val) - of_val)
    if unknown:
        raise DatasetError(
            f"test in {root} has classes that val has not: {', '.join(unknown[:3])}"
            f"{', ...' if len(unknown) > 3 else ''}; add them everywhere, or remove them"
        )
    if all(name.isascii() and name.isdigit() for name in of_val):
        return tuple(sorted(of_val, key=lambda name: (int(name), name)))
    return tuple(sorted(of_val))


def _images(folder: str, left_out: Counter[str]) -> Iterator[str]:
    """Images in a folder and below it, in the order of their names."""
    for entry in _entries(folder):
        path = entry.path
        ending = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 see Files
        if entry.name.startswith("."):
            left_out[_HIDDEN] += 1
        elif entry.is_dir():
            if entry.is_symlink() and Path(folder).resolve().is_relative_to(Path(path).resolve()):
                raise DatasetError(f"the link {path} leads back to a folder above it: remove it")
            yield from _images(path, left_out)
        elif entry.is_symlink() and not Path(path).exists():
            raise DatasetError(f"the link {path} leads nowhere: mend or remove it")
        elif ending in _UNREAD:
            raise DatasetError(
                f"{path} is an image of a kind that is not read: convert all {ending} files, to "
                "PNG for example, or remove them"
            )
        elif entry.is_file() and ending in nfnet.IMAGE_ENDINGS:
            yield path
        else:
            left_out[_other(entry.name)] += 1


def _entries(folder: Path | str) -> list["os.DirEntry[str]"]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _other(name: str) -> str:
    return f"{_OTHERS} {Path(name).suffix.lower()}"


def _in_words(left_out: Counter[str]) -> str:
    """Of files that are no images the endings are named, three at most."""
    kinds: Counter[str] = Counter()
    endings = []
    for kind, count in sorted(left_out.items()):
        if kind.startswith(_OTHERS):
            kinds[_OTHERS] += count
            endings += kind.removeprefix(_OTHERS).split()
        else:
            kinds[kind] += count
    named = ", ".join(endings[:3]) + (", ..." if len(endings) > 3 else "")
    return ", ".join(
        f"{count} {kind}" + (f" ({named})" if kind == _OTHERS and named else "")
        for kind, count in sorted(kinds.items())
        if count
    )
