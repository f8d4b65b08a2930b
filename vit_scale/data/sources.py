"""The interface of a set of labelled images, and sets in memory.

A source is a random-access set: the loader decides which examples to read and in which order, so
that a batch is a pure function of (seed, step).
"""

import hashlib
from collections.abc import Sequence
from typing import NotRequired, Protocol, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from vit_scale.augment.random_crop import MultiCrop
from vit_scale.errors import UserError


class MissingSplit(UserError):
    """A set that has no such split, or none with labels."""


class Batch(TypedDict):
    """Examples, as numpy arrays on the host."""

    image: UInt8[np.ndarray, "n h w 3"]
    label: Int[np.ndarray, "n"]  # int32
    mask: Bool[np.ndarray, "n"]  # False for padding and for corrupt images that are skipped
    target: NotRequired[Float[np.ndarray, "n t"]]  # float32, of sources with `targets` (targets.py)
    local: NotRequired[UInt8[np.ndarray, "n l h w 3"]]  # small crops; then "image" is [n g H W 3]


class Source(Protocol):
    """A random-access set of labelled images of one size."""

    name: str  # in errors and reports
    classes: tuple[str, ...]  # the name of each label
    size: tuple[int, int]  # height and width of the images, in pixels
    decodes: bool  # reading decodes files, which is worth worker processes
    # Optional attributes:
    # examples: the identity of each example, or None (`Examples`)
    # recorded: metadata that a run saves, to detect later that the set has changed
    # labels: a function of indices that returns what `read` does as "label" or "target", alone
    # targets: the length of the vectors that it has instead of labels; 0 or none: it has labels
    # crops: whether `read` takes a stream of random numbers for each example as well, to crop it
    # multi_crop: the several crops that it makes of each example, or None (random_crop.MultiCrop)

    def __len__(self) -> int: ...

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """Return the examples at `indices`, in that order; a skipped one is zeros with mask False.

        Raises UserError with the file and the position of an example that cannot be read.
        """
        ...


class InMemory:
    """A source of decoded images in memory; `mask` is False for corrupt ones.

    Raises UserError for a label outside [0, len(classes)).
    """

    decodes = False
    examples = None  # examples are identified by position

    def __init__(
        self,
        name: str,
        images: UInt8[np.ndarray, "n h w 3"],
        labels: Int[np.ndarray, "n"],
        classes: Sequence[str],
        mask: Bool[np.ndarray, "n"] | None = None,
        target: Float[np.ndarray, "n t"] | None = None,
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"images must be uint8 [n, h, w, 3], not {images.dtype} {images.shape}"
            )
        self.name = name
        self.classes = tuple(classes)
        self.size = (images.shape[1], images.shape[2])
        self.recorded: dict[str, object] = {}
        self.ids: tuple[str, ...] = ()
        self._images = images
        self._labels = check_labels(labels, self.classes, name)
        self._mask = np.ones(len(images), bool) if mask is None else mask
        self._target = target
        self.targets = 0 if target is None else target.shape[1]
        if not len(self._images) == len(self._labels) == len(self._mask):
            raise ValueError(
                f"different numbers of images ({len(images)}), labels ({len(labels)}) and masks "
                f"({len(self._mask)})"
            )

    def __len__(self) -> int:
        return len(self._images)

    def labels(self, indices: Int[np.ndarray, "m"]) -> np.ndarray:
        return np.take(self._labels if self._target is None else self._target, indices, axis=0)

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        batch: Batch = {
            "image": np.take(self._images, indices, axis=0),
            "label": np.take(self._labels, indices),
            "mask": np.take(self._mask, indices),
        }
        if self._target is not None:
            batch["target"] = np.take(self._target, indices, axis=0)
        return batch


def empty_batch(source: Source, n: int) -> Batch:
    """Return `n` masked examples of zeros, as `source` delivers them."""
    multi: MultiCrop | None = getattr(source, "multi_crop", None)
    views = (multi.globals,) if multi else ()
    batch: Batch = {
        "image": np.zeros((n, *views, *source.size, 3), np.uint8),
        "label": np.zeros(n, np.int32),
        "mask": np.zeros(n, bool),
    }
    if length := getattr(source, "targets", 0):
        batch["target"] = np.zeros((n, length), np.float32)
    if multi and multi.locals:
        batch["local"] = np.zeros((n, multi.locals, *multi.local_size, 3), np.uint8)
    return batch


def labels_of(source: Source, indices: Int[np.ndarray, "m"]) -> np.ndarray:
    """Return the labels [m], or targets [m, t], of the examples at `indices`."""
    if own := getattr(source, "labels", None):
        return own(indices)
    batch = source.read(indices)
    return batch.get("target", batch["label"])


def check_labels(labels: Int[np.ndarray, "n"], classes: Sequence[str], where: str) -> np.ndarray:
    """Return the labels as int32. Raises UserError for one outside [0, len(classes))."""
    wrong = np.flatnonzero((np.asarray(labels) < 0) | (np.asarray(labels) >= len(classes)))
    if wrong.size:
        raise UserError(
            f"{where}: label {labels[wrong[0]]} at position {wrong[0]} is outside the "
            f"{len(classes)} classes 0..{len(classes) - 1}; repair or replace the file"
        )
    return np.asarray(labels, np.int32)


def checksum(source: Source, examples: int = 16) -> str:
    """Hash a few examples spread over a source, to compare it between hosts."""
    indices = np.unique(np.linspace(0, len(source) - 1, examples).astype(np.int64))
    batch = source.read(indices)
    digest = hashlib.sha256()
    for name in ("image", "label", "mask", "target"):
        part = batch.get(name, ())
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]
