"""Plot training curves, and bars that compare runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from ml_collections import ConfigDict

from vit_scale.data.targets import CLASS
from vit_scale.inspect.curves import Curve
from vit_scale.inspect.plots.canvas import COLOURS, PERCENT, literal, new_figure


class Panel(NamedTuple):
    """The metrics of one pair of axes, and the label of its y axis."""

    title: str
    metrics: tuple[str, ...]
    unit: str


LOSS, ACCURACY = ("train/loss", "eval/loss"), ("train/accuracy", "eval/accuracy")
OF_VECTORS = (  # by data.target, drawn where a run has them
    Panel("Mean average precision", ("eval/mAP",), "mAP"),
    Panel("Regression", ("eval/r2",), "R2"),
)
RATE = Panel("Learning rate", ("train/learning_rate",), "learning rate")
NORM = Panel("Gradient norm", ("train/gradient_norm",), "norm before clipping")
NATS = "cross-entropy, nats"
LOSS_UNITS = {  # by objective; of the others the loss, and then how it is evaluated
    "mae": "mean squared error",
    "lejepa": "weighted sum of both terms",
    "dino": NATS,
}
TERMS = (  # of the losses without labels, each drawn where a run has it
    Panel("DINO: pooled features", ("train/dino",), "cross-entropy, nats"),
    Panel("iBOT: hidden patches", ("train/ibot",), "cross-entropy, nats"),
    Panel("KoLeo: spread of features", ("train/koleo",), "-log distance, sum over crops"),
    Panel("LeJEPA: disagreement of crops", ("train/disagreement",), "mean squared distance"),
    Panel("LeJEPA: distance from a Gaussian", ("train/normality",), "SIGReg statistic"),
)
LABELS = {"train": "training, augmented batches", "eval": "evaluation"}


def loss_unit(cfg: ConfigDict) -> str:
    """Return what a run's loss is: its training's, and its evaluation's where that differs."""
    if cfg.objective in LOSS_UNITS:
        return LOSS_UNITS[cfg.objective]
    if cfg.loss == "softmax":
        return NATS
    evaluated = f"; evaluation: {NATS}" if cfg.data.target == CLASS else ""
    return f"loss={cfg.loss}{evaluated}"


def choose_panels(curves: Sequence[Mapping[str, Curve]], cfgs: Sequence[ConfigDict]) -> list[Panel]:
    """The panels of some runs: measures and the terms of losses only where one run has them."""
    units = set(map(loss_unit, cfgs))
    unit = units.pop() if len(units) == 1 else "each run's own unit"
    recorded = set().union(*curves)
    accuracy = [Panel("Accuracy", ACCURACY, "accuracy")]
    return [
        Panel("Loss", LOSS, unit),
        *(panel for panel in (*accuracy, *OF_VECTORS) if recorded & set(panel.metrics)),
        RATE,
        NORM,
        *(panel for panel in TERMS if recorded & set(panel.metrics)),
    ]


def plot_curves(
    runs: Mapping[str, Mapping[str, Curve]], title: str, cfgs: Sequence[ConfigDict]
) -> Figure:
    """Curves of one run, or of several in different colours: training solid, evaluation dashed.

    `cfgs` are the runs' configs.
    """
    chosen = choose_panels(list(runs.values()), cfgs)
    rows = -(-len(chosen) // 2)
    figure, panels = new_figure(title, rows, 2, 3.2 * rows)
    several = len(runs) > 1
    for axes in panels[len(chosen) :]:
        axes.set_axis_off()
    for axes, (name, metrics, unit) in zip(panels, chosen, strict=False):
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
        if unit in ("accuracy", "mAP"):
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
