"""Steps that rewrite what a file contains to what a format's key mappings describe."""

import math
import re

import numpy as np

from vit_scale.pretrained.key_mapping import BLOCK_INDEX, Arrays, Step


def split_gated(prefix: str, up: str, gate: str, down: str) -> Step:
    """Return a step that splits a packed SwiGLU into the layers `gate` and `up`.

    Its first layer, stored as `up`, has twice the outputs that `down` reads; the gate comes first.
    """

    def step(arrays: Arrays, depth: int) -> tuple[Arrays, list[str]]:
        arrays = dict(arrays)
        for i in range(depth):
            mlp = prefix.replace(BLOCK_INDEX, str(i))
            packed, read = (arrays.get(f"{mlp}{layer}.weight") for layer in (up, down))
            if packed is None or read is None or packed.ndim != 2 or read.ndim != 2:
                continue
            if f"{mlp}{gate}.weight" in arrays or len(packed) != 2 * read.shape[1]:
                continue
            for key in (f"{mlp}{up}.weight", f"{mlp}{up}.bias"):
                if key in arrays:
                    half, arrays[key] = np.split(arrays[key], 2)
                    arrays[key.replace(up, gate)] = half
        return arrays, []

    return step


def zero_key_bias(query: str, key: str) -> Step:
    """Return a step that adds the biases of keys, where queries have one: DINOv3's are zero."""

    def step(arrays: Arrays, depth: int) -> tuple[Arrays, list[str]]:
        names = [[x.replace(BLOCK_INDEX, str(i)) for x in (query, key)] for i in range(depth)]
        if any(own in arrays for _, own in names) or not all(q in arrays for q, _ in names):
            return arrays, []
        added = {own: np.zeros_like(arrays[q]) for q, own in names}
        return arrays | added, ["the biases of keys are zero"]

    return step


def flatten(pattern: str) -> Step:
    """Return a step that makes vectors (c) of arrays (1 1 1 c) whose keys match `pattern`."""

    def step(arrays: Arrays, depth: int) -> tuple[Arrays, list[str]]:
        vectors = {
            key: x.reshape(-1)
            for key, x in arrays.items()
            if re.match(pattern, key) and x.size == x.shape[-1]
        }
        return arrays | vectors, []

    return step


def unflatten_patches(kernel: np.ndarray) -> np.ndarray:
    """Reshape a patch embedding (p p c) d, of images of any shape, to p p c d."""
    side = math.isqrt(len(kernel) // 3)
    return kernel.reshape(side, -1, 3, kernel.shape[1])
