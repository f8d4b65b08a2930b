"""kNN and linear classifiers: equal to scikit-learn's (golden/make_probes.py), and exact."""

import pathlib

import jax
import numpy as np
import pytest
from scipy.special import softmax

from vit_scale import config
from vit_scale.distributed.mesh import make_mesh
from vit_scale.errors import UserError
from vit_scale.evaluation import few_shot, linear, similarity
from vit_scale.evaluation.knn import KNN

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "probes.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(config.base().mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def examples(golden, mesh) -> linear.Examples:
    return linear.Examples(golden["train"], golden["labels"], 4, mesh)


# kNN


def test_knn_predicts_what_scikit_learn_does(golden, mesh):
    names = [name for name in golden if name.startswith("knn/")]
    assert len(names) == 5
    predictions = set()
    for name in names:
        _, k, temperature = name.split("/")
        classifier = KNN(int(k), float(temperature))
        result = classifier.predict(golden["train"], golden["labels"], golden["test"], mesh)
        np.testing.assert_array_equal(result, golden[name], err_msg=name)
        predictions.add(result.tobytes())
    assert len(predictions) > 2  # k and the temperature matter
    result = KNN(5).evaluate(
        golden["train"], golden["labels"], golden["test"], golden["test_labels"], mesh
    )
    expected = (golden["knn/5/0.07"] == golden["test_labels"]).mean()
    assert result["accuracy"] == expected and (result["n"], result["k"]) == (200, 5)
    assert result["interval"][0] < expected < result["interval"][1]


def test_of_equal_neighbours_the_first_count(mesh, monkeypatch):
    """Also across blocks and chunks; and of classes with equal votes, the first wins."""
    monkeypatch.setattr(similarity, "BLOCK", 4)
    monkeypatch.setattr(similarity, "CHUNK", 3)
    similarity._nearest.cache_clear()
    random = np.random.RandomState(0)
    bank = np.repeat(random.randn(5, 3), 3, axis=0)[random.permutation(15)]
    bank[[2, 9]] = 0.0  # no direction: similarity 0 to all
    queries = 3 * bank[[0, 7, 14, 3]]
    units = similarity.unit_rows(bank)
    expected = np.argsort(-(similarity.unit_rows(queries) @ units.T).round(5), kind="stable")
    for k in (1, 6, 15):
        parts = similarity.Bank(bank, mesh).nearest(queries, k)
        indices = np.concatenate([part[1] for part in parts])
        np.testing.assert_array_equal(indices, expected[:, :k])
    similarity._nearest.cache_clear()
    two = np.array([[1.0, 0], [1.0, 0]], np.float32)
    assert KNN(2).predict(two, np.array([3, 1]), two[:1], mesh).tolist() == [1]
    assert KNN(2, 1e-4).predict(two, np.array([3, 1]), two[:1], mesh).tolist() == [1]


@pytest.mark.parametrize(
    ("classifier", "message"),
    [
        (KNN(16), "16 neighbours of 15 training images: k must be from 1 to 15"),
        (KNN(0), "0 neighbours"),
        (KNN(5, 0.0), "temperature 0.0 of kNN must be above 0"),
        (KNN(5, float("nan")), "temperature nan"),
    ],
)
def test_impossible_settings_of_knn_are_refused(classifier, message):
    with pytest.raises(UserError, match=message):
        classifier.check(15)


# Linear


@pytest.mark.parametrize("strength", [1.0, 1e-1, 1e-2, 1e-3])
def test_linear_is_logistic_regression_of_scikit_learn(golden, examples, strength):
    fit = examples.fit(strength)
    name = f"linear/{strength}"
    assert fit.converged
    np.testing.assert_allclose(fit.params["kernel"], golden[f"{name}/kernel"], rtol=0, atol=2e-3)
    # Only differences of intercepts matter: nothing else determines their sum.
    bias, expected = np.asarray(fit.params["bias"]), golden[f"{name}/bias"]
    np.testing.assert_allclose(bias - bias.mean(), expected - expected.mean(), rtol=0, atol=2e-3)
    result = examples.predict(fit.params, golden["test"])
    np.testing.assert_array_equal(result, golden[f"{name}/classes"])


def test_of_two_classes_it_is_a_difference(golden, mesh):
    two = golden["labels"] < 2
    fit = linear.Examples(golden["train"][two], golden["labels"][two], 2, mesh).fit(1e-2)
    kernel, bias = map(np.asarray, (fit.params["kernel"], fit.params["bias"]))
    np.testing.assert_allclose(kernel[:, 1] - kernel[:, 0], golden["two/kernel"], atol=2e-3)
    np.testing.assert_allclose(bias[1] - bias[0], golden["two/bias"][0], atol=2e-3)


def test_a_fit_does_not_depend_on_scales_start_or_masked_examples(golden, examples, mesh):
    train, labels = golden["train"], golden["labels"]
    inside = np.arange(300) % 3 != 0
    whole = examples.fit(0.1)
    part = examples.fit(0.1, inside, start=whole.params)
    noise = np.where(inside, labels, 3 - labels)
    other = linear.Examples(train * 7 - 40, noise, 4, mesh)
    assert other.n == 300
    np.testing.assert_allclose(
        other.fit(0.1, inside).params["kernel"], part.params["kernel"], rtol=0, atol=1e-4
    )
    kernel, bias = (np.asarray(part.params[name], np.float64) for name in ("kernel", "bias"))
    rows = ((train - train.mean(0, np.float64)) / examples.scale.deviation)[inside]
    errors = softmax(rows @ kernel + bias, axis=1) - np.eye(4)[labels[inside]]
    np.testing.assert_allclose(rows.T @ errors / inside.sum() + 0.1 * kernel, 0, atol=1e-5)
    assert np.abs(np.asarray(whole.params["kernel"] - part.params["kernel"])).max() > 1e-2
    expected = (examples.predict(part.params, train) == labels)[~inside].sum()
    assert examples.hits(part.params, ~inside) == expected


def test_folds_hold_out_a_part_of_each_class():
    labels = np.repeat([0, 1, 2], [50, 7, 1])
    folds = linear.deal(labels, seed=0)
    counts = [np.bincount(folds[labels == label], minlength=5).tolist() for label in range(3)]
    assert counts == [[10] * 5, [2, 2, 1, 1, 1], [1, 0, 0, 0, 0]]
    np.testing.assert_array_equal(folds, linear.deal(labels, seed=0))
    assert (folds != linear.deal(labels, seed=1)).any()


def test_the_strength_is_the_best_on_held_out_examples(golden, examples):
    """Against a search by hand that has no warm start and goes through the whole path."""
    labels = golden["labels"]
    folds = linear.deal(labels, 0)
    inside = folds != 0
    hits = [examples.hits(examples.fit(one, inside).params, ~inside) for one in linear.STRENGTHS]
    strength, share = linear.choose_strength(examples, folds, [0])
    assert (strength, share) == (linear.STRENGTHS[np.argmax(hits)], max(hits) / (~inside).sum())
    result = linear.evaluate(
        golden["train"], labels, golden["test"], golden["test_labels"], examples.mesh
    )
    fitted = examples.predict(examples.fit(strength).params, golden["test"])
    assert result["accuracy"] == (fitted == golden["test_labels"]).mean() > 0.5
    assert (result["strength"], result["held_out_accuracy"]) == (strength, share)
    assert (result["n"], result["train_n"], result["converged"]) == (200, 300, True)


# Few-shot


def test_few_shot_is_the_mean_over_draws(golden, mesh):
    data = (golden[name] for name in ("train", "labels", "test", "test_labels"))
    result = few_shot.evaluate(*data, mesh, shots=5, draws=3)
    accuracies = result["accuracies"]
    assert len(set(accuracies)) > 1 and len(result["strengths"]) == 3
    assert result["accuracy"] == pytest.approx(np.mean(accuracies))
    assert (result["minimum"], result["maximum"]) == (min(accuracies), max(accuracies))
    half = 4.302653 * np.std(accuracies, ddof=1) / 3**0.5  # Student's t of 2 degrees of freedom
    low, high = result["interval"]
    assert (high - low) / 2 == pytest.approx(half, rel=1e-6)
    assert result["accuracy"] > 0.3 and (result["n"], result["shots"]) == (200, 5)


def test_draws_have_the_same_number_of_each_class():
    labels = np.random.RandomState(0).randint(0, 3, 90)
    first, second = (few_shot.draw(labels, 4, 0, number) for number in (0, 1))
    assert np.bincount(labels[first]).tolist() == [4, 4, 4] == np.bincount(labels[second]).tolist()
    assert len(np.unique(first)) == 12 and set(first) != set(second)
    assert set(first) < set(few_shot.draw(labels, 9, 0, 0))


def test_a_linear_probe_needs_two_images_of_a_class(mesh):
    labels = np.arange(4)
    features = np.random.RandomState(0).randn(4, 3).astype(np.float32)
    with pytest.raises(UserError, match=r"4 training images are one of each class: give more, or"):
        linear.evaluate(features, labels, features, labels, mesh)


def test_too_few_images_of_a_class_are_refused():
    labels = np.repeat([0, 2], [9, 4])
    with pytest.raises(UserError, match="5 training images a class, and 'eel' has 4"):
        few_shot.check_counts(labels, ("cat", "dog", "eel"), 5)
    few_shot.check_counts(labels, ("cat", "dog", "eel"), 4)
    for shots, draws in (((1, 5), 5), ((), 5), ((5,), 0)):
        with pytest.raises(UserError, match="few-shot probes"):
            few_shot.check(shots, draws)
