"""random_crop: a photo is cropped as timm's and TensorFlow's random resized crops crop it.

The golden boxes and pixels, and the random numbers that they were drawn with, are of those
libraries (golden/make_random_crop.py).
"""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from tests.augment.test_view import png
from vit_scale.augment.geometry import flip
from vit_scale.augment.random_crop import CROPS, ExampleDraws, RandomCrop
from vit_scale.data.decode import decode, decode_crops

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "random_crop.npz"))
RATIO = {"torchvision": (3 / 4, 4 / 3), "inception": (0.75, 1.33)}


def cases(what: str) -> list[str]:
    return [name.removesuffix(f"/{what}") for name in GOLDEN if name.endswith(f"/{what}")]


class Fractions:
    """The draws of timm's golden values."""

    def __init__(self, numbers: np.ndarray):
        self._numbers = iter(numbers.tolist())

    def uniform(self) -> float:
        return next(self._numbers)

    def below(self, n: int) -> int:
        return int(self.uniform() * n)


class Words(Fractions):
    """Those of TensorFlow: 23 bits make a fraction; words that would favour some are skipped."""

    def uniform(self) -> float:
        return (next(self._numbers) & 0x7FFFFF) / 2**23

    def below(self, n: int) -> int:
        word = next(self._numbers)
        return word % n if word < 2**32 - 2**32 % n else self.below(n)


PINNED = (0.06344102965932141, 0.707504754819708)
DRAWS = {"torchvision": Fractions, "inception": Words}


def a_crop(kind: str, scale=(0.08, 1.0), resample="bicubic") -> RandomCrop:
    return RandomCrop(kind, scale, RATIO[kind], resample)


def test_boxes_are_those_of_the_reference():
    names = cases("box")
    assert len(names) == 2 * 7 * 3 * 3
    clipped = 0
    for name in names:
        kind, size, low, _ = name.split("/")
        image = tuple(map(int, size.split("x")))
        draws = DRAWS[kind](GOLDEN[f"{name}/numbers"])
        box, resample = a_crop(kind, (float(low), 1.0)).draw(image, draws)
        assert box == tuple(GOLDEN[f"{name}/box"]), name
        assert resample == "bicubic"
        clipped += kind == "torchvision" and image in ((24, 240), (240, 24)) and float(low) == 0.9
    assert clipped == 6  # where no box fits: the centre for the one, the whole for the other


def test_pixels_are_those_of_the_reference():
    """timm's to the bit. TensorFlow does not round between rows and columns, nor at the end."""
    names = cases("pixels")
    assert len(names) == 8
    for name in names:
        kind, size, resample = name.split("/")
        draws = DRAWS[kind](GOLDEN[f"{name}/numbers"])
        photo = png(GOLDEN[f"photo/{size}"])
        crops = [(a_crop(kind, resample=resample), (24, 24))]
        (ours,) = decode_crops(photo, crops, draws, True, "pillow")
        theirs = GOLDEN[f"{name}/pixels"]
        if kind == "torchvision":
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        else:
            assert np.abs(ours - np.clip(theirs, 0, 255)).max() < 1.51, name


@pytest.mark.parametrize("kind", CROPS)
def test_boxes_have_the_area_and_the_shape_asked_for(kind):
    crop = a_crop(kind, (0.1, 0.5))
    boxes = [crop.draw((300, 400), ExampleDraws(0, 0, i))[0] for i in range(2000)]
    tops, lefts, heights, widths = np.array(boxes).T
    assert (tops >= 0).all() and (tops + heights <= 300).all()
    assert (lefts >= 0).all() and (lefts + widths <= 400).all()
    area, ratio = heights * widths / 120_000, widths / heights
    assert area.min() == pytest.approx(0.1, abs=0.003) and area.max() == pytest.approx(
        0.5, abs=0.003
    )
    assert ratio.min() == pytest.approx(0.75, abs=0.02)
    assert ratio.max() == pytest.approx(1.33, abs=0.02)
    if kind == "torchvision":  # uniform in the area; TensorFlow's height is
        assert area.mean() == pytest.approx(0.3, abs=0.006)
    else:
        assert area.mean() < 0.28


def test_draws_depend_on_seed_step_and_position():
    def first(*key: int) -> tuple[float, ...]:
        draws = ExampleDraws(*key)
        return tuple(draws.uniform() for _ in range(6))

    reference = first(1, 2, 3)
    assert reference == first(1, 2, 3)
    others = {first(0, 2, 3), first(1, 3, 3), first(1, 2, 4), first(-1, 2, 3), reference}
    assert len(others) == 5
    assert reference[:2] == PINNED, "resumed runs would see other crops"
    sample = [u for i in range(300) for u in first(0, 0, i)]
    assert np.mean(sample) == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 0.07


def test_a_random_filter_is_bilinear_or_bicubic():
    crop = a_crop("torchvision", resample="random")
    filters = [crop.draw((30, 40), ExampleDraws(0, 0, i))[1] for i in range(400)]
    assert set(filters) == {"bilinear", "bicubic"} and 150 < filters.count("bilinear") < 250
    photo = png(GOLDEN["photo/57x33"])
    same = [
        decode_crops(photo, [(a_crop("torchvision", resample=r), (24, 24))], ExampleDraws(0, 0, 0))[
            0
        ]
        for r in ("bilinear", "bicubic", "lanczos")
    ]
    assert len({pixels.tobytes() for pixels in same}) == 3


def test_no_pixel_outside_of_the_box_counts():
    """The box is cut out before it is resized, as in both references."""
    photo = GOLDEN["photo/57x33"].copy()
    crop = a_crop("torchvision", (0.2, 0.3))
    top, left, height, width = crop.draw((57, 33), ExampleDraws(0, 0, 0))[0]
    (before,) = decode_crops(png(photo), [(crop, (24, 24))], ExampleDraws(0, 0, 0))
    inside = photo[top : top + height, left : left + width].copy()
    photo[:] = 255
    photo[top : top + height, left : left + width] = inside
    (after,) = decode_crops(png(photo), [(crop, (24, 24))], ExampleDraws(0, 0, 0))
    np.testing.assert_array_equal(before, after)
    assert (before != decode(png(photo), (24, 24))).any()


def test_the_step_only_flips():
    images = np.random.RandomState(0).randint(0, 256, (3, 4, 5, 3)).astype(np.uint8)
    flipped = np.asarray(flip(jnp.array(images), jnp.array([True, False, True])))
    np.testing.assert_array_equal(flipped[1], images[1])
    np.testing.assert_array_equal(flipped[::2], images[::2, :, ::-1])
    assert flipped.dtype == np.float32
