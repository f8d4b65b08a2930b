"""Several augmented crops of each image, for objectives that compare them.

Large ("global") crops at the model's size and small ("local") ones (Caron et al. 2020, arXiv
2006.09882). What is drawn for a crop depends on the step's key, the example's position in the
global batch, the crop's number, and how many crops there are, alone.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from vit_scale.augment.pipeline import train_images
from vit_scale.augment.random_crop import CROPS as FILE_CROPS
from vit_scale.errors import UserError

# Kinds of crops, in the order of views.blur and views.solarize: the first global crop, the other
# global ones, local ones. Each is folded into the step's key.
FIRST, OTHERS, LOCAL = range(3)
KEY = 0x63726F70


def multi_crop(
    batch: Mapping[str, Array], key: PRNGKeyArray, cfg: ConfigDict, size: tuple[int, int]
) -> dict[str, Float[Array, "b v H W 3"]]:
    """Return normalised crops: "global" [b, g, H, W, 3], and "local" [b, l, h, w, 3] if any.

    Args:
      batch: of the data pipeline, as for `train_images`; or already cropped, "image" [b, g, H, W,
        3] and "local" [b, l, h, w, 3].
      key: the step's.
      cfg: the whole config, of which `views` and `augment` are read.
      size: (H, W) of the global crops.
    """
    views = cfg.views
    large = [_crops(batch, key, cfg, FIRST, 1, size)]
    if views.globals > 1:
        large.append(_crops(batch, key, cfg, OTHERS, views.globals - 1, size))
    crops = {"global": jnp.concatenate(large, axis=1)}
    if views.locals:
        crops["local"] = _crops(batch, key, cfg, LOCAL, views.locals, local_size(cfg))
    return crops


def _crops(
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
    cfg: ConfigDict,
    kind: int,
    count: int,
    size: tuple[int, int],
) -> Float[Array, "b v H W 3"]:
    """Return `count` crops of each image, augmented as rows of one larger batch."""
    augment = cfg.augment.copy_and_resolve_references()
    augment.blur, augment.solarize = cfg.views.blur[kind], cfg.views.solarize[kind]
    if kind == LOCAL:
        augment.scale = cfg.views.local_scale
    b, own = len(batch["mask"]), jax.random.fold_in(key, KEY + kind)
    if cfg.augment.crop in FILE_CROPS:  # already cropped, as the files were decoded
        crops = {FIRST: batch["image"][:, :1], OTHERS: batch["image"][:, 1:]}
        source = batch["local"] if kind == LOCAL else crops[kind]
        images = source.reshape(b * count, *source.shape[2:])
    else:
        images = jnp.repeat(batch["image"], count, axis=0)
    rows = {"image": images, "label": jnp.zeros(b * count, int), "mask": jnp.ones(b * count, bool)}
    rows |= {"late": batch["late"]} if "late" in batch else {}
    images, _ = train_images(rows, own, augment, size, classes=1)
    return images.reshape(b, count, *images.shape[1:])


def local_size(cfg: ConfigDict) -> tuple[int, int]:
    """Return the (height, width) of local crops in pixels."""
    return cfg.views.local_resolution, cfg.views.local_resolution


def check_views(cfg: ConfigDict, patch: int) -> None:
    """Raise UserError for a `views` block that can't work with patches of so many pixels.

    `cfg` is the whole config.
    """
    views = cfg.views
    if (views.globals < 2 and views.globals + views.locals < 2) or views.globals < 1:
        raise UserError(
            f"views.globals={views.globals} and views.locals={views.locals}: there must be at "
            "least one global crop, and two crops in all"
        )
    if views.locals < 0:
        raise UserError(f"views.locals={views.locals} must be at least 0")
    if cfg.augment.crop not in ("resized", *FILE_CROPS):
        raise UserError(
            f"augment.crop={cfg.augment.crop} makes one crop of an image, and objective="
            f"{cfg.objective} compares several: set augment.crop=resized, or of image files "
            "torchvision"
        )
    resolution = views.local_resolution
    if views.locals and (resolution < 2 * patch or resolution % patch):
        raise UserError(
            f"views.local_resolution={resolution} must be a multiple of the patch size {patch}, "
            f"at least {2 * patch}"
        )
    for field in ("blur", "solarize"):
        value = views[field]
        if len(value) != len((FIRST, OTHERS, LOCAL)) or not 0 <= min(value) <= max(value) <= 1:
            raise UserError(
                f"views.{field}={value} must be three probabilities: of the first global crop, of "
                "the others, of local ones"
            )
    low, high = views.local_scale if len(views.local_scale) == 2 else (0, 0)
    if not 0 < low <= high <= 1:
        raise UserError(f"views.local_scale={views.local_scale} must be 0 < low <= high <= 1")
