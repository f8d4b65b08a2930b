"""objectives: cross-entropy over the unmasked examples; parts of a batch add up to the whole."""

import jax
import numpy as np
import pytest
from scipy.special import log_expit, log_softmax

from tests.helpers.tiny import random_batch, random_params, tiny_config, tiny_model
from vit_scale.errors import UserError
from vit_scale.training.objectives import check, classification, make_objective

KEY = jax.random.key(0)
MASK = np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)


def objective(*overrides: str):
    return make_objective(tiny_model(), tiny_config(*overrides))


@pytest.fixture(scope="module")
def loss():
    return jax.jit(objective().loss)


@pytest.fixture(scope="module")
def params():
    return random_params(tiny_model())


def test_the_loss_is_the_mean_cross_entropy(loss, params):
    batch = random_batch() | {"mask": MASK}
    examples = objective("augment.smoothing=0.2").prepare(batch, KEY)
    value, outputs = loss(params, examples, KEY)
    logits = jax.jit(tiny_model().apply)(params, examples["image"])
    targets = 0.8 * np.eye(4)[batch["label"]] + 0.05
    losses = -(targets * log_softmax(np.asarray(logits, np.float64), -1)).sum(-1)
    np.testing.assert_allclose(outputs["loss"], losses, atol=1e-5)
    np.testing.assert_allclose(value, losses[MASK].mean(), atol=1e-5)
    np.testing.assert_array_equal(outputs["correct"], logits.argmax(-1) == batch["label"])
    np.testing.assert_array_equal(outputs["mask"], MASK)


def test_the_parts_add_up_to_the_whole(loss, params):
    """Though the corrupt examples are not the same number in each."""
    batch = random_batch() | {"mask": np.array([0, 0, 0, 1, 1, 1, 1, 1], bool)}
    examples = objective().prepare(batch, KEY)
    whole = loss(params, examples, KEY)[0]
    parts = [
        loss(params, jax.tree.map(lambda x, i=i: x[i : i + 4], examples), KEY)[0] for i in (0, 4)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)
    assert parts[0] < whole / 2


def test_masked_examples_are_never_looked_at(loss, params):
    batch = random_batch() | {"mask": MASK}
    value = loss(params, objective().prepare(batch, KEY), KEY)[0]
    image, label = batch["image"].copy(), batch["label"].copy()
    image[~MASK], label[~MASK] = 255, 3 - label[~MASK]
    other = batch | {"image": image, "label": label}
    assert loss(params, objective().prepare(other, KEY), KEY)[0] == value


def test_an_empty_batch_has_no_loss(loss, params):
    examples = objective().prepare(random_batch() | {"mask": np.zeros(8, bool)}, KEY)
    assert loss(params, examples, KEY)[0] == 0


def test_the_heaviest_target_of_a_mixture_is_the_right_one(loss, params):
    examples = objective("augment.mixup=1.0").prepare(random_batch(), jax.random.key(3))
    assert (np.asarray(examples["target"]).max(-1) < 0.999).any(), "something is mixed"
    _, outputs = loss(params, examples, KEY)
    logits = jax.jit(tiny_model().apply)(params, examples["image"])
    np.testing.assert_array_equal(
        outputs["correct"], logits.argmax(-1) == examples["target"].argmax(-1)
    )


def test_dropout_is_on_with_the_key():
    model = tiny_model("model.dropout=0.5")
    dropping = jax.jit(classification(model, tiny_config()).loss)
    params = random_params(model)
    examples = objective().prepare(random_batch(), KEY)
    first, second = (dropping(params, examples, jax.random.key(i))[0] for i in (1, 2))
    assert abs(first - second) > 1e-3


def test_an_unknown_objective_names_the_nearest():
    with pytest.raises(UserError, match="objective='clasification' is unknown; did you mean class"):
        check(tiny_config("objective=clasification"))


def test_a_loss_per_class_is_summed_or_its_mean(params):
    """Equal to log-sigmoids by hand; `binary` counts both classes of a mixed image fully."""
    examples = objective("augment.mixup=1.0").prepare(random_batch(), jax.random.key(3))
    targets = np.asarray(examples["target"], np.float64)
    assert ((targets > 0).sum(-1) == 2).any()
    logits = np.asarray(jax.jit(tiny_model().apply)(params, examples["image"]), np.float64)

    def per_class(targets):
        return -targets * log_expit(logits) - (1 - targets) * log_expit(-logits)

    for name, expected in {
        "sigmoid": per_class(targets).sum(-1),
        "binary": per_class(np.float64(targets > 0)).mean(-1),
    }.items():
        _, outputs = jax.jit(objective(f"loss={name}").loss)(params, examples, KEY)
        np.testing.assert_allclose(outputs["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss=sigmod"], "loss='sigmod' is unknown; did you mean sigmoid"),
        (["loss=binary", "augment.smoothing=0.1"], "augment.smoothing=0.1 must be 0"),
    ],
)
def test_an_impossible_loss_is_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        check(tiny_config(*overrides))
