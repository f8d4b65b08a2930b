"""Random erasing (Zhong et al. 2020) as timm does it: a box of normalised images becomes noise."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

ATTEMPTS = 10  # to draw a box that fits
ASPECT = (0.3, 1 / 0.3)  # height / width
MODES = ("const", "rand", "pixel")


def draw_boxes(
    key: PRNGKeyArray, b: int, cfg: ConfigDict, size: tuple[int, int]
) -> Int[Array, "b 4"]:
    """Draw [top, left, bottom, right] of the box to erase of each of `b` images, often empty.

    Args:
      key: the step's for erasing; an example's box depends on it and the example's position.
      cfg: the config's augment block.
      size: (height, width) of the images.
    """

    def box(key: PRNGKeyArray) -> Int[Array, "4"]:
        erased, attempts = jax.random.uniform(key), jax.random.uniform(key, (ATTEMPTS, 4))
        return jnp.where(erased < cfg.erase, first_box(attempts, cfg.erase_area, size), 0)

    return jax.vmap(box)(jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b)))


def first_box(
    attempts: Float[Array, "k 4"], area: tuple[float, float], size: tuple[int, int]
) -> Int[Array, "4"]:
    """Return the box of the first attempt that is smaller than the image, or an empty one.

    An attempt has numbers in [0, 1) for the area, the aspect ratio, and the top left corner.
    """
    height, width = size
    shares, ratios, y, x = attempts.T
    pixels = (area[0] + shares * (area[1] - area[0])) * (height * width)
    low, high = map(math.log, ASPECT)
    aspect = jnp.exp(low + ratios * (high - low))
    h = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    top = jnp.floor(y * (height - h + 1)).astype(jnp.int32)
    left = jnp.floor(x * (width - w + 1)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    chosen = jnp.stack([top, left, top + h, left + w], -1)[jnp.argmax(fits)]
    return jnp.where(fits.any(), chosen, 0)


def erase(
    images: Float[Array, "b H W 3"], boxes: Int[Array, "b 4"], key: PRNGKeyArray, mode: str
) -> Float[Array, "b H W 3"]:
    """Fill each box with 0 ("const"), one normal colour ("rand"), or normal pixels ("pixel")."""
    b, height, width, channels = images.shape
    top, left, bottom, right = (boxes[:, side, None, None] for side in range(4))
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    shape = {"const": (), "rand": (1, 1, channels), "pixel": (height, width, channels)}[mode]
    if mode == "const":
        return jnp.where(inside[..., None], 0.0, images)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b))
    noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    return jnp.where(inside[..., None], noise, images)
