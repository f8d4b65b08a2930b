"""Decode image files to RGB pixels of one size, or explain why they cannot be decoded."""

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from vit_scale.augment.random_crop import Box, Draws, RandomCrop
from vit_scale.augment.view import View
from vit_scale.data import turbo

TRAINING = View("cover", 1.0, "train")
RESAMPLES = {
    "train": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
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
TRANSPOSING = [TURNS[value] for value in (5, 6, 7, 8)]
NUMPY_TURNS: dict[Image.Transpose, Callable[[np.ndarray], np.ndarray]] = {
    Image.Transpose.FLIP_LEFT_RIGHT: lambda x: x[:, ::-1],
    Image.Transpose.ROTATE_180: lambda x: x[::-1, ::-1],
    Image.Transpose.FLIP_TOP_BOTTOM: lambda x: x[::-1],
    Image.Transpose.TRANSPOSE: lambda x: x.swapaxes(0, 1),
    Image.Transpose.ROTATE_270: lambda x: x.swapaxes(0, 1)[:, ::-1],
    Image.Transpose.TRANSVERSE: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    Image.Transpose.ROTATE_90: lambda x: x.swapaxes(0, 1)[::-1],
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


def decode_crops(
    data: bytes,
    crops: Sequence[tuple[RandomCrop, tuple[int, int]]],
    draws: Draws,
    exif: bool = True,
    decoder: str = "turbo",
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """Decode an image once, and return the crops that are drawn for it as RGB pixels.

    Each has a size (height, width), to which its box is cut out and then resized with antialiasing,
    so that no pixel outside of it counts. With `exif` boxes are drawn for the image as a viewer
    would show it. `decoder` is "pillow", or "turbo" (turbo.py), with which Pillow decodes only what
    is not an intact JPEG of RGB or grey. Raises Corrupt.
    """
    if decoder == "turbo":
        if stored := turbo.jpeg_size(data):
            return _crop_jpeg(data, stored, crops, draws, exif)
        pixels = np.asarray(_load(data, exif))
        boxes = [crop.draw(pixels.shape[:2], draws) for crop, _ in crops]
        return [
            turbo.resize(_cut(pixels, box), size, resample)
            for (box, resample), (_, size) in zip(boxes, crops, strict=True)
        ]
    image, cuts = _load(data, exif), []
    for crop, size in crops:
        (top, left, height, width), resample = crop.draw((image.height, image.width), draws)
        cut = image.crop((left, top, left + width, top + height))
        cuts.append(np.asarray(cut.resize((size[1], size[0]), RESAMPLES[resample])))
    return cuts


def _crop_jpeg(
    data: bytes,
    stored: tuple[int, int],
    crops: Sequence[tuple[RandomCrop, tuple[int, int]]],
    draws: Draws,
    exif: bool,
) -> list[np.ndarray]:
    """Decode a JPEG of `stored` (height, width), at a lower resolution where all crops allow it."""
    turn = _jpeg_orientation(data) if exif else None
    upright = stored[::-1] if turn in TRANSPOSING else stored
    boxes = [crop.draw(upright, draws) for crop, _ in crops]
    sizes = [size for _, size in crops]
    factor = min(
        turbo.reduction((box.height, box.width), size)
        for (box, _), size in zip(boxes, sizes, strict=True)
    )
    pixels = turbo.decode_jpeg(data, stored, factor)
    if pixels is None:
        pixels, factor = np.asarray(_load(data, exif=False)), 1
    if turn is not None:
        pixels = NUMPY_TURNS[turn](pixels)
    return [
        turbo.resize(_cut(pixels, _scaled(box, factor)), size, resample)
        for (box, resample), size in zip(boxes, sizes, strict=True)
    ]


def _cut(pixels: np.ndarray, box: Box) -> np.ndarray:
    return pixels[box.top : box.top + box.height, box.left : box.left + box.width]


def _scaled(box: Box, factor: int) -> Box:
    """Return the box in an image that was reduced by `factor`.

    Its edges are rounded to whole pixels, which are at most half as large as the result's
    (turbo.MARGIN): they move by a quarter of one of those.
    """
    edges = (box.top, box.left, box.top + box.height, box.left + box.width)
    top, left, bottom, right = (round(edge / factor) for edge in edges)
    return Box(top, left, bottom - top, right - left)


def _jpeg_orientation(data: bytes) -> Image.Transpose | None:
    if not turbo.may_be_turned(data):
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _orientation(image)
    except Exception:  # noqa: BLE001  # damaged metadata raises any type
        return None


def verify(data: bytes) -> None:
    """Raise Corrupt unless the whole image can be decoded."""
    _load(data, exif=True)


def shrink(data: bytes, shorter_side: int, quality: int) -> bytes:
    """Return a JPEG of the image whose shorter side has so many pixels, upright.

    An image that is no larger is returned as it is, byte for byte. Raises Corrupt.
    """
    image = _load(data, exif=True)
    if (ratio := shorter_side / min(image.size)) >= 1:
        return data
    width, height = (max(shorter_side, round(side * ratio)) for side in image.size)
    stream = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(stream, "jpeg", quality=quality)
    return stream.getvalue()


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
    except MemoryError:  # this machine's fault
        raise
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
