"""Draw which patches of an image are hidden from a student: blocks, as in BEiT and DINOv2."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

SMALLEST = 4  # patches of a block, as in BEiT (Bao et al. 2022, arXiv 2106.08254)
ASPECT = 0.3  # and its smallest height / width
ATTEMPTS = 10  # to place one more block


def draw_counts(
    key: PRNGKeyArray, images: int, patches: int, share: float, ratio: tuple[float, float]
) -> Int[Array, "v"]:
    """Draw how many of the patches of each of `images` are to be hidden.

    As in DINOv2 (Oquab et al. 2023): of a share of the images, of which each has a ratio from an
    equal part of its own of the range `ratio`, in random order; of the others none.
    """
    order_key, ratio_key = jax.random.split(key)
    chosen = int(images * share)
    edges = jnp.linspace(*ratio, chosen + 1)
    drawn = edges[:-1] + jax.random.uniform(ratio_key, (chosen,)) * (edges[1:] - edges[:-1])
    counts = jnp.zeros(images, jnp.int32).at[:chosen].set(jnp.floor(patches * drawn).astype(int))
    return counts[jax.random.permutation(order_key, images)]


def draw_blocks(
    key: PRNGKeyArray, grid: tuple[int, int], count: Int[Array, ""]
) -> Bool[Array, "h w"]:
    """Hide rectangular blocks of a grid of patches, up to `count` patches.

    A block is drawn again if it hides no further patch, or too many; after ten such draws in a row
    the mask is left with fewer.
    """

    def unfinished(state):
        _, mask, failures = state
        return (mask.sum() < count) & (failures < ATTEMPTS)

    def add(state):
        key, mask, failures = state
        key, own = jax.random.split(key)
        block = _block(jax.random.uniform(own, (4,)), grid, count - mask.sum())
        more = (block & ~mask).sum()
        fits = (more > 0) & (more <= count - mask.sum())
        return key, jnp.where(fits, mask | block, mask), jnp.where(fits, 0, failures + 1)

    empty = jnp.zeros(grid, bool)
    return jax.lax.while_loop(unfinished, add, (key, empty, jnp.int32(0)))[1]


def _block(
    uniform: Float[Array, "4"], grid: tuple[int, int], remaining: Int[Array, ""]
) -> Bool[Array, "h w"]:
    """Return a block that is drawn from four numbers in [0, 1); none if it is too large."""
    rows, columns = grid
    area = SMALLEST + uniform[0] * (remaining - SMALLEST)
    aspect = jnp.exp((2 * uniform[1] - 1) * math.log(1 / ASPECT))
    height = jnp.round(jnp.sqrt(area * aspect)).astype(int)
    width = jnp.round(jnp.sqrt(area / aspect)).astype(int)
    top = jnp.floor(uniform[2] * (rows - height + 1)).astype(int)
    left = jnp.floor(uniform[3] * (columns - width + 1)).astype(int)
    y, x = jnp.arange(rows)[:, None], jnp.arange(columns)
    inside = (y >= top) & (y < top + height) & (x >= left) & (x < left + width)
    return inside & (height < rows) & (width < columns)
