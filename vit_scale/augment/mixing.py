"""Mix examples with others of the batch: mixup (Zhang et al. 2018), CutMix (Yun et al. 2019).

Each is mixed with the one before it, or, in pairs, with its neighbour; timm mixes with the example
that has the same position from the end.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MODES = ("batch", "pair", "example")  # what one weight and one box are drawn for; timm's "elem"


def mix(
    images: Float[Array, "b H W 3"],
    targets: Float[Array, "b c"],
    mask: Bool[Array, "b"],
    draws: dict[str, Array],
    mode: str = "batch",
) -> tuple[Float[Array, "b H W 3"], Float[Array, "b c"]]:
    """Mix images and targets by the `weight` and `paste` of `draws`.

    A target's own share is the mean over its pixels' own shares, so it is exact also where the
    border clips CutMix's box. An example whose partner is masked out is unchanged.
    """
    if mode == "batch":
        weight, outside = draws["weight"], _outside(draws["paste"], images.shape[1:3])
        share = weight * jnp.mean(outside)
    else:
        weight = draws["weight"][:, None, None]
        outside = jax.vmap(lambda box: _outside(box, images.shape[1:3]))(draws["paste"])
        share = draws["weight"] * jnp.mean(outside, axis=(1, 2))
    partner = _partners(mask, mode)
    pixels = jnp.where(partner[:, None, None], weight * outside, 1.0)[..., None]
    own = jnp.where(partner, share, 1.0)[:, None]
    images = pixels * images + (1 - pixels) * _partners(images, mode)
    return images, own * targets + (1 - own) * _partners(targets, mode)


def _partners(x: Array, mode: str) -> Array:
    """Return the entry of each example's partner."""
    if mode != "pair":
        return jnp.roll(x, 1, axis=0)
    even = len(x) // 2 * 2  # a few images for a tracker may be odd; a batch is not
    pairs = x[:even].reshape(even // 2, 2, *x.shape[1:])[:, ::-1]
    return jnp.concatenate([pairs.reshape(x[:even].shape), x[even:]])


def _outside(box: Int[Array, "4"], size: tuple[int, ...]) -> Float[Array, "H W"]:
    """Return 0 inside of the box [top, left, bottom, right], and 1 outside."""
    top, left, bottom, right = box
    y, x = jnp.arange(size[0])[:, None], jnp.arange(size[1])
    return 1.0 - ((y >= top) & (y < bottom) & (x >= left) & (x < right))
