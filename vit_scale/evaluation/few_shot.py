"""Linear classifiers on a few examples of each class, over several draws of them.

The classifier is that of linear.py. Its strength is chosen by cross-validation among the drawn
examples alone: a fifth of them would be one image of each class.
"""

from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vit_scale.data.orders import permutation
from vit_scale.errors import UserError
from vit_scale.evaluation.intervals import mean_interval, wilson_interval
from vit_scale.evaluation.linear import FOLDS, Examples, choose_strength, deal

SHOTS = (5, 10)
DRAWS = 5


def check(shots: Sequence[int], draws: int) -> None:
    """Raise UserError for numbers of shots or draws that can't work."""
    if not shots or min(shots) < 2:
        raise UserError(
            f"few-shot probes of {', '.join(map(str, shots)) or 'no'} images a class: at least 2 "
            "are needed, as the strength is chosen by cross-validation"
        )
    if draws < 1:
        raise UserError(f"few-shot probes need at least 1 draw, not {draws}")


def check_counts(labels: Int[np.ndarray, "n"], classes: Sequence[str], shots: int) -> None:
    """Raise UserError where a class that has examples has fewer than `shots`."""
    present, counts = np.unique(labels, return_counts=True)
    if counts.min() < shots:
        label, count = int(present[counts.argmin()]), int(counts.min())
        raise UserError(
            f"{shots} training images a class, and {classes[label]!r} has {count}: give fewer "
            "--shots, more training images (--train), or leave few_shot out (--only)"
        )


def draw(labels: Int[np.ndarray, "n"], shots: int, seed: int, number: int) -> Int[np.ndarray, "m"]:
    """Return the indices of `shots` examples of each class, of one of several draws.

    Draws of fewer shots are parts of those of more.
    """
    chosen = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        chosen.append(own[permutation(len(own), seed, number, int(label))[:shots]])
    return np.sort(np.concatenate(chosen))


def evaluate(
    train: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, "n"],
    test: Float[np.ndarray, "m d"],
    labels: Int[np.ndarray, "m"],
    mesh: Mesh,
    shots: int,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict:
    """Fit a classifier to each of several draws, and measure them all on the same examples.

    Returns:
      {"shots": ..., "draws": ..., "n": ..., "accuracy": the mean over draws, "minimum": ...,
      "maximum": ..., "interval": Student's of that mean over draws (of one draw, Wilson's over
      examples), "accuracies": ..., "strengths": ...}.
    """
    classes = int(max(train_labels.max(), labels.max())) + 1
    hits, strengths = [], []
    for number in range(draws):
        indices = draw(train_labels, shots, seed, number)
        examples = Examples(train[indices], train_labels[indices], classes, mesh)
        folds = min(FOLDS, shots)
        strength, _ = choose_strength(
            examples, deal(train_labels[indices], seed, folds), range(folds)
        )
        fit = examples.fit(strength)
        hits.append(int((examples.predict(fit.params, test) == labels).sum()))
        strengths.append(strength)
    n, accuracies = len(labels), [count / len(labels) for count in hits]
    return {
        "shots": shots,
        "draws": draws,
        "n": n,
        "accuracy": float(np.mean(accuracies)),
        "minimum": min(accuracies),
        "maximum": max(accuracies),
        "interval": list(mean_interval(accuracies) or wilson_interval(hits[0], n)),
        "accuracies": accuracies,
        "strengths": strengths,
    }
