"""Named parts of a source: `train[:98%]`, `test`, `train[45000:]`.

A part is cut from one fixed shuffled order of the set, so that it holds all classes, and images can
be held out that neither training nor the test set uses. `[:k]` and `[k:]` are disjoint and together
the whole set, also when one is read from a folder and the other from a pack of it.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vit_scale.augment.random_crop import Draws
from vit_scale.data.example_ids import Examples
from vit_scale.data.sources import Batch, Source, labels_of
from vit_scale.errors import UserError

# The order of positions, for sets without names and for runs of older versions. Never change it:
# `train[:98%]` of a past run and `train[98%:]` of a later evaluation must stay disjoint.
SLICE_ORDER = 20201022
ORDERS = ("example", "position")  # of data.slices
SPLIT = re.compile(r"(?P<name>\w+)(\[(?P<start>\d+%?)?:(?P<stop>\d+%?)?\])?")


class Slice:
    """Part [start, stop) of a source in a shuffled order.

    `by` is "example", the order by what the examples are (`Examples.order`), or "position", an
    order of positions, which is also used if the source does not identify its examples.
    """

    def __init__(self, source: Source, name: str, start: int, stop: int, by: str = "example"):
        self.name = name
        self.classes = source.classes
        self.ids = getattr(source, "ids", ())
        self.size = source.size
        self.decodes = source.decodes
        self.crops = getattr(source, "crops", False)
        self.multi_crop = getattr(source, "multi_crop", None)
        self.targets = getattr(source, "targets", 0)
        self._source = source
        examples: Examples | None = getattr(source, "examples", None)
        self.by = by if examples else "position"
        if examples and by == "example":
            order = examples.order()
        else:
            order = np.random.RandomState(SLICE_ORDER).permutation(len(source))
        self._indices = np.sort(order[start:stop])  # sorted, as neighbours on disk are read faster

    def __len__(self) -> int:
        return len(self._indices)

    def labels(self, indices: Int[np.ndarray, "m"]) -> np.ndarray:
        return labels_of(self._source, self._indices[indices])

    def read(self, indices: Int[np.ndarray, "n"], *draws: Sequence[Draws]) -> Batch:
        return self._source.read(self._indices[indices], *draws)

    @property
    def recorded(self) -> dict[str, object]:
        examples = getattr(self._source, "examples", None)
        fingerprint = {"fingerprint": examples.fingerprint(self._indices)} if examples else {}
        return {"of": len(self._source), "slices": self.by, **fingerprint}


def split_name(split: str, valid: Sequence[str]) -> str:
    """Return the set that a split is cut from: `train` for `train[98%:]`.

    Raises UserError if that is not one of `valid`.
    """
    match = SPLIT.fullmatch(split.strip())
    if not match or match["name"] not in valid:
        raise UserError(
            f"split {split!r} is unknown; valid: {', '.join(valid)}, "
            f"or a part such as {valid[0]}[:45000], {valid[0]}[98%:], {valid[0]}[10%:20%]"
        )
    return match["name"]


def cut(source: Source, split: str, by: str = "example") -> Source:
    """Return the part of `source` that `split` names; bounds are positions or percentages.

    `by` is `Slice`'s. Raises UserError for a part that is empty or exceeds the set.
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
            f"split {split!r} is [{bounds[0]}, {bounds[1]}) of {len(source)} images; "
            f"it needs 0 <= start < stop <= {len(source)}"
        )
    return Slice(source, f"{source.name}{split[split.index('[') :]}", *bounds, by)


def are_disjoint(one: str, other: str) -> bool:
    """Return whether two splits of one data set certainly share no image.

    A bound in positions and one in percent are not compared: such slices may share some.
    """
    left, right = (SPLIT.fullmatch(split.strip()) for split in (one, other))
    if left is None or right is None or left["name"] != right["name"]:
        return True

    def ends_before(stop: str | None, start: str | None) -> bool:
        if not stop or not start or stop.endswith("%") != start.endswith("%"):
            return False
        return int(stop.rstrip("%")) <= int(start.rstrip("%"))

    return ends_before(left["stop"], right["start"]) or ends_before(right["stop"], left["start"])


def _bound(text: str, n: int) -> int:
    return n * int(text[:-1]) // 100 if text.endswith("%") else int(text)
