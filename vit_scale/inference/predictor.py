"""Use a trained model: images in, class probabilities out, preprocessed as in its evaluation.

An image file is decoded at the size at which the evaluation reads images, and what the model sees
is made of that on the device: a 32 px image is enlarged as it was in training.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from ml_collections import ConfigDict

from vit_scale import pretrained
from vit_scale.augment.pipeline import eval_images
from vit_scale.augment.view import View
from vit_scale.config import image_size
from vit_scale.data import are_files, delivered_size, views
from vit_scale.data.decode import Corrupt, decode
from vit_scale.errors import UserError
from vit_scale.models.build import Model
from vit_scale.storage import paths
from vit_scale.storage.errors import user_errors


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """A trained model as a function of uint8 images.

    Args:
      model: its two pure functions.
      params: its parameters; the average, where the run kept one.
      cfg: the config that it was trained with.
      classes: the names of its outputs.
      step: where in its training the parameters are from; 0 for weights of others.
      size: (height, width) in pixels that it sees.
      stored: (height, width) in pixels at which image files are decoded.
      view: evaluation's view of an image file, when it is decoded.
      seen: what the device does after that.
    """

    model: Model
    params: dict = dataclasses.field(repr=False)
    cfg: ConfigDict = dataclasses.field(repr=False)
    classes: tuple[str, ...] = dataclasses.field(repr=False)
    step: int
    size: tuple[int, int]
    stored: tuple[int, int]
    view: View
    seen: View

    def preprocess(self, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b H W 3"]:
        """What the model sees of images of any one size: resized as in evaluation, normalised."""
        return eval_images(images, self.cfg.augment, self.size, self.seen)

    def probabilities(self, params: dict, images: UInt8[Array, "b h w 3"]) -> Float[Array, "b c"]:
        """The whole function, to be compiled or exported."""
        return jax.nn.softmax(self.model.apply(params, self.preprocess(images)))

    @functools.cached_property
    def _compiled(self) -> Callable:
        return jax.jit(self.probabilities)

    def __call__(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b c"]:
        """Probabilities of the classes; images of any size are resized as in evaluation."""
        return np.asarray(self._compiled(self.params, jnp.asarray(images)))

    def top(self, image: str | pathlib.Path, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest (class, probability) of an image file, the likeliest first.

        Raises UserError where the file is missing or no image.
        """
        pixels = read_image(image, self.stored, self.view, self.cfg.data.exif)
        (probabilities,) = self(pixels[None])
        order = np.argsort(-probabilities, kind="stable")[:k]
        return [(self.classes[i], float(probabilities[i])) for i in order]


def decode_size(given: pretrained.Pretrained, cfg: ConfigDict) -> tuple[int, int]:
    """(height, width) at which image files are decoded for a model: that of its evaluation.

    `cfg` is its config, which may name another set than the model was trained on. Weights of others
    come with none, and get images of the size that the model sees.
    """
    return delivered_size(cfg.data) if given.data else image_size(cfg)


def decode_views(given: pretrained.Pretrained, cfg: ConfigDict) -> tuple[View, View]:
    """What is made of an image file when it is decoded, and on the device: see `data.views`."""
    return views(cfg, are_files(cfg.data) or not given.data)


def read_image(
    file: str | pathlib.Path, size: tuple[int, int], seen: View, exif: bool = True
) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image file at `size`, as evaluation sees them."""
    with user_errors(f"cannot read image {file}", also=(Corrupt,)):
        return decode(paths.parse(file).read_bytes(), size, seen, exif)


def load(source: str | os.PathLike) -> Predictor:
    """`load("runs/vit_small_cifar")`: the model, its preprocessing and its class names.

    `source` is a run's folder, a step in it, or other weights (`pretrained.load_model`).
    What is believed of weights of others is printed to standard error. Raises UserError for what is
    none of these, or has no head.
    """
    given = pretrained.load_model(source)
    given.print_notes()
    if not given.classes:
        raise UserError(f"{source} has no head: train one, --config.init.source={source}")
    of_file, on_device = decode_views(given, given.cfg)
    return Predictor(
        given.model,
        given.params,
        given.cfg,
        given.classes,
        given.step,
        size=image_size(given.cfg),
        stored=decode_size(given, given.cfg),
        view=of_file,
        seen=on_device,
    )
