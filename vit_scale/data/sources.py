"""What a set of images is to the rest of the program, and how a part of it is named.

A source is a random-access set: the pipeline decides which examples, in which order; a source only
reads them. That is what makes a batch a pure function of (seed, step). `InMemory` is the source of
everything that fits in memory; `Slice` is a named part of any source, so that model selection can
be done on images that neither training nor the test set sees.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Protocol, TypedDict

import numpy as np
from jaxtyping import Bool, Int, UInt8

from vit_scale.data.example_ids import Examples
from vit_scale.errors import UserError

# Slices of what has no names, and of runs of before, are cut from this one order of positions. It
# may never change: `train[:98%]` of yesterday's run and `train[98%:]` of today's evaluation have to
# be disjoint.
SLICE_ORDER = 20201022
ORDERS = ("example", "position")  # of data.slices


class Batch(TypedDict):
    """Examples on the host."""

    image: UInt8[np.ndarray, "n h w 3"]
    label: Int[np.ndarray, "n"]  # int32
    mask: Bool[np.ndarray, "n"]  # False: no example, but a padded or a skipped one


class Source(Protocol):
    """A random-access set of labelled images, all delivered at one size."""

    name: str  # as errors and reports call it
    classes: tuple[str, ...]  # the name of each label
    size: tuple[int, int]  # height and width of the images, in pixels
    decodes: bool  # reading is work (files, JPEG), worth worker processes
    # A source may also have:
    # examples: which example is which, or None (`Examples`)
    # recorded: what a run keeps of it, to see later whether it is still the same

    def __len__(self) -> int: ...

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        """The examples at `indices`, in that order. A skipped corrupt one is zeros with mask False.

        Raises UserError naming the file and the position of an example that cannot be read.
        """
        ...


class InMemory:
    """A source that holds every image, decoded. `mask` is False for the corrupt ones.

    Raises UserError for a label that is none of the `classes`.
    """

    decodes = False
    examples = None  # they are what their position is

    def __init__(
        self,
        name: str,
        images: UInt8[np.ndarray, "n h w 3"],
        labels: Int[np.ndarray, "n"],
        classes: Sequence[str],
        mask: Bool[np.ndarray, "n"] | None = None,
    ):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(
                f"images have to be uint8 [n, h, w, 3], not {images.dtype} {images.shape}"
            )
        self.name = name
        self.classes = tuple(classes)
        self.size = (images.shape[1], images.shape[2])
        self.recorded: dict[str, object] = {}
        self.ids: tuple[str, ...] = ()
        self._images = images
        self._labels = check_labels(labels, self.classes, name)
        self._mask = np.ones(len(images), bool) if mask is None else mask
        if not len(self._images) == len(self._labels) == len(self._mask):
            raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(self._mask)} masks")

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        return {
            "image": np.take(self._images, indices, axis=0),
            "label": np.take(self._labels, indices),
            "mask": np.take(self._mask, indices),
        }


def check_labels(labels: Int[np.ndarray, "n"], classes: Sequence[str], where: str) -> np.ndarray:
    """The labels as int32. Raises UserError with the position of one outside [0, len(classes))."""
    wrong = np.flatnonzero((np.asarray(labels) < 0) | (np.asarray(labels) >= len(classes)))
    if wrong.size:
        raise UserError(
            f"{where}: label {labels[wrong[0]]} at position {wrong[0]} is outside the "
            f"{len(classes)} classes 0..{len(classes) - 1}; repair or replace the file"
        )
    return np.asarray(labels, np.int32)


class Slice:
    """Part [start, stop) of a source, counted in one fixed shuffled order of it.

    Shuffled, because sets stored class by class would give slices of one class. `[:k]` and `[k:]`
    are disjoint, and together the whole set. `by`: "example", the order of what the examples are
    (`Examples.order`), where the source knows; or "position", an order of places in the source.
    """

    def __init__(self, source: Source, name: str, start: int, stop: int, by: str = "example"):
        self.name = name
        self.classes = source.classes
        self.ids = getattr(source, "ids", ())
        self.size = source.size
        self.decodes = source.decodes
        self._source = source
        examples: Examples | None = getattr(source, "examples", None)
        self.by = by if examples else "position"
        if examples and by == "example":
            order = examples.order()
        else:
            order = np.random.RandomState(SLICE_ORDER).permutation(len(source))
        self._indices = np.sort(order[start:stop])  # neighbours on disk stay neighbours

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        return self._source.read(self._indices[indices])

    @property
    def recorded(self) -> dict[str, object]:
        examples = getattr(self._source, "examples", None)
        known = {"fingerprint": examples.fingerprint(self._indices)} if examples else {}
        return {"of": len(self._source), "slices": self.by, **known}


def checksum(source: Source, examples: int = 16) -> str:
    """Of some examples, spread over a source: two machines' are the same if their files are."""
    indices = np.unique(np.linspace(0, len(source) - 1, examples).astype(np.int64))
    batch = source.read(indices)
    found = hashlib.sha256()
    for part in (batch["image"], batch["label"], batch["mask"]):
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()[:16]


SPLIT = re.compile(r"(?P<name>\w+)(\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


def split_name(split: str, valid: Sequence[str]) -> str:
    """The set that a split is cut from: `train` of `train[98%:]`. UserError if it isn't `valid`."""
    match = SPLIT.fullmatch(split.strip())
    if not match or match["name"] not in valid:
        raise UserError(
            f"split {split!r} is unknown; valid: {', '.join(valid)}, "
            f"and parts of them such as {valid[0]}[:45000], {valid[0]}[98%:], {valid[0]}[10%:20%]"
        )
    return match["name"]


def cut(source: Source, split: str, by: str = "example") -> Source:
    """The part of `source` that `split` names; bounds are positions or, with %, percentages.

    `by`: see `Slice`. Raises UserError for a part that is empty or reaches beyond the set.
    """
    match = SPLIT.fullmatch(split.strip())
    if match is None:
        raise ValueError(split)
    start, stop = match["start"], match["stop"]
    if start is None and stop is None:
        if not len(source):
            raise UserError(f"split {split!r} of {source.name} has no images")
        return source
    bounds = _bound(start or "0", len(source)), _bound(stop or "100%", len(source))
    if not 0 <= bounds[0] < bounds[1] <= len(source):
        raise UserError(
            f"split {split!r} is positions {bounds[0]}..{bounds[1]} of {len(source)} images; "
            f"it needs 0 <= start < stop <= {len(source)}"
        )
    return Slice(source, f"{source.name}{split[split.index('[') :]}", *bounds, by)


def _bound(text: str, n: int) -> int:
    return n * int(text[:-1]) // 100 if text.endswith("%") else int(text)
