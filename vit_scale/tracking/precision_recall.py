"""Measures of several classes an image, from the scores of a whole split, on the host.

Everything is in float64 and counts, and of the order of scores alone: results do not depend on how
examples were batched.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int


class Curve(NamedTuple):
    """True and false positives of one class, if the examples from each score up are marked."""

    scores: Float[np.ndarray, "m"]  # each that occurs, in descending order
    true: Int[np.ndarray, "m"]
    false: Int[np.ndarray, "m"]


def make_curve(scores: Float[np.ndarray, "n"], present: Bool[np.ndarray, "n"]) -> Curve:
    """Return the curve of a class; examples of equal scores are marked together."""
    order = np.argsort(-scores, kind="stable")
    ranked, true = scores[order], np.cumsum(present[order], dtype=np.int64)
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], len(ranked) > 0))
    return Curve(ranked[last], true[last], last + 1 - true[last])


def average_precision(curve: Curve) -> float:
    """Return the mean of the precision at each positive example; nan without any.

    The sum over scores of (recall - the recall before) * precision, without interpolation.
    """
    positives = curve.true[-1] if len(curve.true) else 0
    if not positives:
        return float("nan")
    precision = curve.true / (curve.true + curve.false)
    return float((np.diff(curve.true, prepend=0) * precision).sum() / positives)


def best_threshold(curve: Curve) -> float:
    """Return a score from which up marking examples has the highest F1.

    Half-way to the next lower score, -inf where marking every example is best; of several best
    ones the highest. nan without a positive example.
    """
    positives = curve.true[-1] if len(curve.true) else 0
    if not positives:
        return float("nan")
    best = int(np.argmax(2 * curve.true / (curve.true + curve.false + positives)))
    lower = curve.scores[best + 1] if best + 1 < len(curve.scores) else -np.inf
    return float((curve.scores[best] + lower) / 2)


def f1_scores(
    true: Int[np.ndarray, "c"], marked: Int[np.ndarray, "c"], present: Int[np.ndarray, "c"]
) -> tuple[float, float]:
    """Return macro and micro F1 from the counts of each class.

    Macro F1 is the mean over the classes with a positive example; micro F1 that of all decisions.
    """
    seen = present > 0
    if not seen.any():
        return float("nan"), float("nan")
    per_class = 2 * true[seen] / (marked[seen] + present[seen])
    return float(per_class.mean()), float(2 * true.sum() / (marked.sum() + present.sum()))
