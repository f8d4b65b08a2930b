"""Writes posemb.npz: position embeddings resampled by the two reference implementations.

Run in an environment of its own (needs numpy, scipy and torch, which the project does not):
    python tests/golden/make_posemb.py
`corners` is scipy.ndimage.zoom(order=1), what google-research/vision_transformer calls; `cubic` is
torch's antialiased bicubic, what timm calls. Both run in float64; inputs and results are float32.
"""

import pathlib

import numpy as np
import scipy.ndimage
import torch

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


def cubic(pe: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    image = torch.from_numpy(pe).double().permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        image, size=grid, mode="bicubic", align_corners=False, antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


def main() -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for old, new, width in CASES:
        pe = random.standard_normal((*old, width)).astype(np.float32)
        name = f"{old[0]}x{old[1]}_{new[0]}x{new[1]}"
        arrays[f"{name}/input"] = pe
        for method in (corners, cubic):
            result = method(pe, new).astype(np.float32)
            assert result.shape == (*new, width), (name, method.__name__, result.shape)
            arrays[f"{name}/{method.__name__}"] = result
    path = pathlib.Path(__file__).with_name("posemb.npz")
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(CASES)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
