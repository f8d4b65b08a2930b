"""Evaluation of vectors: every example once, for every batch; thresholds of another split."""

import pathlib

import jax
import numpy as np
import pytest
from scipy.special import expit

from tests.helpers.tiny import CLASSES, random_images, random_params, tiny_config, tiny_model
from vit_scale.data import InMemory
from vit_scale.distributed.mesh import make_mesh
from vit_scale.errors import UserError
from vit_scale.training import measures
from vit_scale.training.evaluator import Evaluate, make_measure

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "labels.npz")
N = 23
IMAGES, MASK = random_images(N), np.arange(N) % 5 != 2
HOT = (np.random.RandomState(1).uniform(size=(N, 4)) < 0.4).astype(np.float32)
NUMBERS = np.random.RandomState(2).normal(size=(N, 4)).astype(np.float32) * 5 + 40
OVERRIDES = {
    "classes": ("loss=sigmoid",),
    "value": (
        "objective=regression",
        "loss=mse",
        "regression.mean=(40.,41.,39.,40.)",
        "regression.std=(5.,4.,6.,1.)",
    ),
}


def source(target, mask=MASK) -> InMemory:
    return InMemory("drawn", IMAGES, np.zeros(N, np.int32), CLASSES, mask, target)


def measure(kind: str, batch: int):
    cfg = tiny_config(
        f"data.target={kind}", f"eval.batch={batch}", "data.workers=0", *OVERRIDES[kind]
    )
    return make_measure(cfg, tiny_model(), make_mesh(cfg.mesh, jax.devices()[:1]))


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    pixels = (IMAGES.astype(np.float32) / 255 - 0.5) / 0.5
    return np.asarray(jax.jit(tiny_model().apply)(random_params(tiny_model()), pixels))


@pytest.mark.parametrize("kind", ["classes", "value"])
def test_every_example_counts_once_for_every_batch(kind, logits):
    target = HOT if kind == "classes" else NUMBERS
    outputs = logits if kind == "classes" else logits * (5, 4, 6, 1) + (40, 41, 39, 40)
    main, summarise = measures.SUMMARIES[kind]
    expected = summarise(np.float32(outputs[MASK]), target[MASK], None)
    noise = np.where(MASK[:, None], target, 1 - target)
    for batch in (4, 64):
        evaluate = measure(kind, batch)
        assert evaluate.main == main
        result = evaluate(random_params(tiny_model()), source(target))
        assert result.pop("n") == MASK.sum()
        for name, value in expected.items():
            np.testing.assert_allclose(result[name], value, rtol=1e-4, err_msg=name)
    assert evaluate(random_params(tiny_model()), source(noise)) == {"n": MASK.sum(), **result}
    with pytest.raises(UserError, match="none of its 23 images could be read"):
        evaluate(random_params(tiny_model()), source(target, np.zeros(N, bool)))


def test_one_class_an_image_is_measured_by_its_accuracy():
    cfg = tiny_config()
    made = make_measure(cfg, tiny_model(), make_mesh(cfg.mesh, jax.devices()[:1]))
    assert isinstance(made, Evaluate) and made.main == "accuracy"


def test_several_classes_are_scikit_learns():
    logits, present = GOLDEN["several/logits"], GOLDEN["several/present"]
    result = measures.summarise_classes(logits, present.astype(np.float32), None)
    average = GOLDEN["several/average_precision"].mean()
    assert result["mAP"] == pytest.approx(average, abs=1e-14), "of the classes that occur"
    assert result["macro_f1"] == pytest.approx(GOLDEN["several/best_f1"].mean(), abs=1e-14)
    assert result["thresholds"][3] == 0.5, "of the class that no example has"
    entropy = np.where(present, -np.log(expit(logits)), -np.log(expit(-logits)))
    assert result["loss"] == pytest.approx(entropy.mean(), rel=1e-6)


def test_thresholds_are_those_of_the_split_that_selects():
    logits, hot = GOLDEN["several/logits"], GOLDEN["several/present"].astype(np.float32)
    first, other = slice(0, 30), slice(30, None)
    selected = measures.summarise_classes(logits[first], hot[first], None)
    result = measures.summarise_classes(logits[other], hot[other], selected)
    assert result["thresholds"] == selected["thresholds"]
    best = measures.summarise_classes(logits[other], hot[other], None)
    assert result["macro_f1"] < best["macro_f1"] and result["mAP"] == best["mAP"]
    half = np.full(4, expit(0.4999)).tolist()  # no score is between it and the golden 0.5
    result = measures.summarise_classes(logits, hot, {"thresholds": half})
    for name in ("macro_f1", "micro_f1"):
        assert result[name] == pytest.approx(GOLDEN[f"several/{name}"], abs=1e-14)
    unknown = measures.summarise_classes(logits, hot, {})
    assert unknown["thresholds"] == [0.5] * 4


def test_numbers_are_scikit_learns():
    made, wanted = (GOLDEN[f"numbers/{name}"] for name in ("predictions", "targets"))
    result = measures.summarise_numbers(made, wanted, None)
    for name, value in result.items():
        assert value == pytest.approx(GOLDEN[f"numbers/{name}"], abs=1e-12), name
    exact = measures.summarise_numbers(wanted, wanted, None)
    assert exact == {"r2": 1.0, "rmse": 0.0, "mae": 0.0}


def test_outputs_that_exceed_the_memory_are_refused_with_arithmetic(monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}.get)
    measures.check_memory("set test", 1000, 1000)
    with pytest.raises(UserError) as caught:
        measures.check_memory("set test", 1_000_000, 1000)
    assert str(caught.value) == (
        "evaluating set test gathers 2 x 1,000,000 images x 1,000 outputs x 4 bytes = 7.5 GiB on "
        "each host, of which half of its 4.0 GiB of memory is too little: evaluate a part of it, "
        "such as test[:10%]"
    )
