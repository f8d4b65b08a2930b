"""Labels that are vectors: several classes of an image (multi-hot), or numbers (regression).

With data.target=classes or value, a source's batches have "target", a float32 vector of an entry a
class, or a number, and "label" is 0. Rows of any length are kept as they are stored, and a vector
is made when an example is read.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from vit_scale.errors import UserError

KINDS = ("class", "classes", "value", "none")  # of data.target; none: there are no labels
CLASS, CLASSES, VALUE, NONE = KINDS
DEFAULT_THRESHOLD = 0.5  # probability from which an image has a class, where none was chosen


class Rows(NamedTuple):
    """Rows of different lengths, one after the other: numbers, or names of classes."""

    flat: np.ndarray
    ends: Int[np.ndarray, "n"]  # of each row in `flat`

    def starts(self) -> Int[np.ndarray, "n"]:
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)


class Targets:
    """The vector of each example; indexing by an int returns it, by positions a part of these."""

    def __init__(self, rows: Rows, length: int, several: bool):
        self.length = length  # of a vector
        self._flat, self._starts, self._ends = rows.flat, rows.starts(), rows.ends
        self._several = several

    def __len__(self) -> int:
        return len(self._ends)

    def vector(self, index: int) -> Float[np.ndarray, "t"]:
        own = self._flat[self._starts[index] : self._ends[index]]
        if not self._several:
            return own.astype(np.float32)
        vector = np.zeros(self.length, np.float32)
        vector[own] = 1
        return vector

    def vectors(self, indices: Int[np.ndarray, "m"]) -> Float[np.ndarray, "m t"]:
        """Return the vectors at `indices`."""
        vectors = np.zeros((len(indices), self.length), np.float32)
        for slot, index in enumerate(indices.tolist()):
            vectors[slot] = self.vector(index)
        return vectors

    def part(self, positions: Int[np.ndarray, "m"]) -> "Targets":
        starts, ends = self._starts[positions], self._ends[positions]
        flat = [self._flat[start:end] for start, end in zip(starts, ends, strict=True)]
        rows = Rows(np.concatenate([self._flat[:0], *flat]), np.cumsum(ends - starts))
        return Targets(rows, self.length, self._several)

    def hashes(self) -> Int[np.ndarray, "n"]:
        """Return a hash of each vector, by which a changed one is detected, in place of labels."""
        return np.array(
            [zlib.crc32(self.vector(i).astype("<f4").tobytes()) for i in range(len(self))], np.int64
        )


def read_scale(cfg: ConfigDict) -> tuple[Float[np.ndarray, "t"], Float[np.ndarray, "t"]]:
    """Return the mean and the deviation by which a config's numbers are normalised.

    0 and 1 for a config that is only planned, whose run would fill them in.
    """
    count = cfg.model.classes
    mean, std = cfg.regression.mean or (0.0,) * count, cfg.regression.std or (1.0,) * count
    return np.array(mean, np.float32), np.array(std, np.float32)


def to_numbers(outputs: Float[Array, "b t"], cfg: ConfigDict) -> Float[Array, "b t"]:
    """Return what the outputs of a model of data.target=value predict, in the numbers' units."""
    mean, std = read_scale(cfg)
    return outputs * std + mean


def rows_of(values: Sequence, where: Callable[[int], str]) -> Rows:
    """Return rows of numbers or of names; a scalar is a row of one.

    Raises UserError for anything else, and for names beside numbers; `where` describes an example.
    """
    lists = [value if isinstance(value, list | np.ndarray) else [value] for value in values]
    names = next((isinstance(row[0], str) for row in lists if len(row)), False)
    for example, row in enumerate(lists):
        for item in row:
            number = isinstance(item, int | float | np.number) and not isinstance(item, bool)
            if isinstance(item, str) != names or not (names or number):
                wanted = "name of a class" if names else "number"
                raise UserError(f"{where(example)}: {item!r} is no {wanted}; correct its label")
    ends = np.cumsum([len(row) for row in lists], dtype=np.int64)
    return Rows(np.array([item for row in lists for item in row]), ends)


def make_targets(
    rows: Rows, kind: str, classes: Sequence[str], where: Callable[[int], str]
) -> Targets:
    """Return the vectors of rows; `where` describes an example.

    Raises UserError for a class that is not one of `classes`, a number that is not finite, and a
    row of another length.
    """

    def refuse(wrong: np.ndarray, why: Callable[[object], str]) -> None:
        if wrong.size:
            example = int(np.searchsorted(rows.ends, wrong[0], side="right"))
            raise UserError(f"{where(example)}: {why(rows.flat[wrong[0]])}; correct its label")

    text = rows.flat.dtype.kind in "USO"
    if kind == CLASSES:
        flat = rows.flat
        if text:
            numbers = {name: number for number, name in enumerate(classes)}
            flat = np.array([numbers.get(name, -1) for name in flat.tolist()], np.int32)
        wrong = (flat < 0) | (flat >= len(classes)) | (flat != np.floor(flat))
        refuse(
            np.flatnonzero(wrong), lambda item: f"class {item} is none of the {len(classes)} known"
        )
        return Targets(Rows(flat.astype(np.int32), rows.ends), len(classes), True)
    if text:
        refuse(np.arange(len(rows.flat)), lambda item: f"{str(item)!r} is not a number")
    refuse(np.flatnonzero(~np.isfinite(rows.flat)), lambda item: f"{item} is not finite")
    lengths = np.diff(rows.ends, prepend=0)
    wrong = np.flatnonzero(lengths != len(classes))
    if wrong.size:
        raise UserError(
            f"{where(int(wrong[0]))}: it has {lengths[wrong[0]]} numbers, and the training set "
            f"{len(classes)} an image; correct its label"
        )
    return Targets(Rows(rows.flat.astype(np.float32), rows.ends), len(classes), False)


def class_names(train: Rows, kind: str) -> tuple[str, ...]:
    """Return the classes of a training set without names of its own, or the numbers' positions."""
    if kind == VALUE:
        count = int(np.diff(train.ends[:1], prepend=0)[0]) if len(train.ends) else 0
        return tuple(map(str, range(count)))
    if train.flat.dtype.kind in "USO":
        return tuple(sorted(set(train.flat.tolist())))
    return tuple(map(str, range(int(max(train.flat, default=-1)) + 1)))
