"""Intervals of confidence for accuracies."""

from collections.abc import Sequence

import numpy as np
from scipy import special

LEVEL = 0.95


def wilson_interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval (1927) of a proportion `hits` / n; 95 % with the default z."""
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    return centre - half, centre + half


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's 95 % interval of the mean of independent `values`; None of a single one."""
    if len(values) < 2:
        return None
    half = special.stdtrit(len(values) - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1)
    mean, half = float(np.mean(values)), float(half / len(values) ** 0.5)
    return mean - half, mean + half


def scored(hits: int, n: int) -> dict:
    """Return {"accuracy": ..., "n": ..., "interval": Wilson's, of 95 %} of `hits` of n examples."""
    return {"accuracy": hits / n, "n": n, "interval": list(wilson_interval(hits, n))}
