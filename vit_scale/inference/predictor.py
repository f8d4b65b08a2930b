"""Predict class probabilities, or numbers, of images, preprocessed as in the model's evaluation.

An image file is decoded at the size at which evaluation decodes images, then resized to the model's
input on the device. So a model that was trained on enlarged 32 px images gets files reduced to 32
px and enlarged in the same way.
"""

import dataclasses
import functools
import math
import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from vit_scale.augment.pipeline import eval_images
from vit_scale.augment.view import View
from vit_scale.config import image_size
from vit_scale.data import are_files, delivered_size, views
from vit_scale.data.decode import Corrupt, decode
from vit_scale.data.targets import CLASSES, DEFAULT_THRESHOLD, VALUE, to_numbers
from vit_scale.errors import UserError
from vit_scale.evaluation.features import Layer
from vit_scale.models.build import Model
from vit_scale.pretrained import Pretrained, load_model
from vit_scale.storage import paths
from vit_scale.storage.errors import user_errors


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """A trained model as a function from uint8 images to class probabilities, or to features.

    A model without a head has features alone. Of a model of several classes an image
    (data.target=classes), each class has a probability of its own; a regression (data.target=value)
    returns numbers, in the training set's units.

    Args:
      source: where it was loaded from.
      model: its pure functions.
      params: its parameters; the moving average, if the run kept one.
      cfg: the config it was trained with.
      classes: the names of its outputs; none without a head.
      step: the training step of the checkpoint; 0 for external weights.
      size: (height, width) in pixels of the model's input.
      decode_size: (height, width) in pixels to which image files are decoded.
      decode_view: how files are resized and cropped when decoded.
      device_view: how decoded images are resized and cropped to `size` on the device.
      thresholds: of several classes an image, the probability from which each is marked: that with
        the highest F1 on the split that selects checkpoints, else 0.5.
    """

    source: str
    model: Model
    params: dict = dataclasses.field(repr=False)
    cfg: ConfigDict = dataclasses.field(repr=False)
    classes: tuple[str, ...] = dataclasses.field(repr=False)
    step: int
    size: tuple[int, int]
    decode_size: tuple[int, int]
    decode_view: View
    device_view: View
    thresholds: tuple[float, ...] = dataclasses.field(default=(), repr=False)

    @property
    def target(self) -> str:
        """What an image has: one class ("class"), several ("classes"), or numbers ("value")."""
        return self.cfg.data.target

    def preprocess(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b H W 3"]:
        """Resize to the model's input size, as in evaluation, and normalize."""
        return eval_images(images, self.cfg.augment, self.size, self.device_view)

    def probabilities(self, params: dict, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b c"]:
        """Preprocess and classify images of any single size; a pure function, not compiled.

        Raises UserError if the model has no head.
        """
        self.check_head()
        pixels = self.preprocess(images)
        outputs = self.model.outputs(params, pixels, self.cfg.eval.flip)
        if self.target == VALUE:
            return to_numbers(outputs, self.cfg)
        return jax.nn.sigmoid(outputs) if self.target == CLASSES else jax.nn.softmax(outputs)

    def check_head(self) -> None:
        """Raise UserError if the model has no head."""
        if not self.classes:
            raise UserError(
                f"{self.source} has no classification head: train one with "
                f"--config.init.source={self.source}, or use its features"
            )

    @functools.cached_property
    def _compiled(self) -> Callable:
        return jax.jit(self.probabilities)

    @functools.cached_property
    def _compiled_features(self) -> Callable:
        def features(params, images, kind, layer):
            return self.model.features(params, self.preprocess(images), kind, layer)

        return jax.jit(features, static_argnames=("kind", "layer"))

    def features(
        self, images: UInt8[np.ndarray, "b h w 3"], kind: str = "pooled", layer: int | None = None
    ) -> Float[np.ndarray, "b d"]:
        """Return float32 features of images of any single size; each new shape is compiled once.

        `kind` is `pooled` (by the model's pool), `cls`, `mean` (of the patches) or `cls_mean`, of
        the last block or of `layer`, counted from 0, or from the end if negative, with the final
        norm. Raises UserError for features that the model does not have.
        """
        Layer(kind, layer).check(self.model)
        return np.asarray(self._compiled_features(self.params, jnp.asarray(images), kind, layer))

    def __call__(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b c"]:
        """Class probabilities of images of any single size; each new shape is compiled once."""
        return np.asarray(self._compiled(self.params, jnp.asarray(images)))

    def read(self, image: str | pathlib.Path) -> UInt8[np.ndarray, "h w 3"]:
        """Decode an image file as evaluation does. Raises UserError if it can't."""
        return read_image(image, self.decode_size, self.decode_view, self.cfg.data.exif)

    def top(self, image: str | pathlib.Path, k: int = 5) -> list[tuple[str, float]]:
        """The k most likely (class, probability) pairs of an image file, in descending order.

        Of a regression, the first k (name, number) pairs, in the order of the outputs. Raises
        UserError if the file is missing or not an image, or the model has no head.
        """
        self.check_head()
        (probabilities,) = self(self.read(image)[None])
        order = np.argsort(-probabilities, kind="stable")
        if self.target == VALUE:
            order = np.arange(len(probabilities))
        return [(self.classes[i], float(probabilities[i])) for i in order[:k]]

    def mark(self, top: Sequence[tuple[str, float]]) -> list[str]:
        """Return the classes of `top` whose probability reaches their threshold, if there are."""
        thresholds = dict(zip(self.classes, self.thresholds, strict=False))
        return [name for name, value in top if value >= thresholds.get(name, math.inf)]


def decode_size(loaded: Pretrained, cfg: ConfigDict) -> tuple[int, int]:
    """(height, width) to which image files are decoded: as for the data set in `cfg`.

    External weights have no data set; for them it is the model's input size.
    """
    return delivered_size(cfg.data) if loaded.data else image_size(cfg)


def read_image(
    file: str | pathlib.Path, size: tuple[int, int], view: View, exif: bool = True
) -> UInt8[np.ndarray, "H W 3"]:
    """Decode an image file to `size`. Raises UserError if it is missing or not an image."""
    with user_errors(f"cannot read image {file}", also=(Corrupt,)):
        return decode(paths.parse(file).read_bytes(), size, view, exif)


def load(source: str | os.PathLike) -> Predictor:
    """Load a model for prediction, such as `load("runs/vit_small_cifar")`.

    `source` is a run's folder, RUN/checkpoints/STEP, or external weights (`pretrained.load_model`).
    What is assumed of external weights is printed to standard error. Raises UserError if `source`
    can't be loaded.
    """
    loaded = load_model(source)
    loaded.print_notes()
    cfg = loaded.cfg
    thresholds = ()
    if cfg.data.target == CLASSES:
        known = loaded.read_selection().get("thresholds")
        thresholds = tuple(known or [DEFAULT_THRESHOLD] * len(loaded.classes))
    decode_view, device_view = views(cfg, are_files(cfg.data) or not loaded.data)
    return Predictor(
        str(source),
        loaded.model,
        loaded.params,
        cfg,
        loaded.classes,
        loaded.step,
        size=image_size(cfg),
        decode_size=decode_size(loaded, cfg),
        decode_view=decode_view,
        device_view=device_view,
        thresholds=thresholds,
    )
