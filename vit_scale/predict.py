"""Use a trained model: images in, class probabilities out, preprocessed as in its evaluation."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vit_scale import paths, pretrained
from vit_scale.augment import eval_images
from vit_scale.config import image_size
from vit_scale.data.images import Corrupt, decode
from vit_scale.errors import UserError


class Predictor:
    """The model of a run's folder (or of a step in it) as a function of uint8 images.

    `classes` are the names of its outputs, `cfg` its config, `params` its parameters, `step` where
    they are from, `size` the (height, width) that it sees. Raises UserError for what is no run.
    """

    def __init__(self, source: str | pathlib.Path):
        given = pretrained.read(source)
        self.cfg, self.params = given.cfg, given.params
        self.classes, self.step = given.classes, given.step
        self.size = image_size(self.cfg)

        def probabilities(params, images):
            images = eval_images(images, self.cfg.augment, self.size)
            return jax.nn.softmax(given.model.apply(params, images))

        self._probabilities = jax.jit(probabilities)

    def __call__(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b c"]:
        """Probabilities of the classes; images of any size are resized as in evaluation."""
        return np.asarray(self._probabilities(self.params, jnp.asarray(images)))

    def top(self, image: str | pathlib.Path, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest (class, probability) of an image file, the likeliest first.

        Raises UserError where the file is missing or no image.
        """
        (probabilities,) = self(read_image(image, self.size)[None])
        order = np.argsort(-probabilities, kind="stable")[:k]
        return [(self.classes[i], float(probabilities[i])) for i in order]


def read_image(file: str | pathlib.Path, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image file at `size`: resized to cover it, the centre cut out."""
    try:
        return decode(paths.path(file).read_bytes(), size)
    except OSError as error:
        raise UserError(f"image {file} can't be opened: {error.strerror}") from error
    except Corrupt as error:
        raise UserError(f"image {file} can't be decoded: {error}") from error


def load(source: str | pathlib.Path) -> Predictor:
    """`load("runs/vit_small_cifar")`: the model, its preprocessing and its class names."""
    return Predictor(source)
