"""Crop, pad, resize and flip images of a batch on the device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt8

from vit_scale.augment.view import View

RESAMPLES = {"train": "linear", "bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}


def sample(
    images: UInt8[Array, "b h w 3"], draws: dict[str, Array], size: tuple[int, int]
) -> Float[Array, "b H W 3"]:
    """Resize each image's box to `size`, black outside of the source, and flip; in [0, 255].

    Crop, padding, antialiased resizing and flip are one resampling, a product with a matrix on each
    side. That is what jax.image.scale_and_translate does, except for the flip, which would copy the
    batch once more. A box of exactly `size` keeps its pixels exactly. At the border of a box the
    filter reads the source around it, not a repeated edge.
    """
    boxes = {side: draws[side].astype(jnp.float32) for side in ("top", "left", "height", "width")}
    rows = functools.partial(_triangles, images.shape[1], size[0])
    columns = functools.partial(_triangles, images.shape[2], size[1])

    def resample(image, top, left, height, width, flip):
        down, across = rows(top, height, jnp.bool_(False)), columns(left, width, flip)
        # On a TPU "high" is three products of bfloat16 parts, not float32's six: within 1/300 of a
        # grey level, and still exact for exact crops, since bfloat16 represents all uint8 pixels.
        return jnp.einsum("hwc,hH,wW->HWc", image, down, across, precision="high")

    return jax.vmap(resample)(images.astype(jnp.float32), **boxes, flip=draws["flip"])


def flip(images: UInt8[Array, "b h w 3"], flips: Bool[Array, "b"]) -> Float[Array, "b h w 3"]:
    """Mirror the images of `flips` left and right: `sample` of whole images, without products."""
    mirrored = jnp.where(flips[:, None, None, None], images[:, :, ::-1], images)
    return mirrored.astype(jnp.float32)


def _triangles(
    source: int, size: int, start: Array, length: Array, flip: Array
) -> Float[Array, "{source} {size}"]:
    """Return the weight of each of `source` pixels in each of `size` samples of a line.

    The samples cover `length` pixels from `start`. Interpolation is linear: triangles one pixel
    wide to each side, or one sample where that is wider (antialiasing). The weights of a sample sum
    to 1, or are all 0 if it is outside of the line.
    """
    step = length / size
    order = jnp.where(flip, jnp.arange(size)[::-1], jnp.arange(size))
    centres = start + (order + 0.5) * step - 0.5
    distance = jnp.abs(centres - jnp.arange(source)[:, None]) / jnp.maximum(step, 1)
    weights = jnp.maximum(0, 1 - distance)
    inside = (centres >= -0.5) & (centres <= source - 0.5)
    return jnp.where(inside, weights / weights.sum(axis=0), 0)


def apply_view(
    images: UInt8[Array, "b h w 3"], size: tuple[int, int], view: View
) -> Float[Array, "b H W 3"]:
    """Resize to `view`'s size, antialiased and ignoring the aspect ratio, and crop the centre."""
    height, width = view.resized(size)
    shape = (images.shape[0], height, width, 3)
    method = RESAMPLES[view.resample]
    resized = jax.image.resize(images.astype(jnp.float32), shape, method, antialias=True)
    top, left = view.corner((height, width), size)
    return resized[:, top : top + size[0], left : left + size[1]]
