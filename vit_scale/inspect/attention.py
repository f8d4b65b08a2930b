"""Statistics of attention: mean attention distance (ViT paper, figure 7) and attention rollout.

All in float32. Tokens are in the model's order: those without a patch, such as [CLS], come first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def patch_distances(grid: tuple[int, int], pixels: tuple[float, float]) -> Float[np.ndarray, "p p"]:
    """Distances in pixels between the centres of all pairs of the patches, in row-major order.

    `pixels` is the (height, width) of a patch in pixels of the model's input.
    """
    rows, columns = np.indices(grid)
    centres = np.stack([rows.ravel() * pixels[0], columns.ravel() * pixels[1]], -1)
    return np.linalg.norm(centres[:, None] - centres[None], axis=-1).astype(np.float32)


def mean_distance(
    weights: Float[Array, "b k n n"], distances: Float[np.ndarray, "p p"]
) -> Float[Array, "b k"]:
    """Mean attention distance of each head in pixels (ViT paper, figure 7).

    The mean distance between patches, weighted by the attention from one to the other. Attention
    from and to [CLS] is left out: it has no distance.
    """
    leading = weights.shape[-1] - len(distances)
    between = weights[..., leading:, leading:].astype(jnp.float32)
    return (between * distances).sum((-2, -1)) / between.sum((-2, -1))


def rollout(layers: Float[Array, "l b n n"]) -> Float[Array, "b n n"]:
    """Attention rollout (Abnar & Zuidema 2020) of attention weights averaged over heads.

    Entry (i, j) is the share of input token j in output token i, if each block's output is half its
    input (skip connection) and half attention: a product of matrices. Rows sum to 1.
    """
    identity = jnp.eye(layers.shape[-1], dtype=jnp.float32)

    def step(product, layer):
        mixed = (layer.astype(jnp.float32) + identity) / 2
        return jnp.matmul(mixed, product, precision=jax.lax.Precision.HIGHEST), None

    start = jnp.broadcast_to(identity, layers.shape[1:])
    return jax.lax.scan(step, start, layers)[0]


def on_grid(tokens: Float[Array, "... n"], grid: tuple[int, int]) -> Float[Array, "... h w"]:
    """Drop the tokens without a patch and arrange the others as the patch grid."""
    patches = grid[0] * grid[1]
    return tokens[..., tokens.shape[-1] - patches :].reshape(*tokens.shape[:-1], *grid)
