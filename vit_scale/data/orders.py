"""Permutations that depend on seeds alone, for the order of examples."""

import numpy as np
from jaxtyping import Int


def permutation(n: int, *seeds: int) -> Int[np.ndarray, "n"]:
    """Return a permutation of n that is the same on every machine and with every numpy."""
    # RandomState's stream is frozen (NEP 19).
    bits = np.random.MT19937(np.random.SeedSequence(seeds))
    return np.random.RandomState(bits).permutation(n)
