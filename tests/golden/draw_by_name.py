"""Random weights and images that follow from their names: a golden file need not store them.

A hybrid's ResNet has 64 channels at least: the smallest weighs megabytes.
"""

import zlib

import numpy as np


def draw(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array of a key of Google's .npz or timm's state dict, as float32.

    Output channels of a ResNet's kernels have standard deviations of .005 to .05, so that the
    epsilon of weight standardisation matters.
    """
    random = np.random.RandomState(zlib.crc32(key.encode()))
    x = random.standard_normal(shape)
    if len(shape) == 4 and shape[:3] != (1, 1, 1):
        first = key.endswith(".weight")  # torch has output channels first
        deviation = 10 ** random.uniform(-2.3, -1.3, shape[0] if first else shape[-1])
        return np.float32(x * (deviation[:, None, None, None] if first else deviation))
    around = float(key.endswith("scale") or ("norm" in key and key.endswith("weight")))
    return np.asarray(around + 0.3 * x, np.float32)


def draw_images(case: str, size: tuple[int, int]) -> np.ndarray:
    """Return two images with pixels in [-1, 1], as float32 [2, h, w, 3]."""
    random = np.random.RandomState(zlib.crc32(case.encode()))
    return np.float32(2 * random.random_sample((2, *size, 3)) - 1)
