"""Writes posemb.npz: position and patch embeddings resampled by the reference implementations.

Run in an environment of its own (needs numpy, scipy, torch and timm, which the project does not):
    python tests/golden/make_posemb.py
`corners` is scipy.ndimage.zoom(order=1), what google-research/vision_transformer calls; `cubic` is
torch's antialiased bicubic, what timm calls; `bicubic` is torch's without antialiasing, what
transformers' Dinov2 calls. They run in float64; inputs and results are float32. Patch embeddings
are resampled by timm's PI-resize, bilinear and without antialiasing, as in FlexiViT's paper.
"""

import pathlib

import numpy as np
import scipy.ndimage
import torch
from timm.layers import resample_patch_embed

CASES = [  # old grid, new grid, width
    ((14, 14), (24, 24), 1),
    ((24, 24), (14, 14), 1),
    ((8, 8), (12, 12), 1),
    ((4, 4), (8, 8), 3),
    ((7, 5), (3, 9), 3),
    ((2, 6), (5, 2), 3),
    ((1, 4), (3, 7), 2),
    ((5, 4), (1, 6), 2),
]


def corners(pe: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    zoom = (grid[0] / pe.shape[0], grid[1] / pe.shape[1], 1)
    return scipy.ndimage.zoom(pe.astype(np.float64), zoom, order=1)


def cubic(pe: np.ndarray, grid: tuple[int, int], antialias: bool = True) -> np.ndarray:
    image = torch.from_numpy(pe).double().permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        image, size=grid, mode="bicubic", align_corners=False, antialias=antialias
    )
    return resized[0].permute(1, 2, 0).numpy()


def bicubic(pe: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    return cubic(pe, grid, antialias=False)


PATCHES = [((4, 4), (6, 6)), ((4, 4), (3, 3)), ((16, 16), (14, 14)), ((3, 5), (6, 4))]


def patches(kernel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(p, q, c, d), as ours; timm has the reverse."""
    stored = torch.from_numpy(kernel).double().permute(3, 2, 0, 1)
    resized = resample_patch_embed(stored, list(size), interpolation="bilinear", antialias=False)
    return resized.permute(2, 3, 1, 0).numpy()


def main() -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for old, new, width in CASES:
        pe = random.standard_normal((*old, width)).astype(np.float32)
        name = f"{old[0]}x{old[1]}_{new[0]}x{new[1]}"
        arrays[f"{name}/input"] = pe
        for method in (corners, cubic, bicubic):
            result = method(pe, new).astype(np.float32)
            assert result.shape == (*new, width), (name, method.__name__, result.shape)
            arrays[f"{name}/{method.__name__}"] = result
    for old, new in PATCHES:
        kernel = random.standard_normal((*old, 3, 2)).astype(np.float32)
        name = f"patches/{old[0]}x{old[1]}_{new[0]}x{new[1]}"
        arrays[f"{name}/input"] = kernel
        arrays[f"{name}/output"] = patches(kernel, new).astype(np.float32)
    path = pathlib.Path(__file__).with_name("posemb.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(CASES)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
