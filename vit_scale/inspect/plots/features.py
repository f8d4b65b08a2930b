"""Plot a map of features, nearest neighbours, and a masked autoencoder's reconstructions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage

from vit_scale.inspect.plots.canvas import (
    COLOURS,
    WIDTH,
    Image,
    draw_tile,
    literal,
    new_figure,
    truncate,
)

MARKERS = (("o", "-"), ("^", "--"))  # of classes' dots, and of the frames of their images
MAX_CLASSES = len(COLOURS) * len(MARKERS)  # that can be told apart by colour and marker
THUMBNAIL = 26  # points, 1/72 inch
REST = "#C4C4C4"


def plot_map(
    points: Float[np.ndarray, "n 2"],
    labels: Int[np.ndarray, "n"] | None,
    classes: Sequence[str],
    thumbnails: Sequence[tuple[int, np.ndarray]],
    axis_names: tuple[str, str],
    title: str,
) -> Figure:
    """A dot for each image, and some images (index, pixels) at their dots.

    Args:
      points: coordinates.
      labels: of each image; None: dots of one colour, and no legend.
      classes: names by label; one that is "" is not told apart from others of that name.
      thumbnails: the images to draw.
      axis_names: of both axes.
      title: of the figure.
    """
    figure, (axes,) = new_figure(title, 1, 1, 7.2)
    style: dict[str, Any] = {"s": 9, "linewidths": 0, "alpha": 0.75}
    frames = np.full(len(points), COLOURS[0], object)
    lines = np.full(len(points), "-", object)
    if labels is None:
        axes.scatter(*points.T, color=COLOURS[0], **style)
    else:
        named = [label for label, name in enumerate(classes) if name]
        rest = ~np.isin(labels, named)
        frames[rest] = REST
        axes.scatter(*points[rest].T, color=REST, **style)
        for number, label in enumerate(named):
            colour = COLOURS[number % len(COLOURS)]
            marker, line = MARKERS[number // len(COLOURS) % len(MARKERS)]
            own = labels == label
            frames[own], lines[own] = colour, line
            text = f"{truncate(classes[label])} ({own.sum():,})"
            axes.scatter(*points[own].T, color=colour, marker=marker, label=literal(text), **style)
        axes.legend(fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5),
                    title="class (images)", title_fontsize=8)  # fmt: skip
    for index, image in thumbnails:
        box = OffsetImage(image, zoom=THUMBNAIL / image.shape[0], interpolation="nearest")
        frame = {"edgecolor": frames[index], "linestyle": lines[index], "linewidth": 1.5}
        axes.add_artist(AnnotationBbox(box, points[index], pad=0.05, bboxprops=frame))
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
    axes.margins(0.06)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure


def plot_neighbours(
    queries: Sequence[np.ndarray],
    query_names: Sequence[str],
    neighbours: Sequence[Sequence[np.ndarray]],
    texts: Sequence[Sequence[str]],
    equal: np.ndarray | None,
    title: str,
) -> Figure:
    """A row for each query: the query, then its neighbours with their texts below them.

    `equal` [b, k] tells whose label is the query's: a solid frame; the others' is dashed. None:
    there are no labels, and no frames.
    """
    rows, columns = len(queries), 1 + len(neighbours[0])
    figure, panels = new_figure(title, rows, columns, 0.6 + rows * (WIDTH / columns + 0.12))
    for row in range(rows):
        tiles = panels[row * columns :]
        draw_tile(tiles[0], queries[row], "" if row else "query")
        tiles[0].set_xlabel(literal(truncate(query_names[row])), fontsize=7.5)
        for k, (image, text) in enumerate(zip(neighbours[row], texts[row], strict=True)):
            draw_tile(tiles[k + 1], image, "" if row else f"neighbour {k + 1}")
            tiles[k + 1].set_xlabel(literal(text), fontsize=7.5, labelpad=2)
            if equal is not None:
                _frame(tiles[k + 1], bool(equal[row, k]))
    return figure


def _frame(axes: Axes, equal: bool) -> None:
    for spine in axes.spines.values():
        spine.set(color=COLOURS[2] if equal else COLOURS[1], linewidth=2.5)
        spine.set_linestyle("-" if equal else (0, (2, 1.5)))


def plot_reconstructions(
    rows: Mapping[str, Sequence[Image]], names: Sequence[str], texts: Sequence[str], title: str
) -> Figure:
    """A column for each image: its pictures by the name of their row, and its text below them."""
    count = len(names)
    figure, panels = new_figure(title, len(rows), count, 0.9 + len(rows) * WIDTH / (count + 0.4))
    for row, (row_name, images) in enumerate(rows.items()):
        tiles = panels[row * count : (row + 1) * count]
        for axes, image, name in zip(tiles, images, names, strict=True):
            draw_tile(axes, image, "" if row else truncate(name))
        tiles[0].set_ylabel(row_name, fontsize=8)
    for axes, text in zip(panels[-count:], texts, strict=True):
        axes.set_xlabel(text, fontsize=7.5)
    return figure
