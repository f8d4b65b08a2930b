"""What all figures share: size, colours, image tiles, and rasterization to PNG."""

import io

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter

# Okabe & Ito 2008, without yellow, which is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOUR_MAP = "viridis"
DPI = 110
WIDTH = 10.0  # inches

Image = Float[np.ndarray, "H W 3"]
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.0f} %")


def rasterize(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
    """Render a figure to pixels."""
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def encode_png(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode pixels as a PNG, losslessly."""
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()


def new_figure(
    title: str, rows: int, columns: int, height: float, width: float = WIDTH, **options
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches, and its axes in row-major order."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(literal(title), fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def draw_tile(axes: Axes, image: np.ndarray, title: str = "", **options):
    """Show an image without axis ticks."""
    axes.set(xticks=[], yticks=[])
    axes.set_title(literal(title), fontsize=7.5, pad=3)
    return axes.imshow(image, interpolation="nearest", **options)


def truncate(name: str, length: int = 16) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def literal(text: str) -> str:
    """Escape dollar signs, between which matplotlib would set a formula."""
    return text.replace("$", r"\$")
