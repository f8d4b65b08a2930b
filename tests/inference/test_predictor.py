"""Predictor: a run as a function of images, preprocessed as in its evaluation."""

import jax
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import vit_scale
from tests.helpers.tiny import (
    CLASSES,
    random_images,
    random_params,
    tiny_config,
    tiny_model,
    write_run,
)
from vit_scale import config
from vit_scale.augment.view import View
from vit_scale.data import InMemory, describe
from vit_scale.distributed.mesh import make_mesh
from vit_scale.errors import UserError
from vit_scale.inference.predictor import Predictor, read_image
from vit_scale.inspect.inspected_run import InspectedRun
from vit_scale.inspect.samples import from_folder
from vit_scale.runs.json_files import read_json
from vit_scale.training.evaluator import Evaluate

NORMALISED = ("augment.mean=(0.4, 0.5, 0.6)", "augment.std=(0.2, 0.25, 0.3)")


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    cfg = tiny_config(*NORMALISED)
    return vit_scale.load(
        write_run(tmp_path_factory.mktemp("run"), cfg, random_params(tiny_model()))
    )


def test_probabilities_are_the_softmax_of_the_normalised_image(predictor):
    images = random_images(3)
    pixels = (images / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    logits = jax.jit(tiny_model().apply)(random_params(tiny_model()), pixels.astype(np.float32))
    result = predictor(images)
    np.testing.assert_allclose(result, softmax(logits, -1), atol=1e-5)
    np.testing.assert_allclose(result.sum(-1), 1, atol=1e-6)
    assert np.ptp(result) > 0.05


def test_attributes(predictor):
    assert (predictor.classes, predictor.step, predictor.size) == (CLASSES, 5, (16, 16))
    assert predictor.cfg.augment.mean == (0.4, 0.5, 0.6)
    np.testing.assert_array_equal(predictor.params["cls"], random_params(tiny_model())["cls"])


@pytest.mark.parametrize(("kind", "layer"), [("pooled", None), ("cls", 0), ("cls_mean", -1)])
def test_features_are_those_of_the_preprocessed_image(predictor, kind, layer):
    small = random_images(3, (8, 8))
    pixels = predictor.preprocess(small.repeat(4, 1).repeat(4, 2))  # squares, reduced to 16 x 16
    expected = tiny_model().features(predictor.params, pixels, kind, layer)
    result = predictor.features(small.repeat(4, 1).repeat(4, 2), kind, layer)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)
    assert result.dtype == np.float32 and np.ptp(result) > 0.1


def test_features_that_a_model_lacks(predictor):
    with pytest.raises(UserError, match="layer 9 of 2 blocks"):
        predictor.features(random_images(1), layer=9)
    with pytest.raises(UserError, match="feature 'patch' is unknown"):
        predictor.features(random_images(1), "patch")


def test_images_of_other_sizes_are_resized(predictor):
    small = random_images(2, (4, 4))
    large = small.repeat(10, 1).repeat(10, 2)  # 40 x 40, of flat squares
    assert predictor(large).shape == (2, len(CLASSES))
    flat = np.full((1, 40, 24, 3), 77, np.uint8)
    np.testing.assert_allclose(predictor(flat), predictor(flat[:, :16, :16]), atol=1e-5)


def test_top_is_ordered_and_named(predictor, tmp_path):
    file = tmp_path / "image.png"
    Image.fromarray(random_images(1)[0]).save(file)
    probabilities = dict(zip(CLASSES, predictor(random_images(1))[0], strict=True))
    result = predictor.top(file, 3)
    assert [name for name, _ in result] == sorted(CLASSES, key=probabilities.get, reverse=True)[:3]
    np.testing.assert_allclose(
        [p for _, p in result], sorted(probabilities.values())[:0:-1], atol=1e-6
    )
    assert len(predictor.top(str(file))) == len(CLASSES), "5 of 4 classes are 4"
    np.testing.assert_array_equal(predictor.read(file), random_images(1)[0])


def test_a_file_is_cropped_to_the_centre(tmp_path):
    """32 x 64 px to 16 x 16: halved, then 8 of the columns go on each side."""
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 16:48] = 200
    Image.fromarray(image).save(tmp_path / "wide.png")
    for fit in ("shorter", "cover"):
        result = read_image(tmp_path / "wide.png", (16, 16), View(fit, 1.0, "train"))
        assert result.shape == (16, 16, 3) and (result[:, 2:-2] == 200).all()


@pytest.mark.parametrize(
    ("stored", "overrides"),
    [
        ((32, 32), ()),
        ((20, 27), ("data.name=folder", "data.load=20", "data.width=64")),
        ((52, 52), ("data.name=fractal", "data.fractal.resolution=52")),
    ],
    ids=["cifar10", "folder", "fractal"],
)
def test_a_file_gets_the_probabilities_of_its_evaluation(stored, overrides, tmp_path):
    """Also where the stored images are smaller or larger than what the model sees, 48 px."""
    overrides = ("data.resolution=48", *overrides)
    cfg, model = tiny_config(*overrides), tiny_model(*overrides)
    images, labels = random_images(3, stored), np.array([0, 1, 3])
    source = InMemory("stored", images, labels, CLASSES)
    run = write_run(tmp_path / "run", cfg, random_params(model), data=describe(source))
    (tmp_path / "images").mkdir()
    for image, label in zip(images, labels, strict=True):
        Image.fromarray(image).save(tmp_path / "images" / f"{label}.png")
    predictor, evaluate = vit_scale.load(run), Evaluate(cfg, model, make_mesh(cfg.mesh))
    for image, label in zip(images, labels, strict=True):
        measured = evaluate(predictor.params, InMemory("one", image[None], [label], CLASSES))
        said = dict(predictor.top(tmp_path / "images" / f"{label}.png"))[CLASSES[label]]
        np.testing.assert_allclose(said, np.exp(-measured["loss"]), rtol=1e-5)
    inspected = InspectedRun(run)
    looked = from_folder(str(tmp_path / "images"), inspected.decode_size, inspected.decode_view)
    np.testing.assert_array_equal(looked.images, images, "inspect --images")


def test_a_run_that_was_trained_with_cudnn_is_a_model_without_a_gpu(tmp_path):
    overrides = ("model.dtype=bfloat16", "model.pool=map")
    params = random_params(tiny_model(*overrides))
    cudnn, xla = (
        write_run(tmp_path / kind, tiny_config(*overrides, f"model.attention={kind}"), params)
        for kind in ("cudnn", "xla")
    )
    predictor = vit_scale.load(cudnn)
    images = random_images(3)
    np.testing.assert_array_equal(predictor(images), vit_scale.load(xla)(images))
    source = InMemory("three", images, np.array([0, 1, 3]), CLASSES)
    evaluate = Evaluate(predictor.cfg, predictor.model, make_mesh(predictor.cfg.mesh))
    assert evaluate(predictor.params, source)["n"] == 3
    looked = InspectedRun(cudnn).attention_maps(images)["heads"]
    np.testing.assert_array_equal(looked, InspectedRun(xla).attention_maps(images)["heads"])
    assert read_json(cudnn / "run.json")["config"]["model"]["attention"] == "cudnn"


def test_a_run_with_a_removed_config_field_is_loaded(predictor, tmp_path, monkeypatch):
    monkeypatch.setitem(config.REMOVED, "model.fused", "all kernels are apart")
    old = config.to_json(tiny_config(*NORMALISED))
    old["model"]["fused"] = True
    run = write_run(tmp_path, predictor.cfg, predictor.params, config=old)
    result = vit_scale.load(run)(random_images(2))
    np.testing.assert_array_equal(result, predictor(random_images(2)))


def test_unreadable_images_are_one_line(predictor, tmp_path):
    with pytest.raises(UserError, match=r"cannot read image .*none\.png: No such file"):
        predictor.top(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UserError, match=r"cannot read image .*text\.png: "):
        predictor.top(tmp_path / "text.png")


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        vit_scale.load(tmp_path)
