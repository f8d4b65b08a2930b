"""Statistics of what is learned before the first block: position embeddings and patch filters."""

import numpy as np
from jaxtyping import Float


def similarity(posemb: Float[np.ndarray, "h w d"]) -> Float[np.ndarray, "h w h w"]:
    """Cosine similarity of every two position embeddings (ViT paper, figure 7, centre).

    Entry (i, j) is the map of similarities to patch (i, j).
    """
    flat = np.asarray(posemb, np.float32).reshape(-1, posemb.shape[-1])
    units = flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-12)
    return (units @ units.T).reshape(*posemb.shape[:2], *posemb.shape[:2])


def principal_components(
    filters: Float[np.ndarray, "p p c d"], count: int = 28
) -> tuple[Float[np.ndarray, "count p p c"], Float[np.ndarray, "count"]]:
    """Principal components of d patch filters, and their shares of the variance.

    As in the ViT paper, figure 7, left, which shows 28. Components have norm 1, and a sign (which
    is arbitrary) such that their largest entry is positive. At most min(p p c, d) are returned.
    """
    *patch, d = filters.shape
    samples = np.asarray(filters, np.float32).reshape(-1, d).T
    _, lengths, components = np.linalg.svd(samples - samples.mean(axis=0), full_matrices=False)
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], axis=1)
    shares = lengths**2 / max(float((lengths**2).sum()), 1e-30)
    return (components * np.sign(largest))[:count].reshape(-1, *patch), shares[:count]


def mosaic(maps: Float[np.ndarray, "h w H W"], gap: int = 1) -> Float[np.ndarray, "M N"]:
    """Tile the maps of all patches in the patch grid, separated by `gap` pixels of nan."""
    padded = np.pad(
        np.asarray(maps, np.float32),
        ((0, 0), (0, 0), (0, gap), (0, gap)),
        constant_values=np.nan,
    )
    h, w, height, width = padded.shape
    tiled = padded.transpose(0, 2, 1, 3).reshape(h * height, w * width)
    return tiled[: h * height - gap, : w * width - gap]
