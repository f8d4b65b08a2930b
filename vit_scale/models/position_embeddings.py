"""Position embeddings: the fixed 2D sin-cos table, and resampling to another patch grid.

A table has the shape (h, w, d), without a row for [CLS], so its grid is known. It is resampled
once, when weights are loaded. Guarantees: equal grids return the same values bit for bit; `cubic`,
`corners` and `bicubic` equal timm's, Google's and transformers' results, made by
tests/golden/make_posemb.py, for every grid, square or not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_scale.errors import UserError, nearest


def sincos2d(grid: tuple[int, int], d: int, temperature: float = 10_000.0) -> Float[Array, "h w d"]:
    """Return the fixed 2D table of MoCo v3 and MAE (He et al. 2022): [sin x, cos x, sin y, cos y].

    x is the patch's column and y its row; frequency i of d/4 is `temperature ** (-4 i / d)`.
    big_vision divides i by d/4 - 1 instead, so its table differs in all but the first frequency.

    Args:
      grid: rows and columns of patches (h, w).
      d: token width, a multiple of 4.
      temperature: longest wavelength / 2 pi, in patches.

    Returns:
      float32 (h, w, d).

    Raises:
      UserError: d is not a positive multiple of 4.
    """
    if d < 4 or d % 4:
        raise UserError(f"model.posemb=sincos2d needs model.width divisible by 4, not {d}")
    frequencies = temperature ** (-np.arange(d // 4) / (d // 4))
    rows, columns = np.indices(grid)
    x, y = columns[..., None] * frequencies, rows[..., None] * frequencies
    return jnp.asarray(
        np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], -1), jnp.float32
    )


def _cubic(pe: Float[Array, "h w d"], grid: tuple[int, int]) -> Float[Array, "H W d"]:
    return jax.image.resize(pe, (*grid, pe.shape[-1]), "cubic", antialias=True)


def _corners(pe: Float[Array, "h w d"], grid: tuple[int, int]) -> Float[Array, "H W d"]:
    # Written as one matrix per axis: unlike jax.image.scale_and_translate, which gives the same
    # numbers, it needs no special case for an axis of size 1. HIGHEST: TPUs multiply in bfloat16.
    rows, columns = _linear_weights(pe.shape[0], grid[0]), _linear_weights(pe.shape[1], grid[1])
    return jnp.einsum("hH,wW,hwd->HWd", rows, columns, pe, precision=jax.lax.Precision.HIGHEST)


def _linear_weights(old: int, new: int) -> np.ndarray:
    """Return the (old, new) matrix of the linear interpolation that keeps both end points."""
    positions = np.linspace(0, old - 1, new)
    return np.maximum(0, 1 - np.abs(np.arange(old)[:, None] - positions)).astype(np.float32)


def _bicubic(pe: Float[Array, "h w d"], grid: tuple[int, int]) -> Float[Array, "H W d"]:
    rows, columns = _cubic_weights(pe.shape[0], grid[0]), _cubic_weights(pe.shape[1], grid[1])
    return jnp.einsum("hH,wW,hwd->HWd", rows, columns, pe, precision=jax.lax.Precision.HIGHEST)


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """Return the (old, new) matrix of torch's bicubic interpolation, whose parameter is -0.75.

    Pixels outside are those at the border (Keys 1981, eq. 4, has -0.5 and other borders).
    """
    a, matrix = -0.75, np.zeros((old, new))
    positions = (np.arange(new) + 0.5) * old / new - 0.5
    for tap in range(-1, 3):
        source = np.floor(positions).astype(int) + tap
        x = np.abs(positions - source)
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        np.add.at(
            matrix, (np.clip(source, 0, old - 1), np.arange(new)), np.where(x <= 1, near, far)
        )
    return matrix.astype(np.float32)


METHODS = {"cubic": _cubic, "corners": _corners, "bicubic": _bicubic}


def check_method(method: str) -> None:
    """Raise UserError for an unknown method."""
    if method not in METHODS:
        raise UserError(f"init.resample={method!r} is unknown; {nearest(method, METHODS)}")


def resample(
    pe: Float[Array, "h w d"], grid: tuple[int, int], method: str = "cubic"
) -> Float[Array, "H W d"]:
    """Resample position embeddings to another patch grid, up or down, per channel.

    `cubic` is antialiased bicubic: timm's `resample_abs_pos_embed`, torch's
    `interpolate(mode="bicubic", antialias=True)`. `corners` is bilinear with aligned corners: the
    ViT paper's code (google-research/vision_transformer), `scipy.ndimage.zoom(order=1)`; there, as
    in scipy, an axis of size 1 is repeated, and an axis shrunk to size 1 keeps its first point.
    `bicubic` is torch's without antialiasing, `interpolate(mode="bicubic")`: transformers' Dinov2,
    CLIP and SigLIP.

    Args:
      pe: position embeddings (h, w, d) of any float type, without a [CLS] row.
      grid: rows and columns (H, W) of the new grid.
      method: `cubic`, `corners` or `bicubic`.

    Returns:
      float32 (H, W, d); equal to `pe` bit for bit where the grids are equal.

    Raises:
      UserError: unknown method, or a table that is not (h, w, d).
    """
    check_method(method)
    if pe.ndim != 3:
        raise UserError(f"position embeddings must have shape (h, w, d), not {pe.shape}")
    pe = jnp.asarray(pe, jnp.float32)
    rows, columns = grid
    return pe if pe.shape[:2] == (rows, columns) else METHODS[method](pe, (rows, columns))
