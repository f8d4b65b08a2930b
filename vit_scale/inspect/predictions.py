"""What a model says of labelled images: confusion, its worst mistakes, and its calibration."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

BINS = 15  # as Guo et al. 2017


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The probabilities of n labelled images of `source`, and where in it each one is."""

    probabilities: Float[np.ndarray, "n c"]
    labels: Int[np.ndarray, "n"]
    positions: Int[np.ndarray, "n"]
    source: str  # the split's name, for people

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def said(self) -> Int[np.ndarray, "n"]:
        return self.probabilities.argmax(-1)

    @property
    def right(self) -> np.ndarray:
        return self.said == self.labels

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def losses(self) -> Float[np.ndarray, "n"]:
        """Cross-entropy of each image; a probability of 0 counts as the smallest float32."""
        of_label = self.probabilities[np.arange(self.n), self.labels]
        return -np.log(np.maximum(of_label, np.finfo(np.float32).tiny))


def confusion(labels: Int[np.ndarray, "n"], said: Int[np.ndarray, "n"], classes: int) -> np.ndarray:
    """int [c, c]: how many images of a class (row) were said to be of a class (column)."""
    return np.bincount(labels * classes + said, minlength=classes**2).reshape(classes, classes)


def confused(matrix: Int[np.ndarray, "c c"], count: int) -> list[tuple[int, int, int]]:
    """(class, what it was taken for, how often): the confusions, most frequent first."""
    off = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    order = np.argsort(-off, axis=None, kind="stable")[:count]
    pairs = [(int(i // len(off)), int(i % len(off))) for i in order]
    return [(i, j, int(off[i, j])) for i, j in pairs if off[i, j]]


def worst(predictions: Predictions, count: int) -> Int[np.ndarray, "k"]:
    """Which of the wrong predictions have the highest loss, the highest first."""
    wrong = np.flatnonzero(~predictions.right)
    return wrong[np.argsort(-predictions.losses[wrong], kind="stable")[:count]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Of each bin of confidence: how many images, how sure the model was, how often right.

    `ece` is the expected calibration error (Guo et al. 2017): the mean over n images of the
    difference between the two in the image's bin. Means of empty bins are nan.
    """

    edges: Float[np.ndarray, "bins+1"]
    counts: Int[np.ndarray, "bins"]
    confidence: Float[np.ndarray, "bins"]
    accuracy: Float[np.ndarray, "bins"]
    ece: float
    n: int


def calibration(
    probabilities: Float[np.ndarray, "n c"], labels: Int[np.ndarray, "n"], bins: int = BINS
) -> Calibration:
    """Confidence is the highest probability; bins are equally wide, (0, 1/bins], ..., up to 1."""
    sure, right = probabilities.max(-1), probabilities.argmax(-1) == labels
    edges = np.linspace(0, 1, bins + 1, dtype=np.float32)
    place = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, weights=sure, minlength=bins) / counts
        accuracy = np.bincount(place, weights=right, minlength=bins) / counts
    gaps = np.nan_to_num(np.abs(accuracy - confidence))
    ece = float((counts * gaps).sum() / len(labels))
    return Calibration(edges, counts, confidence, accuracy, ece, len(labels))


def interval(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share of which `hits` of n were seen."""
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / n + spread / (4 * n)) ** 0.5
    return centre - half, centre + half
