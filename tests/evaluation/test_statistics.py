"""Statistics of features, against their definitions in plain numpy."""

import jax
import numpy as np
import pytest

from vit_scale import config
from vit_scale.distributed.mesh import make_mesh
from vit_scale.evaluation import similarity, statistics


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(config.base().mesh, jax.devices()[:1])


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    random = np.random.RandomState(0)
    return (random.randn(70, 9) @ random.randn(9, 9) + 1).astype(np.float32)


LABELS = np.random.RandomState(1).randint(0, 3, 70)
LABELS[0] = 7  # the only one of its class


def pairs(features: np.ndarray) -> np.ndarray:
    """The squared distance of every two unit vectors [n, n]."""
    units = features.astype(np.float64) / np.linalg.norm(features, axis=1, keepdims=True)
    return ((units[:, None] - units[None]) ** 2).sum(-1)


def test_effective_rank_is_rankme(features, monkeypatch):
    monkeypatch.setattr(statistics, "ROWS", 32)
    for values in (features, features[:5]):  # also of fewer examples than dimensions
        singular = np.linalg.svd(values.astype(np.float64), compute_uv=False)
        shares = singular / singular.sum() + 1e-7
        expected = np.exp(-(shares * np.log(shares)).sum())
        assert statistics.effective_rank(values) == pytest.approx(expected, rel=1e-5)
    axes = np.eye(6, dtype=np.float32)
    assert statistics.effective_rank(axes) == pytest.approx(6, rel=1e-5)
    assert statistics.effective_rank(np.ones((8, 6), np.float32)) == pytest.approx(1, rel=1e-4)


def test_alignment_is_over_pairs_of_one_class(features):
    same = (LABELS[:, None] == LABELS) & ~np.eye(70, dtype=bool)
    expected = pairs(features)[same].mean()
    assert statistics.alignment(features, LABELS) == pytest.approx(expected, rel=1e-5)
    assert statistics.alignment(features, np.arange(70)) is None


def test_uniformity_is_over_all_pairs(features, mesh, monkeypatch):
    """Also in blocks and chunks that don't divide the number of examples."""
    others = ~np.eye(70, dtype=bool)
    expected = np.log(np.exp(-2 * pairs(features)[others]).mean())
    assert statistics.uniformity(features, mesh) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(similarity, "BLOCK", 32)
    monkeypatch.setattr(similarity, "CHUNK", 20)
    similarity._exponential_sums.cache_clear()
    assert statistics.uniformity(features, mesh) == pytest.approx(expected, abs=1e-5)
    similarity._exponential_sums.cache_clear()
    assert statistics.uniformity(features[:1], mesh) is None
    result = statistics.measure(features, LABELS, mesh)
    assert (result["n"], result["dimensions"]) == (70, 9)
    assert result["uniformity"] == pytest.approx(expected, abs=1e-5)
