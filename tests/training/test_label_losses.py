"""Losses of labels that are vectors, and of rare classes: golden values, and what is refused."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit, log_softmax

from tests.helpers.tiny import CLASSES, random_batch, random_params, tiny_config, tiny_model
from vit_scale.augment.pipeline import train_images
from vit_scale.data import InMemory
from vit_scale.errors import UserError
from vit_scale.training.objectives import check, make_objective
from vit_scale.training.objectives.class_weights import compute_weights
from vit_scale.training.objectives.losses import make_loss, make_number_loss
from vit_scale.training.statistics import with_statistics

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "labels.npz")
KEY = jax.random.key(3)
WEIGHTS = (0.5, 2.0, 1.0, 4.0)
SEVERAL = ("data.target=classes", "loss=sigmoid")
NUMBERS = ("data.target=value", "objective=regression", "loss=mse")


def vectors(seed: int = 0) -> dict[str, np.ndarray]:
    """A batch whose images have several classes; the second is masked."""
    target = np.random.RandomState(seed).randint(0, 2, (8, 4)).astype(np.float32)
    mask = np.arange(8) != 1
    return random_batch() | {"target": target, "label": np.zeros(8, np.int32), "mask": mask}


def weighted(*overrides: str):
    return tiny_config(
        "class_weights.kind=balanced", f"class_weights.weights={WEIGHTS}", *overrides
    )


@pytest.mark.parametrize(
    ("name", "overrides"), [("2_25", ["focal.alpha=0.25"]), ("15", ["focal.gamma=1.5"])]
)
def test_the_focal_loss_and_its_gradient_are_the_papers(name, overrides):
    loss = make_loss(tiny_config("loss=focal", *overrides))
    logits, labels = (jnp.float32(GOLDEN[f"focal/{part}"]) for part in ("logits", "labels"))
    np.testing.assert_allclose(loss(logits, labels), GOLDEN[f"focal/losses_{name}"], rtol=2e-6)
    gradient = jax.grad(lambda x: loss(x, labels).sum())(logits)
    np.testing.assert_allclose(gradient, GOLDEN[f"focal/gradient_{name}"], rtol=1e-5, atol=1e-7)


def test_focal_without_its_exponent_is_the_cross_entropy_of_each_class():
    logits, targets = (jax.random.normal(KEY, (5, 4)), jax.random.uniform(KEY, (5, 4)))
    plain = make_loss(tiny_config("loss=sigmoid"))(logits, targets)
    focal = make_loss(tiny_config("loss=focal", "focal.gamma=0.0"))(logits, targets)
    np.testing.assert_allclose(focal, plain, rtol=1e-6)


@pytest.mark.parametrize("kind", ["balanced", "effective"])
def test_class_weights_are_those_of_scikit_learn_and_of_the_paper(kind):
    block = tiny_config(f"class_weights.kind={kind}").class_weights
    result = compute_weights(GOLDEN["weights/counts"], block, CLASSES)
    np.testing.assert_allclose(result, GOLDEN[f"weights/{kind}"], rtol=1e-9)


def test_a_weight_multiplies_an_example_by_its_class_or_a_term_of_its_own():
    logits = jax.random.normal(KEY, (8, 4))
    mixed = 0.75 * np.eye(4)[[0, 1, 2, 3] * 2] + 0.25 * np.eye(4)[[3, 2, 1, 0] * 2]
    exact = np.asarray(logits, np.float64)
    result = make_loss(weighted())(logits, jnp.float32(mixed))
    expected = (mixed @ WEIGHTS) * -(mixed * log_softmax(exact, -1)).sum(-1)
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    hot = vectors()["target"]
    result = make_loss(weighted(*SEVERAL))(logits, jnp.float32(hot))
    terms = -hot * log_expit(exact) - (1 - hot) * log_expit(-exact)
    np.testing.assert_allclose(result, terms @ WEIGHTS, rtol=1e-5)


def test_vectors_are_smoothed_and_mixed_like_images():
    """The pixels, and their mixing, are those of the same batch with labels."""
    batch, size = vectors(), (16, 16)
    cfg = tiny_config("augment.mixup=1.0", "augment.smoothing=0.2").augment
    images, targets = jax.jit(lambda b: train_images(b, KEY, cfg, size, 4))(batch)
    labels = {name: values for name, values in batch.items() if name != "target"}
    plain, _ = jax.jit(lambda b: train_images(b, KEY, cfg, size, 4))(labels)
    np.testing.assert_array_equal(images, plain)
    smooth = 0.8 * batch["target"] + 0.1
    differ = smooth[3] != smooth[2]
    share = (np.asarray(targets)[3] - smooth[2])[differ] / (smooth[3] - smooth[2])[differ]
    assert 0 < share[0] < 1
    np.testing.assert_allclose(share, share[0], rtol=1e-4)
    np.testing.assert_allclose(targets[2], smooth[2], rtol=1e-6)  # the one before it is masked


def test_several_classes_an_image_are_learned_without_a_correct_one():
    batch, params = vectors(), random_params(tiny_model())
    objective = make_objective(tiny_model(), tiny_config(*SEVERAL))
    examples = objective.prepare(batch, KEY)
    value, outputs = jax.jit(objective.loss)(params, examples, KEY)
    logits = np.asarray(jax.jit(tiny_model().apply)(params, examples["image"]), np.float64)
    hot = batch["target"]
    losses = -(hot * log_expit(logits) + (1 - hot) * log_expit(-logits)).sum(-1)
    np.testing.assert_allclose(value, losses[batch["mask"]].mean(), rtol=1e-5)
    assert "correct" not in outputs


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_numbers_are_learned_in_units_of_their_deviation(loss):
    batch, params = vectors(), random_params(tiny_model())
    batch["target"] = np.random.RandomState(1).normal(size=(8, 4)).astype(np.float32) * 30 + 100
    mean, std = (100.0, 90.0, 110.0, 0.0), (30.0, 20.0, 10.0, 100.0)
    own = (f"regression.mean={mean}", f"regression.std={std}", "regression.delta=0.5")
    objective = make_objective(tiny_model(), tiny_config(*NUMBERS, *own, f"loss={loss}"))
    examples = objective.prepare(batch, KEY)
    value, outputs = jax.jit(objective.loss)(params, examples, KEY)
    made = np.asarray(jax.jit(tiny_model().apply)(params, examples["image"]), np.float64)
    errors = np.abs(made - (batch["target"] - mean) / np.array(std))
    losses = {
        "mse": errors**2,
        "mae": errors,
        "huber": np.where(errors < 0.5, errors**2 / 2, 0.5 * (errors - 0.25)),
    }[loss].mean(-1)
    np.testing.assert_allclose(value, losses[batch["mask"]].mean(), rtol=1e-5)
    np.testing.assert_allclose(outputs["measures"]["mae"], (errors * std).mean(-1), rtol=1e-5)
    assert make_number_loss(tiny_config(*NUMBERS))(jnp.ones((1, 2)), jnp.zeros((1, 2))) == 1


def labelled(labels, target=None) -> InMemory:
    images = np.zeros((len(labels), 4, 4, 3), np.uint8)
    return InMemory("drawn", images, np.array(labels), CLASSES, target=target)


def test_a_run_takes_weights_and_scale_from_its_training_set_once():
    cfg = with_statistics(tiny_config("class_weights.kind=balanced"), labelled([0, 1, 1, 2, 3, 3]))
    np.testing.assert_allclose(cfg.class_weights.weights, [1.5, 0.75, 1.5, 0.75])
    assert with_statistics(cfg, labelled([0, 1, 2, 3])) is cfg
    assert with_statistics(plain := tiny_config(), labelled([0])) is plain
    numbers = np.array([[1, 0, 5, 1e6], [3, 0, 7, 1e6], [5, 0, 9, 1e6 + 2]], np.float32)
    cfg = with_statistics(tiny_config(*NUMBERS), labelled([0, 0, 0], numbers))
    np.testing.assert_allclose(cfg.regression.mean, numbers.mean(0, dtype=np.float64), rtol=1e-12)
    expected = [*np.float64(numbers).std(0)]
    np.testing.assert_allclose(cfg.regression.std, [expected[0], 1.0, *expected[2:]], rtol=1e-12)
    message = "the training set has no example of 'eel', one of 2 such classes of 4"
    with pytest.raises(UserError, match=message):
        with_statistics(tiny_config("class_weights.kind=effective"), labelled([0, 1]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.target=classes"],
            "has one an image: set loss=sigmoid, binary or focal",
        ),
        (["data.target=clases"], "data.target='clases' is unknown; did you mean class"),
        (
            ["objective=regression"],
            "learns numbers, and data.target=class: set",
        ),
        ([*NUMBERS[:2]], "objective=regression has no loss=softmax: set loss=mse, mae or huber"),
        (["loss=mse"], "objective=classification has no loss=mse: set loss=softmax, sigmoid,"),
        ([*NUMBERS, "augment.smoothing=.1"], "augment.smoothing=0.1 is of classes"),
        ([*NUMBERS, "regression.delta=0."], "regression.delta=0.0 must be above 0"),
        (
            [*NUMBERS, "regression.mean=(1.,)"],
            "regression.mean has 1 numbers, the model",
        ),
        ([*NUMBERS, "regression.std=(1.,1.,0.,1.)"], "regression.std=(1.0, 1.0, 0.0, 1.0) must be"),
        ([*NUMBERS, "class_weights.kind=balanced"], "objective=regression has none"),
        (["class_weights.kind=balance"], "is unknown; did you mean balanced"),
        (["class_weights.kind=effective", "class_weights.beta=1."], "above 0 and below 1"),
        (
            ["class_weights.kind=balanced", "data.sampling=balanced"],
            "would count twice what data.sampling=balanced evens out",
        ),
        (
            ["class_weights.kind=balanced", "class_weights.weights=(1.,)"],
            "has 1 weights, the model",
        ),
        (["class_weights.weights=(1.,)"], "needs class_weights.kind=balanced or effective"),
        (["focal.gamma=-1."], "focal.gamma=-1.0 must be at least 0"),
        (["focal.alpha=1.5"], "focal.alpha=1.5 must be above 0 and below 1, or None"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(overrides, message):
    with pytest.raises(UserError) as caught:
        check(tiny_config(*overrides))
    assert message in str(caught.value) and "\n" not in str(caught.value)
