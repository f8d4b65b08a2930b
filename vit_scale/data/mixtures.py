"""A training set that draws from several sets, each with a weight.

The batch of a step is a pure function of (seed, step), as for one set: how many examples a batch
takes from each set is fixed by the weights and the step alone, and each set is visited in epochs of
its own, in a shuffled order. Classes of the same name are one class.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from vit_scale.augment.random_crop import Draws
from vit_scale.data.class_mapping import Relabelled, is_numbered
from vit_scale.data.orders import permutation
from vit_scale.data.sources import Batch, Source, empty_batch, labels_of
from vit_scale.errors import UserError

ROWS = 0x6D697874  # of the seed of the rows' order, to be independent of the examples' order


class Mixture:
    """A source of sources: examples are numbered through, one set after the other.

    Raises UserError for sets of different image sizes, for classes without names beside others, and
    for weights that are not above 0.
    """

    examples = None

    def __init__(self, sources: Sequence[Source], weights: Sequence[float], numbers: bool = False):
        self.sources = list(sources)
        if len(weights) != len(sources) or min(weights) <= 0:
            raise UserError(f"the weights of data.mixture, {tuple(weights)}, must be above 0")
        self.weights = np.array(weights, np.float64) / sum(weights)
        sizes = {source.size for source in sources}
        if len(sizes) > 1:
            raise UserError(f"data.mixture has images of different sizes: {sorted(sizes)}")
        (self.size,) = sizes
        self.name = " + ".join(
            f"{share:.0%} {source.name}"
            for share, source in zip(self.weights, sources, strict=True)
        )
        self.classes, self._labels = _union(sources)
        self.targets = len(self.classes) if getattr(sources[0], "targets", 0) else 0
        if numbers and len({frozenset(source.classes) for source in sources}) > 1:
            several = "; ".join(f"{source.name}: {', '.join(source.classes)}" for source in sources)
            raise UserError(f"data.mixture has sets of other numbers ({several}): give the same")
        self.decodes = any(source.decodes for source in sources)
        self.crops = any(getattr(source, "crops", False) for source in sources)
        self.multi_crop = getattr(sources[0], "multi_crop", None)
        self._first = np.cumsum([0] + [len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def lengths(self) -> list[int]:
        return [len(source) for source in self.sources]

    @property
    def recorded(self) -> dict[str, object]:
        records = [getattr(source, "recorded", {}) for source in self.sources]
        return {
            field: "+".join(str(record.get(field, "none")) for record in records)
            for field in ("fingerprint", "slices")
        }

    def taken(self, step: int, batch: int) -> Int[np.ndarray, "s"]:
        """Return how many examples of each set the steps before `step` take.

        The set with the largest weight takes what the others, rounded down, leave.
        """
        total = step * batch
        counts = np.floor(total * self.weights).astype(np.int64)
        largest = int(np.argmax(self.weights))
        counts[largest] += total - counts.sum()
        return counts

    def chosen(
        self, step: int, batch: int, rows: Int[np.ndarray, "r"], seed: int
    ) -> tuple[Int[np.ndarray, "r"], Int[np.ndarray, "r"]]:
        """Return the set of each of `rows` of a batch, and its position in that set's stream."""
        before = self.taken(step, batch)
        counts = self.taken(step + 1, batch) - before
        which = np.repeat(np.arange(len(counts)), counts)
        position = np.concatenate([np.arange(n) for n in counts]) + before[which]
        order = permutation(batch, seed, ROWS, step)[rows]
        return which[order], position[order]

    def index(self, which: int, examples: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        return self._first[which] + examples

    def labels(self, indices: Int[np.ndarray, "m"]) -> np.ndarray:
        which = np.searchsorted(self._first, indices, side="right") - 1
        shape = (len(indices), self.targets) if self.targets else len(indices)
        labels = np.zeros(shape, np.float32 if self.targets else np.int32)
        for number, source in enumerate(self.sources):
            slots = np.flatnonzero(which == number)
            part = labels_of(source, indices[slots] - self._first[number])
            if self.targets:
                labels[np.ix_(slots, self._labels[number])] = part
            else:
                labels[slots] = self._labels[number][part]
        return labels

    def read(self, indices: Int[np.ndarray, "n"], draws: Sequence[Draws] = ()) -> Batch:
        which = np.searchsorted(self._first, indices, side="right") - 1
        batch = empty_batch(self, len(indices))
        for number, source in enumerate(self.sources):
            slots = np.flatnonzero(which == number)
            if not slots.size:
                continue
            crops = bool(draws) and getattr(source, "crops", False)
            own = ([draws[slot] for slot in slots.tolist()],) if crops else ()
            part = source.read(indices[slots] - self._first[number], *own)
            batch["image"][slots], batch["mask"][slots] = part["image"], part["mask"]
            if "local" in part:
                batch["local"][slots] = part["local"]
            batch["label"][slots] = self._labels[number][part["label"]]
            if self.targets:
                batch["target"][np.ix_(slots, self._labels[number])] = part["target"]
        return batch

    def epochs(self, steps: int, batch: int) -> list[tuple[str, float]]:
        """Return each set's name, and how often `steps` steps visit each of its examples.

        Of sets of one name, the second is "NAME (2)".
        """
        counts, names = self.taken(steps, batch), [source.name for source in self.sources]
        numbers = [names[: i + 1].count(name) for i, name in enumerate(names)]
        return [
            (name if number == 1 else f"{name} ({number})", float(count / length))
            for name, number, count, length in zip(
                names, numbers, counts, self.lengths, strict=True
            )
        ]


def _union(sources: Sequence[Source]) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return the classes of all sources, and for each the number of each of its labels in them."""
    if all(source.classes == sources[0].classes for source in sources):
        same = np.arange(len(sources[0].classes), dtype=np.int32)
        return sources[0].classes, [same] * len(sources)
    for source in sources:
        if is_numbered(source.classes):
            raise UserError(
                f"data.mixture: the classes of {source.name} have no names, and other sets have "
                "other classes: name them, or mix sets of the same classes"
            )
    for source in sources:
        if len(set(source.classes)) < len(source.classes):
            raise UserError(f"data.mixture: {source.name} has two classes of one name; rename one")
    names = list(dict.fromkeys(name for source in sources for name in source.classes))
    numbers = {name: number for number, name in enumerate(names)}
    labels = [np.array([numbers[name] for name in s.classes], np.int32) for s in sources]
    return tuple(names), labels


def relabel(source: Source, classes: Sequence[str]) -> Source:
    """Return a source, such as an evaluation set, with its labels numbered as in `classes`.

    Classes without names, of the same number, are taken to be in that order. Raises UserError for a
    class that is not among them.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    unnamed = len(source.classes) == len(classes) and is_numbered(source.classes)
    if source.classes == tuple(classes) or (unnamed and numbers.keys() != set(source.classes)):
        return source
    if unknown := [name for name in source.classes if name not in numbers]:
        raise UserError(f"class {unknown[0]!r} of {source.name} is in none of data.mixture's sets")
    return Relabelled(source, classes, [numbers[name] for name in source.classes])
