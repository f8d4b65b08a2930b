"""Statistics of predictions on labelled images: confusion, worst mistakes, calibration."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

BINS = 15  # as Guo et al. 2017


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Class probabilities of n labelled images.

    Args:
      probabilities: of each class.
      labels: the true class of each image.
      positions: the index of each image in its split.
      source: the name of the split.
    """

    probabilities: Float[np.ndarray, "n c"]
    labels: Int[np.ndarray, "n"]
    positions: Int[np.ndarray, "n"]
    source: str

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def predicted(self) -> Int[np.ndarray, "n"]:
        return self.probabilities.argmax(-1)

    @property
    def correct(self) -> np.ndarray:
        return self.predicted == self.labels

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def losses(self) -> Float[np.ndarray, "n"]:
        """Cross-entropy of each image; probabilities are at least the smallest float32."""
        of_label = self.probabilities[np.arange(self.n), self.labels]
        return -np.log(np.maximum(of_label, np.finfo(np.float32).tiny))


def confusion(
    labels: Int[np.ndarray, "n"], predicted: Int[np.ndarray, "n"], classes: int
) -> Int[np.ndarray, "c c"]:
    """The confusion matrix: images of each true class (row) by predicted class (column)."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def most_confused(matrix: Int[np.ndarray, "c c"], count: int) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of at most `count` confusions, most frequent first."""
    off_diagonal = np.where(np.eye(len(matrix), dtype=bool), 0, matrix)
    order = np.argsort(-off_diagonal, axis=None, kind="stable")[:count]
    pairs = [(int(i // len(matrix)), int(i % len(matrix))) for i in order]
    return [(i, j, int(off_diagonal[i, j])) for i, j in pairs if off_diagonal[i, j]]


def worst(predictions: Predictions, count: int) -> Int[np.ndarray, "k"]:
    """Indices of the wrong predictions with the highest loss, in descending order."""
    wrong = np.flatnonzero(~predictions.correct)
    return wrong[np.argsort(-predictions.losses[wrong], kind="stable")[:count]]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A reliability diagram: image count, mean confidence and accuracy in bins of confidence.

    `ece` is the expected calibration error (Guo et al. 2017): |accuracy - confidence| of each bin,
    weighted by its share of the n images. Means of empty bins are nan.
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
    """Bin images by confidence, the highest probability, in (0, 1/bins], ..., (1 - 1/bins, 1]."""
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == labels
    edges = np.linspace(0, 1, bins + 1, dtype=np.float32)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bin_of, weights=confidence, minlength=bins) / counts
        accuracy = np.bincount(bin_of, weights=correct, minlength=bins) / counts
    gaps = np.nan_to_num(np.abs(accuracy - mean_confidence))
    ece = float((counts * gaps).sum() / len(labels))
    return Calibration(edges, counts, mean_confidence, accuracy, ece, len(labels))
