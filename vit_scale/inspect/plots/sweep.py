"""Plot a sweep: the result of each run over its steps, and by the value of each field."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_scale.inspect.curves import Curve
from vit_scale.inspect.plots.canvas import COLOUR_MAP, PERCENT, literal, new_figure, truncate

NAMED = 8  # runs that the legend names, the best first
WIDE = 10.0  # a field whose values span this factor gets a logarithmic axis


def plot_sweep(
    curves: Sequence[Curve],
    names: Sequence[str],
    points: Sequence[Mapping[str, str]],
    results: Sequence[float | None],
    measure: str,
    percent: bool,
    title: str,
) -> Figure:
    """Plot runs, the best first: curves of `measure`, then `results` by field, a panel each."""
    fields = list(points[0])
    rows = -(-(1 + len(fields)) // 2)
    figure, panels = new_figure(title, rows, 2, 3.2 * rows)
    colours = matplotlib.colormaps[COLOUR_MAP](np.linspace(0.0, 0.9, len(names)))[::-1]
    for rank, (curve, name) in enumerate(zip(curves, names, strict=True)):
        label = literal(truncate(name, 48)) if rank < NAMED else None
        panels[0].plot(*curve, "o-", markersize=3, linewidth=1.4, color=colours[rank], label=label)
    panels[0].set(xlabel="step", ylabel=measure)
    panels[0].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if any(len(curve[0]) for curve in curves):
        panels[0].legend(fontsize=6)
    for axes, field in zip(panels[1:], fields, strict=False):
        plot_field(axes, field, [point[field] for point in points], results, colours)
        axes.set_ylabel(measure)
    for axes in panels[: 1 + len(fields)]:
        axes.grid(alpha=0.3)
        if percent:
            axes.yaxis.set_major_formatter(PERCENT)
    for axes in panels[1 + len(fields) :]:
        axes.set_axis_off()
    return figure


def plot_field(
    axes: Axes,
    field: str,
    values: Sequence[str],
    results: Sequence[float | None],
    colours: np.ndarray,
) -> None:
    """Plot results by the values of a field: numbers on a scale, others in their order."""
    try:
        positions = [float(value) for value in values]
        if min(positions) > 0 and max(positions) / min(positions) >= WIDE:
            axes.set_xscale("log")
    except ValueError:
        order = list(dict.fromkeys(sorted(values)))
        positions = [order.index(value) for value in values]
        axes.set_xticks(range(len(order)), [literal(truncate(value)) for value in order])
    known = [i for i, result in enumerate(results) if result is not None]
    heights = [result for result in results if result is not None]
    axes.scatter([positions[i] for i in known], heights, c=colours[known])
    axes.set_xlabel(literal(field))
