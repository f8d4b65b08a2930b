"""A run under inspection: its model as functions of uint8 images, evaluated batch by batch."""

import contextlib
import functools
import operator
import pathlib
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from tqdm import tqdm

from vit_scale import config, pretrained
from vit_scale.augment.pipeline import eval_images
from vit_scale.data import Source, align, are_files, eval_batches, open_evaluation, views
from vit_scale.data.targets import CLASS, NONE
from vit_scale.errors import UserError, printable
from vit_scale.evaluation.probing import cache_folder
from vit_scale.inference.predictor import decode_size
from vit_scale.inspect import curves
from vit_scale.inspect.attention import mean_distance, on_grid, patch_distances, rollout
from vit_scale.inspect.predictions import Predictions
from vit_scale.models.parameters import count
from vit_scale.runs.json_files import read_json
from vit_scale.training.validation import check_classes

BATCH = 8  # images whose attention weights of one block, [b, k, n, n], are in memory at once


class InspectedRun:
    """The model of a run, and what its folder records.

    Args:
      source: a run's folder, or RUN/checkpoints/STEP.
      overrides: of its config, such as "data.path=DIR".

    Raises:
      UserError: `source` is not a run.
    """

    def __init__(self, source: str | pathlib.Path, overrides: Sequence[str] = ()):
        loaded = pretrained.load_model(source)
        own = config.image_size(loaded.cfg)
        self.cfg = config.override(loaded.cfg, overrides)
        if config.image_size(self.cfg) != own:
            raise UserError(f"inspect shows a model at its own image size, {own[0]} x {own[1]}")
        self.model, self.params, self.classes = loaded.model, loaded.params, loaded.classes
        self.owned, self.cache = loaded.owned, cache_folder(loaded)
        self.step, self.folder = loaded.step, loaded.path.parent.parent
        if not (self.folder / "run.json").is_file():
            raise UserError(
                f"{source} is not a run folder: `vit-scale convert` makes one of external weights"
            )
        self.name = printable(self.folder.absolute().name)
        self.size = config.image_size(self.cfg)
        self.decode_size = decode_size(loaded, self.cfg)
        self.decode_view, self.device_view = views(self.cfg, are_files(self.cfg.data))
        self.parameter_count = count(self.params)
        self.curves = curves.read_curves(self.folder)
        self._probabilities = jax.jit(self._classify)

    def _classify(self, params: dict, images: jax.Array) -> jax.Array:
        pixels = self.pixels(images)
        return jax.nn.softmax(self.model.outputs(params, pixels, self.cfg.eval.flip))

    @functools.cached_property
    def metadata(self) -> dict:
        """The content of run.json."""
        return read_json(self.folder / "run.json")

    @functools.cached_property
    def report(self) -> dict | None:
        """The content of report.json; None before the run has finished."""
        file = self.folder / "report.json"
        return read_json(file) if file.exists() else None

    @property
    def has_head(self) -> bool:
        """Whether the model predicts classes."""
        return self.cfg.model.classes > 0

    def title_suffix(self, n: int | None = None, what: str = "") -> str:
        """What a figure is of, such as `cifar-32, step 450, n = 128 images of cifar10 test`."""
        counted = "" if n is None else f", n = {n:,} {what}"
        return f"{self.name}, step {self.step:,}{counted}"

    def pixels(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b H W 3"]:
        """The model's input, as in evaluation: resized and normalized."""
        return eval_images(images, self.cfg.augment, self.size, self.device_view)

    def display_pixels(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b H W 3"]:
        """Images resized to what the model cuts into patches: not normalized, clipped to [0, 1]."""
        pixels = self.pixels(jnp.asarray(images))
        height, width = getattr(self.model.shape, "pixels", self.size)  # model.nearest_grid
        if (height, width) != self.size:
            pixels = jax.image.resize(pixels, (len(pixels), height, width, 3), "bilinear")
        return self.denormalise(np.asarray(pixels))

    def denormalise(self, pixels: Float[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b H W 3"]:
        """The model's input or a prediction of it, to be shown: clipped to [0, 1]."""
        augment = self.cfg.augment
        return np.clip(pixels * np.float32(augment.std) + np.float32(augment.mean), 0, 1)

    def probabilities(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b c"]:
        """Class probabilities of images of any single size."""
        return np.asarray(self._probabilities(self.params, jnp.asarray(images)))

    def open_split(self, split: str) -> Source:
        """Open a split, with labels in the order of the model's outputs, or its own without a head.

        Raises UserError if it is missing, or has other classes than the model.
        """
        unlabelled = self.cfg.data.target == NONE and not self.has_head
        if self.cfg.data.target != CLASS and not unlabelled:
            raise UserError(
                f"inspect shows predictions of one class an image, and {self.folder} has "
                f"data.target={self.cfg.data.target}: see vit-scale eval"
            )
        source = open_evaluation(self.cfg, split, self.classes)
        if not self.has_head:
            return source
        check_classes(source, self.cfg)
        source, line = align(source, self.classes, self.cfg.init.classes)
        if line:
            print(f"vit-scale: {line}", file=sys.stderr)
        return source

    def predict(self, source: Source) -> Predictions:
        """Predict every readable image of `source`, once. Raises UserError if there is none."""
        batch, parts = self.cfg.eval.batch, []
        reader = eval_batches(source, batch, workers=self.cfg.data.workers)
        with _bar(f"predict {source.name}", len(source)) as bar, contextlib.closing(reader):
            for part in reader:
                parts.append((self.probabilities(part["image"]), part["label"], part["mask"]))
                bar.update(min(batch, len(source) - bar.n))
        probabilities, labels, mask = (np.concatenate(part) for part in zip(*parts, strict=True))
        readable = np.flatnonzero(mask)
        if not readable.size:
            raise UserError(f"{source.name}: none of its {len(source)} images could be read")
        return Predictions(probabilities[readable], labels[readable], readable, source.name)

    # Only for models with attention:

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.model.shape.grid

    @property
    def reads_cls(self) -> bool:
        """Whether the head reads [CLS]."""
        return self.model.shape.pool in ("cls", "cls_gap")

    @property
    def has_cls(self) -> bool:
        """Whether the first token is [CLS], which the head need not read."""
        return self.model.shape.class_token

    @property
    def patch_size(self) -> tuple[float, float]:
        """(height, width) of a patch in pixels of the model's input."""
        return self.size[0] / self.grid[0], self.size[1] / self.grid[1]

    def attention_distances(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "l k"]:
        """Mean attention distance in pixels of each block and head, over all images."""
        between = patch_distances(self.grid, self.patch_size)
        by_image = self._map_attention(
            images,
            lambda weights: mean_distance(weights, between),
            lambda distances, pooled: distances.swapaxes(0, 1),
        )
        return by_image.mean(axis=0)

    def attention_maps(
        self, images: UInt8[np.ndarray, "b h w 3"]
    ) -> dict[str, Float[np.ndarray, "..."]]:
        """Attention to each patch of each image, as multiples of uniform attention.

        heads: [b, l, k, h, w], from [CLS] if the model reads it, else the mean over all tokens.
        cls: [b, k, h, w], from [CLS] in the last block; only of a model that has one.
        registers: [b, r, h, w], from each register in the last block, the mean over heads.
        rollout: [b, h, w], the share of each patch in the pooled vector.
        """
        shape = self.model.shape
        registers = slice(shape.before - shape.registers, shape.before)

        def reduce_block(weights):
            heads = weights[:, :, 0] if self.reads_cls else weights.mean(axis=2)
            return {"heads": heads, "cls": weights[:, :, 0], "mean": weights.mean(axis=1)}

        def reduce_image(blocks, pooled):
            rolled = jnp.einsum("bn,bnm->bm", pooled, rollout(blocks["mean"]))
            tokens = rolled.shape[-1]
            maps = {"heads": blocks["heads"].swapaxes(0, 1), "rollout": rolled}
            maps["registers"] = blocks["mean"][-1][:, registers]
            if self.has_cls:
                maps["cls"] = blocks["cls"][-1]
            return jax.tree.map(lambda shares: on_grid(shares * tokens, self.grid), maps)

        return self._map_attention(images, reduce_block, reduce_image)

    def _map_attention(self, images, reduce_block: Callable, reduce_image: Callable):
        """`reduce_image(*model.attention(..., reduce_block))` of all images, batch by batch."""

        @jax.jit
        def compute(params, images):
            pixels = self.pixels(images)
            return reduce_image(*self.model.attention(params, pixels, reduce_block))

        parts = []
        with _bar("attention", len(images)) as bar:
            for first in range(0, len(images), BATCH):
                batch = images[first : first + BATCH]
                padded = batch[np.arange(BATCH) % len(batch)]
                part = jax.device_get(compute(self.params, jnp.asarray(padded)))
                parts.append(jax.tree.map(operator.itemgetter(slice(len(batch))), part))
                bar.update(len(batch))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _bar(what: str, total: int) -> tqdm:
    return tqdm(total=total, desc=what, unit="image", disable=None, leave=False)
