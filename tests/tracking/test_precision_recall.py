"""Average precision, F1 and balanced accuracy: equal to scikit-learn's, ties and all."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from vit_scale.tracking.metrics import ClassRecall
from vit_scale.tracking.precision_recall import (
    average_precision,
    best_threshold,
    f1_scores,
    make_curve,
)

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "labels.npz")
LOGITS, PRESENT = GOLDEN["several/logits"], GOLDEN["several/present"]


@pytest.mark.parametrize("label", range(3))
def test_average_precision_and_the_highest_f1(label):
    scores, present = LOGITS[:, label], PRESENT[:, label]
    curve = make_curve(scores, present)
    assert len(curve.scores) == len(np.unique(scores))
    golden = GOLDEN["several/average_precision"][label]
    assert average_precision(curve) == pytest.approx(golden, abs=1e-14)
    threshold = best_threshold(curve)
    assert threshold not in scores, "it is half-way between two scores"
    marked = scores >= threshold
    macro, _ = f1_scores(*(np.array([x.sum()]) for x in (marked & present, marked, present)))
    assert macro == pytest.approx(GOLDEN["several/best_f1"][label], abs=1e-14)


def test_a_class_without_a_positive_has_no_precision_and_one_of_positives_all():
    none = make_curve(LOGITS[:, 3], PRESENT[:, 3])
    assert np.isnan(average_precision(none)) and np.isnan(best_threshold(none))
    every = make_curve(LOGITS[:, 3], np.ones(len(LOGITS), bool))
    assert average_precision(every) == 1 and best_threshold(every) == -np.inf
    empty = make_curve(np.zeros(0), np.zeros(0, bool))
    assert np.isnan(average_precision(empty)) and np.isnan(best_threshold(empty))


def test_the_order_of_examples_does_not_matter():
    order = np.random.RandomState(1).permutation(len(LOGITS))
    for label in range(3):
        plain = make_curve(LOGITS[:, label], PRESENT[:, label])
        other = make_curve(LOGITS[order, label], PRESENT[order, label])
        assert average_precision(plain) == average_precision(other)


def test_f1_is_of_the_classes_that_occur_and_of_all_decisions():
    marked = LOGITS >= 0.5
    counts = [x.sum(0) for x in (marked & PRESENT, marked, PRESENT)]
    macro, micro = f1_scores(*counts)
    assert macro == pytest.approx(GOLDEN["several/macro_f1"], abs=1e-14)
    assert micro == pytest.approx(GOLDEN["several/micro_f1"], abs=1e-14)
    assert all(np.isnan(f1_scores(*np.zeros((3, 2), np.int64))))


def test_balanced_accuracy_is_the_mean_recall_and_merges():
    labels, guesses = GOLDEN["recall/labels"], GOLDEN["recall/guesses"]
    hit, mask = jnp.array(labels == guesses), jnp.ones(len(labels), bool)
    whole = ClassRecall.from_model_output(jnp.array(labels), hit, mask, 6)  # two do not occur
    assert whole.compute() == pytest.approx(GOLDEN["recall/balanced_accuracy"], abs=1e-6)
    total = ClassRecall.empty()
    for part in (slice(0, 100), slice(100, None)):
        total = total.merge(
            ClassRecall.from_model_output(jnp.array(labels[part]), hit[part], mask[part], 6)
        )
    assert total.hits.tolist() == whole.hits.tolist()
    assert total.count.tolist() == whole.count.tolist() == [1, 7, 120, 5000, 0, 0]
