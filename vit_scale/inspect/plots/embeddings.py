"""Plot position embeddings, patch filters, and an image cut into patches."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from vit_scale.inspect.embeddings import mosaic
from vit_scale.inspect.plots.canvas import COLOUR_MAP, WIDTH, Image, draw_tile, new_figure

FILTER_COLUMNS = 7


def plot_similarities(panels: Mapping[str, Float[np.ndarray, "h w h w"]], title: str) -> Figure:
    """A panel for each table of position embeddings: a map for each patch, at its grid position."""
    side = 5.4 if len(panels) == 1 else WIDTH / len(panels)
    figure, all_axes = new_figure(title, 1, len(panels), side + 0.5, side * len(panels) + 1)
    lowest = min(float(maps.min()) for maps in panels.values())
    for axes, (name, maps) in zip(all_axes, panels.items(), strict=True):
        tile = maps.shape[2:]
        gap = max(1, min(tile) // 8)
        drawn = axes.imshow(
            mosaic(maps, gap), cmap=COLOUR_MAP, vmin=lowest, vmax=1, interpolation="nearest"
        )
        axes.set_title(name, fontsize=9)
        for axis, count, side in ((axes.xaxis, maps.shape[1], tile[1]), (axes.yaxis, *tile)):
            ticks = np.arange(0, count, -(-count // 8))
            axis.set_ticks(ticks * (side + gap) + side / 2 - 0.5, [str(i + 1) for i in ticks])
        axes.set_xlabel("column of the patch", fontsize=8)
        axes.set_ylabel("row of the patch", fontsize=8)
        axes.tick_params(labelsize=7)
    bar = figure.colorbar(drawn, ax=all_axes, shrink=0.8, pad=0.02)
    bar.set_label("cosine similarity", fontsize=8)
    return figure


def plot_filters(components: np.ndarray, shares: Float[np.ndarray, "count"], title: str) -> Figure:
    """Principal components [count, p, p, 3], each on its own scale, with grey for 0."""
    rows = -(-len(components) // FILTER_COLUMNS)
    figure, panels = new_figure(title, rows, FILTER_COLUMNS, 0.6 + 1.58 * rows)
    for axes in panels[len(components) :]:
        axes.set_axis_off()
    for axes, component, share in zip(panels, components, shares, strict=False):
        image = 0.5 + component / (2 * max(float(np.abs(component).max()), 1e-12))
        draw_tile(axes, image, f"{100 * share:.1f} %")
    return figure


def plot_patches(stored: np.ndarray, image: Image, grid: tuple[int, int], title: str) -> Figure:
    """An image as it is stored, as the model's input, and cut into patches."""
    figure, panels = new_figure(title, 1, 3, 3.9)
    (height, width), (h, w) = image.shape[:2], grid
    p, q = height // h, width // w
    tiles = image.reshape(h, p, w, q, 3).transpose(0, 2, 1, 3, 4)
    gap = max(1, min(p, q) // 5)
    padded = np.pad(tiles, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1)
    cut = padded.transpose(0, 2, 1, 3, 4).reshape(h * (p + gap), w * (q + gap), 3)
    pictures = {
        f"as stored, {stored.shape[0]} x {stored.shape[1]} px": stored,
        f"model input, {height} x {width} px": image,
        f"{h} x {w} patches of {p} x {q} px": cut[:-gap, :-gap],
    }
    for axes, (name, picture) in zip(panels, pictures.items(), strict=True):
        draw_tile(axes, picture)
        axes.set_title(name, fontsize=9)
    return figure
