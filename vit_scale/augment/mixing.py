"""Mix each example with the previous one: mixup (Zhang et al. 2018), CutMix (Yun et al. 2019)."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def mix(
    images: Float[Array, "b H W 3"],
    targets: Float[Array, "b c"],
    mask: Bool[Array, "b"],
    draws: dict[str, Array],
) -> tuple[Float[Array, "b H W 3"], Float[Array, "b c"]]:
    """Mix images and targets by the `weight` and `paste` of `draws`.

    A target's own share is the mean over its pixels' own shares, so it is exact also where the
    border clips CutMix's box. An example whose partner is masked out is unchanged.
    """
    outside = _outside(draws["paste"], images.shape[1:3])
    partner = jnp.roll(mask, 1)
    pixels = jnp.where(partner[:, None, None], draws["weight"] * outside, 1.0)[..., None]
    share = jnp.where(partner, draws["weight"] * jnp.mean(outside), 1.0)[:, None]
    images = pixels * images + (1 - pixels) * jnp.roll(images, 1, axis=0)
    return images, share * targets + (1 - share) * jnp.roll(targets, 1, axis=0)


def _outside(box: Int[Array, "4"], size: tuple[int, ...]) -> Float[Array, "H W"]:
    """Return 0 inside of the box [top, left, bottom, right], and 1 outside."""
    top, left, bottom, right = box
    y, x = jnp.arange(size[0])[:, None], jnp.arange(size[1])
    return 1.0 - ((y >= top) & (y < bottom) & (x >= left) & (x < right))
