"""Random erasing: the boxes are timm's for the same numbers (golden/make_erasing.py)."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.augment.test_pipeline import KEY, a_batch, augmented, settings
from vit_scale.augment.erasing import draw_boxes, erase, first_box
from vit_scale.augment.pipeline import train_images
from vit_scale.errors import UserError

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "erasing.npz"))


@pytest.mark.parametrize("case", ["224", "wide", "small"])
def test_boxes_are_timms(case):
    height, width, low, high = GOLDEN[f"{case}/setting"]
    boxes = [
        first_box(jnp.asarray(numbers, jnp.float32), (low, high), (int(height), int(width)))
        for numbers in GOLDEN[f"{case}/numbers"]
    ]
    np.testing.assert_array_equal(np.array(boxes), GOLDEN[f"{case}/boxes"])
    empty = (GOLDEN[f"{case}/boxes"] == 0).all(1)
    assert empty.any() == (case == "small")


def test_half_of_the_images_have_a_box():
    cfg = settings(erase=0.5)
    boxes = np.asarray(draw_boxes(KEY, 1000, cfg, (64, 64)))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 64**2
    assert 440 < (area > 0).sum() < 560
    assert area[area > 0].min() > 0.018 and area.max() < 0.35
    np.testing.assert_array_equal(boxes[:10], draw_boxes(KEY, 10, cfg, (64, 64)))
    assert (boxes != np.asarray(draw_boxes(jax.random.key(9), 1000, cfg, (64, 64)))).any()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_only_the_box_is_filled(mode):
    images = jnp.full((3, 20, 30, 3), 7.0)
    boxes = jnp.array([[2, 3, 12, 23], [0, 0, 0, 0], [0, 0, 20, 30]])
    result = np.asarray(erase(images, boxes, KEY, mode))
    inside = result[0, 2:12, 3:23]
    assert (result[1] == 7).all() and (result[0] == 7).sum() == 3 * (600 - 200)
    if mode == "const":
        assert (inside == 0).all() and (result[2] == 0).all()
    elif mode == "rand":
        assert (inside == inside[0, 0]).all() and len(set(inside[0, 0].tolist())) == 3
        assert (inside[0, 0] != result[2, 0, 0]).all()
    else:
        assert abs(result[2].mean()) < 0.1 and abs(result[2].std() - 1) < 0.1
        assert len(np.unique(result[2])) > 1700


def test_it_is_done_to_normalised_images():
    cfg = settings(erase=1.0, erase_mode="const", mean=(0.1, 0.2, 0.3))
    plain, _ = augmented(a_batch(), settings(mean=(0.1, 0.2, 0.3)))
    erased, _ = augmented(a_batch(), cfg)
    changed = (plain != erased).any(-1)
    assert changed.any((1, 2)).all() and not changed.all((1, 2)).any()
    assert (erased[changed] == 0).all()


def test_after_until_nothing_is_mixed_or_erased():
    cfg = settings(erase=1.0, mixup=1.0, cutmix=1.0, until=0.5, flip=True)
    run = jax.jit(lambda batch: train_images(batch, KEY, cfg, (10, 14), 4))
    plain = jax.jit(lambda batch: train_images(batch, KEY, settings(flip=True), (10, 14), 4))
    batch = a_batch()
    late, early = (run({**batch, "late": jnp.bool_(value)}) for value in (True, False))
    for ours, expected in zip(late, plain(batch), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert all((np.asarray(a) != np.asarray(b)).any() for a, b in zip(early, late, strict=True))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"erase": 1.5}, "augment.erase=1.5 must be a probability"),
        ({"erase_area": (0.5, 0.2)}, "augment.erase_area="),
        ({"erase_mode": "noise"}, "augment.erase_mode='noise' is unknown; valid: const"),
        ({"mix": "elem"}, "augment.mix='elem' is unknown"),
        ({"until": 1.1}, "augment.until=1.1 must be a fraction"),
    ],
)
def test_bad_values_are_one_line(fields, message):
    with pytest.raises(UserError) as caught:
        augmented(a_batch(), settings(**fields))
    assert message in str(caught.value)
