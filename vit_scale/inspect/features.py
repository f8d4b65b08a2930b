"""Features of a split's images, their map in two dimensions, and their nearest neighbours."""

import functools
import importlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vit_scale.config import base
from vit_scale.data import Slice, Source
from vit_scale.distributed.mesh import make_mesh
from vit_scale.distributed.sharding import shard, shardings
from vit_scale.errors import UserError
from vit_scale.evaluation import Extract
from vit_scale.evaluation.cache import cached, describe_features
from vit_scale.evaluation.features import POOLED
from vit_scale.evaluation.similarity import Bank
from vit_scale.inspect.inspected_run import InspectedRun

COUNT = 2000  # images whose features are computed, at most
CHUNK = 256  # images read at once, to learn which of them are readable
GAP = 0.045  # the least distance of points that `spread` chooses, of the map's sides
SEED, UMAP_NEIGHBOURS = 0, 15
SMALLEST = 50  # images that UMAP can make a map of


class ImageFeatures(NamedTuple):
    """The features of n images, and where they come from.

    Attributes:
      values: pooled vectors, which a head would read.
      labels: the class of each image; None where the set has no classes to tell apart.
      positions: the index of each image in `source`.
      source: the images.
    """

    values: Float[np.ndarray, "n d"]
    labels: Int[np.ndarray, "n"] | None
    positions: Int[np.ndarray, "n"]
    source: Source

    @property
    def n(self) -> int:
        return len(self.values)

    def images(self, indices: Sequence[int]) -> list[np.ndarray]:
        """Read some of the images, uint8 [h, w, 3], as they are stored."""
        return list(self.source.read(self.positions[np.asarray(indices)])["image"])


class Projection(NamedTuple):
    """Features in two dimensions, and how they got there.

    Attributes:
      points: the coordinates of each image.
      method: PCA or UMAP.
      shares: of the variance that each of both principal components explains; () of UMAP.
    """

    points: Float[np.ndarray, "n 2"]
    method: str
    shares: tuple[float, ...] = ()


class Neighbours(NamedTuple):
    """The nearest other images of each image, in descending order of similarity."""

    similarities: Float[np.ndarray, "n k"]  # cosines
    indices: Int[np.ndarray, "n k"]

    def agreement(self, labels: Int[np.ndarray, "n"], k: int) -> float:
        """The share of each image's k nearest that have its label, a mean over all images."""
        return float((labels[self.indices[:, :k]] == labels[:, None]).mean())


def compute_features(run: InspectedRun, source: Source, split: str) -> ImageFeatures:
    """Compute the features of at most COUNT images of a split, or read them from the run's cache.

    A larger split's images are the first of its shuffled order, as those of `split[:COUNT]`. Raises
    UserError where no image can be read, or the features are not finite.
    """
    if len(source) > COUNT:
        source = Slice(source, f"{source.name}[:{COUNT}]", 0, COUNT, run.cfg.data.slices)
    mesh = one_device()
    params = shard(run.params, shardings(run.params, mesh))
    extract = Extract(run.cfg, run.model, mesh)
    description = describe_features(run.cfg, run.params, source, split, POOLED)
    values, labels = cached(run.cache, description, functools.partial(extract, params, source))
    positions = readable(source, len(values))
    labelled = len(source.classes) > 1 and not getattr(source, "targets", 0)
    return ImageFeatures(values, labels if labelled else None, positions, source)


def one_device() -> Mesh:
    """The mesh of the device that a run under inspection is on."""
    return make_mesh(base().mesh, jax.local_devices()[:1])


def readable(source: Source, count: int) -> Int[np.ndarray, "n"]:
    """The positions of the images that can be read, of which there were `count`.

    Raises UserError if there are more or fewer now.
    """
    positions = np.arange(len(source))
    if count == len(source):
        return positions
    chunks = np.split(positions, range(CHUNK, len(source), CHUNK))
    positions = positions[np.concatenate([source.read(chunk)["mask"] for chunk in chunks])]
    if len(positions) != count:
        raise UserError(
            f"{source.name} has {len(positions):,} readable images, and had {count:,} when their "
            "features were cached: remove the run's folder `features`"
        )
    return positions


def project(values: Float[np.ndarray, "n d"]) -> Projection:
    """Map features to two dimensions: by UMAP if the package `umap` is installed, else by PCA.

    UMAP (McInnes et al. 2018, arXiv 1802.03426) is of cosine distances, and has a fixed seed.
    """
    if len(values) < SMALLEST:
        return principal_plane(values)
    try:
        umap = importlib.import_module("umap")
    except ImportError:
        return principal_plane(values)
    mapping = umap.UMAP(UMAP_NEIGHBOURS, metric="cosine", random_state=SEED, n_jobs=1)
    return Projection(np.asarray(mapping.fit_transform(values), np.float32), "UMAP")


def principal_plane(values: Float[np.ndarray, "n d"]) -> Projection:
    """Project centred features on their two first principal components.

    A component's sign, which is arbitrary, is such that its largest entry is positive.
    """
    centred = np.asarray(values, np.float64)
    centred = centred - centred.mean(axis=0)
    _, lengths, components = np.linalg.svd(centred, full_matrices=False)
    components = components[:2]
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)
    points = np.zeros((len(values), 2), np.float32)
    points[:, : len(components)] = centred @ (components * np.sign(largest)).T
    shares = (lengths[:2] ** 2 / max(float((lengths**2).sum()), 1e-30)).tolist()
    return Projection(points, "PCA", tuple(shares))


def find_neighbours(values: Float[np.ndarray, "n d"], k: int) -> Neighbours:
    """Find the k nearest others of each image by cosine similarity; fewer if there are fewer."""
    k = min(k, len(values) - 1)
    parts = Bank(values, one_device()).nearest(values, k + 1)
    similarities, indices = map(np.concatenate, zip(*parts, strict=True))
    # An image is not always its own nearest: another may have the same feature.
    others = indices != np.arange(len(values))[:, None]
    others[others.all(axis=1), -1] = False
    shape = len(values), k
    return Neighbours(similarities[others].reshape(shape), indices[others].reshape(shape))


def spread(points: Float[np.ndarray, "n 2"], count: int) -> list[int]:
    """Choose at most `count` points far from each other: each is the farthest from those before it.

    Ends where that is nearer than GAP.
    """
    lowest, highest = points.min(axis=0), points.max(axis=0)
    scaled = (points - lowest) / np.maximum(highest - lowest, 1e-12)
    distances = np.full(len(points), math.inf)
    chosen: list[int] = []
    farthest = int(np.linalg.norm(scaled - 0.5, axis=1).argmin())
    while len(chosen) < count and distances[farthest] > GAP:
        chosen.append(farthest)
        distances = np.minimum(distances, np.linalg.norm(scaled - scaled[farthest], axis=1))
        farthest = int(distances.argmax())
    return chosen
