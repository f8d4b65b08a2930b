"""Decode image files to RGB pixels of one size, or explain why they cannot be decoded."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vit_scale.augment.view import View
from vit_scale.data.example_ids import Examples
from vit_scale.data.sources import Batch
from vit_scale.errors import UserError, nearest

TRAINING = View("cover", 1.0, "train")
RESAMPLES = {
    "train": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CHOICES = ("fail", "skip")  # of data.on_corrupt
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags, and a value of the second
SIXTEEN_BITS = ("PNG", "PPM")  # formats whose Pillow mode I always has 16 bits
TURNS = {  # by the value of EXIF's orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Corrupt(Exception):
    """The bytes are not an image, or not a complete one."""


def decode(
    data: bytes, size: tuple[int, int], view: View = TRAINING, exif: bool = True
) -> UInt8[np.ndarray, "h w 3"]:
    """Decode to RGB pixels of `size` (height, width), resized with antialiasing as `view` says.

    For training, the largest centred box of that aspect ratio is resized, bicubic. An image of
    exactly that size is not resampled. With `exif` it is first rotated as a viewer would. Raises
    Corrupt.
    """
    return np.asarray(_apply_view(_load(data, exif), size, view))


def _apply_view(image: Image.Image, size: tuple[int, int], view: View) -> Image.Image:
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
    """Raise Corrupt unless the whole image can be decoded."""
    _load(data, exif=True)


def _load(data: bytes, exif: bool) -> Image.Image:
    """Decode the whole image, or the first of several, to RGB with 8 bits per channel."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # orientation may be stored after the pixels, and TIFF applies it here
            turn = _orientation(image) if exif else None
            rgb = to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)
    except UnidentifiedImageError as error:  # its text is a buffer's address
        raise Corrupt("not an image") from error
    except Exception as error:  # damaged files make Pillow raise any type
        raise Corrupt(str(error) or type(error).__name__) from error


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the rotation that EXIF asks for, or None, also if the metadata is damaged."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001  # damaged metadata raises any type
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded image of any mode to RGB with 8 bits per channel.

    Pillow clips deeper gray to 255. Here 16 bits are scaled by 255 / 65535 and floats by 255,
    independent of the image's own range. Raises Corrupt if the white value is ambiguous.
    """
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})
        bits = tags.get(BITS, (16,))[0]  # a TIFF may have 12
        return _gray(np.asarray(image), 2**bits - 1, tags)
    if image.mode == "I":
        return _gray(_sixteen_bits(image), 65535, {})
    if image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # also for NaN
            raise Corrupt(f"mode F, floats from {low:g} to {high:g}: only 0 to 1 are supported")
        return _gray(values, 1, getattr(image, "tag_v2", {}))
    if image.mode == "La":  # gray times alpha; Pillow converts it only so
        image = image.convert("LA")
    return image.convert("RGB")


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    """Return the values of an image of 32-bit integers that fit in 16 bits. Raises Corrupt."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Corrupt(
            f"mode I, 32-bit integers from {low} to {high}: the white value is unknown; save it "
            "with 8 or 16 bits"
        )
    if 0 < high <= 255 and image.format not in SIXTEEN_BITS:
        raise Corrupt(
            f"mode I, 32-bit integers from {low} to {high}: either 8 bits, or 16 and nearly black; "
            "save it with 8 or 16 bits"
        )
    return values


def _gray(values: np.ndarray, white: int, tags: Mapping[int, int]) -> Image.Image:
    """Convert gray values in [0, `white`] to RGB, rounded to 8 bits."""
    scaled = np.round(np.asarray(values, np.float64) * (255 / white)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        scaled = 255 - scaled  # Pillow does it for 8 bits only
    return Image.fromarray(scaled).convert("RGB")


def decoded_size(cfg: ConfigDict) -> tuple[int, int]:
    """Return the (height, width) at which files are decoded: data.load, else the model's input."""
    width = cfg.width or cfg.resolution
    if not cfg.load:
        return cfg.resolution, width
    return cfg.load, cfg.load if cfg.square else max(1, round(cfg.load * width / cfg.resolution))


class EncodedImages:
    """A source of image files, which subclasses locate by `encoded` and `location`."""

    decodes = True
    view = TRAINING
    examples: Examples | None = None  # the examples' identity, if known

    def __init__(self, name: str, classes: Sequence[str], cfg: ConfigDict):
        if cfg.on_corrupt not in CHOICES:
            hint = nearest(cfg.on_corrupt, CHOICES)
            raise UserError(f"data.on_corrupt={cfg.on_corrupt!r} is unknown; {hint}")
        self.name = name
        self.classes = tuple(classes)
        self.size = decoded_size(cfg)
        self._skip = cfg.on_corrupt == "skip"
        self._exif = cfg.exif

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def recorded(self) -> dict[str, object]:
        return {"fingerprint": self.examples.fingerprint()} if self.examples else {}

    def encoded(self, index: int) -> tuple[bytes, int]:
        """Return the file's bytes and the label of one example. Raises Corrupt."""
        raise NotImplementedError

    def location(self, index: int) -> str:
        """Return the file and the position of one example, for error messages."""
        raise NotImplementedError

    def read(self, indices: Int[np.ndarray, "n"]) -> Batch:
        n = len(indices)
        images, labels = np.zeros((n, *self.size, 3), np.uint8), np.zeros(n, np.int32)
        mask = np.zeros(n, bool)
        for slot, index in enumerate(indices.tolist()):
            try:
                data, label = self.encoded(index)
                images[slot] = decode(data, self.size, self.view, self._exif)
            except Corrupt as error:
                if self._skip:
                    continue
                raise UserError(
                    f"cannot read {self.location(index)}: {error}; replace it, "
                    "or skip such images with --config.data.on_corrupt=skip"
                ) from error
            labels[slot], mask[slot] = label, True
        return {"image": images, "label": labels, "mask": mask}
