"""Random resized crops of image files, drawn before a photo is decoded, at its own resolution.

"torchvision" is torchvision's RandomResizedCrop, as timm, DeiT and MAE train with it. "inception"
is TensorFlow's sample_distorted_bounding_box, as in big_vision. In the first the area and the
logarithm of the aspect ratio are uniform, in the second the height and the aspect ratio itself.
They also differ in what happens when a box does not fit.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from ml_collections import ConfigDict

ATTEMPTS = {"torchvision": 10, "inception": 100}
COMPARING = ("dino", "lejepa")  # objectives that compare several crops of an image
RANDOM = ("bilinear", "bicubic")  # of which augment.resample=random takes either
RESAMPLES = (*RANDOM, "lanczos", "random")


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


class Draws(Protocol):
    """A stream of random numbers."""

    def uniform(self) -> float:
        """Return a number in [0, 1)."""
        ...

    def below(self, n: int) -> int:
        """Return an integer in [0, n)."""
        ...


class ExampleDraws:
    """The stream of one example, which depends on (seed, step, position in the global batch) alone.

    Philox is counter-based (Salmon et al. 2011), and numpy never changes the bits of a generator.
    """

    def __init__(self, seed: int, step: int, position: int):
        key = np.array([seed % 2**64, step], np.uint64)
        counter = np.array([0, 0, 0, position], np.uint64)
        self._bits = np.random.Philox(key=key, counter=counter)

    def uniform(self) -> float:
        return (self._bits.random_raw() >> 11) * 2.0**-53

    def below(self, n: int) -> int:
        return int(self.uniform() * n)


class RandomCrop(NamedTuple):
    """How training crops image files: the fields of those names in the config's augment block."""

    crop: str  # a key of CROPS
    scale: tuple[float, float]
    ratio: tuple[float, float]
    resample: str

    def draw(self, image: tuple[int, int], draws: Draws) -> tuple[Box, str]:
        """Return the box of an image of (height, width) pixels, and the filter of its resizing."""
        box = CROPS[self.crop](image, self.scale, self.ratio, draws)
        if self.resample == "random":
            return box, RANDOM[draws.below(2)]
        return box, self.resample


class MultiCrop(NamedTuple):
    """How training makes several crops of each image file: the config's `views` block."""

    large: RandomCrop
    globals: int  # crops at the model's size
    small: RandomCrop
    locals: int
    local_size: tuple[int, int]  # (height, width) of the small ones

    def sized(self, size: tuple[int, int]) -> list[tuple[RandomCrop, tuple[int, int]]]:
        """Return each crop with its size, the large ones, which have `size`, first."""
        small = [(self.small, self.local_size)] * self.locals
        return [(self.large, size)] * self.globals + small


def _torchvision(
    image: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> Box:
    height, width = image
    logs = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(ATTEMPTS["torchvision"]):
        area = (scale[0] + (scale[1] - scale[0]) * draws.uniform()) * (height * width)
        aspect = math.exp(logs[0] + (logs[1] - logs[0]) * draws.uniform())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(draws.below(height - h + 1), draws.below(width - w + 1), h, w)
    w, h = width, height
    if width / height < min(ratio):
        h = round(w / min(ratio))
    elif width / height > max(ratio):
        w = round(h * max(ratio))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _inception(
    image: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], draws: Draws
) -> Box:
    """Draw in float32, as TensorFlow does; boxes never touch the bottom and right edges, as there.

    The exception is a box that is as high or as wide as the image.
    """
    height, width = image
    f = np.float32
    pixels = [f(f(f(share) * f(width)) * f(height)) for share in scale]
    for _ in range(ATTEMPTS["inception"]):
        aspect = f(f(draws.uniform()) * (f(ratio[1]) - f(ratio[0])) + f(ratio[0]))
        size = _inception_size(image, pixels, aspect, draws)
        if size:
            h, w = size
            top = draws.below(height - h) if h < height else 0
            left = draws.below(width - w) if w < width else 0
            return Box(top, left, h, w)
    return Box(0, 0, height, width)


def _inception_size(
    image: tuple[int, int], pixels: list[np.float32], aspect: np.float32, draws: Draws
) -> tuple[int, int] | None:
    """Return (height, width) of a box with this width / height and `pixels` (least, most), if any.

    The height is uniform between those of the smallest and of the largest box that fits.
    """
    height, width = image

    def wide(h: int) -> int:
        return int(np.rint(np.float32(h) * aspect))

    lowest, highest = (int(np.rint(np.sqrt(area / aspect))) for area in pixels)
    if wide(highest) > width:
        highest = int((width + 0.5 - 1e-7) / float(aspect))
        highest -= wide(highest) > width
    highest = min(highest, height)
    h = min(lowest, highest)
    if h < highest:
        h += draws.below(highest - h + 1)
    if h * wide(h) < pixels[0]:
        h += 1
    if h * wide(h) > pixels[1]:
        h -= 1
    w = wide(h)
    fits = pixels[0] <= h * w <= pixels[1] and 0 < w <= width and 0 < h <= height
    return (h, w) if fits else None


CROPS: dict[str, Callable[..., Box]] = {"torchvision": _torchvision, "inception": _inception}


def random_crop(cfg: ConfigDict) -> RandomCrop | None:
    """Return the crop of a config's augment block, or None for one that the device makes."""
    if cfg.crop not in CROPS:
        return None
    return RandomCrop(cfg.crop, tuple(cfg.scale), tuple(cfg.ratio), cfg.resample)


def file_crop(cfg: ConfigDict) -> RandomCrop | MultiCrop | None:
    """Return how a whole config crops image files for training, or None if the device does."""
    large, views = random_crop(cfg.augment), cfg.views
    if large is None or cfg.objective not in COMPARING:
        return large
    small = large._replace(scale=tuple(views.local_scale))
    local = (views.local_resolution, views.local_resolution)
    return MultiCrop(large, views.globals, small, views.locals, local)
