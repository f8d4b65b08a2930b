"""Rotary position embeddings of a patch grid (Su et al. 2021, arXiv 2104.09864, in two dimensions).

Channels of a query and a key are rotated in pairs, by angles that grow with the patch's position:
the score of two tokens depends on their distance. Channel i is paired with i + e/2. Libraries that
pair neighbours (EVA-02, RoPE-ViT) have the same channels in another order, which their import
undoes.

- `axial`: patch coordinates times fixed frequencies; half of the angles follow the row, half the
  column (EVA-02, Fang et al. 2023, arXiv 2303.11331; Heo et al. 2024, arXiv 2403.13298).
- `dinov3`: the same, with coordinates from -1 to 1 on each axis, so that angles don't depend on the
  resolution, and with random changes of them in training (Siméoni et al. 2025, arXiv 2508.10104).
- `mixed`: each head of each block learns its frequencies of both axes (Heo et al. 2024).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from vit_scale.errors import UserError

KINDS = ("none", "axial", "dinov3", "mixed")


class Rotation(NamedTuple):
    """Cosines and sines of the angles of each token; those before the patches don't rotate."""

    cos: Float[Array, "*b n #k e/2"]
    sin: Float[Array, "*b n #k e/2"]

    def first(self, count: int | None) -> "Rotation":
        """Return the rotation of the `count` first tokens; None: of all."""
        return Rotation(self.cos[..., :count, :, :], self.sin[..., :count, :, :])

    def keep(self, tokens: Array) -> "Rotation":
        """Return the rotation of the tokens [b, m] of each image."""
        return Rotation(self.cos[tokens], self.sin[tokens])

    def __call__(self, x: Float[Array, "b n k e"]) -> Float[Array, "b n k e"]:
        """Rotate queries or keys, in float32."""
        left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = left * self.cos - right * self.sin, right * self.cos + left * self.sin
        return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


class Settings(NamedTuple):
    """The fields of a `model` block that say how positions rotate."""

    rope: str
    rope_temperature: float
    rope_reference: int
    rope_offset: float
    rope_shift: float
    rope_jitter: float
    rope_rescale: float


def settings(cfg: ConfigDict) -> Settings:
    """Return the settings of a `model` block."""
    return Settings(*(cfg[name] for name in Settings._fields))


def check(cfg: ConfigDict, head_width: int) -> None:
    """Raise UserError for a `model` block whose heads can't be rotated, or with invalid numbers."""
    if cfg.rope != "none" and head_width % 4:
        raise UserError(
            f"model.rope={cfg.rope} needs a head width (model.width / model.heads) divisible by 4, "
            f"not {head_width}"
        )
    if cfg.rope_temperature <= 1:
        raise UserError(f"model.rope_temperature={cfg.rope_temperature} must be above 1")
    for field in ("rope_reference", "rope_shift"):
        if cfg[field] < 0:
            raise UserError(f"model.{field}={cfg[field]} must be at least 0 (0: off)")
    for field in ("rope_jitter", "rope_rescale"):
        if cfg[field] and cfg[field] < 1:
            raise UserError(f"model.{field}={cfg[field]} is a factor: at least 1 (0: off)")


def coordinates(cfg: Settings, grid: tuple[int, int]) -> Float[np.ndarray, "n 2"]:
    """Return each patch's (row, column): counted, or from -1 to 1 with rope=dinov3.

    `model.rope_reference` stretches what is counted, so that this many patches span the image.
    """
    axes = []
    for size in grid:
        if cfg.rope == "dinov3":
            axes.append((2 * np.arange(size) + 1) / size - 1)
        else:
            counted = np.arange(size) + cfg.rope_offset
            axes.append(counted * (cfg.rope_reference or size) / size)
    rows, columns = np.meshgrid(*axes, indexing="ij")
    return np.stack([rows.reshape(-1), columns.reshape(-1)], axis=-1)


def frequencies(cfg: Settings, head_width: int) -> Float[np.ndarray, "e/4"]:
    """Return the fixed frequencies of one axis, in radians per unit of its coordinate."""
    count = head_width // 4
    turns = 2 * np.pi if cfg.rope == "dinov3" else 1.0
    return turns * cfg.rope_temperature ** (-np.arange(count) / count)


def augmented(cfg: Settings, positions: Float[Array, "n 2"], key: Array) -> Float[Array, "n 2"]:
    """Shift all coordinates, and scale them by axis and together: once in a forward pass.

    DINOv3, where this is from, draws anew for each block.
    The shift is uniform up to `rope_shift`; factors are log-uniform, up to `rope_jitter` for each
    axis and `rope_rescale` for both.
    """
    shift, jitter, rescale = jax.random.split(key, 3)
    if limit := cfg.rope_shift:
        positions = positions + jax.random.uniform(shift, (2,), minval=-limit, maxval=limit)
    for limit, part, shape in ((cfg.rope_jitter, jitter, (2,)), (cfg.rope_rescale, rescale, (1,))):
        if limit:
            bound = np.log(limit)
            scale = jnp.exp(jax.random.uniform(part, shape, minval=-bound, maxval=bound))
            positions = positions * scale
    return positions


def rotation(
    cfg: Settings, positions: Float[Array, "n 2"], before: int, head_width: int
) -> Rotation:
    """Return the rotation by fixed frequencies of `before` tokens, which is none, and of patches.

    `positions` are the patches' coordinates, row by row.
    """
    angles = positions[:, :, None] * frequencies(cfg, head_width)  # n, axis, e/4
    return _rotation(angles.reshape(len(positions), 1, -1), before)


def mixed_rotation(
    learned: Float[Array, "2 k e/2"], positions: Float[Array, "n 2"], before: int
) -> Rotation:
    """Return the rotation by a block's learned frequencies: of columns first, then of rows."""
    rows, columns = jnp.asarray(positions, jnp.float32).T[:, :, None, None]
    return _rotation(columns * learned[0] + rows * learned[1], before)


def _rotation(angles, before: int) -> Rotation:
    angles = jnp.pad(jnp.asarray(angles, jnp.float32), ((before, 0), (0, 0), (0, 0)))
    return Rotation(jnp.cos(angles), jnp.sin(angles))


def random_frequencies(
    key: Array, heads: int, head_width: int, temperature: float
) -> Float[Array, "2 k e/2"]:
    """Draw the initial frequencies of rope=mixed: the axial ones, turned by an angle per head."""
    turn = jax.random.uniform(key, (heads, 1), maxval=2 * jnp.pi)
    count = head_width // 4
    size = temperature ** (-jnp.arange(count) / count)
    turns = (turn, turn + jnp.pi / 2)
    columns = jnp.concatenate([size * jnp.cos(angle) for angle in turns], axis=-1)
    rows = jnp.concatenate([size * jnp.sin(angle) for angle in turns], axis=-1)
    return jnp.stack([columns, rows])
