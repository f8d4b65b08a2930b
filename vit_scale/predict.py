"""Use a trained model: images in, class probabilities out, with the preprocessing it was trained with."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vit_scale import pretrained
from vit_scale.augment import eval_images
from vit_scale.config import image_size
from vit_scale.data.images import Corrupt, decode
from vit_scale.errors import UserError


class Predictor:
    """The model of a run's folder (or of a step in it) as a function of uint8 images.

    `classes` are the names of its outputs, `cfg` its config, `params` its parameters by name.
    """

    def __init__(self, source: str | pathlib.Path):
        self.cfg, model, self.params, self.classes, self.step, _ = pretrained.read(source)
        self.size = image_size(self.cfg)

        def probabilities(params, images):
            return jax.nn.softmax(
                model.apply(params, eval_images(images, self.cfg.augment, self.size))
            )

        self._probabilities = jax.jit(probabilities)

    def __call__(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b c"]:
        """Probabilities of the classes; images of any size are resized as in evaluation."""
        return np.asarray(self._probabilities(self.params, jnp.asarray(images)))

    def top(self, image: str | pathlib.Path, k: int = 5) -> list[tuple[str, float]]:
        """The k likeliest (class, probability) of an image file, the likeliest first.

        Raises UserError where the file is missing or no image.
        """
        (probabilities,) = self(read_image(image, self.size)[None])
        order = np.argsort(-probabilities)[:k]
        return [(self.classes[i], float(probabilities[i])) for i in order]


def read_image(file: str | pathlib.Path, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """The pixels of an image file at `size`: resized to cover it, the centre cut out."""
    try:
        return decode(pathlib.Path(file).read_bytes(), size)
    except OSError as error:
        raise UserError(f"image {file} can't be opened: {error.strerror}") from error
    except Corrupt as error:
        raise UserError(f"image {file} can't be decoded: {error}") from error


def load(source: str | pathlib.Path) -> Predictor:
    """`load("runs/vit_small_cifar")`: the model, its preprocessing and its class names."""
    return Predictor(source)


__all__: Sequence[str] = ["Predictor", "load", "read_image"]
