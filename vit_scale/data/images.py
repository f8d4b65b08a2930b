"""Encoded images: from a file's bytes to pixels of one size, or to the line that says why not."""

import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from PIL import Image, ImageOps, UnidentifiedImageError

from vit_scale.data.sources import Batch
from vit_scale.errors import UserError, nearest
from vit_scale.view import View

TRAINING = View("cover", 1.0, "train")
RESAMPLES = {
    "train": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CHOICES = ("fail", "skip")  # of data.on_corrupt


class Corrupt(Exception):
    """These bytes are no image, or not the whole of one."""


def decode(data: bytes, size: tuple[int, int], view: View = TRAINING) -> UInt8[np.ndarray, "h w 3"]:
    """RGB pixels at `size` (height, width), with antialiasing where they are resized.

    For training the largest centred box of that shape is resized to it, bicubic; evaluation has a
    view of its own. An image of that size, all of which is seen, is left as it is. Raises Corrupt.
    """
    return np.asarray(_seen(_load(data), size, view))


def _seen(image: Image.Image, size: tuple[int, int], view: View) -> Image.Image:
    (height, width), method = size, RESAMPLES[view.resample]
    if view.crop == 1 and image.size == (width, height):
        return image
    if view.fit == "cover":
        return ImageOps.fit(image, (width, height), method, bleed=(1 - view.crop) / 2)
    whole = view.whole((image.height, image.width), size)
    if (image.height, image.width) != whole:
        image = image.resize((whole[1], whole[0]), method)
    top, left = view.corner(whole, size)
    return image.crop((left, top, left + width, top + height))


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
    view = TRAINING

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
                images[slot] = decode(data, self.size, self.view)
            except Corrupt as error:
                if self._skip:
                    continue
                raise UserError(
                    f"{self.place(index)} cannot be read ({error}); replace it, "
                    "or leave such images out with --config.data.on_corrupt=skip"
                ) from error
            labels[slot], mask[slot] = label, True
        return {"image": images, "label": labels, "mask": mask}
