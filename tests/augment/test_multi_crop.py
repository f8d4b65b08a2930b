"""Several crops of each image, on the device and of files, and the patches that are hidden."""

import io

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.objectives import SELF_SUPERVISED
from tests.helpers.tiny import random_images, tiny_config
from vit_scale.augment.multi_crop import multi_crop
from vit_scale.augment.patch_masks import draw_blocks, draw_counts
from vit_scale.augment.random_crop import ExampleDraws, file_crop
from vit_scale.data import open_training, train_batches

FILES = ("data.name=folder", "augment.crop=torchvision", "data.workers=0", "data.decoder=pillow")


def config(*overrides: str):
    return tiny_config(*SELF_SUPERVISED["lejepa"], *overrides)


def batch(images: np.ndarray) -> dict:
    n = len(images)
    return {"image": images, "label": np.zeros(n, np.int32), "mask": np.ones(n, bool)}


def crops_of(images: np.ndarray, *overrides: str, key: int = 0) -> dict[str, np.ndarray]:
    """As levels from 0 to 255."""
    cfg = config(*overrides)
    result = jax.jit(lambda b, k: multi_crop(b, k, cfg, (16, 16)))(
        batch(images), jax.random.key(key)
    )
    return {name: np.round(127.5 * (np.asarray(crops) + 1)) for name, crops in result.items()}


# On the device


def test_crops_differ_in_size_scale_and_kind_of_change():
    """Each image has one level, but for its border, so that a crop shows what was done to it."""
    images = np.full((8, 32, 32, 3), 200, np.uint8)
    only = ("views.solarize=(0.,1.,0.)", "views.globals=3", "views.locals=4")
    result = crops_of(images, *only)
    assert result["global"].shape == (8, 3, 16, 16, 3) and result["local"].shape == (8, 4, 8, 8, 3)
    assert (result["global"][:, 0] == 200).all() and (result["local"] == 200).all()
    assert (result["global"][:, 1:] == 55).all()  # the other global crops are solarised


def test_a_crop_depends_on_its_position_and_number_alone():
    images = random_images(8, (32, 32))
    whole, half = crops_of(images), crops_of(images[:4])
    for name in ("global", "local"):
        np.testing.assert_array_equal(whole[name][:4], half[name])
        assert len({crop.tobytes() for crop in whole[name].reshape(16, -1)}) == 16
        assert not np.array_equal(whole[name], crops_of(images, key=1)[name])


def test_small_crops_are_small_parts():
    """Of an image of one colour a row, a small crop spans few rows, a large one many."""
    rows = np.broadcast_to(8 * np.arange(32, dtype=np.uint8)[:, None, None], (32, 32, 3))
    fields = ("augment.scale=(.8,1.)", "views.local_scale=(.05,.1)", "views.solarize=(0.,0.,0.)")
    result = crops_of(np.stack([rows] * 8), *fields)
    spans = {name: np.ptp(crops[..., 0], axis=(2, 3)) / 8 for name, crops in result.items()}
    assert spans["local"].max() < 14 < 20 < spans["global"].min()


# Of files


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "train/one").mkdir(parents=True)
    for number in range(6):
        pixels = random_images(1, (40 + number, 52), seed=number)[0]
        Image.fromarray(pixels).save(folder / f"train/one/{number}.png")
    return folder


def read(photos, rows=None, *overrides: str) -> dict:
    cfg = config(*FILES, f"data.path={photos}", "data.batch=8", *overrides)
    source = open_training(cfg)
    return next(iter(train_batches(source, cfg.data, cfg.seed, 3, 4, rows)))[1]


def test_crops_of_files_are_cut_one_after_the_other(photos):
    """Large ones first, from one stream of numbers for each example, as Pillow resizes them."""
    result = read(photos)
    assert result["image"].shape == (8, 2, 16, 16, 3) and result["local"].shape == (8, 2, 8, 8, 3)
    cfg = config(*FILES)
    files = {
        np.asarray(Image.open(file)).tobytes(): file for file in (photos / "train/one").iterdir()
    }
    crops = file_crop(cfg)
    for position in range(8):
        matching = 0
        for file in files.values():
            image, draws, same = Image.open(file), ExampleDraws(0, 3, position), True
            made = [*result["image"][position], *result["local"][position]]
            for (crop, size), pixels in zip(crops.sized((16, 16)), made, strict=True):
                (top, left, height, width), _ = crop.draw((image.height, image.width), draws)
                cut = image.crop((left, top, left + width, top + height))
                expected = cut.resize(size[::-1], Image.Resampling.BICUBIC)
                same &= np.array_equal(pixels, np.asarray(expected))
            matching += same
        assert matching == 1, position


def test_hosts_read_their_rows_of_the_same_crops(photos):
    whole = read(photos)
    for rows in (np.arange(4), np.arange(4, 8)):
        part = read(photos, rows)
        for name in ("image", "local", "label", "mask"):
            np.testing.assert_array_equal(part[name], whole[name][rows])


def test_a_jpeg_is_decoded_once_for_all_crops(photos, monkeypatch):
    from vit_scale.data import turbo
    from vit_scale.data.decode import decode_crops

    stream = io.BytesIO()
    Image.fromarray(random_images(1, (400, 400))[0]).save(stream, "jpeg", quality=90)
    calls, decode = [], turbo.decode_jpeg

    def counted(data, size, factor=1):
        calls.append(factor)
        return decode(data, size, factor)

    monkeypatch.setattr(turbo, "decode_jpeg", counted)
    crops = file_crop(config(*FILES)).sized((16, 16))
    cut = decode_crops(stream.getvalue(), crops, ExampleDraws(0, 0, 0))
    assert [pixels.shape for pixels in cut] == [(16, 16, 3)] * 2 + [(8, 8, 3)] * 2
    assert len(calls) == 1 and calls[0] > 1


def test_the_device_only_changes_colours_of_crops_of_files(photos):
    """So that a step sees what was read: here nothing is changed but mirrored."""
    result = read(photos)
    plain = ("augment.flip=False", "views.blur=(0.,0.,0.)", "views.solarize=(0.,0.,0.)")
    cfg = config(*FILES, *plain)
    crops = jax.jit(lambda b, k: multi_crop(b, k, cfg, (16, 16)))(result, jax.random.key(0))
    levels = {name: np.round(127.5 * (np.asarray(x) + 1)) for name, x in crops.items()}
    np.testing.assert_array_equal(levels["global"], result["image"])
    np.testing.assert_array_equal(levels["local"], result["local"])


# Hidden patches


def test_shares_of_hidden_patches():
    """Half of the images, with ratios that cover the range evenly, in random order."""
    counts = np.asarray(draw_counts(jax.random.key(0), 40, 100, 0.5, (0.1, 0.5)))
    hiding = np.sort(counts[counts > 0])
    assert len(hiding) == 20 and hiding[0] >= 10 and hiding[-1] <= 50
    edges = np.floor(100 * np.linspace(0.1, 0.5, 21))
    assert (hiding >= edges[:-1]).all() and (hiding <= edges[1:]).all()
    other = np.asarray(draw_counts(jax.random.key(1), 40, 100, 0.5, (0.1, 0.5)))
    assert ((counts > 0) != (other > 0)).any()


def test_hidden_patches_are_blocks_up_to_a_count():
    keys = jax.random.split(jax.random.key(0), 64)
    masks = np.asarray(jax.vmap(lambda key: draw_blocks(key, (14, 14), 60))(keys))
    counts = masks.sum((1, 2))
    assert (counts <= 60).all() and counts.mean() > 50
    # Blocks: a hidden patch's neighbour is mostly hidden too, which of single patches 30 % were.
    beside = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, :-1].sum()
    assert beside > 0.6
    assert not draw_blocks(keys[0], (14, 14), 0).any()
    assert len({mask.tobytes() for mask in masks}) == 64
