"""Augmentation on the device, inside the step: uint8 pixels in, normalised images and targets out.

`draw` makes every random decision, `train_images` applies them. An example's draws depend on the
step's key and on the example's position in the global batch, and on nothing else, so a batch is
augmented alike on any number of hosts. What is drawn for an example is whole pixels and a flag, so
that two machines that round differently still agree. One draw a batch decides how it is mixed.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from vit_scale.augment.view import View
from vit_scale.errors import UserError, nearest

WHOLE = View("stretch", 1.0, "train")
RESAMPLES = {"train": "linear", "bilinear": "linear", "bicubic": "cubic", "lanczos": "lanczos3"}
CROPS = ("none", "pad", "resized")


def train_images(
    batch: dict[str, Array], key: PRNGKeyArray, cfg: ConfigDict, size: tuple[int, int], classes: int
) -> tuple[Float[Array, "b H W 3"], Float[Array, "b c"]]:
    """Augmented, normalised images at `size` = (H, W) pixels, and soft targets, which sum to 1.

    `batch` holds uint8 "image" [b, h, w, 3], int "label" [b] and bool "mask" [b]; `key` is the
    step's; `cfg` is the config's augment block. Raises UserError for a value that makes no sense.
    """
    check(cfg)
    b, *source, _ = batch["image"].shape
    chosen = draw(key, b, cfg, (source[0], source[1]), size)
    images = _sample(batch["image"], chosen, size)
    # RandAugment belongs here: it is defined on pixels in [0, 255].
    images = _normalise(images, cfg)
    # Random erasing belongs here: it fills with noise of the normalised scale.
    targets = jax.nn.one_hot(batch["label"], classes)
    targets = (1 - cfg.smoothing) * targets + cfg.smoothing / classes  # Szegedy et al. 2016
    if "weight" in chosen:
        images, targets = _mix(images, targets, batch["mask"], chosen)
    return images, targets


def eval_images(
    images: UInt8[Array, "b h w 3"], cfg: ConfigDict, size: tuple[int, int], view: View = WHOLE
) -> Float[Array, "b H W 3"]:
    """The image at `size` = (H, W), resized (antialiased) where it differs, normalised.

    Of a view that crops, it is resized as a whole, whatever its shape, and its centre is cut out.
    """
    height, width = view.resized(size)
    shape = (images.shape[0], height, width, 3)
    method = RESAMPLES[view.resample]
    resized = jax.image.resize(images.astype(jnp.float32), shape, method, antialias=True)
    top, left = view.corner((height, width), size)
    return _normalise(resized[:, top : top + size[0], left : left + size[1]], cfg)


def draw(
    key: PRNGKeyArray, b: int, cfg: ConfigDict, source: tuple[int, int], size: tuple[int, int]
) -> dict[str, Array]:
    """Every random decision about a batch of `b` images of `source` = (h, w) pixels.

    top, left, height, width: int32 [b], the box that becomes the image, in source pixels; it may
    reach beyond the source, where all is black. flip: bool [b], mirrored left-right. With mixup or
    CutMix on, also, for the whole batch: paste: int32 [top, left, bottom, right], the box in pixels
    of the output `size` = (H, W) in which all is the partner's; weight: float32, of an example's
    own pixels everywhere else.
    """
    example_key, mix_key = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(example_key, jnp.arange(b))
    chosen = jax.vmap(lambda k: _draw_box(k, cfg, source))(keys)
    if cfg.mixup or cfg.cutmix:
        chosen |= _draw_mix(mix_key, cfg, size)
    return chosen


def _draw_box(key: PRNGKeyArray, cfg: ConfigDict, source: tuple[int, int]) -> dict[str, Array]:
    """The box and the flip of one example.

    The resized crop is Inception's (Szegedy et al. 2015): its area is uniform in `scale`, the
    logarithm of width / height uniform in that of `ratio`. A box that does not fit is clamped to
    the image; torchvision redraws it, up to ten times, which is a loop. Only boxes nearly as large
    as the image differ: clamped ones are more often nearly whole, at the image's own ratio.
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
    """One lambda ~ Beta(a, a) for the batch, as both papers have it, used by mixup or by CutMix."""
    choice_key, weight_key = jax.random.split(key)
    choice, y, x = jax.random.uniform(choice_key, (3,))
    share = cfg.cutmix_share if cfg.mixup and cfg.cutmix else float(cfg.cutmix > 0)
    pastes = choice < share
    alpha = jnp.where(pastes, cfg.cutmix, cfg.mixup)
    weight = jax.random.beta(weight_key, alpha, alpha)
    bound = jnp.array(size)
    side = jnp.floor(bound * jnp.sqrt(1 - weight)).astype(jnp.int32)
    corner = _below(jnp.stack([y, x]), bound) - side // 2
    paste = jnp.clip(jnp.concatenate([corner, corner + side]), 0, jnp.tile(bound, 2))
    return {"weight": jnp.where(pastes, 1.0, weight), "paste": jnp.where(pastes, paste, 0)}


def _between(uniform: Float[Array, ""], low: float, high: float) -> Float[Array, ""]:
    return low + uniform * (high - low)


def _below(uniform: Float[Array, "*n"], bound: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """A whole number in [0, bound), from one in [0, 1)."""
    return jnp.floor(uniform * bound).astype(jnp.int32)


def _sample(
    images: UInt8[Array, "b h w 3"], chosen: dict[str, Array], size: tuple[int, int]
) -> Float[Array, "b H W 3"]:
    """Each image's box resized to `size`, in [0, 255], black outside of the source; then flipped.

    Crop, padding, antialiased resizing and the flip are this one resampling, a product with a
    matrix on each side: what jax.image.scale_and_translate does, but for the flip, which as a step
    of its own copies the batch once more. A box of exactly `size` keeps exact pixels. At its border
    the filter sees the source around the box, not a repeated edge.
    """
    boxes = {side: chosen[side].astype(jnp.float32) for side in ("top", "left", "height", "width")}
    rows = functools.partial(_triangles, images.shape[1], size[0])
    columns = functools.partial(_triangles, images.shape[2], size[1])

    def sample(image, top, left, height, width, flip):
        down, across = rows(top, height, jnp.bool_(False)), columns(left, width, flip)
        # On a TPU "high" is three products of bfloat16 parts, not the six of float32: it is within
        # 1/300 of a grey level, and still exact for exact crops, as pixels are exact in bfloat16.
        return jnp.einsum("hwc,hH,wW->HWc", image, down, across, precision="high")

    return jax.vmap(sample)(images.astype(jnp.float32), **boxes, flip=chosen["flip"])


def _triangles(
    source: int, size: int, start: Array, length: Array, flip: Array
) -> Float[Array, "{source} {size}"]:
    """The weight of each pixel of a line in each of `size` samples, which cover `length` pixels.

    Linear interpolation: triangles one pixel wide to each side, or one sample where that is wider
    (antialiasing). The weights of a sample sum to 1, or are all 0 where it is outside of the line.
    """
    step = length / size
    order = jnp.where(flip, jnp.arange(size)[::-1], jnp.arange(size))
    centres = start + (order + 0.5) * step - 0.5
    distance = jnp.abs(centres - jnp.arange(source)[:, None]) / jnp.maximum(step, 1)
    weights = jnp.maximum(0, 1 - distance)
    inside = (centres >= -0.5) & (centres <= source - 0.5)
    return jnp.where(inside, weights / weights.sum(axis=0), 0)


def _normalise(images: Float[Array, "b H W 3"], cfg: ConfigDict) -> Float[Array, "b H W 3"]:
    return (images / 255 - jnp.array(cfg.mean)) / jnp.array(cfg.std)


def _mix(
    images: Float[Array, "b H W 3"],
    targets: Float[Array, "b c"],
    mask: Bool[Array, "b"],
    chosen: dict[str, Array],
) -> tuple[Float[Array, "b H W 3"], Float[Array, "b c"]]:
    """Mix each example with the one before it: mixup (Zhang et al. 2018), CutMix (Yun et al. 2019).

    A target's own part is the mean over its pixels of their own part, hence exact also where the
    border cuts CutMix's box off. An example whose partner is masked out stays as it is.
    """
    outside = _outside(chosen["paste"], images.shape[1:3])
    partner = jnp.roll(mask, 1)
    pixels = jnp.where(partner[:, None, None], chosen["weight"] * outside, 1.0)[..., None]
    share = jnp.where(partner, chosen["weight"] * jnp.mean(outside), 1.0)[:, None]
    images = pixels * images + (1 - pixels) * jnp.roll(images, 1, axis=0)
    return images, share * targets + (1 - share) * jnp.roll(targets, 1, axis=0)


def _outside(box: Int[Array, "4"], size: tuple[int, ...]) -> Float[Array, "H W"]:
    """0 inside of the box [top, left, bottom, right], 1 outside."""
    top, left, bottom, right = box
    y, x = jnp.arange(size[0])[:, None], jnp.arange(size[1])
    return 1.0 - ((y >= top) & (y < bottom) & (x >= left) & (x < right))


def check(cfg: ConfigDict) -> None:
    """Raise UserError, in one line, for a value of the augment block that makes no sense."""
    if cfg.crop not in CROPS:
        raise UserError(f"augment.crop={cfg.crop!r} is unknown; {nearest(cfg.crop, CROPS)}")
    rules = {
        "pad": (cfg.pad >= 0, "0 or more pixels"),
        "scale": (_rising(cfg.scale, 1.0), "two numbers, 0 < low <= high <= 1"),
        "ratio": (_rising(cfg.ratio, math.inf), "two numbers, 0 < low <= high"),
        "mixup": (cfg.mixup >= 0, "0 (off) or more"),
        "cutmix": (cfg.cutmix >= 0, "0 (off) or more"),
        "cutmix_share": (0 <= cfg.cutmix_share <= 1, "a share from 0 to 1"),
        "smoothing": (0 <= cfg.smoothing < 1, "from 0 to below 1"),
        "mean": (len(cfg.mean) == 3, "three numbers, one per channel"),
        "std": (len(cfg.std) == 3 and min(cfg.std) > 0, "three numbers above 0, one per channel"),
    }
    for field, (holds, wanted) in rules.items():
        if not holds:
            raise UserError(f"augment.{field}={cfg[field]} must be {wanted}")


def _rising(pair: tuple[float, ...], limit: float) -> bool:
    """Whether it is (low, high) with 0 < low <= high <= limit."""
    return len(pair) == 2 and 0 < pair[0] <= pair[1] <= limit
