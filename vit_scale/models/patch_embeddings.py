"""Resample a patch embedding to another patch size: FlexiViT's PI-resize (Beyer et al. 2023).

The kernel is chosen so that an enlarged patch has the embedding that it had before it was enlarged:
the least-squares solution, by the pseudo-inverse of a bilinear resize (arXiv 2212.08013, eq. 5).
Where patches become smaller it is the best approximation. Equals timm's `resample_patch_embed` with
bilinear interpolation and without antialiasing, and big_vision's (tests/golden/make_posemb.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def resample_patches(
    kernel: Float[Array, "p q c d"], size: tuple[int, int]
) -> Float[Array, "P Q c d"]:
    """Return the kernel for patches of `size` (height, width) pixels, in float32."""
    kernel = jnp.asarray(kernel, jnp.float32)
    if kernel.shape[:2] == size:
        return kernel
    rows, columns = (
        _inverse_resize(old, new) for old, new in zip(kernel.shape[:2], size, strict=True)
    )
    high = jax.lax.Precision.HIGHEST
    return jnp.einsum("Pp,Qq,pqcd->PQcd", rows, columns, kernel, precision=high)


def _inverse_resize(old: int, new: int) -> np.ndarray:
    """Return the (new, old) pseudo-inverse of the transposed bilinear resize of one axis."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    positions = np.clip(centres, 0, old - 1)[:, None]
    resize = np.maximum(0, 1 - np.abs(positions - np.arange(old)))
    return np.linalg.pinv(resize.T).astype(np.float32)
