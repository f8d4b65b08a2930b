"""Draw every random decision about a batch.

An example's draws depend on the step's key and its position in the global batch alone. They are
whole pixels and a flag, so two machines that round differently still agree. How the batch is mixed
is one draw per batch.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict


def draw(
    key: PRNGKeyArray, b: int, cfg: ConfigDict, source: tuple[int, int], size: tuple[int, int]
) -> dict[str, Array]:
    """Draw all decisions for `b` images of `source` = (h, w) pixels and an output `size` = (H, W).

    Args:
      key: the step's.
      cfg: the config's augment block.

    Returns:
      top, left, height, width: int32 [b], the box to crop, in source pixels. It may extend beyond
        the source, which is black there.
      flip: bool [b], mirror left and right.
      paste, with mixup or CutMix on: int32 [top, left, bottom, right], the box in output pixels
        that is the partner's.
      weight, likewise: float32, the weight of an example's own pixels outside that box.
      Both are [b, ...] unless augment.mix is "batch".
    """
    example_key, mix_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(example_key, jnp.arange(b))
    draws = jax.vmap(lambda k: _draw_crop(k, cfg, source))(keys)
    if cfg.mixup or cfg.cutmix:
        draws |= _draw_mixes(mix_key, b, cfg, size)
    return draws


def _draw_mixes(
    key: PRNGKeyArray, b: int, cfg: ConfigDict, size: tuple[int, int]
) -> dict[str, Array]:
    """Draw how a batch is mixed: once, or for each pair or example."""
    if cfg.mix == "batch":
        return _draw_mix(key, cfg, size)
    numbers = jnp.arange(b) // (2 if cfg.mix == "pair" else 1)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return jax.vmap(lambda k: _draw_mix(k, cfg, size))(keys)


def _draw_crop(key: PRNGKeyArray, cfg: ConfigDict, source: tuple[int, int]) -> dict[str, Array]:
    """Draw the box and the flip of one example.

    The resized crop is Inception's (Szegedy et al. 2015): the area is uniform in `scale`, the
    logarithm of width / height is uniform in that of `ratio`. A box that does not fit is clamped to
    the image; torchvision redraws it up to ten times, which would be a loop. The two differ only in
    boxes nearly as large as the image: clamped ones more often cover nearly all of it.
    """
    h, w = source
    area, ratio, y, x, mirror = jax.random.uniform(key, (5,))  # one call compiles fast
    height, width = jnp.int32(h), jnp.int32(w)
    border = cfg.pad if cfg.crop == "pad" else 0
    if cfg.crop == "resized":
        pixels = h * w * _between(area, *cfg.scale)
        ratio = jnp.exp(_between(ratio, *map(math.log, cfg.ratio)))
        height = jnp.clip(jnp.round(jnp.sqrt(pixels / ratio)), 1, h).astype(jnp.int32)
        width = jnp.clip(jnp.round(jnp.sqrt(pixels * ratio)), 1, w).astype(jnp.int32)
    return {
        "top": _below(y, h - height + 2 * border + 1) - border,
        "left": _below(x, w - width + 2 * border + 1) - border,
        "height": height,
        "width": width,
        "flip": (mirror < 0.5) & cfg.flip,
    }


def _draw_mix(key: PRNGKeyArray, cfg: ConfigDict, size: tuple[int, int]) -> dict[str, Array]:
    """Draw mixup or CutMix, and lambda ~ Beta(a, a) for the batch, as in both papers.

    A box's side may be odd; in timm it is even.
    """
    choice_key, weight_key = jax.random.split(key)
    choice, y, x = jax.random.uniform(choice_key, (3,))
    share = cfg.cutmix_share if cfg.mixup and cfg.cutmix else float(cfg.cutmix > 0)
    pastes = choice < share
    alpha = jnp.where(pastes, cfg.cutmix, cfg.mixup)
    weight = _beta(weight_key, alpha)
    bound = jnp.array(size)
    side = jnp.floor(bound * jnp.sqrt(1 - weight)).astype(jnp.int32)
    corner = _below(jnp.stack([y, x]), bound) - side // 2
    paste = jnp.clip(jnp.concatenate([corner, corner + side]), 0, jnp.tile(bound, 2))
    return {"weight": jnp.where(pastes, 1.0, weight), "paste": jnp.where(pastes, paste, 0)}


def _between(uniform: Float[Array, ""], low: float, high: float) -> Float[Array, ""]:
    return low + uniform * (high - low)


def _below(uniform: Float[Array, "*n"], bound: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """Map uniform draws in [0, 1) to integers in [0, bound)."""
    return jnp.floor(uniform * bound).astype(jnp.int32)


def _beta(key: PRNGKeyArray, a: Float[Array, ""]) -> Float[Array, ""]:
    """Return jax.random.beta(key, a, a), to the bit, for half of its time to compile."""
    logs = jax.vmap(jax.random.loggamma, (0, None))(jax.random.split(key), a)
    scaled = jnp.exp(logs - logs.max())
    return scaled[0] / (scaled[0] + scaled[1])
