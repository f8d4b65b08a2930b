"""The run that is looked into: its model as functions of uint8 images, a batch at a time."""

import contextlib
import functools
import operator
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from vit_scale import config, pretrained
from vit_scale.augment.pipeline import eval_images
from vit_scale.augment.view import view
from vit_scale.data import Source, align, are_files, eval_batches, open_split, views
from vit_scale.errors import UserError, printable
from vit_scale.inference.predictor import decode_size
from vit_scale.inspect import curves
from vit_scale.inspect.attention import mean_distance, on_grid, patch_distances, rollout
from vit_scale.inspect.predictions import Predictions
from vit_scale.models.parameters import count
from vit_scale.runs.json_files import read_json
from vit_scale.training.validation import check_classes

BATCH = 8  # images whose weights of one block, [b, k, n, n], are in memory at once


class InspectedRun:
    """The model of a run's folder, or of a step in it.

    `overrides` are of its config, such as data.path=DIR. Raises UserError for what is no run.
    """

    def __init__(self, source: str | pathlib.Path, overrides: Sequence[str] = ()):
        given = pretrained.load_model(source)
        self.cfg = config.override(given.cfg, overrides)
        self.model, self.params, self.classes = given.model, given.params, given.classes
        self.step, self.folder = given.step, given.path.parent.parent
        if not (self.folder / "run.json").is_file():
            raise UserError(f"{source} is not the folder of a run: inspect looks into runs")
        self.name = printable(self.folder.absolute().name)
        self.size = config.image_size(self.cfg)
        self.stored = decode_size(given, self.cfg)
        self.view, self.seen = views(self.cfg, are_files(self.cfg.data))
        self.parameters = count(self.params)
        self.curves = curves.read(self.folder)

        def probabilities(params, images):
            images = eval_images(images, self.cfg.augment, self.size, self.seen)
            return jax.nn.softmax(self.model.apply(params, images))

        self._probabilities = jax.jit(probabilities)

    @functools.cached_property
    def about(self) -> dict:
        """What run.json says beside the config."""
        return read_json(self.folder / "run.json")

    @functools.cached_property
    def report(self) -> dict | None:
        """What the finished run came to; None before its end."""
        file = self.folder / "report.json"
        return read_json(file) if file.exists() else None

    def stamp(self, n: int | None = None, what: str = "") -> str:
        """`cifar-32, step 450, n = 128 images of cifar10 test`: what a number is of."""
        counted = "" if n is None else f", n = {n:,} {what}"
        return f"{self.name}, step {self.step:,}{counted}"

    def see(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b H W 3"]:
        """Images at the size that the model sees, in [0, 1]; what is beyond is cut off."""
        augment = self.cfg.augment
        seen = np.asarray(eval_images(jnp.asarray(images), augment, self.size, self.seen))
        return np.clip(seen * np.float32(augment.std) + np.float32(augment.mean), 0, 1)

    def probabilities(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b c"]:
        return np.asarray(self._probabilities(self.params, jnp.asarray(images)))

    def open(self, split: str) -> Source:
        """The set that `split` names. Raises UserError where it is missing, or of other classes."""
        source = open_split(self.cfg.data, split, view(self.cfg.eval))
        check_classes(source, self.cfg)
        source, line = align(source, self.classes, self.cfg.init.classes)
        if line:
            print(f"vit-scale: {line}", file=sys.stderr)
        return source

    def predict(self, source: Source) -> Predictions:
        """Of every image of `source` that can be read, once. Raises UserError where none can."""
        batch, found = self.cfg.eval.batch, []
        reader = eval_batches(source, batch, workers=self.cfg.data.workers)
        with _bar(f"predict {source.name}", len(source)) as bar, contextlib.closing(reader):
            for part in reader:
                found.append((self.probabilities(part["image"]), part["label"], part["mask"]))
                bar.update(min(batch, len(source) - bar.n))
        probabilities, labels, mask = (np.concatenate(part) for part in zip(*found, strict=True))
        there = np.flatnonzero(mask)
        if not there.size:
            raise UserError(f"{source.name}: none of its {len(source)} images could be read")
        return Predictions(probabilities[there], labels[there], there, source.name)

    # Only of a model with attention:

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.shape.grid

    @property
    def patch(self) -> tuple[float, float]:
        """Height and width of a patch, in pixels of what the model sees."""
        return self.size[0] / self.grid[0], self.size[1] / self.grid[1]

    def distances(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "l k"]:
        """Mean attention distance in pixels of each block and head, over all images."""
        between = patch_distances(self.grid, self.patch)

        def see(weights):
            return mean_distance(weights, between)

        found = self._look(images, see, lambda seen, pooled: seen.swapaxes(0, 1))
        return found.mean(axis=0)

    def maps(self, images: UInt8[np.ndarray, "b h w 3"]) -> dict[str, Float[np.ndarray, "..."]]:
        """Where the model looks in each image, as multiples of uniform attention.

        heads: [b, l, k, h, w], of [CLS] where there is one, else the mean over all tokens.
        rollout: [b, h, w], of what the classifier gets.
        """
        from_first = self.model.shape.pool == "cls"

        def see(weights):
            heads = weights[:, :, 0] if from_first else weights.mean(axis=2)
            return {"heads": heads, "mean": weights.mean(axis=1)}

        def summarise(seen, pooled):
            rolled = jnp.einsum("bn,bnm->bm", pooled, rollout(seen["mean"]))
            tokens = rolled.shape[-1]
            found = {"heads": seen["heads"].swapaxes(0, 1), "rollout": rolled}
            return jax.tree.map(lambda shares: on_grid(shares * tokens, self.grid), found)

        return self._look(images, see, summarise)

    def _look(self, images, see: Callable, summarise: Callable):
        """`summarise` of what `Model.attention` gives, [b, ...], of all images: BATCH at a time."""

        @jax.jit
        def look(params, images):
            images = eval_images(images, self.cfg.augment, self.size, self.seen)
            return summarise(*self.model.attention(params, images, see))

        found = []
        with _bar("attention", len(images)) as bar:
            for first in range(0, len(images), BATCH):
                some = images[first : first + BATCH]
                padded = some[np.arange(BATCH) % len(some)]
                seen = jax.device_get(look(self.params, jnp.asarray(padded)))
                found.append(jax.tree.map(operator.itemgetter(slice(len(some))), seen))
                bar.update(len(some))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="image", disable=None, leave=False)
