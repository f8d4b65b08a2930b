"""Writes labels.npz: what scikit-learn and torch make of drawn scores, labels and numbers.

Average precision, the highest F1, F1, R^2, errors, balanced accuracy and class weights are
scikit-learn's; the focal loss is Lin et al.'s equation 5 and its gradient torch's.

Run in an environment with scikit-learn and torch:
    python tests/golden/make_labels.py
"""

import pathlib

import numpy as np
import torch
from sklearn import metrics
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional

FILE = pathlib.Path(__file__).with_name("labels.npz")
N, C = 60, 4


def several_classes(draw: np.random.RandomState) -> dict:
    """Scores with ties in two classes, and a class that no example has."""
    logits = draw.normal(size=(N, C)).astype(np.float32)
    logits[:, 1] = np.round(logits[:, 1])
    logits[:, 2] = np.round(logits[:, 2], 1)
    present = draw.uniform(size=(N, C)) < 1 / (1 + np.exp(1 - 1.5 * logits))
    present[:, 3] = False
    average, best = [], []
    for label in range(C - 1):
        average.append(metrics.average_precision_score(present[:, label], logits[:, label]))
        precision, recall, _ = metrics.precision_recall_curve(present[:, label], logits[:, label])
        best.append(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-30)))
    marked, seen = logits >= 0.5, present.any(0)
    return {
        "several/logits": logits,
        "several/present": present,
        "several/average_precision": np.array(average),
        "several/best_f1": np.array(best),
        "several/macro_f1": metrics.f1_score(present[:, seen], marked[:, seen], average="macro"),
        "several/micro_f1": metrics.f1_score(present, marked, average="micro", zero_division=0),
    }


def focal(draw: np.random.RandomState) -> dict:
    logits = torch.tensor(3 * draw.normal(size=(6, 5)), requires_grad=True)
    labels = torch.tensor((draw.uniform(size=(6, 5)) < 0.4).astype(np.float64))
    content = {"focal/logits": logits.detach().numpy(), "focal/labels": labels.numpy()}
    for name, gamma, alpha in (("2_25", 2.0, 0.25), ("15", 1.5, None)):
        logits.grad = None
        chance = torch.sigmoid(logits)
        right = torch.where(labels > 0, chance, 1 - chance)
        weight = 1 if alpha is None else torch.where(labels > 0, alpha, 1 - alpha)
        entropy = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        losses = (weight * (1 - right) ** gamma * entropy).sum(-1)
        losses.sum().backward()
        content[f"focal/losses_{name}"] = losses.detach().numpy()
        content[f"focal/gradient_{name}"] = logits.grad.numpy()
    return content


def numbers(draw: np.random.RandomState) -> dict:
    """Two numbers an image, and one that is always the same."""
    wanted = draw.normal(size=(N, 3)).astype(np.float32) * (1, 50, 0) + (0, 1000, 7)
    predicted = wanted + draw.normal(size=(N, 3)) * (0.5, 30, 1)
    return {
        "numbers/targets": wanted,
        "numbers/predictions": predicted,
        "numbers/r2": metrics.r2_score(wanted, predicted),
        "numbers/rmse": metrics.root_mean_squared_error(wanted, predicted),
        "numbers/mae": metrics.mean_absolute_error(wanted, predicted),
    }


def weights(draw: np.random.RandomState) -> dict:
    """Effective weights are Cui et al.'s equations 2 and 4, with their normalisation."""
    counts = np.array([1, 7, 120, 5000])
    labels = np.repeat(np.arange(4), counts)
    each = (1 - 0.999) / (1 - 0.999 ** counts.astype(np.float64))
    guesses = draw.randint(0, 4, len(labels))
    return {
        "weights/counts": counts,
        "weights/balanced": compute_class_weight("balanced", classes=np.arange(4), y=labels),
        "weights/effective": each / each.sum() * 4,
        "recall/labels": labels,
        "recall/guesses": guesses,
        "recall/balanced_accuracy": metrics.balanced_accuracy_score(labels, guesses),
    }


def main() -> None:
    draw = np.random.RandomState(0)
    content: dict = {}
    for part in (several_classes, focal, numbers, weights):
        content |= part(draw)
    np.savez_compressed(FILE, **content)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
