"""Image folders: `train/<class>/*` and `val/<class>/*` or `test/<class>/*`.

ImageNet's and Tiny ImageNet's layouts are supported: images may be deeper (`<class>/images/*`), a
validation folder may be flat with a `val_annotations.txt`, and WordNet ids are shown as words if
there is a `words.txt` or `LOC_synset_mapping.txt`. A label is the position of its class among the
sorted names of the training folders, so it is the same on every machine.
"""

import copy
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale.data import image_files
from vit_scale.data.class_mapping import is_numbered
from vit_scale.data.class_names import read_lines, readable
from vit_scale.data.encoded_images import EncodedImages
from vit_scale.data.example_ids import Examples
from vit_scale.data.image_files import read_image_file
from vit_scale.data.sources import MissingSplit
from vit_scale.errors import UserError, nearest, printable
from vit_scale.storage import paths

# `test` is the validation set if the test labels are not public, as in ImageNet.
FOLDERS = {
    "train": ("train",),
    "val": ("val", "validation"),
    "validation": ("validation", "val"),
    "test": ("test", "val", "validation"),
}
LISTINGS = ("every", "common")  # of data.listing
SEARCHED = 20  # folders in which a misplaced one is searched for
ANNOTATIONS = "val_annotations.txt"  # Tiny-ImageNet's: file, class, box


@dataclass(frozen=True)
class Listing:
    """The files of a split, class by class, each sorted by name."""

    root: Path
    files: np.ndarray  # bytes, relative to root; a list of str would be three times as large
    labels: Int[np.ndarray, "n"]
    classes: tuple[str, ...]  # names of the class folders

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.files[index])


class ImageFolder(EncodedImages):
    """A source of the images of a listing."""

    def __init__(self, name: str, classes: tuple[str, ...], listing: Listing, cfg: ConfigDict):
        super().__init__(name, classes, cfg)
        self.ids = listing.classes
        self._listing = listing
        self.examples = Examples(listing.files, listing.labels)

    def __len__(self) -> int:
        return len(self._listing.labels)

    def encoded(self, index: int) -> tuple[bytes, int]:
        return read_image_file(self._listing.path(index)), int(self._listing.labels[index])

    def part(self, positions: Int[np.ndarray, "n"]) -> "ImageFolder":
        part, listed = copy.copy(self), self._listing
        part._listing = replace(
            listed, files=listed.files[positions], labels=listed.labels[positions]
        )
        return part

    def location(self, index: int) -> str:
        return str(self._listing.path(index))


def source(cfg: ConfigDict, name: str) -> ImageFolder:
    """Open the split `name` (train, val, validation, test) of the image folder at cfg.path.

    Without a labelled test set, `test` is the validation set. Raises UserError for a folder that is
    missing, empty, or has a class that the training set lacks.
    """
    if cfg.listing not in LISTINGS:
        hint = nearest(cfg.listing, LISTINGS)
        raise UserError(f"data.listing={cfg.listing!r} is unknown; {hint}")
    folder, common = paths.parse(cfg.path), cfg.listing == "common"
    listing = list_images(folder, name, common)
    classes = readable(folder, listing.classes, common)
    title = folder.resolve().name + (f" {listing.root.name}" if listing.root != folder else "")
    return ImageFolder(printable(title), classes, listing, cfg)


def list_images(folder: Path, name: str, common: bool = False) -> Listing:
    """List the files of split `name` below `folder`, with their labels. Raises UserError.

    Files that are skipped, because they are not images or in no class, are counted in a line on
    stderr. `common` is as for `image_files.image_names`.
    """
    train, skipped = folder / "train", image_files.SkippedFiles()
    classes = _subfolders(train, common) if train.is_dir() else ()
    root = _split_folder(folder, name, classes, common)
    classes = classes or _in_order(_subfolders(root, common))
    if (root / ANNOTATIONS).is_file():
        examples = sorted(_annotated(root, classes))
    else:
        examples = list(_by_class(root, classes, skipped, common))
    if not examples:
        raise UserError(f"{root} has no images; expected {root}/CLASS/IMAGE{skipped.hint()}")
    if root == train:
        _refuse_empty(root, classes, {label for _, label in examples}, skipped)
    if skipped.counts:
        image_files.print_once(f"{root}: {skipped}; skipped")
    names = np.array([os.fsencode(file) for file, _ in examples])
    return Listing(root, names, np.array([label for _, label in examples], np.int32), classes)


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the classes in order: folders 0, 1, ..., 999, as ImageNet-V2 has, are numbers."""
    numbered = tuple(map(str, range(len(names))))
    return numbered if set(numbered) == set(names) else names


def _refuse_empty(root: Path, classes: tuple[str, ...], labels: set[int], skipped) -> None:
    for label, name in enumerate(classes):
        if label not in labels:
            raise UserError(f"{root / name} has no images; remove it, or add some{skipped.hint()}")


def _split_folder(folder: Path, name: str, classes: tuple[str, ...], common: bool) -> Path:
    other: UserError | None = None
    for candidate in FOLDERS[name]:
        root = folder / candidate
        if not root.is_dir():
            continue
        # A test folder without classes has no public labels: try the next candidate.
        subfolders = set(_subfolders(root, common))
        if (root / ANNOTATIONS).is_file() or subfolders & set(classes) or not classes:
            return root
        hint = _deeper_classes(root, classes) or _deeper_classes(folder / "train", subfolders)
        kind = UserError if subfolders else MissingSplit  # images without labels are no split
        other = kind(f"{root} has none of the {len(classes)} classes of {folder / 'train'}{hint}")
    if other:
        raise other
    inside = _subfolders(folder) if folder.is_dir() else ()
    if name != "train" and len(inside) > 1 and is_numbered(_in_order(inside)):
        return folder  # ImageNet-V2, which has no folders of splits
    layouts = " or ".join(f"{candidate}/CLASS/IMAGE" for candidate in FOLDERS[name])
    raise MissingSplit(
        f"{folder} has no labelled split {name!r}; expected {layouts} in it"
        f"{_deeper_set(folder, FOLDERS[name])}"
    )


def _deeper_classes(root: Path, classes: Collection[str]) -> str:
    """Return a hint if `classes` are one level deeper than they should be, else ""."""
    for name in _subfolders(root)[:SEARCHED]:
        if not {*_subfolders(root / name)}.isdisjoint(classes):
            return f"; they are one level too deep, in {root / name}: move them up to {root}"
    return ""


def _deeper_set(folder: Path, splits: Collection[str]) -> str:
    """Return a hint if an adjacent folder is the set that `folder` should be, else ""."""
    inside = (folder / name for name in _subfolders(folder)[:SEARCHED]) if folder.is_dir() else ()
    for other in (*inside, folder.parent):
        if any((other / split).is_dir() for split in splits):
            return f"; {other} is such a folder: --config.data.path={other}"
    return ""


def _subfolders(folder: Path, common: bool = False) -> tuple[str, ...]:
    return _shown_folders(paths.entries(folder), common)


def _shown_folders(entries: list[tuple[str, bool]], common: bool) -> tuple[str, ...]:
    return tuple(
        name
        for name, is_folder in entries
        if is_folder and not (name.startswith(".") if common else image_files.is_hidden(name))
    )


def _by_class(
    root: Path, classes: tuple[str, ...], skipped: image_files.SkippedFiles, common: bool
) -> Iterator[tuple[str, int]]:
    label, deeper = {name: number for number, name in enumerate(classes)}, {}
    entries = paths.entries(root)
    _report_loose(root, [name for name, is_folder in entries if not is_folder])
    folders = _shown_folders(entries, common)
    for name in tqdm(folders, desc=f"list {root}", unit="class", disable=None, delay=1):
        if name not in label:
            raise UserError(
                f"{root / name} is a class that the training set lacks; remove it, or add it there"
                f"{_deeper_classes(root, classes)}"
            )
        files = list(image_files.image_names(root / name, skipped, common, f"{name}/"))
        yield from ((file, label[name]) for file in files)
        if files and all(file.count("/") > 1 for file in files):
            deeper[name] = sorted({file.split("/")[1] for file in files})
    if not common:
        _report_deeper(root, deeper, len(classes))


def _report_loose(root: Path, names: list[str]) -> None:
    """Print how many images are in no class folder."""
    loose = [n for n in names if image_files.is_image(n) and not image_files.is_hidden(n)]
    if loose:
        count = "1 image is" if len(loose) == 1 else f"{len(loose):,} images are"
        image_files.print_once(f"{root}: {count} in no class folder; skipped (first: {loose[0]})")


def _report_deeper(root: Path, deeper: dict[str, list[str]], classes: int) -> None:
    """Warn of a class whose images are all in subfolders, which may be the real classes.

    Raises UserError if it is the only class.
    """
    several = {name: below for name, below in deeper.items() if len(below) > 1}
    if not several or (len(several) > 1 and len({tuple(x) for x in several.values()}) == 1):
        return  # the same subfolders in each class: sessions, cameras, days
    name, below = next(iter(several.items()))
    shown = ", ".join(below[:3]) + (", ..." if len(below) > 3 else "")
    if classes == 1:
        raise UserError(
            f"{root / name} is the only class of {root} and has {len(below)} folders of images "
            f"({shown}): the classes are one level too deep; move them up to {root}"
        )
    image_files.print_once(
        f"{root / name} has images only in {len(below)} subfolders ({shown}): all are one class, "
        f"{name}; if each is a class, move them up to {root}"
    )


def _annotated(root: Path, classes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    label = {name: number for number, name in enumerate(classes)}
    for number, line in enumerate(read_lines(root / ANNOTATIONS), start=1):
        if not line.strip():
            continue
        file, name, *_ = [*line.split("\t"), ""]
        if name not in label:
            raise UserError(
                f"{root / ANNOTATIONS}: line {number}: class {name!r} is none of the "
                f"{len(classes)} classes of the training set; repair the file"
            )
        yield f"images/{file}", label[name]
