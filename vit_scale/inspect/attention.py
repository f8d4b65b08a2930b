"""What tokens attend to, as numbers: how far (ViT paper, figure 7), and at which patches (rollout).

All of it is float32. Tokens are numbered as in the model: those that stand for no patch, such as
[CLS], come first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def patch_distances(grid: tuple[int, int], pixels: tuple[float, float]) -> Float[np.ndarray, "p p"]:
    """Distance in pixels between the centres of any two of the h x w patches, row by row.

    `pixels` is the height and width of a patch, in pixels of what the model sees.
    """
    rows, columns = np.indices(grid)
    centres = np.stack([rows.ravel() * pixels[0], columns.ravel() * pixels[1]], -1)
    return np.linalg.norm(centres[:, None] - centres[None], axis=-1).astype(np.float32)


def mean_distance(
    weights: Float[Array, "b k n n"], distances: Float[np.ndarray, "p p"]
) -> Float[Array, "b k"]:
    """How far, in pixels, the patches of an image look: weighted by attention, of each head.

    The mean attention distance of the ViT paper, figure 7. Only what patches take from patches
    counts: attention from and to [CLS] has no distance.
    """
    first = weights.shape[-1] - len(distances)
    between = weights[..., first:, first:].astype(jnp.float32)
    return (between * distances).sum((-2, -1)) / between.sum((-2, -1))


def rollout(layers: Float[Array, "l b n n"]) -> Float[Array, "b n n"]:
    """Share of each input token (column) in each last token (row), by attention rollout.

    Abnar & Zuidema 2020: a block passes on half of a token as it is, for its skip connection, and
    half by its attention, averaged over heads; the blocks' matrices are multiplied. Rows sum to 1.
    """
    identity = jnp.eye(layers.shape[-1], dtype=jnp.float32)

    def through(so_far, layer):
        mixed = (layer.astype(jnp.float32) + identity) / 2
        return jnp.matmul(mixed, so_far, precision=jax.lax.Precision.HIGHEST), None

    start = jnp.broadcast_to(identity, layers.shape[1:])
    return jax.lax.scan(through, start, layers)[0]


def on_grid(tokens: Float[Array, "... n"], grid: tuple[int, int]) -> Float[Array, "... h w"]:
    """The values of the patches' tokens where the patches are; those of other tokens left out."""
    patches = grid[0] * grid[1]
    return tokens[..., tokens.shape[-1] - patches :].reshape(*tokens.shape[:-1], *grid)
