"""Evaluation's view of an image: the sizes of its resize and its centre crop.

Image files are resized and cropped by data/decode.py when they are decoded, images in memory by
geometry.py on the device; this module has the arithmetic of both.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from vit_scale.errors import UserError, nearest

FITS = ("shorter", "shortest_edge", "cover", "stretch")
RESAMPLES = ("train", "bilinear", "bicubic", "lanczos")


class View(NamedTuple):
    """The fields `fit`, `crop` and `resample` of the config's eval block."""

    fit: str
    crop: float
    resample: str

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) whose central `size` pixels are used: timm's `scale_size`."""
        return math.floor(size[0] / self.crop), math.floor(size[1] / self.crop)

    def whole(self, image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) to which `image` (height, width) is resized before the crop.

        `shorter` rounds as timm does, which uses torchvision's `Resize` for a square size, else its
        own `ResizeKeepRatio`.
        """
        height, width = self.resized(size)
        if self.fit == "stretch":
            return height, width
        if height == width:
            short, long = sorted(image)
            other = int(height * long / short)
            return (height, other) if image[0] <= image[1] else (other, height)
        ratio = min(image[0] / height, image[1] / width)
        return round(image[0] / ratio), round(image[1] / ratio)

    def corner(self, whole: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Return (top, left) of the central `size` pixels of an image of `whole` pixels.

        Half pixels round to even, as in torchvision and timm, or down for `shortest_edge`, as in
        transformers.
        """
        top, left = (whole[0] - size[0]) / 2, (whole[1] - size[1]) / 2
        return (int(top), int(left)) if self.fit == "shortest_edge" else (round(top), round(left))


def view(cfg: ConfigDict) -> View:
    """Return the view of a config's eval block. Raises UserError for an invalid value."""
    for field, valid in (("fit", FITS), ("resample", RESAMPLES)):
        if cfg[field] not in valid:
            raise UserError(f"eval.{field}={cfg[field]!r} is unknown; {nearest(cfg[field], valid)}")
    if not 0 < cfg.crop <= 1:
        raise UserError(f"eval.crop={cfg.crop} must be above 0 and at most 1")
    return View(cfg.fit, cfg.crop, cfg.resample)


def crop_of(size: tuple[int, int], resized: tuple[int, int]) -> float | None:
    """Return the crop for which `View.resized(size)` is `resized`, or None if there is none."""
    low = max(s / (r + 1) for s, r in zip(size, resized, strict=True))
    high = min(s / r for s, r in zip(size, resized, strict=True))
    for crop in (high, (low + high) / 2):
        if View("stretch", crop, "train").resized(size) == resized:
            return crop
    return None
