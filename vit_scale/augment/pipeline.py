"""The stages between uint8 pixels and normalised images and targets, inside the step."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from vit_scale.augment.colour import NUDGE
from vit_scale.augment.draws import draw
from vit_scale.augment.erasing import MODES as ERASING_MODES
from vit_scale.augment.erasing import draw_boxes, erase
from vit_scale.augment.geometry import apply_view, flip, sample
from vit_scale.augment.mixing import MODES as MIXING_MODES
from vit_scale.augment.mixing import mix
from vit_scale.augment.operations import apply_operations, draw_operations
from vit_scale.augment.policies import make
from vit_scale.augment.random_crop import CROPS as FILE_CROPS
from vit_scale.augment.random_crop import RESAMPLES
from vit_scale.augment.view import View
from vit_scale.errors import UserError, nearest

WHOLE = View("stretch", 1.0, "train")
DEVICE_CROPS = ("none", "pad", "resized")
CROPS = (*DEVICE_CROPS, *FILE_CROPS)
CHOICES = {
    "crop": CROPS,
    "resample": RESAMPLES,
    "mix": MIXING_MODES,
    "erase_mode": ERASING_MODES,
}
# Folded into the step's key, so that other draws stay what they are.
ERASING, OPERATIONS = 0x65726173, 0x6F706572
UNCROPPED = ("none", *FILE_CROPS)  # on the device


def train_images(
    batch: dict[str, Array], key: PRNGKeyArray, cfg: ConfigDict, size: tuple[int, int], classes: int
) -> tuple[Float[Array, "b H W 3"], Float[Array, "b c"]]:
    """Return augmented, normalised images of `size` = (H, W), and soft targets.

    Those of labels sum to 1: smoothing takes its share of the class and gives it to all classes
    alike. With "target", an entry y becomes (1 - smoothing) y + smoothing / 2, as is usual for a
    loss per class. Mixing mixes either.

    Args:
      batch: uint8 "image" [b, h, w, 3], int "label" [b] and bool "mask" [b]; "target" [b, c]
        instead of the label, if there is one; and bool "late" if the step is after augment.until.
      key: the step's.
      cfg: the config's augment block.

    Raises:
      UserError: an invalid value in `cfg`.
    """
    check(cfg)
    b, h, w, _ = batch["image"].shape
    draws = draw(key, b, cfg, (h, w), size)
    if (h, w) == size and cfg.crop in UNCROPPED:
        images = flip(batch["image"], draws["flip"])
    else:
        images = sample(batch["image"], draws, size)
    late = batch.get("late", jnp.bool_(False))
    if made := make(cfg, size):
        drawn = draw_operations(jax.random.fold_in(key, OPERATIONS), b, made)
        # Halves are common, since crops are enlarged by whole factors, and their float32 is not
        # exact: without the nudge two meshes would round some of them differently.
        levels = jnp.floor(images + (0.5 + NUDGE)).astype(jnp.uint8)
        changed = functools.partial(apply_operations, drawn=drawn, made=made)
        if cfg.until < 1:
            levels = jax.lax.cond(late, lambda levels: levels, changed, levels)
        else:
            levels = changed(levels)
        images = levels.astype(jnp.float32)
    images = _normalise(images, cfg)
    if cfg.erase:
        box_key, fill_key = jax.random.split(jax.random.fold_in(key, ERASING))
        boxes = jnp.where(late, 0, draw_boxes(box_key, b, cfg, size))
        images = erase(images, boxes, fill_key, cfg.erase_mode)
    if "target" in batch:
        targets = (1 - cfg.smoothing) * batch["target"] + cfg.smoothing / 2
    else:
        targets = jax.nn.one_hot(batch["label"], classes)
        targets = (1 - cfg.smoothing) * targets + cfg.smoothing / classes  # Szegedy et al. 2016
    if "weight" in draws:
        if cfg.until < 1:
            draws["weight"] = jnp.where(late, 1.0, draws["weight"])
            draws["paste"] = jnp.where(late, 0, draws["paste"])
        images, targets = mix(images, targets, batch["mask"], draws, cfg.mix)
    return images, targets


def eval_images(
    images: UInt8[Array, "b h w 3"], cfg: ConfigDict, size: tuple[int, int], view: View = WHOLE
) -> Float[Array, "b H W 3"]:
    """Return the images at `size` = (H, W) as `view` resizes and crops them, normalised."""
    return _normalise(apply_view(images, size, view), cfg)


def _normalise(images: Float[Array, "b H W 3"], cfg: ConfigDict) -> Float[Array, "b H W 3"]:
    return (images / 255 - jnp.array(cfg.mean)) / jnp.array(cfg.std)


def check(cfg: ConfigDict) -> None:
    """Raise UserError for an invalid value in the augment block."""
    for field, valid in CHOICES.items():
        if cfg[field] not in valid:
            hint = nearest(cfg[field], valid)
            raise UserError(f"augment.{field}={cfg[field]!r} is unknown; {hint}")
    constraints = {
        "jitter": (
            len(cfg.jitter) == 4 and min(cfg.jitter) >= 0 and cfg.jitter[3] <= 0.5,
            "four numbers of at least 0, the last at most 0.5",
        ),
        "erase": (0 <= cfg.erase <= 1, "a probability from 0 to 1"),
        "jitter_chance": (0 <= cfg.jitter_chance <= 1, "a probability from 0 to 1"),
        "grey": (0 <= cfg.grey <= 1, "a probability from 0 to 1"),
        "blur": (0 <= cfg.blur <= 1, "a probability from 0 to 1"),
        "solarize": (0 <= cfg.solarize <= 1, "a probability from 0 to 1"),
        "erase_area": (_rising(cfg.erase_area, 1.0), "two numbers, 0 < low <= high <= 1"),
        "until": (0 <= cfg.until <= 1, "a fraction of the steps from 0 to 1"),
        "pad": (cfg.pad >= 0, "at least 0 pixels"),
        "scale": (_rising(cfg.scale, 1.0), "two numbers, 0 < low <= high <= 1"),
        "ratio": (_rising(cfg.ratio, math.inf), "two numbers, 0 < low <= high"),
        "mixup": (cfg.mixup >= 0, "at least 0 (0: off)"),
        "cutmix": (cfg.cutmix >= 0, "at least 0 (0: off)"),
        "cutmix_share": (0 <= cfg.cutmix_share <= 1, "a share from 0 to 1"),
        "smoothing": (0 <= cfg.smoothing < 1, "at least 0 and below 1"),
        "mean": (len(cfg.mean) == 3, "three numbers, one per channel"),
        "std": (len(cfg.std) == 3 and min(cfg.std) > 0, "three numbers above 0, one per channel"),
    }
    for field, (holds, constraint) in constraints.items():
        if not holds:
            raise UserError(f"augment.{field}={cfg[field]} must be {constraint}")
    make(cfg, (1, 1))


def _rising(pair: tuple[float, ...], limit: float) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] <= limit
