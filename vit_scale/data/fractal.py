"""A generated set for pretraining without a download: each class is a fractal.

A class is an iterated function system of two to four affine maps, sampled as in Anderson & Farrell,
"Improving Fractal Pre-training" (2022); an image is its attractor, rendered by the chaos game with
gray 3 x 3 patches as in FractalDB (Kataoka et al. 2020). One image per class makes it OFDB
(Nakamura et al. 2023).

Class k does not depend on the number of classes or the resolution, so disjoint ranges of classes
are disjoint sets. Images are bit-identical on every machine: they are computed by +, -, *, / and
the square root of float64, which IEEE 754 rounds exactly, one NumPy operation at a time.
"""

import hashlib
import io
import json
import logging
import uuid
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from vit_scale.data.sources import InMemory
from vit_scale.errors import UserError, nearest
from vit_scale.storage import files, paths
from vit_scale.storage.errors import DAMAGED, one_line, user_errors

VERSION = 1  # of the pixels; increase it with any change to them, to invalidate caches
SPLITS = {"train": 1, "test": 2}  # part of the random seed; 0 is the systems'
GRAY = 127  # FractalDB's "patch_gray"
FILL = 0.1  # least share of the cells of a FILL_GRID x FILL_GRID grid that a system reaches
FILL_GRID, FILL_POINTS = 32, 2000
BURN_IN, CHAIN = 20, 50  # steps of each of many parallel chains: dropped, drawn
ATTEMPTS = 1000  # at sampling a system; about one in two is accepted


def source(cfg: ConfigDict, split: str) -> InMemory:
    """Return the images of a split, "train" or "test", from the cache or newly generated.

    They are ordered by image, then class. Raises UserError for an invalid split or value, and if
    the cache cannot be written.
    """
    check(cfg)
    if split not in SPLITS:
        raise UserError(f"the fractal set has no split {split!r}; {nearest(split, SPLITS)}")
    block = cfg.fractal
    per_class = block.train_per_class if split == "train" else block.test_per_class
    if not per_class:
        raise UserError(f"the fractal set has no {split} images: data.fractal.{split}_per_class=0")
    gray = _cached(paths.parse(cfg.path), block, split, per_class)
    labels = np.tile(np.arange(block.classes, dtype=np.int32), per_class)
    names = tuple(f"fractal-{block.first + k:05d}" for k in range(block.classes))
    return InMemory(f"fractal {split}", np.repeat(gray[..., None], 3, axis=3), labels, names)


def check(cfg: ConfigDict) -> None:
    """Raise UserError for an invalid value in data.fractal."""
    least = {"classes": 1, "first": 0, "train_per_class": 0, "test_per_class": 0, "resolution": 3}
    least |= {"points": 1, "jitter": 0, "seed": 0}
    for field, bound in least.items():
        if cfg.fractal[field] < bound:
            raise UserError(f"data.fractal.{field}={cfg.fractal[field]} must be at least {bound}")


def _cached(folder: Path, block: ConfigDict, split: str, per_class: int) -> np.ndarray:
    """Return a split's images, gray uint8 [per_class * classes, r, r], read or generated."""
    fields = ("classes", "first", "resolution", "points", "jitter", "seed")
    key = {field: block[field] for field in fields}
    key |= {"version": VERSION, "split": split, "per_class": per_class}
    text = json.dumps(key, sort_keys=True)
    path = folder / f"fractal-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"
    shape = (per_class * block.classes, block.resolution, block.resolution)
    images = _load(path, shape)
    if images is None:
        images = _draw_all(block, split, per_class)
        _save(path, images)
    return images


def _load(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the cached images, or None if there are none or, with a warning, damaged ones."""
    try:
        with np.load(io.BytesIO(path.read_bytes())) as stored:
            images = stored["images"]  # numpy checks the CRC-32
        if images.shape == shape and images.dtype == np.uint8:
            return images
        reason = f"{images.dtype} {images.shape}"
    except FileNotFoundError:
        return None
    except (OSError, *DAMAGED) as error:
        reason = one_line(error)
    logging.getLogger(__name__).warning(
        "%s is damaged (%s): generating the images again", path, reason
    )
    return None


def _save(path: Path, images: np.ndarray) -> None:
    """Write the cache. Raises UserError if that fails."""
    content = io.BytesIO()
    np.savez_compressed(content, images=images)
    advice = "set data.path to a writable folder with free space"
    with user_errors(f"cannot write the generated images to {path.parent}", advice):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, content.getvalue(), f".{uuid.uuid4().hex}.tmp")


def _draw_all(block: ConfigDict, split: str, per_class: int) -> UInt8[np.ndarray, "n r r"]:
    shape = (per_class, block.classes, block.resolution, block.resolution)
    images = np.empty(shape, np.uint8)
    for k in tqdm(
        range(block.classes), desc=f"draw fractals ({split})", unit="class", disable=None
    ):
        number = block.first + k
        maps = system(block.seed, number)
        for image in range(per_class):
            rng = _generator(block.seed, number, SPLITS[split], image)
            canonical = split == "train" and image == 0
            shown = maps if canonical else _jittered(maps, block.jitter, rng)
            images[image, k] = _render(shown, block.points, block.resolution, rng)
    return images.reshape(-1, block.resolution, block.resolution)


def _generator(*entropy: int) -> np.random.Generator:
    """Return a counter-based generator. Use only its `random`, whose stream numpy keeps stable."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def system(seed: int, number: int) -> Float[np.ndarray, "maps 6"]:
    """Return the maps (a, b, c, d, e, f) of class `number`: x, y -> a x + b y + e, c x + d y + f.

    They are resampled until the attractor is more than a few dots or a line in its bounding box.
    """
    rng = _generator(seed, number, 0, 0)
    for _ in range(ATTEMPTS):
        maps = _draw_system(rng)
        if _fill(maps, rng) >= FILL:
            return maps
    raise AssertionError(f"no system in {ATTEMPTS} attempts fills {FILL} of its box")


def _draw_system(rng: np.random.Generator) -> Float[np.ndarray, "maps 6"]:
    """Sample maps A = U diag(s1, s2) V, reflected or not, with translations in [-1, 1)."""
    maps = np.empty((2 + int(3 * rng.random()), 6))
    for row, (s1, s2) in zip(maps, _singular_values(len(maps), rng), strict=True):
        (p, q), (u, v) = _unit_vector(rng), _unit_vector(rng)
        mirror_x, mirror_y = 1 - 2 * (rng.random(2) < 0.5)
        row[0] = (p * s1 * u - q * s2 * v) * mirror_x
        row[1] = (-p * s1 * v - q * s2 * u) * mirror_y
        row[2] = (q * s1 * u + p * s2 * v) * mirror_x
        row[3] = (-q * s1 * v + p * s2 * u) * mirror_y
        row[4:] = 2 * rng.random(2) - 1
    return maps


def _singular_values(n: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Sample n pairs 1 >= s1 >= s2 >= 0 with sum(s1 + 2 s2) uniform in [(5 + n) / 2, (6 + n) / 2).

    Systems in that band look good (Anderson & Farrell). Each value is uniform between the bounds
    from which the later pairs, which take from 0 to 3 each, can still reach the sum.
    """

    def uniform(low: float, high: float) -> float:
        return low + rng.random() * (high - low)

    left, pairs = uniform((5 + n) / 2, (6 + n) / 2), []
    for later in range(n - 1, 0, -1):
        least = left - 3 * later  # for this pair, so that the later ones can take the rest
        s1 = uniform(max(0.0, least / 3), min(1.0, left))
        s2 = uniform(max(0.0, (least - s1) / 2), min(s1, (left - s1) / 2))
        left -= s1 + 2 * s2
        pairs.append((s1, s2))
    s2 = uniform(max(0.0, (left - 1) / 2), left / 3)
    return [*pairs, (left - 2 * s2, s2)]


def _unit_vector(rng: np.random.Generator) -> tuple[float, float]:
    """Sample a direction, without sine and cosine, whose last bit differs between machines."""
    while True:
        x, y = 2 * rng.random(2) - 1
        square = x * x + y * y
        if 0.01 < square <= 1:
            length = np.sqrt(square)
            return x / length, y / length


def _jittered(
    maps: Float[np.ndarray, "maps 6"], jitter: float, rng: np.random.Generator
) -> Float[np.ndarray, "maps 6"]:
    """Return another instance of a class: each coefficient times a factor in 1 +- `jitter`.

    If that destroys the attractor, the jitter is halved, down to almost none.
    """
    while True:
        changed = maps * (1 + jitter * (2 * rng.random(maps.shape) - 1))
        if jitter < 1e-3 or _fill(changed, rng) >= FILL:
            return changed
        jitter /= 2


def _fill(maps: Float[np.ndarray, "maps 6"], rng: np.random.Generator) -> float:
    """Return the share of the cells of the attractor's bounding box that the chaos game reaches."""
    rows, columns = _game(maps, FILL_POINTS, FILL_GRID, rng)
    return len(np.unique(rows * FILL_GRID + columns)) / FILL_GRID**2


def _game(
    maps: Float[np.ndarray, "maps 6"], points: int, cells: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Play the chaos game; return int64 rows and columns in [0, cells) of points on the attractor.

    Many short chains are as good as a long one, and one array operation per step. Each starts on
    the attractor, at the fixed point of the first map.
    """
    weight = np.abs(maps[:, 0] * maps[:, 3] - maps[:, 1] * maps[:, 2])
    share = np.cumsum(weight) / np.sum(weight)
    chains = -(-points // CHAIN)
    chosen = np.searchsorted(share[:-1], rng.random((BURN_IN + CHAIN, chains)), side="right")
    a, b, c, d, e, f = np.moveaxis(maps[chosen], 2, 0)
    x, y = np.empty((2, BURN_IN + CHAIN, chains))
    x_last, y_last = _fixed_point(maps[0])
    for step in range(BURN_IN + CHAIN):
        x[step] = a[step] * x_last + b[step] * y_last + e[step]
        y[step] = c[step] * x_last + d[step] * y_last + f[step]
        x_last, y_last = x[step], y[step]
    return _cell(y, points, cells), _cell(x, points, cells)


def _fixed_point(map_: Float[np.ndarray, "6"]) -> tuple[float, float]:
    a, b, c, d, e, f = map_
    determinant = (1 - a) * (1 - d) - b * c
    return ((1 - d) * e + b * f) / determinant, ((1 - a) * f + c * e) / determinant


def _cell(at: Float[np.ndarray, "steps chains"], points: int, cells: int) -> np.ndarray:
    """Quantise the drawn coordinates to `cells` equal parts of their range."""
    at = at[BURN_IN:].reshape(-1)[:points]
    low, extent = np.min(at), np.ptp(at)
    if not 0 < extent < np.inf:
        return np.zeros(len(at), np.int64)
    return np.minimum((at - low) / extent * cells, cells - 1).astype(np.int64)


def _render(
    maps: Float[np.ndarray, "maps 6"], points: int, resolution: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "r r"]:
    """Render the attractor, stretched to the image: a random 3 x 3 pattern per point, gray."""
    rows, columns = _game(maps, points, resolution - 2, rng)
    pattern = rng.random((9, points)) < 0.5
    image = np.zeros((resolution, resolution), np.uint8)
    for cell, shown in enumerate(pattern):
        image[rows[shown] + cell // 3, columns[shown] + cell % 3] = GRAY
    return image
