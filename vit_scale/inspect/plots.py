"""The pictures, drawn with matplotlib from arrays alone; none of them opens a window.

Every function returns a Figure. Colours are told apart by people who are colour-blind: Okabe and
Ito's for lines, viridis for maps. Titles, units and colour bars are in the picture, so that it can
be understood without its page.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vit_scale.inspect.curves import Curve
from vit_scale.inspect.embeddings import mosaic
from vit_scale.inspect.predictions import Calibration

# Okabe & Ito 2008, without yellow, which is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MAP = "viridis"
DOTS = 110  # per inch
WIDTH = 10.0  # inches
COLUMNS = 13  # tiles beside each other, at most

Image = Float[np.ndarray, "H W 3"]
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.0f} %")


def draw(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
    figure.set_dpi(DOTS)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def encode(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A PNG of exactly these pixels."""
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()


def _figure(
    title: str, rows: int, columns: int, height: float, width: float = WIDTH, **options
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches, and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(_plain(title), fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.ravel())


def _tile(axes: Axes, picture: np.ndarray, title: str = "", **options):
    axes.set(xticks=[], yticks=[])
    axes.set_title(_plain(title), fontsize=7.5, pad=3)
    return axes.imshow(picture, interpolation="nearest", **options)


def _shorter(name: str, length: int = 16) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"


def _plain(text: str) -> str:
    """`text` as it is: two dollars would make a formula of what is between them."""
    return text.replace("$", r"\$")


# Training


CURVES = (  # (title, what is drawn, unit of the y axis)
    ("Loss", ("train/loss", "eval/loss"), "cross-entropy, nats"),
    ("Accuracy", ("train/accuracy", "eval/accuracy"), "share of images that are right"),
    ("Learning rate", ("train/learning_rate",), "learning rate"),
    ("Gradient", ("train/gradient_norm",), "norm before clipping"),
)
WORDS = {"train": "training batches, as augmented", "eval": "evaluation"}


def curves(runs: Mapping[str, Mapping[str, Curve]], title: str) -> Figure:
    """Of one run, or of several in colours of their own: training solid, evaluation dashed."""
    figure, panels = _figure(title, 2, 2, 6.4)
    several = len(runs) > 1
    for axes, (name, drawn, unit) in zip(panels, CURVES, strict=True):
        for number, (run, found) in enumerate(runs.items()):
            for part, key in enumerate(drawn):
                if key not in found:
                    continue
                label = (
                    f"{run}, {WORDS[key.split('/')[0]]}" if several else WORDS[key.split("/")[0]]
                )
                alone = len(found[key][0]) == 1  # a line of one point is not seen
                style: dict[str, Any] = {"marker": "o", "markersize": 3} if part or alone else {}
                style["linestyle"] = "--" if part else "-"
                colour = COLOURS[(number if several else part) % len(COLOURS)]
                axes.plot(*found[key], label=label, color=colour, linewidth=1.4, **style)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
        if name == "Accuracy":
            axes.yaxis.set_major_formatter(PERCENT)
        if len(drawn) > 1 and axes.get_lines():
            axes.legend(fontsize=7)
    return figure


# Attention


def attention(
    images: Sequence[Image], names: Sequence[str], columns: Sequence[str], maps, title: str
) -> Figure:
    """A row for each image, a column for each of its maps [b, columns, h, w].

    Maps are multiples of uniform attention, in one colour scale up to their 99.5th percentile.
    """
    rows = len(images)
    figure, panels = _figure(title, rows, len(columns) + 1, 0.9 + 10.6 * rows / (len(columns) + 2))
    top = max(float(np.percentile(maps, 99.5)), 1e-6)
    for row in range(rows):
        line = panels[row * (len(columns) + 1) :]
        _tile(line[0], images[row], _shorter(names[row]))
        for column, name in enumerate(columns):
            drawn = _tile(line[column + 1], maps[row, column], "" if row else name,
                          cmap=MAP, vmin=0, vmax=top)  # fmt: skip
    bar = figure.colorbar(drawn, ax=panels, shrink=0.7, pad=0.01, aspect=40, extend="max")
    bar.set_label("attention / uniform attention", fontsize=8)
    return figure


def rollouts(images: Sequence[Image], names: Sequence[str], maps, title: str) -> Figure:
    """Below each image its map [h, w], and the image in the light of it."""
    figure, panels = _figure(title, 3, len(images), 0.7 + 3 * WIDTH / (len(images) + 0.9))
    top = max(float(np.max(maps)), 1e-6)
    for column, (image, name) in enumerate(zip(images, names, strict=True)):
        light = maps[column] / max(float(maps[column].max()), 1e-6)
        factor = [size // side for size, side in zip(image.shape[:2], light.shape, strict=True)]
        _tile(panels[column], image, _shorter(name))
        drawn = _tile(panels[len(images) + column], maps[column], cmap=MAP, vmin=0, vmax=top)
        light = np.kron(light, np.ones(factor))[..., None]
        _tile(panels[2 * len(images) + column], image * light)
    for axes, name in zip(
        panels[:: len(images)], ("image", "rollout", "image x rollout"), strict=True
    ):
        axes.set_ylabel(name, fontsize=8)
    bar = figure.colorbar(drawn, ax=panels, shrink=0.7, pad=0.01, aspect=30)
    bar.set_label("share / uniform share", fontsize=8)
    return figure


def distances(found: Float[np.ndarray, "l k"], uniform: float, title: str) -> Figure:
    """A dot for each head of each block, beside each other by distance."""
    figure, (axes,) = _figure(title, 1, 1, 4.2)
    blocks = np.arange(1, len(found) + 1)
    beside = blocks[:, None] + np.linspace(-0.2, 0.2, found.shape[1])
    axes.plot(beside.ravel(), np.sort(found).ravel(), "o", color=COLOURS[0],
              markersize=5, markeredgewidth=0, label="a head")  # fmt: skip
    axes.plot(blocks, found.mean(axis=1), color=COLOURS[1], label="mean over heads")
    axes.axhline(uniform, color="black", linestyle=":", label="uniform attention")
    axes.set_xlabel("block, from the input")
    axes.set_ylabel("mean attention distance, pixels")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


# Embeddings


def similarities(panels: Mapping[str, Float[np.ndarray, "h w h w"]], title: str) -> Figure:
    """Of each table of position embeddings a map for each patch, at the patch's place."""
    side = 5.4 if len(panels) == 1 else WIDTH / len(panels)
    figure, drawn = _figure(title, 1, len(panels), side + 0.5, side * len(panels) + 1)
    lowest = min(float(maps.min()) for maps in panels.values())
    for axes, (name, maps) in zip(drawn, panels.items(), strict=True):
        tile = maps.shape[2:]
        gap = max(1, min(tile) // 8)
        picture = axes.imshow(
            mosaic(maps, gap), cmap=MAP, vmin=lowest, vmax=1, interpolation="nearest"
        )
        axes.set_title(name, fontsize=9)
        for axis, count, side in ((axes.xaxis, maps.shape[1], tile[1]), (axes.yaxis, *tile)):
            shown = np.arange(0, count, -(-count // 8))
            axis.set_ticks(shown * (side + gap) + side / 2 - 0.5, [str(i + 1) for i in shown])
        axes.set_xlabel("column of the patch", fontsize=8)
        axes.set_ylabel("row of the patch", fontsize=8)
        axes.tick_params(labelsize=7)
    bar = figure.colorbar(picture, ax=drawn, shrink=0.8, pad=0.02)
    bar.set_label("cosine similarity", fontsize=8)
    return figure


def filters(components: np.ndarray, shares: Float[np.ndarray, "count"], title: str) -> Figure:
    """Principal components [count, p, p, 3]; grey is 0, and each has its own scale."""
    rows = -(-len(components) // 7)
    figure, panels = _figure(title, rows, 7, 0.6 + 1.58 * rows)
    for axes in panels[len(components) :]:
        axes.set_axis_off()
    for axes, component, share in zip(panels, components, shares, strict=False):
        shown = 0.5 + component / (2 * max(float(np.abs(component).max()), 1e-12))
        _tile(axes, shown, f"{100 * share:.1f} %")
    return figure


def patches(original: np.ndarray, seen: Image, grid: tuple[int, int], title: str) -> Figure:
    """An image as it is stored, as the model sees it, and cut into its patches."""
    figure, panels = _figure(title, 1, 3, 3.9)
    (height, width), (h, w) = seen.shape[:2], grid
    p, q = height // h, width // w
    cut = seen.reshape(h, p, w, q, 3).transpose(0, 2, 1, 3, 4)
    gap = max(1, min(p, q) // 5)
    padded = np.pad(cut, ((0, 0), (0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1)
    apart = padded.transpose(0, 2, 1, 3, 4).reshape(h * (p + gap), w * (q + gap), 3)
    stored = f"as stored, {original.shape[0]} x {original.shape[1]} px"
    for axes, picture, name in zip(
        panels,
        (original, seen, apart[:-gap, :-gap]),
        (
            stored,
            f"as the model sees it, {height} x {width} px",
            f"{h} x {w} patches of {p} x {q} px",
        ),
        strict=True,
    ):
        _tile(axes, picture)
        axes.set_title(name, fontsize=9)
    return figure


# Predictions


def confusion(matrix: Int[np.ndarray, "c c"], classes: Sequence[str], title: str) -> Figure:
    """Shares of each true class (row); counts in the cells where there is room for them."""
    c = len(matrix)
    figure, (axes,) = _figure(title, 1, 1, 7.6)
    sums = matrix.sum(axis=1, keepdims=True)
    shares = matrix / np.maximum(sums, 1)
    drawn = axes.imshow(shares, cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
    axes.set_xlabel("said")
    axes.set_ylabel("true")
    if c <= 50:
        names = [_plain(_shorter(name)) for name in classes]
        axes.set_xticks(range(c), names, rotation=90 if c > 12 else 45, fontsize=8,
                        ha="center" if c > 12 else "right", rotation_mode="anchor"
                        if c <= 12 else "default")  # fmt: skip
        axes.set_yticks(range(c), names, fontsize=8)
    if c <= 20:
        for i, j in np.ndindex(c, c):
            colour = "black" if shares[i, j] > 0.6 else "white"
            axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=colour, fontsize=7)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, format=PERCENT)
    bar.set_label("share of the images of the true class")
    return figure


def mistakes(images: Sequence[np.ndarray], texts: Sequence[str], title: str) -> Figure:
    columns = 6
    rows = -(-len(images) // columns)
    figure, panels = _figure(title, rows, columns, 0.5 + 1.95 * rows)
    for axes in panels[len(images) :]:
        axes.set_axis_off()
    for axes, image, text in zip(panels, images, texts, strict=False):
        _tile(axes, image, text)
    return figure


def reliability(found: Calibration, title: str) -> Figure:
    """Accuracy against confidence (Guo et al. 2017, figure 1); below, how many images were so."""
    figure, (upper, lower) = _figure(
        title, 2, 1, 6.6, sharex=True, gridspec_kw={"height_ratios": (3, 1)}
    )
    left, width = found.edges[:-1], np.diff(found.edges)
    filled = found.counts > 0
    bars: dict[str, Any] = {"align": "edge", "edgecolor": "white", "linewidth": 0.8}
    upper.bar(left[filled], found.accuracy[filled], width[filled], color=COLOURS[0],
              label="accuracy", **bars)  # fmt: skip
    upper.plot(found.confidence[filled], found.accuracy[filled], "o", color="black",
               markersize=4, label="at the mean confidence of the bin")  # fmt: skip
    upper.plot([0, 1], [0, 1], "--", color=COLOURS[1], label="perfectly calibrated")
    upper.set(ylim=(0, 1), xlim=(0, 1), ylabel="accuracy")
    upper.yaxis.set_major_formatter(PERCENT)
    upper.legend(fontsize=8, loc="upper left")
    lower.bar(left, found.counts, width, color=COLOURS[5], **bars)
    lower.set(xlabel="confidence: the highest probability", ylabel="images")
    lower.xaxis.set_major_formatter(PERCENT)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure


# Several runs


def comparison(names: Sequence[str], measures: Mapping[str, dict], title: str) -> Figure:
    """{"accuracy, %": {"values": [...], "low": ..., "high": ..., "texts": ...}, ...}: bars, a panel
    for each measure; a value may be None."""
    figure, panels = _figure(title, 1, len(measures), 1.3 + 0.5 * len(names), sharey=True)
    places = np.arange(len(names))
    for axes, (name, of) in zip(panels, measures.items(), strict=True):
        values = np.array([0 if value is None else value for value in of["values"]], float)
        errors = np.abs(np.array([of["low"], of["high"]]) - values) if "low" in of else None
        colours = [COLOURS[i % len(COLOURS)] for i in places]
        axes.barh(places, values, xerr=errors, color=colours, capsize=3, height=0.6)
        edge = values if errors is None else values + errors[1]
        for place, at, text in zip(places, edge, of["texts"], strict=True):
            axes.annotate(text, (at, place), (4, 0), textcoords="offset points", va="center",
                          fontsize=8)  # fmt: skip
        axes.set_xlim(0, 1.45 * max(float(edge.max()), 1e-9))
        axes.set_xlabel(name)
        axes.set_yticks(places, list(map(_plain, names)))
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    return figure
