"""inspect: its mathematics, against values computed by hand or in plain numpy."""

import json

import numpy as np
import pytest

from tests.helpers.tiny import tiny_config
from vit_scale.evaluation.intervals import wilson_interval
from vit_scale.inspect import curves, embeddings, predictions
from vit_scale.inspect.attention import mean_distance, on_grid, patch_distances, rollout
from vit_scale.inspect.predictions import Predictions
from vit_scale.inspect.samples import evenly_spaced


def rows_of_attention(*shape: int, seed: int = 0) -> np.ndarray:
    """Positive, rows sum to 1, float32."""
    weights = np.random.RandomState(seed).gamma(0.5, size=shape)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


# Attention


def test_patch_distances_are_pixels_between_centres():
    """A 2 x 3 grid of patches 3 pixels high and 4 wide: one down and one right is 5 pixels."""
    result = patch_distances((2, 3), (3, 4))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0], [0, 4, 8, 3, 5, np.sqrt(9 + 64)], rtol=1e-6)
    np.testing.assert_array_equal(result, result.T)


def test_mean_distance_by_hand():
    """Two patches 8 pixels apart, after [CLS]: a quarter of what they take is the other's."""
    weights = np.float32([[[[0.2, 0.4, 0.4], [0.5, 0.375, 0.125], [0.0, 0.25, 0.75]]]])
    result = mean_distance(weights, patch_distances((1, 2), (8, 8)))
    assert result.shape == (1, 1)
    np.testing.assert_allclose(result, (0.125 + 0.25) / 1.5 * 8, rtol=1e-6)


def test_mean_distance_without_cls_is_the_paper_s_sum():
    weights, apart = rows_of_attention(2, 3, 6, 6), patch_distances((2, 3), (4, 4))
    expected = np.zeros((2, 3))
    for b, k in np.ndindex(2, 3):
        for i in range(6):
            expected[b, k] += sum(weights[b, k, i, j] * apart[i, j] for j in range(6)) / 6
    np.testing.assert_allclose(mean_distance(weights, apart), expected, rtol=1e-5)
    alone = np.broadcast_to(np.eye(6, dtype=np.float32), (1, 1, 6, 6))
    assert mean_distance(alone, apart)[0, 0] == 0
    uniform = mean_distance(np.full((1, 1, 6, 6), 1 / 6, np.float32), apart)
    np.testing.assert_allclose(uniform, apart.mean(), rtol=1e-6)


def test_rollout_multiplies_later_blocks_from_the_left():
    layers = rows_of_attention(3, 2, 5, 5)
    result = np.asarray(rollout(layers))
    for b in range(2):
        expected = np.eye(5)
        for layer in layers[:, b].astype(np.float64):
            expected = (layer / 2 + np.eye(5) / 2) @ expected
        np.testing.assert_allclose(result[b], expected, atol=1e-6)
    np.testing.assert_allclose(result.sum(-1), 1, atol=1e-6)
    assert np.abs(result - np.asarray(rollout(layers[::-1]))).max() > 0.01, "the order matters"


def test_rollout_by_hand():
    """Token 0 takes all from token 1: half of it is token 1's after a block, 3/4 after two."""
    layer = np.float32([[[0, 1], [0, 1]]])
    np.testing.assert_allclose(rollout(layer[None])[0], [[0.5, 0.5], [0, 1]])
    np.testing.assert_allclose(rollout(np.stack([layer] * 2))[0], [[0.25, 0.75], [0, 1]])


def test_tokens_are_laid_out_row_by_row_without_those_of_no_patch():
    tokens = np.arange(14).reshape(2, 7)
    np.testing.assert_array_equal(on_grid(tokens, (2, 3))[1], [[8, 9, 10], [11, 12, 13]])
    np.testing.assert_array_equal(on_grid(tokens[:, 1:], (3, 2))[0], [[1, 2], [3, 4], [5, 6]])


# Embeddings


def test_similarity_is_the_cosine():
    table = np.float32([[[1, 0], [3, 4]], [[-2, 0], [0, 0]]])
    result = embeddings.similarity(table)
    np.testing.assert_allclose(result[0, 0], [[1, 0.6], [-1, 0]], atol=1e-7)
    np.testing.assert_allclose(result[0, 1], [[0.6, 1], [-0.6, 0]], atol=1e-7)


def test_principal_components_are_those_of_the_covariance():
    filters = np.random.RandomState(0).randn(2, 2, 3, 40).astype(np.float32)
    filters[0, 1, 2] *= 5  # one pixel's blue varies most
    result, shares = embeddings.principal_components(filters, 4)
    assert result.shape == (4, 2, 2, 3)
    values, vectors = np.linalg.eigh(np.cov(filters.reshape(12, 40)))
    np.testing.assert_allclose(shares, values[:-5:-1] / values.sum(), rtol=1e-4)
    for component, vector in zip(result, vectors.T[::-1], strict=False):
        assert abs(component.ravel() @ vector) == pytest.approx(1, abs=1e-4)
    assert result[0, 0, 1, 2] == np.abs(result[0]).max() > 0.9, "the largest entry, and positive"


def test_there_are_no_more_components_than_pixels_or_filters():
    result, shares = embeddings.principal_components(np.random.randn(4, 4, 3, 10).astype("f"), 28)
    assert result.shape == (10, 4, 4, 3) and shares[-1] == pytest.approx(0, abs=1e-6)
    assert embeddings.principal_components(np.random.randn(1, 2, 3, 90))[0].shape == (6, 1, 2, 3)


def test_mosaic_puts_a_patch_s_map_at_its_place():
    maps = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    result = embeddings.mosaic(maps, gap=2)
    assert result.shape == (3, 10)
    np.testing.assert_array_equal(result[:, :4], maps[0, 0])
    np.testing.assert_array_equal(result[:, 6:], maps[0, 1])
    assert np.isnan(result[:, 4:6]).all()


# Predictions


SURE = np.float32([[0.9, 0.1, 0], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.05, 0.05, 0.9]])
LABELS = np.array([0, 2, 0, 1])


def of(probabilities=SURE, labels=LABELS) -> Predictions:
    return Predictions(probabilities, labels, np.arange(len(labels)) + 10, "a set")


def test_predictions_by_hand():
    result = of()
    assert (result.n, result.accuracy) == (4, 0.5)
    np.testing.assert_array_equal(result.predicted, [0, 1, 0, 2])
    np.testing.assert_allclose(result.losses, -np.log([0.9, 0.1, 0.6, 0.05]), rtol=1e-6)
    assert np.isfinite(of(np.float32([[1, 0]]), np.array([1])).losses).all()


def test_confusion_counts_true_by_predicted():
    matrix = predictions.confusion(LABELS, of().predicted, 3)
    np.testing.assert_array_equal(matrix, [[2, 0, 0], [0, 0, 1], [0, 1, 0]])
    matrix[2, 0] = 7
    assert predictions.most_confused(matrix, 2) == [(2, 0, 7), (1, 2, 1)]
    assert predictions.most_confused(np.diag([3, 4, 5]), 2) == []


def test_the_worst_mistakes_are_wrong_and_have_the_highest_loss():
    np.testing.assert_array_equal(predictions.worst(of(), 5), [3, 1])
    np.testing.assert_array_equal(predictions.worst(of(), 1), [3])


def test_calibration_by_hand():
    """Confidences .9, .7, .6, .9 in bins of a fifth: right are 1 of 2 above .8, 1 of 2 below."""
    result = predictions.calibration(SURE, LABELS, bins=5)
    np.testing.assert_array_equal(result.counts, [0, 0, 1, 1, 2])
    np.testing.assert_allclose(result.accuracy[2:], [1, 0, 0.5])
    np.testing.assert_allclose(result.confidence[2:], [0.6, 0.7, 0.9], rtol=1e-6)
    assert np.isnan(result.accuracy[:2]).all()
    assert result.ece == pytest.approx((0.4 + 0.7 + 2 * 0.4) / 4, rel=1e-6)
    assert result.n == 4


def test_calibration_equals_a_plain_loop():
    draw = np.random.RandomState(0)
    probabilities = draw.dirichlet(np.full(4, 0.3), 500).astype(np.float32)
    labels = draw.randint(0, 4, 500)
    result = predictions.calibration(probabilities, labels, bins=10)
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for b in range(10):
        here = (sure > np.float32(b / 10)) & (sure <= np.float32((b + 1) / 10))
        assert here.sum() == result.counts[b]
        if here.any():
            expected += here.mean() * abs(sure[here].mean() - right[here].mean())
    assert result.ece == pytest.approx(expected, rel=1e-5)
    assert result.counts.sum() == 500
    perfect = predictions.calibration(np.eye(4, dtype=np.float32), np.arange(4))
    assert (perfect.ece, perfect.counts[-1]) == (0, 4)


def test_interval_is_wilson_s():
    """Wilson 1927; the values are those of Newcombe 1998, table I, for 81 of 263 and 0 of 20."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


# Curves and samples


@pytest.mark.parametrize("name", ["train/loss", "train/learning_rate", "eval/accuracy"])
@pytest.mark.parametrize("points", [1, 2])
def test_a_curve_of_one_point_is_seen(name, points):
    """A line needs two: of one point it draws nothing, unless the point has a marker."""
    pytest.importorskip("matplotlib", reason="launch/environment.sh inspect")
    from vit_scale.inspect import plots

    curve = ([40, 80][:points], [0.5, 0.25][:points])
    drawn = plots.rasterize(plots.plot_curves({"run": {name: curve}}, "title", [tiny_config()]))
    empty = plots.plot_curves({"run": {name: ([40], [0.5])}}, "title", [tiny_config()])
    (line,) = [line for axes in empty.axes for line in axes.get_lines()]
    assert line.get_marker() == "o"
    line.set_marker("None")
    if points == 1:
        assert (drawn != plots.rasterize(empty)).sum() > 10
    else:
        figure = plots.plot_curves({"run": {name: curve}}, "title", [tiny_config()])
        (line,) = [line for axes in figure.axes for line in axes.get_lines()]
        assert (line.get_marker() == "o") == name.startswith("eval")


def test_curves_skip_null_and_truncated_lines(tmp_path):
    rows = [
        {"step": 10, "time": 5.0, "train/loss": 2.0, "images_per_second": 30.0},
        {"step": 20, "time": 6.0, "train/loss": None, "images_per_second": 50.0},
        {"step": 20, "time": 6.5, "eval/loss": 1.5, "eval/n": 100},
        {"step": 30, "time": 7.0, "train/loss": 1.0, "images_per_second": 31.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 40, "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    result = curves.read_curves(tmp_path)
    assert result["train/loss"] == ([10, 30], [2.0, 1.0])
    assert result["eval/loss"] == ([20], [1.5])
    assert "time" not in result and "step" not in result
    assert curves.median_speed(result) == 31.0, "the median"
    assert curves.read_curves(tmp_path / "none") == {} and curves.median_speed({}) is None


def test_evenly_spaced_takes_the_first_the_last_and_between():
    assert evenly_spaced(range(10), 4) == [0, 3, 6, 9]
    assert evenly_spaced("abc", 9) == ["a", "b", "c"]
    assert evenly_spaced([], 3) == []
