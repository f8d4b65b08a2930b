"""train step: gradients, what a step changes, that it is repeatable, and that it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import random_batch, random_params, tiny_config
from vit_scale.distributed.sharding import shard_batch
from vit_scale.models.parameters import named
from vit_scale.tracking.metrics import to_floats
from vit_scale.training.optimizer import update_ema
from vit_scale.training.setup import make_setup
from vit_scale.training.train_state import TrainState
from vit_scale.training.train_step import gradients, jit_train_step

# Everything that the tests below look at is on in the one setup that they share.
STEP = (
    "optim.lr=0.01",
    "optim.ema=0.75",
    "optim.freeze=('embed',)",
    "augment.crop=pad",
    "augment.flip=True",
)
MASK = np.array([1, 0, 1, 1, 1, 1, 0, 0], bool)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def setup():
    return make_setup(tiny_config(*STEP))


@pytest.fixture(scope="module")
def step(setup):
    return jit_train_step(setup)


def new_state(setup, step: int = 0) -> TrainState:
    """At `step`, the average still being the parameters."""
    params, ema = (jax.device_put(random_params(setup.model)) for _ in range(2))
    return TrainState(jnp.int32(step), params, setup.optimizer.init(params), ema)


def batch_of(setup, **changed) -> dict:
    batch = random_batch() | changed
    return shard_batch(batch, setup.mesh, len(batch["label"]))


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


# Gradients in parts


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_give_its_gradient(parts):
    """Of a linear regression, with masked examples."""
    draw = np.random.RandomState(0)
    x, y, w = (draw.randn(*shape).astype(np.float32) for shape in ((8, 3), (8,), (3,)))
    weight = (MASK / MASK.sum()).astype(np.float32)
    examples = {"x": x, "y": y, "weight": weight, "id": np.arange(8)}

    def loss(params, part, key):
        errors = part["x"] @ params["w"] - part["y"]
        return (errors**2 * part["weight"]).sum(), {"id": part["id"]}

    grads, outputs = gradients(loss, {"w": w}, examples, jax.random.key(0), parts)
    np.testing.assert_allclose(grads["w"], 2 * x.T @ ((x @ w - y) * weight), atol=1e-5)
    np.testing.assert_array_equal(outputs["id"], np.arange(8), "not in the batch's order")


def test_parts_have_keys_of_their_own():
    def loss(params, examples, key):
        drawn = jax.random.uniform(key, examples["x"].shape)
        return (drawn * params).sum(), {"drawn": drawn}

    _, outputs = gradients(loss, jnp.float32(1), {"x": np.zeros(8)}, jax.random.key(0), 4)
    assert len(np.unique(outputs["drawn"])) == 8


# The step


def test_accumulated_steps_are_the_same_step(setup, step):
    """With sums over parts that have 1, 2 and 0 unmasked examples."""
    accumulating = make_setup(tiny_config(*STEP, "optim.accumulate=4"))
    batch = batch_of(setup, mask=MASK)
    expected, metrics = step(new_state(setup), batch)
    found, other = jit_train_step(accumulating)(new_state(accumulating), batch)
    for name, leaf in named(found.opt_state).items():
        np.testing.assert_allclose(leaf, named(expected.opt_state)[name], atol=1e-5, err_msg=name)
    other = to_floats(other)
    for key, value in to_floats(metrics).items():
        np.testing.assert_allclose(other[key], value, rtol=1e-5, err_msg=key)


def test_a_step_is_a_function_of_state_and_batch_bit_for_bit(setup, step):
    batch = batch_of(setup)
    first, again, later = (step(new_state(setup, at), batch) for at in (3, 3, 4))
    assert bits(first) == bits(again)
    assert bits(first[0].params) != bits(later[0].params), "the step decides the augmentation"


def test_the_state_that_goes_in_is_donated(setup, step):
    state = new_state(setup)
    after, _ = step(state, batch_of(setup))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_what_a_step_changes(setup, step):
    before = jax.device_get(new_state(setup))
    after, metrics = jax.device_get(step(new_state(setup), batch_of(setup, mask=MASK)))
    assert after.step == 1 and jax.tree.structure(after) == jax.tree.structure(before)
    old, new = named(before.params), named(after.params)
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert old.keys() - changed == {"embed/kernel", "embed/bias"}
    averaged = update_ema(before.params, after.params, 0.75)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), after.ema, averaged)
    jax.tree.map(
        lambda ema, a, b: np.testing.assert_allclose(ema, 0.75 * a + 0.25 * b, atol=1e-6),
        after.ema,
        before.params,
        after.params,
    )
    measured = metrics.compute()
    assert measured["skipped"] == 3
    assert measured["learning_rate"] == setup.schedule(0) == np.float32(0.01)
    norm = np.sqrt(sum(np.square(new[name] - old[name]).sum() for name in old))
    np.testing.assert_allclose(measured["update_norm"], norm, rtol=1e-3)


def test_masked_images_change_nothing(setup, step):
    image = random_batch()["image"].copy()
    image[~MASK] = 255
    first, second = (
        step(new_state(setup), batch_of(setup, mask=MASK, **changed))[0].params
        for changed in ({}, {"image": image})
    )
    assert bits(first) == bits(second)


def test_it_learns(setup, step):
    batch, state, losses = batch_of(setup), new_state(setup), []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics.compute()["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == 20


# A loss of the whole batch together


@pytest.mark.parametrize("parts", [2, 4])
def test_a_loss_of_the_whole_batch_has_the_same_gradient_in_parts(parts):
    """Of pairs of examples, with noise of its own in each part, and parameters of its own."""
    draw = np.random.RandomState(0)
    params = {"a": jnp.asarray(draw.randn(3, 5)), "b": jnp.asarray(draw.randn(5))}
    examples = {"x": jnp.asarray(draw.randn(8, 3)), "mask": jnp.asarray(MASK)}

    def loss(params, examples, key):
        embeddings = jnp.tanh(examples["x"] @ params["a"])
        losses = (embeddings**2).sum(-1)
        outputs = {"loss": losses, "mask": examples["mask"], "embeddings": embeddings}
        return (losses * examples["mask"]).sum() / 8, outputs

    def coupled(params, embeddings, mask, key):
        pairs = (embeddings * params["b"]) @ embeddings.T * mask * mask[:, None]
        value = jnp.exp(pairs / 4).mean() + jax.random.normal(key)
        return value, {"pairs": value}

    whole = gradients(loss, params, examples, KEY, 1, coupled)
    result = gradients(loss, params, examples, KEY, parts, coupled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), result, whole)
    alone = gradients(loss, params, examples, KEY, parts)[0]
    assert np.abs(alone["a"] - whole[0]["a"]).max() > 0.01 and not np.any(alone["b"])
    losses, measure = whole[1]["loss"], whole[1]["measures"]["pairs"]
    np.testing.assert_allclose(
        losses - measure, (np.tanh(examples["x"] @ params["a"]) ** 2).sum(-1), rtol=1e-4
    )
