"""Statistics of features that no classifier has to be fitted for.

    effective rank   RankMe (Garrido et al. 2023, arXiv 2210.02885): how many dimensions are in use
    alignment        Wang & Isola 2020 (arXiv 2005.10242): how near images of one class are
    uniformity       the same paper: how evenly features cover the sphere

All are exact sums over all examples, or pairs of them, not estimates from batches.
"""

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vit_scale.evaluation.similarity import Bank, unit_rows

ROWS = 4096  # in float64 at a time
EPSILON = 1e-7  # RankMe's, equation 1
FACTOR = 2.0  # t of uniformity


def effective_rank(features: Float[np.ndarray, "n d"]) -> float:
    """Return RankMe: exp of the entropy of the singular values' shares, of features as they are.

    It is at least 1 and at most min(n, d). The singular values are square roots of the eigenvalues
    of the Gram matrix [d, d], in float64.
    """
    gram = np.zeros((features.shape[1], features.shape[1]))
    for first in range(0, len(features), ROWS):
        part = features[first : first + ROWS].astype(np.float64)
        gram += part.T @ part
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(gram), 0))
    shares = singular[-min(features.shape) :] / max(singular.sum(), 1e-300) + EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))


def alignment(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"]) -> float | None:
    """Return the mean squared distance of two unit vectors of one class, over all such pairs.

    Wang & Isola take two augmented views of one image; here there is one view, and the pairs are
    all those of different images with the same label. Of n unit vectors with the sum s, the
    distances of all ordered pairs sum to 2 n^2 - 2 |s|^2. None without a pair.
    """
    units = unit_rows(features)
    total, pairs = 0.0, 0
    for label in np.unique(labels):
        own = units[labels == label].astype(np.float64)
        squares, sums = np.einsum("nd,nd->", own, own), own.sum(axis=0)
        total += float(2 * len(own) * squares - 2 * sums @ sums)
        pairs += len(own) * (len(own) - 1)
    return total / pairs if pairs else None


def uniformity(features: Float[np.ndarray, "n d"], mesh: Mesh) -> float | None:
    """Return log of the mean of exp(-2 squared distance) over all pairs of unit vectors.

    None of a single one. At best, with many dimensions, it is -4; features that are all the same
    have 0.
    """
    if len(features) < 2:
        return None
    # The squared distance of unit vectors is 2 - 2 similarity.
    return float(np.log(Bank(features, mesh).mean_exponential(2 * FACTOR, features)))


def measure(features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], mesh: Mesh) -> dict:
    """Return {"n", "dimensions", "effective_rank", "alignment", "uniformity"}."""
    return {
        "n": len(features),
        "dimensions": features.shape[1],
        "effective_rank": effective_rank(features),
        "alignment": alignment(features, labels),
        "uniformity": uniformity(features, mesh),
    }
