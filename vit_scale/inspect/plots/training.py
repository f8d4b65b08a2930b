"""Plot training curves, and bars that compare runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_scale.inspect.curves import Curve
from vit_scale.inspect.plots.canvas import COLOURS, PERCENT, literal, new_figure

PANELS = (  # (title, metrics, label of the y axis)
    ("Loss", ("train/loss", "eval/loss"), "cross-entropy, nats"),
    ("Accuracy", ("train/accuracy", "eval/accuracy"), "accuracy"),
    ("Learning rate", ("train/learning_rate",), "learning rate"),
    ("Gradient norm", ("train/gradient_norm",), "norm before clipping"),
)
LABELS = {"train": "training, augmented batches", "eval": "evaluation"}


def plot_curves(runs: Mapping[str, Mapping[str, Curve]], title: str) -> Figure:
    """Curves of one run, or of several in different colours: training solid, evaluation dashed."""
    figure, panels = new_figure(title, 2, 2, 6.4)
    several = len(runs) > 1
    for axes, (name, metrics, unit) in zip(panels, PANELS, strict=True):
        for number, (run, curves) in enumerate(runs.items()):
            for part, metric in enumerate(metrics):
                if metric not in curves:
                    continue
                label = LABELS[metric.split("/")[0]]
                single = len(curves[metric][0]) == 1  # a line of one point is invisible
                style: dict[str, Any] = {"marker": "o", "markersize": 3} if part or single else {}
                style["linestyle"] = "--" if part else "-"
                style["color"] = COLOURS[(number if several else part) % len(COLOURS)]
                style["label"] = f"{run}, {label}" if several else label
                axes.plot(*curves[metric], linewidth=1.4, **style)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
        if name == "Accuracy":
            axes.yaxis.set_major_formatter(PERCENT)
        if len(metrics) > 1 and axes.get_lines():
            axes.legend(fontsize=7)
    return figure


def plot_comparison(names: Sequence[str], measures: Mapping[str, dict], title: str) -> Figure:
    """Horizontal bars of several runs, with a panel for each measure.

    `measures` is {"accuracy, %": {"values": [...], "low": [...], "high": [...], "texts": [...]},
    ...}; `low` and `high`, the ends of error bars, are optional, and a value may be None.
    """
    figure, panels = new_figure(title, 1, len(measures), 1.3 + 0.5 * len(names), sharey=True)
    rows = np.arange(len(names))
    for axes, (name, measure) in zip(panels, measures.items(), strict=True):
        values = np.array([0 if value is None else value for value in measure["values"]], float)
        errors = None
        if "low" in measure:
            errors = np.abs(np.array([measure["low"], measure["high"]]) - values)
        colours = [COLOURS[i % len(COLOURS)] for i in rows]
        axes.barh(rows, values, xerr=errors, color=colours, capsize=3, height=0.6)
        ends = values if errors is None else values + errors[1]
        for row, end, text in zip(rows, ends, measure["texts"], strict=True):
            axes.annotate(text, (end, row), (4, 0), textcoords="offset points", va="center",
                          fontsize=8)  # fmt: skip
        axes.set_xlim(0, 1.45 * max(float(ends.max()), 1e-9))
        axes.set_xlabel(name)
        axes.set_yticks(rows, list(map(literal, names)))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return figure
