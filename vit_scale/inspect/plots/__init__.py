"""Draw the report's figures with matplotlib, from arrays alone; no window is opened.

Every `plot_*` function returns a Figure with its own title, units and colour bars, so that it can
be understood without its page. Colours suit colour-blind readers: Okabe and Ito's for lines,
viridis for maps.
"""

from vit_scale.inspect.plots.attention import (
    MAX_COLUMNS,
    plot_attention,
    plot_distances,
    plot_head_overlays,
    plot_rollouts,
)
from vit_scale.inspect.plots.canvas import encode_png, rasterize
from vit_scale.inspect.plots.embeddings import plot_filters, plot_patches, plot_similarities
from vit_scale.inspect.plots.features import (
    MAX_CLASSES,
    plot_map,
    plot_neighbours,
    plot_reconstructions,
)
from vit_scale.inspect.plots.predictions import plot_confusion, plot_mistakes, plot_reliability
from vit_scale.inspect.plots.training import plot_comparison, plot_curves

__all__ = [
    "MAX_CLASSES",
    "MAX_COLUMNS",
    "encode_png",
    "plot_attention",
    "plot_comparison",
    "plot_confusion",
    "plot_curves",
    "plot_distances",
    "plot_filters",
    "plot_head_overlays",
    "plot_map",
    "plot_mistakes",
    "plot_neighbours",
    "plot_patches",
    "plot_reconstructions",
    "plot_reliability",
    "plot_rollouts",
    "plot_similarities",
    "rasterize",
]
