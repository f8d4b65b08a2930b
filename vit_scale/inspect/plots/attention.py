"""Plot attention maps, attention rollout and mean attention distance."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit_scale.inspect.plots.canvas import (
    COLOUR_MAP,
    COLOURS,
    WIDTH,
    Image,
    draw_tile,
    new_figure,
    truncate,
)

MAX_COLUMNS = 13  # tiles next to each other
MAX_TILE = 2.0  # inches of a side


def plot_attention(
    images: Sequence[Image], names: Sequence[str], columns: Sequence[str], maps, title: str
) -> Figure:
    """A row for each image: the image, then its maps [b, columns, h, w].

    Maps are multiples of uniform attention, on one colour scale up to their 99.5th percentile.
    """
    rows = len(images)
    height = 0.9 + 10.6 * rows / (len(columns) + 2)
    figure, panels = new_figure(title, rows, len(columns) + 1, height)
    top = max(float(np.percentile(maps, 99.5)), 1e-6)
    for row in range(rows):
        tiles = panels[row * (len(columns) + 1) :]
        draw_tile(tiles[0], images[row], truncate(names[row]))
        for column, name in enumerate(columns):
            drawn = draw_tile(tiles[column + 1], maps[row, column], "" if row else name,
                              cmap=COLOUR_MAP, vmin=0, vmax=top)  # fmt: skip
    bar = figure.colorbar(drawn, ax=panels, shrink=0.7, pad=0.01, aspect=40, extend="max")
    bar.set_label("attention / uniform attention", fontsize=8)
    return figure


def plot_head_overlays(
    images: Sequence[Image], names: Sequence[str], columns: Sequence[str], maps, title: str
) -> Figure:
    """A row for each image: the image, and its maps [b, columns, h, w] laid over it in grey.

    Each map has its own scale, from 0 to its maximum, which is written above it.
    """
    count = len(columns)
    tile = min(WIDTH / (count + 1.4), MAX_TILE)
    height, width = 0.5 + (tile + 0.25) * len(images), tile * (count + 1.4)
    figure, panels = new_figure(title, len(images), count + 1, height, max(width, WIDTH / 1.5))
    for row, (image, name) in enumerate(zip(images, names, strict=True)):
        tiles = panels[row * (count + 1) :]
        draw_tile(tiles[0], image, truncate(name))
        grey = image.mean(axis=-1)
        outline = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
        for axes, column, shares in zip(tiles[1:], columns, maps[row], strict=False):
            top = float(shares.max())
            draw_tile(axes, grey, f"{column}\nmax {top:.1f}", cmap="gray", vmin=0, vmax=1)
            drawn = axes.imshow(shares / max(top, 1e-6), extent=outline, alpha=0.65, vmin=0, vmax=1,
                                cmap=COLOUR_MAP, interpolation="nearest")  # fmt: skip
    bar = figure.colorbar(drawn, ax=panels, shrink=0.7, pad=0.01, aspect=40)
    bar.set_label("attention / the map's maximum", fontsize=8)
    return figure


def plot_rollouts(images: Sequence[Image], names: Sequence[str], maps, title: str) -> Figure:
    """A column for each image: the image, its map [h, w], and the image shaded by its map."""
    count = len(images)
    figure, panels = new_figure(title, 3, count, 0.7 + 3 * WIDTH / (count + 0.9))
    top = max(float(np.max(maps)), 1e-6)
    for column, (image, name) in enumerate(zip(images, names, strict=True)):
        shade = maps[column] / max(float(maps[column].max()), 1e-6)
        patch = [size // side for size, side in zip(image.shape[:2], shade.shape, strict=True)]
        draw_tile(panels[column], image, truncate(name))
        drawn = draw_tile(panels[count + column], maps[column], cmap=COLOUR_MAP, vmin=0, vmax=top)
        shade = np.kron(shade, np.ones(patch))[..., None]
        draw_tile(panels[2 * count + column], image * shade)
    for axes, name in zip(panels[::count], ("image", "rollout", "image x rollout"), strict=True):
        axes.set_ylabel(name, fontsize=8)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.7, pad=0.01, aspect=30)
    bar.set_label("share / uniform share", fontsize=8)
    return figure


def plot_distances(distances: Float[np.ndarray, "l k"], uniform: float, title: str) -> Figure:
    """A dot for each head of each block, the heads of a block side by side in ascending order."""
    figure, (axes,) = new_figure(title, 1, 1, 4.2)
    blocks = np.arange(1, len(distances) + 1)
    positions = blocks[:, None] + np.linspace(-0.2, 0.2, distances.shape[1])
    axes.plot(positions.ravel(), np.sort(distances).ravel(), "o", color=COLOURS[0],
              markersize=5, markeredgewidth=0, label="head")  # fmt: skip
    axes.plot(blocks, distances.mean(axis=1), color=COLOURS[1], label="mean over heads")
    axes.axhline(uniform, color="black", linestyle=":", label="uniform attention")
    axes.set_xlabel("block, from the input")
    axes.set_ylabel("mean attention distance, pixels")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure
