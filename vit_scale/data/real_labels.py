"""ReaL: several right classes for each image of ImageNet's validation set (Beyer et al. 2020).

real.json is a list of lists of classes, one for each image in the order of file names. A prediction
is right if it is one of them, and an image without any is not counted.
"""

import json
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vit_scale.data.sources import Batch, Source
from vit_scale.errors import UserError
from vit_scale.storage import paths
from vit_scale.storage.errors import DAMAGED, user_errors

AGREE = 0.5  # least share of the images whose own label is among ReaL's; of ImageNet's it is 0.9


class RealLabels:
    """A source whose "target" marks the right classes; images without any are masked."""

    def __init__(self, source: Source, right: Sequence[Sequence[int]]):
        self.name, self.size, self.classes = f"{source.name} (ReaL)", source.size, source.classes
        self.decodes, self.targets = source.decodes, len(source.classes)
        self.ids: tuple[str, ...] = getattr(source, "ids", ())
        self._source, self._right = source, right

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        batch = self._source.read(indices)
        batch["target"] = np.zeros((len(indices), self.targets), np.float32)
        for slot, index in enumerate(indices.tolist()):
            batch["target"][slot, self._right[index]] = 1
        batch["mask"] = batch["mask"] & batch["target"].any(axis=1)
        return batch


def with_real_labels(source: Source, file: str | os.PathLike) -> RealLabels:
    """Return ImageNet's validation set with the labels of `file`, a real.json.

    Raises UserError for another file, and for a set that has no names, another number of images, or
    labels that do not agree.
    """
    file, classes = paths.parse(file), len(source.classes)
    with user_errors(f"cannot read {file}", "give ReaL's real.json", also=(*DAMAGED, TypeError)):
        listed = [[int(number) for number in row] for row in json.loads(file.read_bytes())]
    examples = getattr(source, "examples", None)
    if examples is None:
        raise UserError(
            f"{source.name} has no names of its images, or is a slice; {file} is in their order"
        )
    if len(listed) != len(source):
        raise UserError(f"{file} has {len(listed):,} images, and {source.name} {len(source):,}")
    if wrong := [n for row in listed for n in row if not 0 <= n < classes]:
        raise UserError(f"{file}: class {wrong[0]} is outside the {classes} of {source.name}")
    names = [name.rpartition(b"/")[2] for name in examples.files.tolist()]
    right: list[list[int]] = [[]] * len(listed)
    for row, index in zip(listed, sorted(range(len(names)), key=names.__getitem__), strict=True):
        right[index] = row
    own = zip(examples.labels.tolist(), right, strict=True)
    agree = [label in row for label, row in own if row]
    if sum(agree) < AGREE * max(1, len(agree)):
        raise UserError(
            f"{file} has the label of {source.name} for only {sum(agree):,} of {len(agree):,} "
            "images: its images or its classes are in another order"
        )
    return RealLabels(source, right)
