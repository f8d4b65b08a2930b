"""Class-balanced sampling: the endless stream visits each class equally often.

Round r of the stream, its positions r c to r c + c - 1, has one example of each of the c classes,
in an order drawn by (seed, r). A class's examples are visited in shuffled epochs of its own. So a
batch remains a pure function of (seed, step), and two classes differ by at most one example in any
number of steps.
"""

import functools

import numpy as np
from jaxtyping import Int

from vit_scale.data.orders import permutation
from vit_scale.data.sources import Source
from vit_scale.data.statistics import all_labels
from vit_scale.errors import UserError

SAMPLINGS = ("shuffle", "balanced")  # of data.sampling
ROUNDS, EPOCHS = 0x726F756E, 0x636C6173  # of the seeds, to be independent of each other


class BalancedOrder:
    """The examples of a set by class; classes without any are left out.

    Raises UserError for a set whose images do not have one class each.
    """

    def __init__(self, source: Source):
        if getattr(source, "targets", 0):
            raise UserError(
                f"data.sampling=balanced needs one class an image, and {source.name} has vectors "
                "(data.target): set data.sampling=shuffle, and weigh the classes (class_weights)"
            )
        labels = all_labels(source)
        by_class = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels)))
        self._examples = [examples for examples in by_class if len(examples)]

    def examples(self, positions: Int[np.ndarray, "n"], seed: int) -> Int[np.ndarray, "n"]:
        """Return the example at each position of the stream."""
        rounds, offsets = np.divmod(positions, len(self._examples))
        chosen = np.empty_like(positions)
        for slot, (number, offset) in enumerate(
            zip(rounds.tolist(), offsets.tolist(), strict=True)
        ):
            label = int(_round(len(self._examples), seed, number)[offset])
            own = self._examples[label]
            epoch, position = divmod(number, len(own))
            chosen[slot] = own[_epoch(len(own), seed, label, epoch)[position]]
        return chosen


@functools.lru_cache(maxsize=128)
def _round(classes: int, seed: int, number: int) -> Int[np.ndarray, "c"]:
    return permutation(classes, seed, ROUNDS, number)


@functools.lru_cache(maxsize=4096)  # one for each class: as much memory as the list of examples
def _epoch(n: int, seed: int, label: int, epoch: int) -> Int[np.ndarray, "n"]:
    return permutation(n, seed, EPOCHS, label, epoch)
