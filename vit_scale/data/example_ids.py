"""Which example is which, however its set is stored: by its path below the folder of its split.

A slice of a set is cut from the order of the paths' hashes. So whether an image is in `train[98%:]`
does not depend on whether the set is a folder or a pack of it, and hardly on which other images
there are: one that is added moves at most one other over a bound. The sum of the hashes says
whether two listings are of the same images.

Neither may ever change: a run that is resumed would train on what it held out.
"""

import functools
import hashlib

import numpy as np
from jaxtyping import Int, UInt64

LABELS = np.uint64(0x9E3779B97F4A7C15)  # odd: another label is another number modulo 2^64


class Examples:
    """The paths, bytes relative to the folder of their split, and the labels of a set."""

    def __init__(self, files: np.ndarray, labels: Int[np.ndarray, "n"]):
        self.files, self.labels = files, labels

    def __getstate__(self) -> dict:
        return {"files": self.files, "labels": self.labels}  # a worker needs no hashes

    @functools.cached_property
    def hashes(self) -> UInt64[np.ndarray, "n"]:
        """BLAKE2b of each path, its first 64 bits."""
        digests = (hashlib.blake2b(file, digest_size=8).digest() for file in self.files.tolist())
        return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)

    def order(self) -> Int[np.ndarray, "n"]:
        """The positions of the examples by hash; by path where two have the same."""
        order = np.argsort(self.hashes, kind="stable")
        ranked = self.hashes[order]
        if (ranked[1:] == ranked[:-1]).any():
            return np.lexsort((self.files, self.hashes))
        return order

    def fingerprint(self, chosen: Int[np.ndarray, "m"] | slice = slice(None)) -> str:
        """16 hexadecimal digits, the same for the same paths with the same labels in any order."""
        labels = self.labels[chosen].astype(np.uint64)
        mixed = self.hashes[chosen] ^ (labels * LABELS)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        return f"{int(mixed.sum(dtype=np.uint64)):016x}"
