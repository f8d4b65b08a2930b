"""Pixels: 16-bit and float images are scaled or refused; photos are upright, with their aspect."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.data.test_image_folder import block, encoded, everything, save
from vit_scale import config, data
from vit_scale.data import packing
from vit_scale.data.decode import Corrupt, decode
from vit_scale.data.encoded_images import decoded_size

RAMP = np.linspace(0, 255, 32).round()[:, None].repeat(32, 1)  # gray, black above


def gray(data: bytes) -> np.ndarray:
    actual = decode(data, (32, 32)).astype(int)
    np.testing.assert_array_equal(actual[..., 0], actual[..., 2])
    return actual[..., 0]


def tiff(values: np.ndarray, bits: int, photometric: int = 1, kind: int = 1) -> bytes:
    """Return a TIFF that Pillow cannot write.

    `kind`: 1 unsigned, 2 signed, 3 floats; `photometric` 0: zero is white.
    """
    raw, (height, width) = values.tobytes(), (32, 32)
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 120 + 4}
    tags |= {277: 1, 278: height, 279: len(raw), 339: kind}
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    return head + b"".join(entries) + struct.pack("<I", 0) + raw


@pytest.mark.parametrize("form", ["png", "tiff", "ppm", "jpeg2000"])
def test_sixteen_bits_are_scaled(form):
    deep = Image.fromarray((RAMP * 257).astype(np.uint16))
    np.testing.assert_array_equal(gray(encoded(deep, form)), RAMP)


def test_sixteen_bits_are_rounded_and_keep_their_order():
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    expected = np.round(values.astype(float) * 255 / 65535)
    np.testing.assert_array_equal(gray(encoded(Image.fromarray(values))), expected)


def test_big_endian_and_signed_tiffs_are_scaled():
    big = Image.fromarray((RAMP * 257).astype(">u2"))
    assert big.mode == "I;16B"
    np.testing.assert_array_equal(gray(encoded(big, "tiff")), RAMP)
    signed = tiff((RAMP * 128).astype(np.int16), 16, kind=2)
    np.testing.assert_array_equal(gray(signed), np.round(RAMP * 128 * 255 / 65535))


def test_tiffs_where_zero_is_white():
    dark = (RAMP * 257).astype(np.uint16)
    np.testing.assert_array_equal(gray(tiff(dark, 16, photometric=0)), 255 - RAMP)
    half = (RAMP / 255).astype(np.float32)
    np.testing.assert_array_equal(gray(tiff(half, 32, photometric=0, kind=3)), 255 - RAMP)


def test_declared_twelve_bits_are_scaled_to_the_full_range():
    values = np.round(RAMP / 255 * 4095).astype(int)
    first, second = values[:, ::2], values[:, 1::2]
    parts = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    packed = np.stack(parts, axis=-1).astype(np.uint8)
    np.testing.assert_array_equal(gray(tiff(packed, 12)), RAMP)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colour_is_scaled_by_pillow(channels):
    """A PNG with 16 bits in each of gray and alpha, RGB, RGBA."""
    import zlib

    deep = np.repeat((RAMP * 257).astype(">u2")[..., None], channels, axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    kind = {2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, kind, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    np.testing.assert_array_equal(gray(content), RAMP)


def test_integers_and_floats_with_a_known_white_are_scaled():
    np.testing.assert_array_equal(
        gray(encoded(Image.fromarray((RAMP * 257).astype(np.int32)), "tiff")), RAMP
    )
    floats = Image.fromarray((RAMP / 255).astype(np.float32))
    np.testing.assert_array_equal(gray(encoded(floats, "tiff")), RAMP)
    black = Image.fromarray(np.zeros((32, 32), np.int32))
    assert not gray(encoded(black, "tiff")).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((RAMP * 2**20).astype(np.int32), "mode I, 32-bit integers from 0 to 267386880"),
        ((RAMP - 9).astype(np.int32), "mode I, 32-bit integers from -9 to 246"),
        (RAMP.astype(np.int32), "mode I, 32-bit integers from 0 to 255: either 8 bits, or 16"),
        (RAMP.astype(np.float32), "mode F, floats from 0 to 255"),
        ((RAMP / 255 - 0.5).astype(np.float32), "mode F, floats from -0.5 to 0.5"),
        (np.where(RAMP < 9, np.nan, 0.5).astype(np.float32), "mode F, floats from nan to nan"),
    ],
)
def test_values_without_a_known_white_are_refused(values, message, tmp_path):
    content = encoded(Image.fromarray(values), "tiff")
    with pytest.raises(Corrupt, match=message.replace("(", "\\(")):
        decode(content, (32, 32))
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.tif").write_bytes(content)
    source = data.open_split(block(tmp_path, on_corrupt="skip"), "train")
    assert everything(source)["mask"].tolist() == [False]


@pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBa", "YCbCr", "LAB", "I;16L", "I;16N"])
def test_every_mode_of_pillow_becomes_rgb(mode):
    from vit_scale.data.decode import to_rgb

    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


# Orientation

MARKED = np.zeros((24, 16, 3), np.uint8)  # upright: bright at the top, red on the left
MARKED[:8] = 200
MARKED[:, :4, 0] = 255
INVERSE = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
INVERSE |= {6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}


def photo(orientation: int, form: str) -> bytes:
    """Return `MARKED` as a camera held in this orientation stores it."""
    stored = Image.fromarray(MARKED).transpose(Image.Transpose[INVERSE[orientation]])
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    more = {"quality": 100} if form == "jpeg" else {"lossless": True} if form == "webp" else {}
    stored.save(stream, form, exif=exif, **more)
    return stream.getvalue()


@pytest.mark.parametrize("orientation", sorted(INVERSE))
@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied(orientation, form):
    content = photo(orientation, form)
    actual = decode(content, (24, 16)).astype(int)
    assert np.abs(actual - MARKED).mean() < (3 if form == "jpeg" else 0.5)
    with Image.open(io.BytesIO(content)) as image:
        if form != "tiff":  # Pillow rotates those itself
            upright = ImageOps.exif_transpose(image.convert("RGB"))
            np.testing.assert_array_equal(actual, np.asarray(upright))
            stored = decode(content, image.size[::-1], exif=False)
            np.testing.assert_array_equal(stored, np.asarray(image.convert("RGB")))


def test_exif_orientation_is_applied_to_sixteen_bits():
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 3
    Image.fromarray((RAMP[::-1] * 257).astype(np.uint16)).save(stream, "png", exif=exif)
    np.testing.assert_array_equal(gray(stream.getvalue()), RAMP)


@pytest.mark.parametrize("value", [0, 1, 9, 77])
def test_invalid_exif_orientations_are_ignored(value):
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = value
    Image.fromarray(MARKED).save(stream, "png", exif=exif)
    np.testing.assert_array_equal(decode(stream.getvalue(), (24, 16)), MARKED)


def test_broken_exif_is_ignored():
    stream = io.BytesIO()
    Image.fromarray(MARKED).save(stream, "png", exif=b"Exif\0\0MM\0*\0\0\xff\xff\0")
    np.testing.assert_array_equal(decode(stream.getvalue(), (24, 16)), MARKED)


@pytest.fixture
def photos(tmp_path):
    for name in ("ant", "bee"):
        folder = tmp_path / "set/train" / name
        folder.mkdir(parents=True)
        (folder / "1.png").write_bytes(photo(6, "png"))
    return tmp_path / "set"


@pytest.mark.parametrize("exif", [True, False])
def test_folders_and_packs_respect_the_field_exif(photos, tmp_path, exif):
    packing.pack(photos, tmp_path / "out", workers=1)
    fields = {"resolution": 24, "width": 16, "exif": exif}
    for source in (
        data.open_split(block(photos, **fields), "train"),
        data.open_split(block(tmp_path / "out", name="array_record", **fields), "train"),
    ):
        upright = (everything(source)["image"] == MARKED).all()
        assert upright == exif
    packed = data.open_split(block(tmp_path / "out", name="array_record"), "train")
    assert packed.encoded(0)[0] == photo(6, "png"), "packed unchanged"


def test_earlier_runs_decode_as_before():
    old = config.from_json({})
    assert (old.data.exif, config.base().data.exif) == (False, True)
    old.data.update({"load": 64, "resolution": 24, "width": 48})
    assert decoded_size(old.data) == (64, 64)


# Aspect


@pytest.mark.parametrize(
    ("resolution", "width", "load", "size"),
    [
        (24, 48, 32, (32, 64)),
        (48, 24, 32, (32, 16)),
        (8, 6, 5, (5, 4)),
        (224, None, 256, (256,) * 2),
    ],
)
def test_load_keeps_the_aspect_that_the_model_sees(tmp_path, resolution, width, load, size):
    cfg = block(tmp_path, resolution=resolution, width=width, load=load)
    assert decoded_size(cfg) == data.delivered_size(cfg) == size


def test_a_wide_photo_is_not_squeezed(tmp_path):
    """A disc is as wide as it is high in the pixels that the model sees."""
    y, x = np.mgrid[:64, :128]
    disc = np.where((y - 32) ** 2 + (x - 64) ** 2 < 24**2, 255, 0).astype(np.uint8)
    save(tmp_path / "train/a/1.png", np.repeat(disc[..., None], 3, axis=-1))
    source = data.open_split(block(tmp_path, resolution=32, width=64, load=48), "train")
    (image,) = everything(source)["image"]
    bright = image[..., 0] > 127
    height, width = bright.any(1).sum(), bright.any(0).sum()
    assert image.shape == (48, 96, 3) and abs(int(height) - int(width)) <= 1 and height >= 34
