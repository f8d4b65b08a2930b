"""Images to look at: some of a labelled set, or of a folder of any images."""

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

COUNT = 128  # images that attention distance is averaged over, as in the ViT paper's figure 7
SHOWN = 8  # of them are shown


class Samples(NamedTuple):
    """Images of one size, what each is called, and where they are from, for people."""

    images: UInt8[np.ndarray, "b h w 3"]
    names: tuple[str, ...]
    source: str

    def shown(self) -> "Samples":
        """At most SHOWN of them, with as many different names as there are."""
        first = [self.names.index(name) for name in dict.fromkeys(self.names)]
        others = [i for i in range(len(self.names)) if i not in first]
        chosen = sorted((spread(first, SHOWN) + others)[:SHOWN])
        return Samples(self.images[chosen], tuple(self.names[i] for i in chosen), self.source)


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, from the first to the last, equally far apart."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in places]


def from_source(source: Source, count: int = COUNT) -> Samples:
    """At most `count` images from all over a set, which may be stored class by class."""
    batch = source.read(np.array(spread(range(len(source)), count)))
    there = np.flatnonzero(batch["mask"])
    names = tuple(printable(source.classes[batch["label"][i]]) for i in there)
    return Samples(batch["image"][there], names, source.name)


def from_folder(
    folder: str, size: tuple[int, int], view: View, count: int = COUNT, exif: bool = True
) -> Samples:
    """At most `count` images of a folder and its folders, at `size`, as evaluation sees them.

    Raises UserError where there is none, and for one that can't be decoded.
    """
    top, skipped = paths.parse(folder), image_files.SkippedFiles()
    with user_errors(f"cannot read --images {folder}"):
        found = spread(list(image_files.image_names(top, skipped)), count)
    if not found:
        raise UserError(f"--images {folder} has no image{skipped.hint()}")
    if skipped.counts:
        image_files.print_once(f"{folder}: {skipped}; skipped")
    images = np.stack([read_image(top / file, size, view, exif) for file in found])
    names = tuple(printable(pathlib.PurePath(file).stem) for file in found)
    return Samples(images, names, printable(folder))
