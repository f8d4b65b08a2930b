"""Statistics of a set's labels, of every example, without decoding an image."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from vit_scale.data.sources import Source, labels_of
from vit_scale.data.targets import Rows

CHUNK = 8192  # examples whose labels, or vectors, are in memory at once


def all_labels(source: Source) -> Int[np.ndarray, "n"]:
    """Return the class of each example of a source of one class an image."""
    return np.concatenate([np.zeros(0, np.int32), *_chunks(source)])


def class_counts(source: Source) -> Int[np.ndarray, "c"]:
    """Return how many examples have each class, the only one or one of several."""
    counts = np.zeros(len(source.classes), np.int64)
    for part in _chunks(source):
        several = part.ndim == 2
        counts += (part > 0).sum(0) if several else np.bincount(part, minlength=len(counts))
    return counts


def mean_and_std(source: Source) -> tuple[Float[np.ndarray, "t"], Float[np.ndarray, "t"]]:
    """Return the mean and the standard deviation of each number of data.target=value, in float64.

    The deviation of a number that never changes is 1, so that it can be divided by.
    """
    n = len(source)
    mean = sum(part.sum(0, dtype=np.float64) for part in _chunks(source)) / n
    squares = sum(np.square(part - mean).sum(0) for part in _chunks(source))
    std = np.sqrt(squares / n)
    return mean, np.where(std > 0, std, 1.0)


def target_rows(source: Source, positions: Int[np.ndarray, "m"], several: bool) -> Rows:
    """Return the vectors at `positions` as rows: numbers, or the classes of each if `several`."""
    flat: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    for part in _chunks(source, positions):
        flat.append(np.nonzero(part)[1].astype(np.int32) if several else part.ravel())
        lengths.append((part > 0).sum(1) if several else np.full(len(part), part.shape[1]))
    return Rows(np.concatenate(flat), np.cumsum(np.concatenate(lengths)))


def _chunks(source: Source, positions: Int[np.ndarray, "m"] | None = None) -> Iterator[np.ndarray]:
    positions = np.arange(len(source)) if positions is None else positions
    for first in range(0, len(positions), CHUNK):
        yield labels_of(source, positions[first : first + CHUNK])
