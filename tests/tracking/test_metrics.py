"""metrics: exact counts, masks that hold, float32 sums, one value over several steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_scale.tracking.metrics import (
    Count,
    EvalMetrics,
    Share,
    TrainMetrics,
    norm,
    reduce,
    to_floats,
)

evaluate = jax.jit(EvalMetrics.single_from_model_output)
of_step = jax.jit(lambda *options: TrainMetrics.of_step(*options[:5], jnp.asarray(options[5])))


def eval_batch(examples, seed=0, classes=7):
    random = np.random.default_rng(seed)
    return {
        "logits": random.standard_normal((examples, classes)).astype(np.float32),
        "labels": random.integers(0, classes, examples).astype(np.int32),
        "mask": random.random(examples) < 0.7,
    }


def train_outputs(loss, correct, mask):
    return {
        "loss": jnp.asarray(loss),
        "correct": jnp.asarray(correct, bool),
        "mask": jnp.asarray(mask, bool),
    }


TREE = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}


def test_eval_values_by_hand():
    """Two unmasked examples, one right; cross-entropy of equal logits is log(classes)."""
    logits = jnp.array([[0.0, 0.0], [0.0, np.log(3.0)], [9.0, 0.0]])
    values = to_floats(
        evaluate(logits=logits, labels=jnp.array([0, 0, 1]), mask=jnp.array([True, True, False]))
    )
    assert values == {
        "loss": pytest.approx((np.log(2) + np.log(4)) / 2, rel=1e-6),
        "accuracy": 0.5,
        "balanced_accuracy": 0.5,
        "n": 2,
    }
    assert isinstance(values["n"], int) and isinstance(values["accuracy"], float)


def test_masked_examples_count_nowhere_whatever_they_hold():
    batch = eval_batch(64)
    expected = to_floats(evaluate(**batch))
    batch["logits"][~batch["mask"]] = np.nan
    batch["labels"][~batch["mask"]] = 0
    assert to_floats(evaluate(**batch)) == expected
    kept = {name: array[batch["mask"]] for name, array in batch.items()}
    assert to_floats(evaluate(**kept)) == pytest.approx(expected)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_any_cut_into_batches_gives_the_same(size):
    """Merged on the device from `empty()`, as evaluation does, and reduced on the host."""
    batch = eval_batch(100)
    whole = to_floats(evaluate(**batch))
    parts = [
        evaluate(**{name: array[i : i + size] for name, array in batch.items()})
        for i in range(0, 100, size)
    ]
    merged = EvalMetrics.empty()
    for part in parts:
        merged = merged.merge(part)
    for values in (to_floats(merged), reduce(parts)):
        assert values["accuracy"] == pytest.approx(whole["accuracy"], rel=1e-7)
        assert values["n"] == whole["n"] == batch["mask"].sum()
        assert values["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_counts_are_exact_where_float32_is_not():
    """float32 can't hold 2**24 + 1."""
    many = 2**24 + 1
    share = Share(jnp.int32(many), jnp.int32(2 * many)).merge(Share(jnp.int32(1), jnp.int32(1)))
    count = Count(jnp.int32(many)).merge(Count(jnp.int32(1)))
    assert (int(share.hits), int(share.count), int(count.total)) == (
        many + 1,
        2 * many + 1,
        many + 1,
    )
    metrics = EvalMetrics.empty()
    total = reduce([type(metrics)(**{**vars(metrics), "accuracy": share, "n": count})] * 3)
    assert total["n"] == 3 * (many + 1)
    assert total["accuracy"] == (many + 1) / (2 * many + 1)


def test_reduce_sums_in_float64():
    """1e8 + 1 + 1 ... in float32 stays 1e8."""
    batch = {"logits": jnp.zeros((1, 2)), "labels": jnp.array([0]), "mask": jnp.array([True])}
    one = evaluate(**batch)
    big = jax.tree.map(lambda x: x, one)
    object.__setattr__(big, "loss", type(one.loss)(jnp.float32(1e8), jnp.int32(1)))
    total = reduce([big, *[one] * 99])
    assert total["loss"] * 100 == pytest.approx(1e8 + 99 * np.log(2), rel=1e-9)


def test_bfloat16_losses_are_summed_in_float32():
    """A bfloat16 sum of 1,000 ones stops at 256."""
    ones = jnp.ones(1000, jnp.bfloat16)
    outputs = train_outputs(ones * 1.5, ones, ones)
    assert to_floats(of_step(outputs, TREE, TREE, TREE, 0.1, True))["loss"] == 1.5
    logits = jnp.zeros((1000, 2), jnp.bfloat16)
    metrics = evaluate(logits=logits, labels=jnp.zeros(1000, jnp.int32), mask=ones.astype(bool))
    assert metrics.loss.total.dtype == jnp.float32
    assert to_floats(metrics)["loss"] == pytest.approx(np.log(2), rel=1e-5)


def test_train_values_of_one_step_and_of_several():
    first = of_step(
        train_outputs([1.0, 3.0, np.nan], [1, 0, 1], [1, 1, 0]),
        TREE,
        {"a": jnp.array([0.3])},
        {"a": jnp.array([2.0])},
        0.1,
        True,
    )
    assert to_floats(first) == pytest.approx(
        {
            "loss": 2.0,
            "accuracy": 0.5,
            "gradient_norm": 5.0,
            "update_norm": 0.3,
            "parameter_norm": 2.0,
            "learning_rate": 0.1,
            "skipped": 1,
            "nonfinite": 0,
        }
    )
    double = jax.tree.map(lambda x: 2 * x, TREE)
    outputs = train_outputs([8.0, 0, 0], [1, 1, 1], [1, 1, 1])
    second = of_step(outputs, double, TREE, TREE, 0.2, False)
    expected = {
        "loss": (1 + 3 + 8) / 5,
        "accuracy": 4 / 5,
        "gradient_norm": 7.5,
        "update_norm": 2.65,
        "parameter_norm": 5.0,  # the last step's
        "learning_rate": 0.2,  # the last step's
        "skipped": 1,
        "nonfinite": 1,
    }
    assert reduce([first, second]) == pytest.approx(expected)
    assert to_floats(first.merge(second)) == pytest.approx(expected)


def test_nothing_measured_is_nan_without_a_warning(recwarn):
    values = to_floats(EvalMetrics.empty())
    assert values["n"] == 0 and np.isnan(values["accuracy"]) and np.isnan(values["loss"])
    assert not list(recwarn)


def test_a_mask_that_does_not_fit_is_an_error():
    batch = eval_batch(4)
    for mask in (batch["mask"][:3], batch["mask"][:, None], np.ones(4, np.float32)):
        with pytest.raises(ValueError, match="mask"):
            EvalMetrics.single_from_model_output(**{**batch, "mask": mask})
    outputs = train_outputs([1.0, 2.0], [1, 1], [1])
    with pytest.raises(ValueError, match="a mask, all of shape"):
        TrainMetrics.of_step(outputs, TREE, TREE, TREE, 0.1, jnp.bool_(True))


def test_norm():
    tree = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.full((1, 1), -4.0, jnp.bfloat16)}}
    assert norm(tree) == 5.0 and norm(tree).dtype == jnp.float32
    assert norm({"a": jnp.ones(10_000, jnp.bfloat16)}) == 100.0  # a bfloat16 sum stops at 256
