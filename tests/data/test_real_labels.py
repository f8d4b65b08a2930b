"""ReaL: any of an image's classes is right, images without any don't count; the file is checked."""

import json

import jax
import numpy as np
import pytest

from tests.data.test_image_folder import block, everything, picture, save
from tests.data.test_tar_shards import refused
from tests.helpers.tiny import random_params, tiny_config, tiny_model
from vit_scale import data
from vit_scale.data.real_labels import with_real_labels
from vit_scale.distributed.mesh import make_mesh
from vit_scale.training.evaluator import Evaluate

# Class and number of each image; the numbers are the order of real.json.
IMAGES = [(0, 4), (0, 1), (1, 3), (1, 6), (2, 5), (3, 2)]
RIGHT = {1: [0], 2: [1, 3], 3: [1, 2], 4: [], 5: [2, 0], 6: [0]}  # by number


@pytest.fixture
def folder(tmp_path):
    for label, number in IMAGES:
        name = f"val/n{label}/ILSVRC2012_val_{number:08}.png"
        save(tmp_path / "set" / name, picture(8, 8, number))
    return tmp_path / "set"


def written(folder, labels) -> str:
    (folder / "real.json").write_text(json.dumps(labels))
    return str(folder / "real.json")


def opened(folder, classes=(), labels=None):
    file = written(folder, [RIGHT[n] for n in sorted(RIGHT)] if labels is None else labels)
    cfg = tiny_config("data.name=folder", f"data.path={folder}", "data.resolution=8")
    return data.open_evaluation(cfg, "val", classes, file)


def test_labels_are_in_the_order_of_file_names(folder):
    source = opened(folder)
    batch = everything(source)
    expected = np.zeros((6, 4))
    for row, (_, number) in enumerate(sorted(IMAGES)):
        expected[row, RIGHT[number]] = 1
    np.testing.assert_array_equal(batch["target"], expected)
    assert batch["mask"].tolist() == [number != 4 for _, number in sorted(IMAGES)]
    batches = list(data.eval_batches(source, 4))
    assert np.concatenate([b["mask"] for b in batches]).sum() == 5


@pytest.mark.parametrize("batch", [2, 6])
def test_a_prediction_is_right_if_it_is_among_them(folder, batch):
    cfg = tiny_config("data.name=folder", f"eval.batch={batch}", "data.workers=0")
    cfg.data.path = str(folder)
    model = tiny_model()
    outputs = ("n2", "n0", "n3", "n1")  # a model with the classes in another order
    source = data.open_evaluation(cfg, "val", outputs, written(folder, [*RIGHT.values()]))
    predict = jax.jit(model.apply)
    pixels = everything(source)["image"].astype(np.float32) / 127.5 - 1
    guesses = np.asarray(predict(random_params(model), pixels)).argmax(-1)
    aligned, _ = data.align(source, outputs)
    result = Evaluate(cfg, model, make_mesh(cfg.mesh, jax.devices()[:1]))(
        random_params(model), aligned
    )
    hits = [
        int(outputs[guess][1]) in RIGHT[number]
        for guess, (_, number) in zip(guesses, IMAGES, strict=True)
        if RIGHT[number]
    ]
    assert (result["n"], result["accuracy"]) == (5, pytest.approx(np.mean(hits)))
    assert 0 < np.mean(hits) < 1, "choose other pictures"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0]], "real.json has 1 images, and set val 6"),
        ([[0], [1], [1], [9], [2], [0]], "class 9 is outside the 4 of set val"),
        ([[3], [0], [2], [], [0], [2]], "has the label of set val for only 0 of 5 images: its"),
        ({"a": 1}, "give ReaL's real.json"),
        ([1, 2], "give ReaL's real.json"),
    ],
)
def test_another_file_is_one_line(folder, labels, message):
    assert message in refused(lambda: opened(folder, labels=labels))


def test_a_set_without_names_is_refused(folder):
    half = data.open_split(block(folder), "val[:50%]")
    file = written(folder, [[0]] * 3)
    assert "has no names of its images, or is a slice" in refused(
        lambda: with_real_labels(half, file)
    )
