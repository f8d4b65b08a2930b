"""Choose sample images to inspect: from a labelled split, or from a folder of any images."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vit_scale.augment.view import View
from vit_scale.data import Source, image_files
from vit_scale.errors import UserError, printable
from vit_scale.inference.predictor import read_image
from vit_scale.storage import paths
from vit_scale.storage.errors import user_errors

COUNT = 128  # images to average attention distance over, as in the ViT paper's figure 7
SHOWN = 8  # of which so many are shown


class Samples(NamedTuple):
    """Images of one size, their names (classes, or file names), and the split or folder."""

    images: UInt8[np.ndarray, "b h w 3"]
    names: tuple[str, ...]
    source: str

    def to_show(self) -> "Samples":
        """At most SHOWN of the images, with as many different names as possible."""
        chosen = varied(self.names, SHOWN)
        return Samples(self.images[chosen], tuple(self.names[i] for i in chosen), self.source)


def evenly_spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at equal distances, including the first and the last."""
    indices = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in indices]


def varied(names: Sequence[Any], count: int) -> list[int]:
    """Indices of at most `count` items, in order, with as many different names as possible."""
    first = list({name: i for i, name in reversed(list(enumerate(names)))}.values())[::-1]
    chosen = evenly_spaced(first, count)
    others = [i for i in range(len(names)) if i not in first]
    return sorted(chosen + evenly_spaced(others, count - len(chosen)))


def from_source(source: Source, count: int = COUNT) -> Samples:
    """At most `count` images from all over a split, which may be sorted by class."""
    batch = source.read(np.array(evenly_spaced(range(len(source)), count)))
    readable = np.flatnonzero(batch["mask"])
    names = tuple(printable(source.classes[batch["label"][i]]) for i in readable)
    return Samples(batch["image"][readable], names, source.name)


def from_folder(
    folder: str, size: tuple[int, int], view: View, count: int = COUNT, exif: bool = True
) -> Samples:
    """At most `count` images of a folder and its subfolders, decoded to `size` with `view`.

    Raises UserError if there is no image, or one can't be decoded.
    """
    top, skipped = paths.parse(folder), image_files.SkippedFiles()
    with user_errors(f"cannot read --images {folder}"):
        files = evenly_spaced(list(image_files.image_names(top, skipped)), count)
    if not files:
        raise UserError(f"--images {folder} has no image{skipped.hint()}")
    if skipped.counts:
        image_files.print_once(f"{folder}: {skipped}; skipped")
    images = np.stack([read_image(top / file, size, view, exif) for file in files])
    names = tuple(printable(pathlib.PurePath(file).stem) for file in files)
    return Samples(images, names, printable(folder))
