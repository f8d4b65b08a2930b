"""turbo: the same pixels as Pillow's, before resizing to the bit, after it within a grey level."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.augment.test_random_crop import GOLDEN
from vit_scale.augment.random_crop import ExampleDraws, RandomCrop
from vit_scale.data import turbo
from vit_scale.data.decode import RESAMPLES, TURNS, Corrupt, decode_crops

PHOTO = GOLDEN["photo/57x33"]
WHOLE = RandomCrop("torchvision", (1.0, 1.0), (3 / 4, 4 / 3), "bicubic")
CROP = RandomCrop("torchvision", (0.2, 0.6), (3 / 4, 4 / 3), "bicubic")


def encoded(pixels: np.ndarray, form: str = "jpeg", mode: str = "RGB", **options) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form, **options)
    return stream.getvalue()


def smooth(height: int, width: int, scale: float = 1.0) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / scale
    waves = [127 + 100 * np.sin(x / (30 + i) + y / (50 - i)) for i in range(3)]
    return np.stack(waves, -1).astype(np.uint8)


def both(data: bytes, size=(24, 20), crop=CROP, draw=0, exif=True) -> list[np.ndarray]:
    return [
        decode_crops(data, [(crop, size)], ExampleDraws(0, 0, draw), exif, decoder)[0].astype(int)
        for decoder in ("turbo", "pillow")
    ]


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_a_jpeg_is_decoded_as_by_pillow(mode, options):
    data = encoded(PHOTO, mode=mode, quality=80, **options)
    assert turbo.jpeg_size(data) == (57, 33)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(turbo.decode_jpeg(data, (57, 33)), theirs)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(57, 33), (20, 90), (24, 50), (9, 20), (24, 20)])
def test_resizing_is_pillows_within_a_grey_level(resample, shape):
    pixels = smooth(*shape)
    ours = turbo.resize(pixels, (24, 20), resample)
    theirs = np.asarray(Image.fromarray(pixels).resize((20, 24), RESAMPLES[resample]))
    assert ours.shape == (24, 20, 3) and ours.dtype == np.uint8
    assert np.abs(ours.astype(int) - theirs).max() <= 1
    assert (ours == theirs).mean() > 0.95


def test_exif_is_found_after_other_segments():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(PHOTO, exif=exif)
    comment = b"\xff\xfe\x00\x0bExif\0\0abc"
    assert turbo.may_be_turned(data) and turbo.may_be_turned(data[:2] + comment + data[2:])
    plain = encoded(PHOTO)
    assert not turbo.may_be_turned(plain) and not turbo.may_be_turned(
        plain[:2] + comment + plain[2:]
    )
    for cut in range(2, len(data), 7):
        turbo.may_be_turned(data[:cut])
    assert not turbo.may_be_turned(data[:3]) and not turbo.may_be_turned(b"\xff\xd8\xff")


def test_filters_differ():
    results = {turbo.resize(PHOTO, (24, 20), name).tobytes() for name in turbo.FILTERS}
    assert len(results) == 3


@pytest.mark.parametrize("orientation", [0, *TURNS, 9])
def test_orientation_is_applied_before_the_box_is_drawn(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(57, 33), quality=95, exif=exif)
    ours, theirs = both(data)
    assert np.abs(ours - theirs).max() <= 2
    ours, stored = both(data, exif=False)
    assert np.abs(ours - stored).max() <= 2
    assert (np.abs(theirs - stored).max() > 20) == (orientation in TURNS)


@pytest.mark.parametrize(
    "data",
    [
        encoded(PHOTO, "png"),
        encoded(PHOTO, "webp", lossless=True),
        encoded(PHOTO, "jpeg", "CMYK"),
        encoded(PHOTO, "gif", "P"),
    ],
    ids=["png", "webp", "cmyk", "gif"],
)
def test_other_files_are_decoded_by_pillow_and_resized_alike(data):
    ours, theirs = both(data)
    assert np.abs(ours - theirs).max() <= 2 and (ours == theirs).mean() > 0.9


def test_a_damaged_jpeg_is_read_or_refused_as_by_pillow():
    data = encoded(PHOTO)
    with_tail = data + b"trailing bytes"
    np.testing.assert_array_equal(*[both(d)[0] for d in (data, with_tail)])
    marked = data.replace(b"\xff\xda", b"\xff\x00\x00\xff\xda", 1)  # libjpeg only warns
    with pytest.raises(ValueError, match="extraneous"):
        __import__("simplejpeg").decode_jpeg(marked)
    np.testing.assert_array_equal(both(marked)[0], both(data)[0])
    for damaged in (data[:-40], data[:20], b"\xff\xd8\xff"):
        for decoder in ("turbo", "pillow"):
            with pytest.raises(Corrupt):
                decode_crops(damaged, [(CROP, (24, 20))], ExampleDraws(0, 0, 0), True, decoder)


def test_a_large_jpeg_is_reduced_as_it_is_decoded(monkeypatch):
    assert [turbo.reduction((n, n + 9), (24, 24)) for n in (20, 95, 96, 191, 192, 384, 999)] == [
        *(1, 1, 2, 2, 4, 8, 8)
    ]
    assert turbo.reduction((500, 96), (24, 24)) == 2
    data = encoded(smooth(403, 601, scale=8), quality=98)
    factors, decode = [], turbo.decode_jpeg

    def spy(data, size, factor):
        factors.append(factor)
        pixels = decode(data, size, factor)
        assert pixels.shape[:2] == (-(-403 // factor), -(-601 // factor))
        return pixels

    monkeypatch.setattr(turbo, "decode_jpeg", spy)
    crop = CROP._replace(scale=(0.03, 0.6))
    for draw in range(20):
        ours, theirs = both(data, (24, 20), crop, draw)
        # The box moves by a quarter of a pixel of the result, 5 of the photo: 2 grey levels here.
        assert np.abs(ours - theirs).max() <= 3
    assert {2, 4} <= set(factors) <= {1, 2, 4, 8}
