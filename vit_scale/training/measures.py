"""What an evaluation makes of a split's outputs, if the targets are vectors (data.target).

The outputs of all examples are gathered on every host, because neither average precision nor R^2
is a mean over batches, and computed there in float64: the same for every batch size and number of
hosts.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from vit_scale.data.targets import CLASSES, DEFAULT_THRESHOLD, VALUE
from vit_scale.errors import UserError
from vit_scale.tracking.precision_recall import (
    average_precision,
    best_threshold,
    f1_scores,
    make_curve,
)

Outputs = Float[np.ndarray, "n t"]
Results = dict[str, Any]


class Summary(NamedTuple):
    """A function (outputs, targets, selected) -> results, and the result that is to be highest.

    `selected` are the results of the same parameters on the split that selects checkpoints; None
    while that one is evaluated.
    """

    main: str
    summarise: Callable[[Outputs, Outputs, Mapping | None], Results]


def summarise_classes(logits: Outputs, targets: Outputs, selected: Mapping | None) -> Results:
    """Return mAP, F1, the thresholds that F1 is at, and the loss, of images with several classes.

    mAP is the mean of the average precision over the classes that have a positive example. The
    thresholds, of probabilities, are `selected["thresholds"]`, which maximised each class's F1 on
    another split; while `selected` is None, those that do so on this one. Unknown ones, and those
    of classes without a positive example, are 0.5. The loss is the binary cross-entropy, a mean
    over examples and classes.
    """
    c = logits.shape[1]
    stored = (selected or {}).get("thresholds", [DEFAULT_THRESHOLD] * c)
    precisions, counts, loss = np.full(c, np.nan), np.zeros((3, c), np.int64), 0.0
    thresholds = np.array(stored, np.float64)
    for label in range(c):
        scores, present = logits[:, label].astype(np.float64), targets[:, label] > 0
        curve = make_curve(scores, present)
        precisions[label] = average_precision(curve)
        if selected is None and not np.isnan(precisions[label]):
            thresholds[label] = _probability(best_threshold(curve))
        marked = _probability(scores) >= thresholds[label]
        counts[:, label] = (marked & present).sum(), marked.sum(), present.sum()
        loss += (np.logaddexp(0, scores) - scores * present).sum()
    macro, micro = f1_scores(*counts)
    seen = ~np.isnan(precisions)
    return {
        "mAP": float(precisions[seen].mean()) if seen.any() else float("nan"),
        "macro_f1": macro,
        "micro_f1": micro,
        "loss": float(loss / logits.size),
        "thresholds": thresholds.tolist(),
    }


def _probability(logits):
    """Return the sigmoid, which rises strictly in float64 up to a logit of 36."""
    return np.exp(-np.logaddexp(0, -logits))


def summarise_numbers(made: Outputs, targets: Outputs, selected: Mapping | None) -> Results:
    """Return R^2, the root mean squared error, and the mean absolute error.

    Each is the mean over an image's numbers. R^2 of a number that is the same in all images is 1
    where it is predicted exactly, else 0, as in scikit-learn.
    """
    errors = made.astype(np.float64) - targets
    deviations = targets - targets.mean(0, dtype=np.float64)
    squares, total = np.square(errors).sum(0), np.square(deviations).sum(0)
    constant = np.where(squares == 0, 1.0, 0.0)
    r2 = np.where(total > 0, 1 - squares / np.where(total > 0, total, 1), constant)
    return {
        "r2": float(r2.mean()),
        "rmse": float(np.sqrt(squares / len(errors)).mean()),
        "mae": float(np.abs(errors).mean()),
    }


SUMMARIES = {CLASSES: Summary("mAP", summarise_classes), VALUE: Summary("r2", summarise_numbers)}


def check_memory(name: str, images: int, outputs: int) -> None:
    """Raise UserError where the outputs and targets of a split do not fit in a host's memory."""
    needed = 2 * images * outputs * 4
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory // 2:
        raise UserError(
            f"evaluating {name} gathers 2 x {images:,} images x {outputs:,} outputs x 4 bytes = "
            f"{needed / 2**30:.1f} GiB on each host, of which half of its {memory / 2**30:.1f} GiB "
            f"of memory is too little: evaluate a part of it, such as {_part(name)}"
        )


def _part(name: str) -> str:
    return f"{name.split()[-1].partition('[')[0]}[:10%]"


def select_scalars(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the results that a curve can have: not the thresholds."""
    return {name: value for name, value in results.items() if not isinstance(value, Sequence)}
