"""Build the report's figures of a run's features, and of a masked autoencoder's reconstructions.

Every figure's title names the run, the checkpoint's step and the number of images.
"""

from typing import NamedTuple

import numpy as np

from vit_scale.data import Source
from vit_scale.errors import UserError, printable
from vit_scale.inspect import features, plots
from vit_scale.inspect.features import ImageFeatures, Neighbours, Projection
from vit_scale.inspect.html import Note, Part, Picture
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.reconstruction import reconstruct_images
from vit_scale.inspect.samples import Samples, evenly_spaced, varied

QUERIES, NEIGHBOURS = 8, 6  # images whose neighbours are shown, and how many
THUMBNAILS = 28  # images drawn on the map
MARKS = {True: "✓", False: "✗"}  # of a neighbour of the query's class, and of another


class Nearest(NamedTuple):
    """The share of n images of a split whose nearest other image has their label."""

    share: float
    n: int
    source: str


def show_features(
    run: InspectedRun, source: Source | None, split: str
) -> tuple[list[Part], Nearest | None]:
    """The map of features and nearest neighbours, and how often the nearest has the same label."""
    missing = f"split {split} can't be opened; set --split"
    if source is not None:
        try:
            result = features.compute_features(run, source, split)
        except UserError as error:
            missing = str(error)
        else:
            return _feature_parts(run, result)
    return [Note("Features", f"Not available: {missing}.")], None


def _feature_parts(run: InspectedRun, result: ImageFeatures) -> tuple[list[Part], Nearest | None]:
    if result.n <= 2:
        text = f"Not available: {result.source.name} has too few images, {result.n}."
        return [Note("Features", text)], None
    neighbours = features.find_neighbours(result.values, NEIGHBOURS)
    nearest = None
    if result.labels is not None:
        nearest = Nearest(neighbours.agreement(result.labels, 1), result.n, result.source.name)
    return [_map(run, result), _neighbours(run, result, neighbours)], nearest


def _map(run: InspectedRun, result: ImageFeatures) -> Picture:
    projection = features.project(result.values)
    chosen = features.spread(projection.points, THUMBNAILS)
    thumbnails = list(zip(chosen, result.images(chosen), strict=True))
    classes = tuple(map(printable, result.source.classes))
    told_apart = set(evenly_spaced(range(len(classes)), plots.MAX_CLASSES))
    names = [name if i in told_apart else "" for i, name in enumerate(classes)]
    axis_names, how = _describe(projection)
    caption = (
        f"A dot for each of n = {result.n:,} images: {result.values.shape[1]} pooled features, in "
        f"two dimensions by {how}. {len(chosen)} images, far from each other, are drawn at their "
        "dots."
    )
    rest = len(classes) - len(told_apart)
    if result.labels is not None and rest:
        caption += f" Grey: the other {rest:,} of {len(classes):,} classes."
    suffix = run.title_suffix(result.n, f"images of {result.source.name}")
    figure = plots.plot_map(
        projection.points, result.labels, names, thumbnails, axis_names,
        f"Map of features, {projection.method}: {suffix}",
    )  # fmt: skip
    return Picture("features", "Map of features", caption, figure)


def _describe(projection: Projection) -> tuple[tuple[str, str], str]:
    """The names of a projection's axes, and how the features got there."""
    if projection.method == "UMAP":
        return ("UMAP 1", "UMAP 2"), (
            f"UMAP (McInnes et al. 2018) of their cosine distances, with {features.UMAP_NEIGHBOURS}"
            f" neighbours and seed {features.SEED}; axes, and distances between groups, mean "
            "nothing"
        )
    one, two = (f"{100 * share:.1f} %" for share in projection.shares)
    axes = f"component 1 ({one} of the variance)", f"component 2 ({two} of the variance)"
    return axes, (
        f"PCA: their first two principal components, which explain {one} and {two} of the "
        f"variance, together {100 * sum(projection.shares):.1f} %"
    )


def _neighbours(run: InspectedRun, result: ImageFeatures, neighbours: Neighbours) -> Picture:
    queries = _choose_queries(result)
    indices, similarities = neighbours.indices[queries], neighbours.similarities[queries]
    k, labels = indices.shape[1], result.labels
    shown = result.images([*queries, *indices.ravel()])
    rows = [shown[len(queries) + k * i :][:k] for i in range(len(queries))]
    names = [f"image {position:,}" for position in result.positions[queries]]
    texts = [[f"{similarity:.3f}" for similarity in row] for row in similarities]
    caption = (
        f"The {k} images with the most similar pooled features (cosine, below each), among the "
        f"other {result.n - 1:,} of n = {result.n:,} images of {result.source.name}."
    )
    equal = None
    if labels is not None:
        classes = tuple(map(printable, result.source.classes))
        equal = labels[indices] == labels[queries][:, None]
        names = [classes[label] for label in labels[queries]]
        texts = [
            [
                f"{MARKS[hit]} {classes[label][:12]} {text}"
                for label, hit, text in zip(*row, strict=True)
            ]
            for row in zip(labels[indices], equal, texts, strict=True)
        ]
        one, all_shown = (100 * neighbours.agreement(labels, count) for count in (1, k))
        caption += (
            f" {MARKS[True]} and a solid frame: of the query's class; {MARKS[False]} and a dashed "
            f"one: of another. With each of the n images as the query, the nearest is of its class "
            f"in {one:.1f} %, and the nearest {k} are in {all_shown:.1f} %."
        )
    suffix = run.title_suffix(result.n, f"images of {result.source.name}")
    figure = plots.plot_neighbours(
        shown[: len(queries)], names, rows, texts, equal, f"Nearest neighbours: {suffix}"
    )
    return Picture("neighbours", "Nearest neighbours", caption, figure)


def _choose_queries(result: ImageFeatures) -> list[int]:
    """Indices of images from all over the set, of as many classes as possible."""
    spaced = evenly_spaced(range(result.n), 40 * QUERIES)
    names = spaced if result.labels is None else [int(result.labels[i]) for i in spaced]
    return [spaced[i] for i in varied(names, QUERIES)]


def show_reconstructions(run: InspectedRun, samples: Samples) -> list[Part]:
    """What a masked autoencoder predicts of hidden patches; nothing for other objectives."""
    if run.cfg.objective != "mae":
        return []
    if not run.owned:
        text = "the decoder is not among these parameters: they are an average, or were converted"
        return [Note("Reconstructions", text)]
    shown = samples.to_show()
    result = reconstruct_images(run, shown.images)
    rows = {
        "image": list(result.images),
        "visible": list(result.visible),
        "reconstruction": list(result.predicted),
    }
    n, percent = len(shown.images), f"{100 * result.hidden:.0f} %"
    suffix = run.title_suffix(n, f"images of {shown.source}")
    if run.cfg.mae.normalise:
        unit = (
            "in units of each patch's standard deviation. The model predicts pixels normalised by "
            "the mean and variance of their patch (mae.normalise); to be shown, predictions got "
            "those of the true patches, which the model does not know."
        )
    else:
        unit = "of normalised pixels."
    caption = (
        f"The encoder reads the visible patches, and the decoder predicts the others, {percent} "
        "(He et al. 2022). Visible patches are shown in the last row as they are. Below each image "
        f"is its mean squared error over the hidden patches, on average "
        f"{float(np.mean(result.losses)):.3f} (n = {n}), {unit}"
    )
    texts = [f"error {loss:.3f}" for loss in result.losses]
    title = f"Reconstructions, {percent} hidden: {suffix}"
    figure = plots.plot_reconstructions(rows, shown.names, texts, title)
    return [Picture("reconstructions", "Reconstructions of hidden patches", caption, figure)]
