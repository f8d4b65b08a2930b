"""Plot the confusion matrix, misclassified images and the reliability diagram."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from vit_scale.inspect.plots.canvas import (
    COLOUR_MAP,
    COLOURS,
    PERCENT,
    draw_tile,
    literal,
    new_figure,
    truncate,
)
from vit_scale.inspect.predictions import Calibration

MISTAKE_COLUMNS = 6
MAX_COUNTS, MAX_NAMES = 20, 50  # classes for whose counts, or names, a confusion matrix has room


def plot_confusion(matrix: Int[np.ndarray, "c c"], classes: Sequence[str], title: str) -> Figure:
    """Confusion matrix: colours are shares of the true class (row), numbers are images."""
    c = len(matrix)
    figure, (axes,) = new_figure(title, 1, 1, 7.6)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    drawn = axes.imshow(shares, cmap=COLOUR_MAP, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if c <= MAX_NAMES:
        names = [literal(truncate(name)) for name in classes]
        slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(c), names, fontsize=8, **({"rotation": 90} if c > 12 else slanted))
        axes.set_yticks(range(c), names, fontsize=8)
    if c <= MAX_COUNTS:
        for i, j in np.ndindex(c, c):
            colour = "black" if shares[i, j] > 0.6 else "white"
            axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=colour, fontsize=7)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, format=PERCENT)
    bar.set_label("share of the true class")
    return figure


def plot_mistakes(images: Sequence[np.ndarray], texts: Sequence[str], title: str) -> Figure:
    """Tiles of images, each with its text above it."""
    rows = -(-len(images) // MISTAKE_COLUMNS)
    figure, panels = new_figure(title, rows, MISTAKE_COLUMNS, 0.5 + 1.95 * rows)
    for axes in panels[len(images) :]:
        axes.set_axis_off()
    for axes, image, text in zip(panels, images, texts, strict=False):
        draw_tile(axes, image, text)
    return figure


def plot_reliability(calibration: Calibration, title: str) -> Figure:
    """Accuracy by confidence (Guo et al. 2017, figure 1), above the number of images per bin."""
    figure, (upper, lower) = new_figure(
        title, 2, 1, 6.6, sharex=True, gridspec_kw={"height_ratios": (3, 1)}
    )
    left, width = calibration.edges[:-1], np.diff(calibration.edges)
    filled = calibration.counts > 0
    accuracy = calibration.accuracy[filled]
    bars: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    upper.bar(left[filled], accuracy, width[filled], color=COLOURS[0], label="accuracy", **bars)
    upper.plot(calibration.confidence[filled], accuracy, "o", color="black",
               markersize=4, label="mean confidence of the bin")  # fmt: skip
    upper.plot([0, 1], [0, 1], "--", color=COLOURS[1], label="perfect calibration")
    upper.set(ylim=(0, 1), xlim=(0, 1), ylabel="accuracy")
    upper.yaxis.set_major_formatter(PERCENT)
    upper.legend(fontsize=8, loc="upper left")
    lower.bar(left, calibration.counts, width, color=COLOURS[5], **bars)
    lower.set(xlabel="confidence (highest probability)", ylabel="images")
    lower.xaxis.set_major_formatter(PERCENT)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure
