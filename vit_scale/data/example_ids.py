"""Identify examples by their path below the split's folder, however the set is stored.

Slices are cut from the order of the paths' hashes. So whether an image is in `train[98%:]` does not
depend on whether the set is a folder or a pack of it, and hardly on the other images: adding one
moves at most one other across a bound. A sum of the hashes tells whether two sets are the same.

Never change either: a resumed run would train on images that it had held out.
"""

import functools
import hashlib

import numpy as np
from jaxtyping import Int, UInt64

LABELS = np.uint64(0x9E3779B97F4A7C15)  # odd, so that label * LABELS is injective modulo 2^64


class Examples:
    """The paths of a set's files, as bytes relative to the split's folder, and their labels."""

    def __init__(self, files: np.ndarray, labels: Int[np.ndarray, "n"]):
        self.files, self.labels = files, labels

    def __getstate__(self) -> dict:
        return {"files": self.files, "labels": self.labels}  # workers need no hashes

    @functools.cached_property
    def hashes(self) -> UInt64[np.ndarray, "n"]:
        """The first 64 bits of BLAKE2b of each path."""
        digests = (hashlib.blake2b(file, digest_size=8).digest() for file in self.files.tolist())
        return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)

    def order(self) -> Int[np.ndarray, "n"]:
        """Return the positions of the examples sorted by hash, then by path."""
        order = np.argsort(self.hashes, kind="stable")
        ranked = self.hashes[order]
        if (ranked[1:] == ranked[:-1]).any():
            return np.lexsort((self.files, self.hashes))
        return order

    def fingerprint(self, chosen: Int[np.ndarray, "m"] | slice = slice(None)) -> str:
        """Return 16 hexadecimal digits that identify the set of (path, label), in any order."""
        labels = self.labels[chosen].astype(np.uint64)
        mixed = self.hashes[chosen] ^ (labels * LABELS)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
        return f"{int(mixed.sum(dtype=np.uint64)):016x}"
