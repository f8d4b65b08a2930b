"""The losses of self-distillation, and how a teacher's logits become targets.

Each takes weights or a mask, so that padded and corrupt examples count nowhere, and is a function
of the whole global batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vit_scale.models.projection_heads import unit

ITERATIONS = 3  # of Sinkhorn and Knopp's algorithm, as in SwAV and DINOv2
EPSILON = 1e-8


def centred(
    logits: Float[Array, "*n c"], centre: Float[Array, "c"], temperature: float | Array
) -> Float[Array, "*n c"]:
    """Return the teacher's probabilities, of logits less their running mean (DINO, equation 1)."""
    return jax.nn.softmax((logits - centre) / temperature, axis=-1)


def update_centre(
    centre: Float[Array, "c"],
    logits: Float[Array, "*n c"],
    weight: Float[Array, "*n"],
    momentum: float,
) -> Float[Array, "c"]:
    """Return the running mean of the teacher's logits after this batch (DINO, equation 4)."""
    axes = tuple(range(weight.ndim))
    total = weight.sum()
    mean = (weight[..., None] * logits).sum(axes) / jnp.maximum(total, 1e-12)
    return jnp.where(total > 0, momentum * centre + (1 - momentum) * mean, centre)


def sinkhorn(
    logits: Float[Array, "*n c"],
    weight: Float[Array, "*n"],
    temperature: float | Array,
    iterations: int = ITERATIONS,
) -> Float[Array, "*n c"]:
    """Assign the vectors whose weight is not 0 to prototypes, to all of them equally often.

    The assignment of each vector is a distribution (Caron et al. 2020, arXiv 2006.09882); the
    algorithm alternates between rows and columns as there. Others have the assignment 0.
    """
    axes = tuple(range(weight.ndim))
    counted = (weight > 0)[..., None]
    scaled = jnp.where(counted, logits / temperature, -jnp.inf)
    largest = jax.lax.stop_gradient(scaled.max(where=counted, initial=-1e30))
    q = jnp.exp(scaled - largest)
    q /= jnp.maximum(q.sum(), 1e-30)
    for _ in range(iterations):
        q /= jnp.maximum(q.sum(axes, keepdims=True), 1e-30)
        q /= jnp.maximum(q.sum(-1, keepdims=True), 1e-30)
    return q


def across_views(
    targets: Float[Array, "b t c"], logits: Float[Array, "b s c"], temperature: float
) -> Float[Array, "b"]:
    """Return the mean cross-entropy of a student's views and a teacher's other views.

    The teacher's view i is the student's view i too: these pairs are left out (DINO, equation 3).
    """
    log_probabilities = jax.nn.log_softmax(logits / temperature)
    # A TPU's default rounds both to bfloat16.
    entropies = -jnp.einsum("btc,bsc->bts", targets, log_probabilities, precision="highest")
    t, s = entropies.shape[1:]
    different = 1 - jnp.eye(t, s)
    return (entropies * different).sum((1, 2)) / different.sum()


def of_patches(
    targets: Float[Array, "b m c"],
    logits: Float[Array, "b m c"],
    weight: Float[Array, "b m"],
    temperature: float,
) -> Float[Array, "b"]:
    """Return the weighted sum of the cross-entropies of an image's hidden patches.

    iBOT (Zhou et al. 2022, arXiv 2111.07832), equation 2.
    """
    log_probabilities = jax.nn.log_softmax(logits / temperature)
    return -(weight * (targets * log_probabilities).sum(-1)).sum(-1)


def koleo(vectors: Float[Array, "b d"], mask: Bool[Array, "b"]) -> Float[Array, ""]:
    """Return minus the mean logarithm of the distance to the nearest of the others.

    Sablayrolles et al. 2019 (arXiv 1806.03198), of unit vectors, as in DINOv2: it spreads them.
    """
    x = unit(vectors.astype(jnp.float32))
    pairs = mask[:, None] & mask & ~jnp.eye(len(x), dtype=bool)
    similarities = jnp.matmul(x, x.T, precision="highest")
    nearest = jnp.where(pairs, jax.lax.stop_gradient(similarities), -2).argmax(1)
    difference = x - x[nearest] + EPSILON
    distance = jnp.sqrt(jnp.square(difference).sum(-1))
    counted = pairs.any(1)  # an example alone has no neighbour
    return -(counted * jnp.log(distance + EPSILON)).sum() / jnp.maximum(counted.sum(), 1)
