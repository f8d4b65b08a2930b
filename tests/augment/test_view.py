"""view: evaluation sees of a photo what timm's and transformers' evaluation sees, pixel by pixel.

The golden pixels are timm's own (golden/make_view.py).
"""

import io
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

import vit_scale
from tests.helpers.tiny import (
    CLASSES,
    random_images,
    random_params,
    tiny_config,
    tiny_model,
    write_run,
)
from vit_scale import config, data
from vit_scale.augment.pipeline import eval_images
from vit_scale.augment.view import View, crop_of, view
from vit_scale.data import InMemory, describe, open_split
from vit_scale.data.decode import decode
from vit_scale.distributed.mesh import make_mesh
from vit_scale.errors import UserError
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.training.evaluator import Evaluate

GOLDEN = dict(np.load(pathlib.Path(__file__).parents[1] / "golden" / "view.npz"))
CASES = [name for name in GOLDEN if not name.startswith("photo/")]


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png")
    return stream.getvalue()


def seen(case: str) -> np.ndarray:
    photo, size, fit, crop, resample = case.split("/")
    height, width = map(int, size.split("x"))
    return decode(png(GOLDEN[f"photo/{photo}"]), (height, width), View(fit, float(crop), resample))


def test_a_file_is_seen_as_timm_sees_it():
    assert len(CASES) == 120
    for case in CASES:
        np.testing.assert_array_equal(seen(case), GOLDEN[case], err_msg=case)


def test_each_field_matters():
    """Of a photo that is not square, and for a model that is not."""
    base = "57x33/16x24/shorter/0.9/bicubic"
    for other, least in (
        ("stretch/0.9/bicubic", 99),
        ("shorter/1.0/bicubic", 20),
        ("shorter/0.9/bilinear", 4),
    ):
        assert np.abs(seen(base).astype(int) - seen(f"57x33/16x24/{other}")).max() > least


def test_half_a_pixel_is_rounded_as_timm_or_as_transformers_does():
    """27 rows of which 16 are cut out: the first is the fifth and a half."""
    assert View("shorter", 1.0, "train").corner((27, 16), (16, 16)) == (6, 0)
    assert View("shortest_edge", 1.0, "train").corner((27, 16), (16, 16)) == (5, 0)
    photo = png(GOLDEN["photo/57x33"])
    assert Image.open(io.BytesIO(photo)).size == (33, 57)
    one, other = (
        decode(photo, (16, 16), View(f, 1, "train")) for f in ("shorter", "shortest_edge")
    )
    np.testing.assert_array_equal(one[:-1], other[1:])


def test_cover_is_what_training_decodes():
    photo = png(GOLDEN["photo/40x61"])
    plain = decode(photo, (16, 16))
    np.testing.assert_array_equal(decode(photo, (16, 16), View("cover", 1.0, "train")), plain)
    nearer = decode(photo, (16, 16), View("cover", 0.5, "train"))
    middle = Image.open(io.BytesIO(photo)).resize(
        (16, 16), Image.Resampling.BICUBIC, (20.5, 10, 40.5, 30)
    )
    np.testing.assert_array_equal(nearer, middle)


def test_an_image_of_the_models_size_is_left_alone_unless_it_is_cropped():
    photo = GOLDEN["photo/20x20"]
    for fit in ("shorter", "cover", "stretch"):
        np.testing.assert_array_equal(decode(png(photo), (20, 20), View(fit, 1, "train")), photo)
        assert np.any(decode(png(photo), (20, 20), View(fit, 0.5, "train")) != photo)


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_on_the_device_as_in_a_file(resample):
    """A set in memory, of squares: within the rounding to whole grey levels of the file's way."""
    photos = random_images(2, (40, 40)) // 2 + 64
    cfg = tiny_config("augment.mean=(0.0, 0.0, 0.0)", "augment.std=(1.0, 1.0, 1.0)").augment
    what = View("shorter", 0.8, resample)
    actual = 255 * np.asarray(eval_images(photos, cfg, (16, 16), what))
    for photo, image in zip(photos, actual, strict=True):
        assert np.abs(image - decode(png(photo), (16, 16), what)).max() <= 1.001
    whole = 255 * np.asarray(eval_images(photos, cfg, (16, 16), what._replace(crop=1.0)))
    assert np.abs(whole - actual).max() > 10


def test_crop_of_is_what_gives_that_size():
    for size in (16, 224, 384, 448, 518):
        for resized in range(size, 2 * size):
            crop = crop_of((size, size), (resized, resized))
            assert View("shorter", crop, "train").resized((size, size)) == (resized, resized)
    assert View("stretch", crop_of((24, 40), (26, 44)), "train").resized((24, 40)) == (26, 44)
    assert crop_of((12, 12), (15, 18)) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "fit=squash",
            "eval.fit='squash' is unknown; valid: cover, shorter, shortest_edge, stretch",
        ),
        ("resample=linear", "eval.resample='linear' is unknown; did you mean bilinear"),
        ("crop=0.0", "eval.crop=0.0 must be above 0 and at most 1"),
        ("crop=87.5", "eval.crop=87.5 must be above 0 and at most 1"),
    ],
)
def test_values_that_make_no_sense(override, message):
    with pytest.raises(UserError) as caught:
        view(config.override(config.base(), [f"eval.{override}"]).eval)
    assert message in str(caught.value)


@pytest.fixture
def photos(tmp_path) -> pathlib.Path:
    """A folder of photos that are not square, of four classes, and a run's config for it."""
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number, shape in enumerate(((40, 61), (57, 33))):
                shifted = np.roll(GOLDEN["photo/" + "x".join(map(str, shape))], label, 2)
                Image.fromarray(shifted).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("memory", ["False", "True"])
@pytest.mark.parametrize("load", [(), ("data.load=24",)])
def test_predict_sees_what_evaluation_sees(memory, load, photos, tmp_path):
    """Of a crop, files in memory and files decoded larger than the model sees them."""
    overrides = ("eval.crop=0.7", "eval.resample=bilinear", f"data.memory={memory}", *load)
    cfg = tiny_config("data.name=folder", f"data.path={photos}", "data.workers=0", *overrides)
    params = random_params(tiny_model())
    source = open_split(cfg.data, "val", view(cfg.eval))
    run = write_run(tmp_path / "run", cfg, params, data=describe(source))
    predictor = vit_scale.load(run)
    measured = Evaluate(cfg, predictor.model, make_mesh(cfg.mesh))(params, source)
    probabilities = [
        dict(predictor.top(file, 4))[file.parent.name] for file in sorted(photos.glob("val/*/*"))
    ]
    assert measured["n"] == len(probabilities) == 8
    np.testing.assert_allclose(measured["loss"], -np.mean(np.log(probabilities)), rtol=1e-5)
    other = config.override(cfg, ["eval.crop=1.0"])
    whole = Evaluate(other, predictor.model, make_mesh(cfg.mesh))(
        params, open_split(cfg.data, "val", view(other.eval))
    )
    assert abs(whole["loss"] - measured["loss"]) > 1e-4


def test_a_set_in_memory_is_cropped_on_the_device_once(tmp_path):
    cfg = tiny_config("eval.crop=0.5")
    params = random_params(tiny_model())
    images, labels = random_images(4, (32, 32)), np.arange(4, dtype=np.int32)
    source = InMemory("stored", images, labels, CLASSES)
    run = write_run(tmp_path / "run", cfg, params, data=describe(source))
    Image.fromarray(images[2]).save(tmp_path / "2.png")
    predictor = vit_scale.load(run)
    centre = (images[:, 8:24, 8:24] / 255 - 0.5) / 0.5
    logits = predictor.model.apply(params, centre.astype(np.float32))
    np.testing.assert_allclose(predictor(images), jax.nn.softmax(logits), atol=1e-5)
    probabilities = dict(predictor.top(tmp_path / "2.png", 4))
    np.testing.assert_allclose(
        [probabilities[name] for name in CLASSES], jax.nn.softmax(logits)[2], atol=1e-5
    )


def test_inspect_crops_once_wherever_images_are(tmp_path):
    """Also of converted weights, which were trained on no set that is known."""
    run = write_run(tmp_path / "run", tiny_config("eval.crop=0.5"), random_params(tiny_model()))
    memory, files = InspectedRun(run), InspectedRun(run, ["data.name=folder"])
    assert (memory.decode_view.crop, memory.device_view.crop) == (1.0, 0.5)
    assert (files.decode_view.crop, files.device_view.crop) == (0.5, 1.0)


def test_training_does_not_see_evaluations_view(photos):
    cfg = tiny_config("data.name=folder", f"data.path={photos}", "eval.crop=0.5").data
    plain, cropped = open_split(cfg, "val"), open_split(cfg, "val", View("stretch", 0.5, "lanczos"))
    batches = [source.read(np.arange(4))["image"] for source in (plain, cropped)]
    assert np.any(batches[0] != batches[1])
    first = sorted(photos.glob("val/*/*"))[0].read_bytes()
    np.testing.assert_array_equal(batches[0][0], decode(first, (16, 16)))
    assert data.are_files(cfg) and not data.are_files(tiny_config().data)
