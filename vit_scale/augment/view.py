"""What evaluation shows a model of an image: how much of it, and resized how. Arithmetic alone.

Files are resized and cropped where they are decoded (data/images.py), sets in memory on the device
(augment.py), as wholes, whatever their shape, as for training; both ask here.
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
        """(height, width) out of whose centre `size` is cut: timm's `scale_size`."""
        return math.floor(size[0] / self.crop), math.floor(size[1] / self.crop)

    def whole(self, image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) to which an image of these pixels is resized before the crop of `size`.

        `shorter` rounds as timm does: torchvision's `Resize` for a square size, else its own
        `ResizeKeepRatio`.
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
        """(top, left) of the centre of `size` pixels.

        Half a pixel is rounded to the even one, as torchvision and timm do, or down, as
        transformers does after resizing the shortest edge.
        """
        top, left = (whole[0] - size[0]) / 2, (whole[1] - size[1]) / 2
        return (int(top), int(left)) if self.fit == "shortest_edge" else (round(top), round(left))


def view(cfg: ConfigDict) -> View:
    """The view of a config's eval block. Raises UserError for a value that makes no sense."""
    for field, valid in (("fit", FITS), ("resample", RESAMPLES)):
        if cfg[field] not in valid:
            raise UserError(f"eval.{field}={cfg[field]!r} is unknown; {nearest(cfg[field], valid)}")
    if not 0 < cfg.crop <= 1:
        raise UserError(f"eval.crop={cfg.crop} must be above 0 and at most 1")
    return View(cfg.fit, cfg.crop, cfg.resample)


def crop_of(size: tuple[int, int], resized: tuple[int, int]) -> float | None:
    """The crop for which `View.resized` of `size` is `resized`; None where there is none."""
    low = max(s / (r + 1) for s, r in zip(size, resized, strict=True))
    high = min(s / r for s, r in zip(size, resized, strict=True))
    for crop in (high, (low + high) / 2):
        if View("stretch", crop, "train").resized(size) == resized:
            return crop
    return None
