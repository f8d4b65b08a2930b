"""Build the report's figures of a run's predictions: confusion, worst mistakes, calibration.

Every figure's title names the run, the checkpoint's step and the number of images.
"""

from collections.abc import Sequence

import numpy as np

from vit_scale.data import Source
from vit_scale.errors import printable
from vit_scale.evaluation.intervals import wilson_interval
from vit_scale.inspect import plots, predictions
from vit_scale.inspect.html import Note, Part, Picture, Table
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.predictions import Predictions

WORST = 24  # mistakes shown
CONFUSED = 10  # pairs of classes listed


def show_mistakes(run: InspectedRun, result: Predictions, source: Source) -> list[Part]:
    """The confusion matrix, the most frequent confusions, and the worst mistakes."""
    classes = tuple(map(printable, run.classes))
    suffix = run.title_suffix(result.n, f"images of {result.source}")
    matrix = predictions.confusion(result.labels, result.predicted, len(classes))
    low, high = wilson_interval(int(result.correct.sum()), result.n)
    caption = (
        f"Accuracy {100 * result.accuracy:.2f} % (95 % interval {100 * low:.2f} to "
        f"{100 * high:.2f} %), cross-entropy {result.losses.mean():.4f}, n = {result.n:,}."
    )
    figure = plots.plot_confusion(matrix, classes, f"Confusion matrix: {suffix}")
    parts: list[Part] = [Picture("confusion", "Confusion matrix", caption, figure)]
    pairs = predictions.most_confused(matrix, CONFUSED)
    if not pairs:
        return [
            *parts,
            Note("Worst mistakes", f"None: all {result.n:,} images are correct."),
        ]
    rows = [_pair(classes, matrix, *pair) for pair in pairs]
    parts.append(Table(f"Most frequent confusions: {suffix}", rows))
    chosen = predictions.worst(result, WORST)
    images = source.read(result.positions[chosen])["image"]
    texts = [_mistake(classes, result, i) for i in chosen]
    wrong = result.n - int(result.correct.sum())
    figure = plots.plot_mistakes(list(images), texts, f"Worst mistakes: {suffix}")
    caption = (
        f"The {len(chosen)} misclassified images with the highest loss, of {wrong:,} (n = "
        f"{result.n:,}): the model gave their true class the lowest probability."
    )
    return [*parts, Picture("mistakes", "Worst mistakes", caption, figure)]


def _pair(
    classes: Sequence[str], matrix: np.ndarray, true: int, predicted: int, images: int
) -> dict[str, str]:
    n = int(matrix[true].sum())
    return {
        "true class": classes[true],
        "predicted class": classes[predicted],
        "images": f"{images:,}",
        "share of the true class": f"{100 * images / n:.1f} % of n = {n:,}",
    }


def _mistake(classes: Sequence[str], result: Predictions, i: int) -> str:
    lines = (("pred.", result.predicted[i]), ("true", result.labels[i]))
    return "\n".join(
        f"{word} {classes[c][:14]} {100 * result.probabilities[i, c]:.3g} %" for word, c in lines
    )


def show_calibration(run: InspectedRun, result: Predictions) -> list[Part]:
    """The reliability diagram and the expected calibration error."""
    measured = predictions.calibration(result.probabilities, result.labels)
    confidence = float(result.probabilities.max(-1).mean())
    suffix = run.title_suffix(result.n, f"images of {result.source}")
    title = f"Calibration: ECE {100 * measured.ece:.2f} %: {suffix}"
    direction = "overconfident" if confidence > result.accuracy else "underconfident"
    caption = (
        f"Expected calibration error {100 * measured.ece:.2f} % ({predictions.BINS} bins of equal "
        f"width, n = {measured.n:,}; Guo et al. 2017). Mean confidence is {100 * confidence:.2f} % "
        f"and accuracy {100 * result.accuracy:.2f} %: the model is {direction} by "
        f"{100 * abs(confidence - result.accuracy):.2f} points."
    )
    figure = plots.plot_reliability(measured, title)
    return [Picture("calibration", "Calibration", caption, figure)]
