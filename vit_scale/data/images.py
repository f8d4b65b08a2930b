"""Encoded images: from a file's bytes to pixels of one size, or to the line that says why not."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_scale.data.sources import Batch
from vit_scale.errors import UserError, nearest

CHOICES = ("fail", "skip")  # of data.on_corrupt


class Corrupt(Exception):
    """These bytes are no image, or not the whole of one."""


def decode(data: bytes, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels at `size` (height, width). An image of that size is left as it is.

    Any other is resized, bicubic with antialiasing, until it just covers `size`, and its centre is
    cut out. Raises Corrupt.
    """
    height, width = size
    image = _load(data)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


def verify(data: bytes) -> None:
    """Raises Corrupt unless the whole image can be decoded."""
    _load(data)


def _load(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # its text is the address of a buffer
        raise Corrupt("not an image") from error
    except Exception as error:  # broken bytes make Pillow's readers raise whatever they meet
        raise Corrupt(str(error) or type(error).__name__) from error


def decoded_size(cfg: ConfigDict) -> tuple[int, int]:
    """(height, width) at which files are decoded: data.load, else what the model sees."""
    if cfg.load:
        return cfg.load, cfg.load
    return cfg.resolution, cfg.width or cfg.resolution


class EncodedImages:
    """A source of encoded images. A subclass says where they are: `encoded` and `place`."""

    decodes = True

    def __init__(self, name: str, classes: Sequence[str], cfg: ConfigDict):
        if cfg.on_corrupt not in CHOICES:
            hint = nearest(cfg.on_corrupt, CHOICES)
            raise UserError(f"data.on_corrupt={cfg.on_corrupt!r} is unknown; {hint}")
        self.name = name
        self.classes = tuple(classes)
        self.size = decoded_size(cfg)
        self._skip = cfg.on_corrupt == "skip"

    def __len__(self) -> int:
        raise NotImplementedError

    def encoded(self, index: int) -> tuple[bytes, int]:
        """The file's bytes and the label of one example. Raises Corrupt."""
        raise NotImplementedError

    def place(self, index: int) -> str:
        """The file, and the position in it, of one example."""
        raise NotImplementedError

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        n = len(indices)
        images, labels = np.zeros((n, *self.size, 3), np.uint8), np.zeros(n, np.int32)
        mask = np.zeros(n, bool)
        for slot, index in enumerate(indices.tolist()):
            try:
                data, label = self.encoded(index)
                images[slot] = decode(data, self.size)
            except Corrupt as error:
                if self._skip:
                    continue
                raise UserError(
                    f"{self.place(index)} cannot be read ({error}); replace it, "
                    "or leave such images out with --config.data.on_corrupt=skip"
                ) from error
            labels[slot], mask[slot] = label, True
        return {"image": images, "label": labels, "mask": mask}
