"""Image folders: `train/<class>/*` and `val/<class>/*` or `test/<class>/*`.

ImageNet's and Tiny-ImageNet's layouts are two of them: images may lie deeper (`<class>/images/*`),
a validation folder may be flat with a `val_annotations.txt`, and WordNet ids are shown as words
where `words.txt` or `LOC_synset_mapping.txt` is there. A label is the position of its class among
the sorted names of the training folders, so a set means the same on every machine.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale import paths
from vit_scale.data.images import Corrupt, EncodedImages
from vit_scale.errors import UserError

# `test` is the validation set where a data set keeps its test labels to itself, as ImageNet does.
FOLDERS = {
    "train": ("train",),
    "val": ("val", "validation"),
    "validation": ("validation", "val"),
    "test": ("test", "val", "validation"),
}
ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's: file, class, box


@dataclass(frozen=True)
class Listing:
    """The files of one split, in a fixed order: class by class, each sorted by name."""

    root: Path
    files: np.ndarray  # bytes, relative to root: a list of a million str is three times as large
    labels: Int[np.ndarray, "n"]
    classes: tuple[str, ...]  # names of the folders

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.files[index])


class Folder(EncodedImages):
    """The images of a listing."""

    def __init__(self, name: str, listing: Listing, cfg: ConfigDict):
        super().__init__(name, readable(listing.root.parent, listing.classes), cfg)
        self.ids = listing.classes
        self._listing = listing

    def __len__(self) -> int:
        return len(self._listing.labels)

    def encoded(self, index: int) -> tuple[bytes, int]:
        try:
            data = self._listing.path(index).read_bytes()
        except OSError as error:
            raise Corrupt(error.strerror) from error
        return data, int(self._listing.labels[index])

    def place(self, index: int) -> str:
        return f"{self._listing.path(index)} (image {index} of {self.name})"


def source(cfg: ConfigDict, name: str) -> Folder:
    """The split `name` (train, val, validation, test) of the image folder at cfg.path.

    Without a labelled test set `test` is the validation set. Raises UserError for a folder that is
    missing, empty, or has a class that the training set lacks.
    """
    folder = paths.path(cfg.path)
    listing = list_images(folder, name)
    return Folder(f"{folder.resolve().name} {listing.root.name}", listing, cfg)


def list_images(folder: Path, name: str) -> Listing:
    """The files of split `name` below `folder`, with their labels. Raises UserError."""
    train = folder / "train"
    classes = _subfolders(train) if train.is_dir() else ()
    root = _split_folder(folder, name, classes)
    classes = classes or _subfolders(root)
    if (root / ANNOTATIONS).is_file():
        found = sorted(_annotated(root, classes))
    else:
        found = list(_by_class(root, classes))
    if not found:
        raise UserError(f"{root} has no images; expected {root}/CLASS/IMAGE ({' '.join(ENDINGS)})")
    if root == train:
        _refuse_empty(root, classes, {label for _, label in found})
    files = np.array([os.fsencode(file) for file, _ in found])
    return Listing(root, files, np.array([label for _, label in found], np.int32), classes)


def _refuse_empty(root: Path, classes: tuple[str, ...], labels: set[int]) -> None:
    for label, name in enumerate(classes):
        if label not in labels:
            raise UserError(
                f"{root / name} has no images; remove it, or add some ({' '.join(ENDINGS)})"
            )


def _split_folder(folder: Path, name: str, classes: tuple[str, ...]) -> Path:
    for candidate in FOLDERS[name]:
        root = folder / candidate
        if not root.is_dir():
            continue
        # A test folder without classes is one whose labels were never published: look further.
        if (root / ANNOTATIONS).is_file() or set(_subfolders(root)) & set(classes) or not classes:
            return root
        if candidate == FOLDERS[name][-1]:
            raise UserError(f"{root} has none of the {len(classes)} classes of {folder / 'train'}")
    wanted = " or ".join(f"{candidate}/CLASS/IMAGE" for candidate in FOLDERS[name])
    raise UserError(f"{folder} has no labelled split {name!r}; expected {wanted} in it")


def _subfolders(folder: Path) -> tuple[str, ...]:
    found = paths.entries(folder)
    return tuple(name for name, is_folder in found if is_folder and not name.startswith("."))


def _by_class(root: Path, classes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    label = {name: number for number, name in enumerate(classes)}
    for name in tqdm(_subfolders(root), desc=f"list {root}", unit="class", disable=None, delay=1):
        if name not in label:
            raise UserError(
                f"{root / name} is a class that the training set lacks; remove it, or add it there"
            )
        for file in _images(root / name):
            yield f"{name}/{file}", label[name]


def _images(folder: Path) -> Iterator[str]:
    for name, is_folder in paths.entries(folder):
        if is_folder:
            yield from (f"{name}/{file}" for file in _images(folder / name))
        elif name.lower().endswith(ENDINGS) and not name.startswith("."):
            yield name


def _annotated(root: Path, classes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    label = {name: number for number, name in enumerate(classes)}
    lines = (root / ANNOTATIONS).read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        file, name, *_ = [*line.split("\t"), ""]
        if name not in label:
            raise UserError(
                f"{root / ANNOTATIONS}: line {number}: class {name!r} is none of the "
                f"{len(classes)} folders of the training set; repair the file"
            )
        yield f"images/{file}", label[name]


def readable(folder: Path, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes as words, where a file in `folder` maps WordNet ids to them; else unchanged."""
    words: dict[str, str] = {}
    for file, separator in (("words.txt", "\t"), ("LOC_synset_mapping.txt", " ")):
        if (folder / file).is_file():
            lines = (folder / file).read_text().splitlines()
            words |= {key: text for key, _, text in (line.partition(separator) for line in lines)}
    named = [words.get(name, name).split(",")[0].strip() for name in classes]
    # Two ids may share a first word (a crane flies, a crane lifts): the id tells them apart.
    return tuple(
        name if named.count(name) == 1 else f"{name} ({key})"
        for name, key in zip(named, classes, strict=True)
    )
