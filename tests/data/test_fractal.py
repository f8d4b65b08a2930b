"""The generated set: systems follow the paper, images are equal everywhere, the cache is safe."""

import zlib

import numpy as np
import pytest

from vit_scale import config
from vit_scale.data import fractal, open_split
from vit_scale.errors import UserError

GOLDEN = 1270267897  # CRC-32 of the pixels


def settings(tmp_path, **block):
    """Return the data block of a small generated set."""
    cfg = config.base().data
    cfg.name, cfg.path = "fractal", str(tmp_path)
    cfg.fractal.update({"classes": 4, "resolution": 24, "points": 1000, **block})
    return cfg


def images(cfg, split="train") -> np.ndarray:
    source = open_split(cfg, split)
    return source.read(np.arange(len(source)))["image"]


def test_systems_obey_the_constraint_on_singular_values():
    """Anderson & Farrell 2022: 1 >= s1 >= s2 >= 0, (5 + n) / 2 <= sum(s1 + 2 s2) < (6 + n) / 2."""
    sizes = set()
    for number in range(200):
        maps = fractal._draw_system(fractal._generator(0, number))
        n = len(maps)
        sizes.add(n)
        s = np.linalg.svd(maps[:, :4].reshape(n, 2, 2), compute_uv=False)
        assert s.max() <= 1 + 1e-12
        assert (5 + n) / 2 - 1e-9 <= (s[:, 0] + 2 * s[:, 1]).sum() < (6 + n) / 2 + 1e-9
        assert np.abs(maps[:, 4:]).max() <= 1
    assert sizes == {2, 3, 4}


def test_accepted_systems_fill_their_image():
    for number in range(20):
        maps = fractal.system(0, number)
        assert fractal._fill(maps, np.random.default_rng(0)) >= 0.8 * fractal.FILL


def test_images_are_the_same_everywhere(tmp_path):
    """Golden: exact float64 arithmetic. A change of the pixels must increase fractal.VERSION."""
    drawn = images(settings(tmp_path))
    assert drawn.shape == (4, 24, 24, 3)
    assert set(np.unique(drawn)) == {0, fractal.GRAY}
    assert zlib.crc32(drawn.tobytes()) == GOLDEN


def test_a_class_does_not_depend_on_the_number_of_classes(tmp_path):
    few, many = images(settings(tmp_path)), images(settings(tmp_path, classes=7))
    np.testing.assert_array_equal(few, many[:4])
    held_out = images(settings(tmp_path, classes=2, first=5))
    np.testing.assert_array_equal(held_out, many[5:7])
    assert open_split(settings(tmp_path, first=5), "train").classes[0] == "fractal-00005"


def test_classes_and_seeds_differ(tmp_path):
    drawn = images(settings(tmp_path))
    assert len({image.tobytes() for image in drawn}) == 4
    assert not np.array_equal(drawn, images(settings(tmp_path, seed=1)))


def test_images_of_a_class_differ_by_jitter_and_patches(tmp_path):
    """The first is the class itself; without jitter the others differ only by their patches."""
    two = {"train_per_class": 2, "test_per_class": 1}
    jittered, still = (images(settings(tmp_path, jitter=j, **two)) for j in (0.3, 0.0))
    np.testing.assert_array_equal(jittered[:4], still[:4])
    apart = [np.mean(many[:4] != many[4:]) for many in (jittered, still)]
    assert apart[0] > 1.5 * apart[1] > 0
    test = images(settings(tmp_path, **two), "test")
    assert not any(np.array_equal(a, b) for a in test for b in jittered)
    labels = open_split(settings(tmp_path, **two), "train").read(np.arange(8))["label"]
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_the_cache_is_read_and_redrawn_if_corrupt(tmp_path, monkeypatch, caplog):
    cfg = settings(tmp_path)
    drawn = images(cfg)
    (cache,) = tmp_path.iterdir()
    good = cache.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(fractal, "_draw_all", None)  # calling it would fail
        np.testing.assert_array_equal(images(cfg), drawn)
    for bad in (good[: len(good) // 2], b"", good.replace(good[200:240], bytes(40))):
        cache.write_bytes(bad)
        np.testing.assert_array_equal(images(cfg), drawn)
        assert "damaged" in caplog.text
        assert cache.read_bytes() == good
        caplog.clear()
    assert [f.name for f in tmp_path.iterdir()] == [cache.name]


@pytest.mark.parametrize(
    ("block", "split", "message"),
    [
        ({"classes": 0}, "train", "data.fractal.classes=0"),
        ({"jitter": -0.1}, "train", "data.fractal.jitter=-0.1"),
        ({}, "test", "test_per_class=0"),
    ],
)
def test_invalid_values_are_refused(tmp_path, block, split, message):
    with pytest.raises(UserError, match=message):
        open_split(settings(tmp_path, **block), split)
